"""Render conversations with a model's own chat template, which comes from the hub: sandboxed, bounded, no files.

What a template may do is `sandbox.py`'s. It runs in the worker, with at most MAX_CHARACTERS of output and RENDER_SECONDS of
time for each conversation, and its date stands still, so that a run can be repeated. Turning the text into samples is left
to `samples.py`.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedsoda_edge.data.sandbox import MAX_CHARACTERS, Sandbox
from fedsoda_edge.data.tokenizer_files import TokenizerFile, read_json, read_text, special_tokens
from fedsoda_edge.errors import DataProblem, UsageProblem

RENDER_SECONDS = 2.0
ChatMessage = Mapping[str, object]  # foreign JSON: role, content, and what else a template reads
_REASONING = ("reasoning_content", "thinking", "reasoning")  # the names of a message's reasoning, the usual one first


class _TooSlow(BaseException):
    """The end of a rendering that takes too long, raised in its thread by the timer. Jinja catches each Exception."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. generated: (begin, end) in characters of each part that the template marks as generated."""

    text: str
    generated: Sequence[tuple[int, int]]


class ChatTemplate:
    """A compiled chat template and the special tokens that it may name.

    Args:
        source: the template.
        tokens: the text of each special token by its name ("eos_token", ...).
        render_seconds: the time that one conversation may take.

    Raises:
        UsageProblem: on construction, when the source is not a template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], render_seconds: float = RENDER_SECONDS) -> None:
        self._sandbox = Sandbox()
        try:
            with _at_most(render_seconds):
                self._template = self._sandbox.from_string(source)
        except (_TooSlow, Exception) as error:  # compiling runs constant expressions, which may raise anything
            why = f"it took more than {render_seconds:g} s" if isinstance(error, _TooSlow) else _short(error)
            raise UsageProblem(
                f"the model's chat template cannot be read ({why}); ask the hub's owner to correct it"
            ) from error
        self._tokens = dict(tokens)
        self._render_seconds = render_seconds

    @staticmethod
    def read(files: Mapping[str, TokenizerFile]) -> ChatTemplates | None:
        """Read the chat templates from a model's tokenizer files, by name; None where the model has none.

        Nothing is compiled before a conversation is rendered: a run without conversations needs no template.
        """
        config = read_json(files.get("tokenizer_config.json"))
        source: Any = config.get("chat_template")
        if "chat_template.jinja" in files:
            source = read_text(files["chat_template.jinja"])
        if isinstance(source, list):
            sources = {
                str(entry.get("name")): entry["template"]
                for entry in source
                if isinstance(entry, dict) and isinstance(entry.get("template"), str)
            }
        elif isinstance(source, str):
            sources = {"default": source}
        else:
            return None
        return ChatTemplates(sources, special_tokens(config))

    def rendered(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
    ) -> Rendered:
        """Write a conversation as the text that the model was trained to read.

        Args:
            add_generation_prompt: whether to add what comes before the assistant's answer.
            tools: JSON schemas of what the assistant may call.
            documents: what it may read.

        Raises:
            DataProblem: the template refuses these messages, writes too much or takes too long.
        """
        pieces: list[str] = []
        generated: list[tuple[int, int]] = []
        size = 0

        def mark(text: str) -> None:
            generated.append((size, size + len(text)))

        self._sandbox.mark = mark
        try:
            with _at_most(self._render_seconds):
                for piece in self._template.generate(
                    **self._tokens,
                    messages=[_message(message) for message in messages],
                    tools=tools,
                    documents=documents,
                    add_generation_prompt=add_generation_prompt,
                ):
                    pieces.append(piece)
                    size += len(piece)
                    if size > MAX_CHARACTERS:
                        raise TooLong(
                            f"the chat template wrote more than {MAX_CHARACTERS} characters; shorten the messages"
                        )
        except _TooSlow:
            raise DataProblem(
                f"the chat template took more than {self._render_seconds:g} s for one row; shorten the row, or ask the "
                "hub's owner"
            ) from None
        except DataProblem:
            raise
        except Exception as error:  # a template is a program: it may raise anything
            raise DataProblem(
                f"the chat template refuses these messages ({_short(error)}); write them as the model expects them"
            ) from error
        return Rendered("".join(pieces), generated)


class TooLong(DataProblem):
    """A conversation of more than MAX_CHARACTERS."""


@dataclass(frozen=True)
class ChatTemplates:
    """The chat templates of a model by name, compiled at their first use, and the special tokens that they may name.

    As in Transformers, `default` is used, or `tool_use` for a conversation with tools where there is one.
    """

    sources: Mapping[str, str]
    tokens: Mapping[str, str]

    @cached_property
    def _compiled(self) -> dict[str, ChatTemplate]:
        return {}

    def chosen(self, *, has_tools: bool) -> ChatTemplate:
        """Compile the template of conversations with or without tools.

        Raises:
            UsageProblem: none has that name, or it is not a template.
        """
        name = "tool_use" if has_tools and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise UsageProblem(
                f"the model has the chat templates {', '.join(sorted(self.sources))}, but none named default; ask the "
                "hub's owner to name one of them default"
            )
        if name not in self._compiled:
            self._compiled[name] = ChatTemplate(self.sources[name], self.tokens)
        return self._compiled[name]

    def rendered(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
    ) -> Rendered:
        """Write a conversation as `ChatTemplate.rendered` does."""
        return self.chosen(has_tools=tools is not None).rendered(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, documents=documents
        )


def _message(message: ChatMessage) -> dict[str, Any]:
    """Copy a message as Transformers gives it to a template: without what is None, reasoning under its usual names."""
    there = {name: value for name, value in message.items() if value is not None}
    reasoning = next((there[name] for name in _REASONING if name in there), None)
    return there if reasoning is None else {"thinking": reasoning, **there, "reasoning_content": reasoning}


def _short(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise _TooSlow in this thread after `seconds`; without signals, so that it works in any thread and system."""
    thread, lock, is_over = threading.get_ident(), threading.Lock(), False

    def interrupt() -> None:
        with lock:
            if not is_over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TooSlow))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            is_over = True
        timer.cancel()
