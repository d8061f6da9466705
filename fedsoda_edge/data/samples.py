"""Turn rows into samples: token ids with the place where the completion begins, as docs/methods.md (m8-sample) says.

Token ids exist in the process that trains, and nowhere else. Columns, and whether they are there, are left to
`local_data.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsoda_edge.data.formats import DataRow
from fedsoda_edge.data.local_data import LocalData, is_chat
from fedsoda_edge.errors import DataProblem
from fedsoda_edge.protocol.template import TextTemplate

if TYPE_CHECKING:
    from fedsoda_edge.data.chat import ChatTemplate


@dataclass(frozen=True)
class Sample:
    """A sample. ids: prompt, completion and eos. start: the index of the first completion id."""

    ids: tuple[int, ...]
    start: int

    @property
    def num_supervised(self) -> int:
        """The number of completion ids, eos among them."""
        return len(self.ids) - self.start


@dataclass(frozen=True)
class SampleSet:
    """The samples of a file, in its order. num_skipped: rows without a completion id left."""

    samples: tuple[Sample, ...]
    num_skipped: int

    @property
    def digest(self) -> str:
        """The sha256 of all ids and starts."""
        return hashlib.sha256(json.dumps([[s.ids, s.start] for s in self.samples]).encode()).hexdigest()


def join_text(prompt: str, completion: str) -> str:
    """Join a prompt and its completion, with a space if neither has white space there and neither is empty."""
    bare = prompt and completion and not prompt[-1].isspace() and not completion[0].isspace()
    return prompt + (" " if bare else "") + completion


class SampleTokenizer:
    """A model's own tokenizer.json, which makes samples of text.

    Args:
        eos_id: the model's end-of-sequence ids, of which a sample ends with the first; None: it has none.
    """

    def __init__(self, tokenizer_json: Path, eos_id: int | Sequence[int] | None) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(tokenizer_json))
        self._tokenizer.no_truncation()  # tokenizer.json may carry the settings of whoever saved it
        self._tokenizer.no_padding()
        # Some configs list every id that may end a generation; a sample ends with the first.
        self._eos = [] if eos_id is None else [eos_id] if isinstance(eos_id, int) else list(eos_id[:1])

    def encode(self, text: str) -> list[int]:
        """Tokenize text, with the special tokens that the model's own tokenizer adds."""
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Write ids as text, without special tokens."""
        return str(self._tokenizer.decode(list(ids)))

    def sample(self, prompt: str, completion: str, max_length: int | None = None) -> Sample | None:
        """Make a sample, cut on the right; None where no completion id is left within max_length.

        Args:
            max_length: ids of a sample at most; None: it is not cut.
        """
        return _sample(self.encode(prompt), self.encode(join_text(prompt, completion)) + self._eos, max_length)

    def chat_sample(self, prompt: str, whole: str, max_length: int | None = None) -> Sample | None:
        """Make a sample of a conversation, as a chat template wrote it; None where no completion id is left.

        Templates write special tokens themselves, so none are added; eos only where the template writes none.

        Args:
            prompt, whole: the conversation without and with its last message.
            max_length: ids of a sample at most; None: it is not cut.
        """
        alone, ids = (list(self._tokenizer.encode(text, add_special_tokens=False).ids) for text in (prompt, whole))
        is_ended = bool(self._eos) and self._eos[0] in ids[len(alone) :]
        return _sample(alone, ids if is_ended else ids + self._eos, max_length)


def _sample(alone: Sequence[int], whole: Sequence[int], max_length: int | None) -> Sample | None:
    """Make a sample whose completion begins at the first id that differs from those of the prompt alone."""
    start = 0
    while start < min(len(alone), len(whole)) and alone[start] == whole[start]:
        start += 1
    ids = whole[:max_length]
    return Sample(tuple(ids), start) if start < len(ids) else None


@dataclass(frozen=True)
class Renderer:
    """The way from a row to text and sample: by the templates, for a conversation by the model's own chat template."""

    prompt: TextTemplate
    completion: TextTemplate
    chat: ChatTemplate | None = None

    def texts(self, row: DataRow) -> tuple[str, str]:
        """Write (prompt, completion) of a row; for a conversation (what the assistant answers to, the whole).

        Raises:
            DataProblem: the row is a conversation, and the model has no chat template, or one that refuses it.
        """
        if not self.is_chat(row):
            return self.prompt.render(row), self.completion.render(row)
        if self.chat is None:
            raise DataProblem(
                "the row is a conversation, and this model has no chat template; write rows with prompt and completion"
            )
        messages: Any = row["messages"]  # `LocalData.check` has seen what they are
        return (
            self.chat.render(messages[:-1], add_generation_prompt=True),
            self.chat.render(messages, add_generation_prompt=False),
        )

    def is_chat(self, row: DataRow) -> bool:
        """Tell whether the row is a conversation."""
        return is_chat(row, (*self.prompt.columns, *self.completion.columns))

    def samples(self, data: LocalData, tokenizer: SampleTokenizer) -> Iterator[Sample | None]:
        """Yield each row's sample, uncut; None where its completion is empty.

        Raises:
            DataProblem: a row cannot be rendered; names its line.
        """
        for line, row in data.rows():
            try:
                texts = self.texts(row)
            except DataProblem as error:
                raise DataProblem(f"{data.path}:{line}: {error}") from error
            yield tokenizer.chat_sample(*texts) if self.is_chat(row) else tokenizer.sample(*texts)


def read_samples(
    data: LocalData,
    prompt: TextTemplate,
    completion: TextTemplate,
    tokenizer: SampleTokenizer,
    max_length: int,
    chat: ChatTemplate | None = None,
) -> SampleSet:
    """Read all rows as samples.

    Args:
        max_length: ids of a sample at most; a longer one is cut on the right.
        chat: the model's chat template, for conversations; None: it has none.

    Raises:
        DataProblem: no row has a completion id left (names the max_length that keeps 90 % of them), or a row cannot be
            rendered.
    """
    samples: list[Sample] = []
    needed: list[int] = []
    for made in Renderer(prompt, completion, chat).samples(data, tokenizer):
        if made is None:
            needed.append(0)
            continue
        needed.append(made.start + 1)
        if made.start < max_length:
            samples.append(Sample(made.ids[:max_length], made.start))
    if not samples:
        raise nothing_left(data.path, needed, max_length)
    return SampleSet(tuple(samples), len(needed) - len(samples))


def nothing_left(path: Path, needed: Sequence[int], max_length: int) -> DataProblem:
    """Make the error that no completion is left, with the max_length that keeps most of them.

    Args:
        needed: for each row, ids up to its first completion id; 0 where its completion is empty.
    """
    enough = sorted(n for n in needed if n)
    advice = (
        f"max_length = {enough[(9 * len(enough) - 1) // 10]} keeps 90 % of them, so shorten prompts or ask the hub's owner"
        if enough
        else "every completion is empty, so write some"
    )
    return DataProblem(f"none of the {len(needed)} rows of {path} has a completion within {max_length} ids; {advice}")
