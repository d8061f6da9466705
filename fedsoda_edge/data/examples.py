"""Decide what a row means: a prompt with its completion, a conversation, or nothing to learn from.

This is the one place that does: edges, evaluation, public rows and comparisons read through it. Rows without anything to
learn (null, an empty answer, more text than a model reads) are counted; values of a wrong type are refused.
"""

from __future__ import annotations

import contextlib
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Literal

from fedsoda_edge.data.formats import DataRow
from fedsoda_edge.errors import DataProblem
from fedsoda_edge.protocol.template import TextTemplate

Turn = Mapping[str, object]  # role, content and what else a chat template may read
Reason = Literal["null", "empty", "long", "cut"]
REASONS: dict[Reason, str] = {
    "null": "a value is null",
    "empty": "nothing to learn: the completion is empty or blank",
    "long": "more text than is read of a row",
    "cut": "no completion id is left within max_length",
}
SHOWN = 80  # characters of a value that an error shows: rows are private
MAX_TEXT = 1 << 20  # characters of a prompt with its completion
MAX_CONVERSATION = 64 << 10  # characters of a conversation
# Names of ShareGPT's roles, without `function_call`: templates would write its text as an answer, which it is not.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"} | {
    role: role for role in ("user", "assistant", "system", "tool")
}
_NAMED = {"list": "a list", "dict": "an object", "bytes": "bytes", "bool": "a boolean"}


@dataclass(frozen=True)
class TextExample:
    """A prompt and the completion that is trained on behind it, as text."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class ChatExample:
    """Messages, of which the last is the assistant's and trained on.

    tools: what it could call, as JSON Schemas. documents: what it could read.
    """

    messages: Sequence[Turn]
    tools: Sequence[Mapping[str, object]] | None = None
    documents: Sequence[Mapping[str, object]] | None = None


@dataclass(frozen=True)
class Skipped:
    """A row that is counted and not trained on."""

    reason: Reason


Example = TextExample | ChatExample | Skipped


@dataclass(frozen=True)
class RowReader:
    """The way from a row to what it means.

    columns: the column in the file by the template's name for it. is_text: whether the file is one that people write.
    """

    prompt: TextTemplate
    completion: TextTemplate
    columns: Mapping[str, str]
    is_text: bool = True

    @cached_property
    def reads_conversations(self) -> bool:
        """Whether the run asks for the default template's two columns, so that rows may be conversations."""
        return {*self.prompt.columns, *self.completion.columns} == {"prompt", "completion"}

    def is_conversation(self, row: DataRow) -> bool:
        """Tell whether a row is a conversation: it has messages, and not both a prompt and a completion as text."""
        return self.reads_conversations and _messages_of(row) is not None

    def read(self, row: DataRow) -> Example:
        """Read a row with a prompt and a completion, or a conversation.

        Raises:
            DataProblem: a column is missing (lists those there are), a value has a type that is not text, or a conversation
                is not a list of messages that ends with the assistant's.
        """
        row = self.renamed(row)
        if self.is_conversation(row):
            return _conversation_of(row)
        prompt, completion = self._values(row, self.prompt), self._values(row, self.completion)
        for name, value in completion.items():
            if value is not None and not isinstance(value, str):
                raise DataProblem(f"{self._named(name)} is {shown(value)}, not a string; {self._as_text()}")
        if None in (*prompt.values(), *completion.values()):
            return Skipped("null")
        pair = TextExample(self._text(self.prompt, prompt), self._text(self.completion, completion))
        if len(pair.prompt) + len(pair.completion) > MAX_TEXT:
            return Skipped("long")
        is_blank = not "".join(map(str, completion.values())).strip() if completion else not pair.completion.strip()
        return Skipped("empty") if is_blank else pair

    def read_prompt(self, row: DataRow) -> str | Skipped:
        """Read the prompt of a row that needs no completion.

        Raises:
            DataProblem: as in `read`.
        """
        values = self._values(self.renamed(row), self.prompt)
        if None in values.values():
            return Skipped("null")
        text = self._text(self.prompt, values)
        return Skipped("long") if len(text) > MAX_TEXT else text

    def renamed(self, row: DataRow) -> DataRow:
        """Add the columns under the template's names for them."""
        return row | {name: row[column] for name, column in self.columns.items() if column in row}

    def _named(self, name: str) -> str:
        return repr(self.columns.get(name, name)[:SHOWN])

    def _as_text(self) -> str:
        if self.is_text:
            return "completions are text, so write it in quotes"
        return "completions are text, so cast the column to strings"

    def _values(self, row: DataRow, template: TextTemplate) -> dict[str, object]:
        """Look up the template's columns.

        Raises:
            DataProblem: one is missing.
        """
        for name in template.columns:
            if name not in row:
                there = sorted(str(column)[:SHOWN] for column in row.keys() - self.columns.keys())
                listed = ", ".join(there[:20]) + (", ..." if there[20:] else "")
                self._refuse_whole_tables(row, name)
                raise DataProblem(f"no column {self._named(name)}; there are {listed or 'none'}", name)
        return {name: row[name] for name in template.columns}

    def _refuse_whole_tables(self, row: DataRow, name: str) -> None:
        """Refuse an object that holds all rows instead of being one, as {"data": [{...}, ...]} does."""
        column = self.columns.get(name, name)
        for key, value in row.items():
            if isinstance(value, list) and value and all(isinstance(one, dict) and column in one for one in value):
                raise DataProblem(
                    f"this is one object, and the rows are the {len(value)} objects in its {str(key)[:SHOWN]!r}; save that "
                    "list alone"
                )

    def _text(self, template: TextTemplate, values: Mapping[str, object]) -> str:
        return template.render({name: self._written(name, value) for name, value in values.items()})

    def _written(self, name: str, value: object) -> str:
        """Write a value of a prompt: text as it is, a finite number in digits.

        Raises:
            DataProblem: it is something else.
        """
        match value:
            case str():
                if not value.isascii():
                    _refuse_halves(self._named(name), value)
                return value
            case bool():
                pass
            case int():
                return _digits(value)
            case float() if math.isfinite(value):
                return repr(value)
            case Decimal() if value.is_finite():
                return f"{value:f}"
        kind = type(value).__name__
        named = (
            "not a finite number" if isinstance(value, float | Decimal) else f"{_NAMED.get(kind, kind)} and not text"
        )
        remedy = "write text or a number" if self.is_text else "cast the column to strings"
        raise DataProblem(f"{self._named(name)} is {shown(value)}, {named}; {remedy}")


def _digits(value: int) -> str:
    try:
        return str(value)
    except ValueError:  # thousands of digits, which Python does not write
        raise DataProblem("a number has more than 4,300 digits; write it as text") from None


def shown(value: object) -> str:
    """Write a value for an error: short, null as null, bytes and dates by their kind."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, str | bytes | int):
        text = (
            repr(value[:SHOWN])
            if isinstance(value, str | bytes)
            else str(value)
            if abs(value) < 10**SHOWN
            else "a number"
        )
    else:
        text = reprlib.repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def alike_key(completion: str) -> str:
    """Write a completion with one space for each run of white space, and none at its ends."""
    return " ".join(completion.split())


def _refuse_halves(what: str, text: str) -> None:
    """Refuse half a character (a lone surrogate), which JSON can escape and UTF-8 and tokenizers cannot hold."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataProblem(
            f"{what} has half a character, \\u{ord(text[error.start]):04x}, at character {error.start + 1}: UTF-8 cannot hold "
            "it; cut the text between characters, or delete it"
        ) from None


# -- conversations ------------------------------------------------------------------------------------------


_PAIR = "prompt and completion"  # as two lists of messages


def _messages_of(row: DataRow) -> tuple[str, object] | None:
    """Find a row's messages and the column that they are in, as TRL does: prompt and completion go before messages."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _PAIR, [*prompt, *completion]
    if prompt is not None and completion is not None:
        return None
    for name in ("messages", "conversations", "conversation"):
        if row.get(name) is not None:
            return name, row[name]
    # Null alone is nothing to learn; beside a pair that is missing it says which of the two the row would be.
    if not {"prompt", "completion"} <= row.keys():
        return next(((name, None) for name in ("messages", "conversations") if name in row), None)
    return None


def _conversation_of(row: DataRow) -> ChatExample | Skipped:
    found = _messages_of(row)
    assert found is not None, "only a conversation is read as one"
    column, messages = found
    if messages is None:
        return Skipped("null")
    if column == _PAIR and isinstance(messages, list) and messages and all(isinstance(one, str) for one in messages):
        raise DataProblem(
            f"prompt and completion are lists of {len(messages)} texts in all; write an object for each pair, one a line"
        )
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise DataProblem(f'{column} must be a list of {{"role": "...", "content": "..."}}, but is {shown(messages)}')
    read = [_message(f"{column}[{at}]", one) for at, one in enumerate(messages)]
    last = read[-1]
    if last["role"] != "assistant":
        raise DataProblem(
            f"the last message has the role {shown(last['role'])}; it must be the assistant's, which is trained on"
        )
    if any(one.get("content") is None and not one.get("tool_calls") for one in read):
        return Skipped("null")
    if not said_in(last).strip() and not last.get("tool_calls"):
        return Skipped("empty")
    tools, documents = _listed(row, "tools"), _listed(row, "documents")
    if sum(len(said_in(one)) for one in read) > MAX_CONVERSATION:
        return Skipped("long")
    return ChatExample(tuple(read), tools, documents)


def said_in(message: Turn) -> str:
    """Return the text of a message; a call of a tool may have none."""
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _message(where: str, message: Mapping[str, object]) -> Turn:
    """Read one message, of ShareGPT too; keys without a value are left out, but for an answer that is a call."""
    message = {name: value for name, value in message.items() if value is not None or name == "content"}
    if "role" not in message and "from" in message:
        sender = message.pop("from")
        if sender not in _ROLES:
            raise DataProblem(f"{where} is from {shown(sender)}; known are {', '.join(sorted(_ROLES))}")
        message = {"role": _ROLES[sender], "content": message.pop("value", None), **message}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise DataProblem(f'{where} has no role; messages must be a list of {{"role": "...", "content": "..."}}')
    if isinstance(content, list):
        message["content"] = content = _joined(where, content)
    if content is not None and not isinstance(content, str):
        raise DataProblem(
            f'{where} has the content {shown(content)}; messages must be a list of {{"role": "...", "content": "..."}}'
        )
    _refuse_halves_in(where, message)
    return message


def _joined(where: str, parts: Sequence[object]) -> str:
    """Join a content of several parts, all of which are text."""
    for part in parts:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise DataProblem(f"{where} has a part {shown(kind)} in its content; only text is trained on")
    return "".join(part["text"] for part in parts if isinstance(part, dict))


def _refuse_halves_in(where: str, value: object) -> None:
    match value:
        case str():
            _refuse_halves(where, value)
        case dict():
            for name, part in value.items():
                _refuse_halves_in(where, str(name))
                _refuse_halves_in(where, part)
        case list():
            for part in value:
                _refuse_halves_in(where, part)


def _listed(row: DataRow, name: str) -> Sequence[Mapping[str, object]] | None:
    """Read a conversation's tools or documents: a list, or JSON of one, as Arrow cannot hold schemas that differ."""
    found = row.get(name)
    if isinstance(found, str) and found.strip():
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(found)
    if found in (None, "", []):
        return None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise DataProblem(f"{name} is {shown(found)}, not a list of objects; write one, as it is or as JSON")
    _refuse_halves_in(name, found)
    return found
