"""Tell what a chat template does not write of a conversation, or writes otherwise. Nothing is refused for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from fedsoda_edge.data.chat import TooLong
from fedsoda_edge.data.examples import ChatExample, said_in
from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.data.samples import Renderer

Loss = Literal["answer", "message", "tools", "calls", "no generation prompt", "asked otherwise"]
LOSSES: dict[Loss, str] = {
    "answer": "the chat template writes the answer otherwise than it is, such as without the spaces around it",
    "message": "the chat template leaves out an earlier message, or writes it otherwise than it is",
    "tools": "the chat template does not write the tools that could be called",
    "calls": "the chat template does not write a call of a tool",
    "no generation prompt": "the chat template knows no generation prompt, so the model learns to write what stands before "
    "an answer too",
    "asked otherwise": "what the chat template writes to ask for an answer does not begin what is trained on",
}


MAX_ROWS = 1000  # that are looked at


@dataclass
class LostRows:
    """The number of conversations that lose something in one way, and the line of the first."""

    rows: int
    first_line: int


def lost_in(data: LocalData, renderer: Renderer) -> dict[Loss, LostRows]:
    """Find what the first MAX_ROWS rows lose in the model's chat template.

    Raises:
        DataProblem: a row cannot be used, or the template refuses it; names its line.
    """
    found: dict[Loss, LostRows] = {}
    for line, example in islice(data.examples(renderer.prompt, renderer.completion), MAX_ROWS):
        if not isinstance(example, ChatExample):
            continue
        with data.at(line):
            try:
                lost = losses(renderer, example)
            except TooLong:
                continue
        for one in lost:
            found.setdefault(one, LostRows(0, line)).rows += 1
    return found


def losses(renderer: Renderer, told: ChatExample) -> tuple[Loss, ...]:
    """List what a conversation loses in the model's chat template.

    Raises:
        DataProblem: the template refuses it.
    """
    return tuple(_losses(renderer, told))


def _losses(renderer: Renderer, told: ChatExample) -> Iterator[Loss]:
    before, whole = renderer.conversation(told)
    *earlier, last = told.messages
    if said_in(last) not in whole.text:
        yield "answer"
    if any(said_in(message) not in whole.text for message in earlier):
        yield "message"
    if any(name not in whole.text for name in _names(told.tools or ())):
        yield "tools"
    if any(name not in whole.text for message in told.messages for name in _names(message.get("tool_calls") or ())):
        yield "calls"
    assert renderer.chat is not None, "it has written the conversation"
    if (
        earlier
        and before
        == renderer.chat.rendered(earlier, add_generation_prompt=False, tools=told.tools, documents=told.documents).text
    ):
        yield "no generation prompt"
    if not whole.text.startswith(before):
        yield "asked otherwise"


def _names(tools: Any) -> Iterator[str]:
    """Yield the names of tools or of calls, which stand in them or in their `function`."""
    for tool in tools:
        found = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if isinstance(found, Mapping) and isinstance(found.get("name"), str):
            yield found["name"]
