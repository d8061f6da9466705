"""Turn rows into samples: token ids with the place where the completion begins, as docs/methods.md (m8-sample) says.

Token ids exist in the process that trains, and nowhere else. Columns, and whether they are there, are left to
`local_data.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsoda_edge.data.chat import TooLong
from fedsoda_edge.data.examples import ChatExample, Skipped, TextExample
from fedsoda_edge.data.local_data import LocalData, SkippedRows
from fedsoda_edge.data.tokenizer_files import TokenizerFile, read_json, read_text, special_tokens
from fedsoda_edge.errors import DataProblem, UsageProblem, panics_caught
from fedsoda_edge.protocol.template import TextTemplate
from fedsoda_edge.protocol.tokenizer_json import check_tokenizer_json
from fedsoda_edge.units import one_line

if TYPE_CHECKING:
    from fedsoda_edge.data.chat import ChatTemplate, ChatTemplates, Rendered


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
    """The samples of a file, in its order. skipped: the other rows."""

    samples: tuple[Sample, ...]
    skipped: SkippedRows

    @property
    def num_skipped(self) -> int:
        """The number of rows that are no samples."""
        return self.skipped.total

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
        eos_id: the model's end-of-sequence ids; None: it has none.
        config: the model's tokenizer_config.json.
        vocab_size: the number of ids that the model has an embedding for; None: it is not checked.

    Attributes:
        ends: all ids that end a text.

    Raises:
        UsageProblem: tokenizer.json is none, or fails on a text: it comes from the hub.
        DataProblem: on use, when a text has an id that the model has no embedding for.
    """

    def __init__(
        self,
        tokenizer_json: TokenizerFile,
        eos_id: int | Sequence[int] | None,
        config: Mapping[str, object] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        from tokenizers import Tokenizer

        config = config or {}
        try:
            with panics_caught():
                text = read_text(tokenizer_json)
                check_tokenizer_json(text)
                self._tokenizer = Tokenizer.from_str(text)
        except UsageProblem:
            raise
        except Exception as error:  # it raises nothing more exact
            raise UsageProblem(
                f"the model's tokenizer.json cannot be read ({one_line(str(error), 200)}); ask the hub's owner to correct it"
            ) from error
        self._tokenizer.no_truncation()  # tokenizer.json may carry the settings of whoever saved it
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))
        self._vocab_size = vocab_size
        self._suffix = self._appended()
        eos = [] if eos_id is None else [eos_id] if isinstance(eos_id, int) else list(eos_id)
        name = special_tokens(config).get("eos_token")
        own = None if name is None else self._tokenizer.token_to_id(name)
        if own in eos:  # of several ids that may end a generation, the tokenizer's own ends a text
            eos = [own, *(one for one in eos if one != own)]
        self._end = eos[:1] or self._suffix
        self.ends = frozenset(eos or self._suffix[-1:])

    @classmethod
    def read(
        cls, files: Mapping[str, TokenizerFile], eos_id: int | Sequence[int] | None, vocab_size: int | None = None
    ) -> SampleTokenizer:
        """Read a model's tokenizer files, by name."""
        return cls(files["tokenizer.json"], eos_id, read_json(files.get("tokenizer_config.json")), vocab_size)

    def _appended(self) -> list[int]:
        """List the ids that the tokenizer itself puts behind every text."""
        encoding = self._encoded("a")
        at = len(encoding.ids)
        while at and encoding.special_tokens_mask[at - 1]:
            at -= 1
        return list(encoding.ids[at:])

    def encode(self, text: str) -> list[int]:
        """Tokenize text, with the special tokens that the model's own tokenizer adds."""
        return list(self._checked(self._encoded(text)).ids)

    def begun(self, text: str) -> list[int]:
        """Tokenize the beginning of a text: as `encode`, without what the tokenizer puts behind every text."""
        ids = self.encode(text)
        return ids[: len(ids) - len(self._suffix)]

    def bare(self, text: str) -> list[int]:
        """Tokenize text without the special tokens that the tokenizer adds."""
        return list(self._checked(self._encoded(text, is_bare=True)).ids)

    def plain(self, text: str) -> str:
        """Write text without the special tokens in it."""
        return self.decode(self.bare(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Write ids as text, without special tokens."""
        return self._decoded(ids, are_special_shown=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Write each id as the vocabulary has it, special tokens and marks of spaces visible."""
        return [self._tokenizer.id_to_token(one) or "?" for one in ids]

    def is_special(self, one: int) -> bool:
        """Tell whether an id is a special token, which stands for no text."""
        token = self._tokenizer.get_added_tokens_decoder().get(one)
        return token is not None and bool(token.special)

    @property
    def tokens(self) -> Mapping[str, int]:
        """The whole vocabulary: the id of each token, added ones among them."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def sample(self, prompt: str, completion: str, max_length: int | None = None) -> Sample | None:
        """Make a sample, cut on the right; None where no completion id is left within max_length.

        Args:
            max_length: ids of a sample at most; None: it is not cut.
        """
        whole = self.begun(join_text(prompt, completion))
        start = _common(self.begun(prompt), whole)
        return _sample(start, self._ended(whole, start), max_length)

    def chat_sample(
        self,
        prompt: str,
        whole: str,
        max_length: int | None = None,
        generated: Sequence[tuple[int, int]] = (),
    ) -> Sample | None:
        """Make a sample of a conversation, as a chat template wrote it; None where no completion id is left.

        Templates write special tokens themselves, so none are added; eos only where the template writes none.

        Args:
            prompt, whole: the conversation without and with its last message.
            max_length: ids of a sample at most; None: it is not cut.
            generated: (begin, end) in characters of what the template marks as generated in `whole`; the last part is
                the completion then.
        """
        encoding = self._checked(self._encoded(whole, is_bare=True))
        ids = list(encoding.ids)
        start = _common(self.bare(prompt), ids)
        begin, end = generated[-1] if generated else (0, 0)
        marked = [place for at in range(begin, end) if (place := encoding.char_to_token(at)) is not None]
        if marked:
            start, ids = marked[0], ids[: marked[-1] + 1]
        return _sample(start, self._ended(ids, start), max_length)

    def _ended(self, ids: list[int], start: int) -> list[int]:
        """End ids with exactly one end token: what is written behind the last one is left out where it is only spaces.

        Args:
            start: the index of the first completion id.
        """
        last = next((at for at in range(len(ids) - 1, start - 1, -1) if ids[at] in self.ends), None)
        if last is None or self._decoded(ids[last + 1 :], are_special_shown=True).strip():
            return ids + self._end
        while last > start and ids[last - 1] == ids[last]:
            last -= 1
        return ids[: last + 1]

    def _encoded(self, text: str, *, is_bare: bool = False) -> Any:
        try:
            with panics_caught():
                return self._tokenizer.encode(text, add_special_tokens=not is_bare)
        except Exception as error:  # as above; of the text nothing but its length is said
            raise UsageProblem(
                f"the model's tokenizer.json fails on a text of {len(text)} characters ({one_line(str(error), 200)}); ask the "
                "hub's owner to correct it"
            ) from error

    def _decoded(self, ids: Sequence[int], *, are_special_shown: bool) -> str:
        try:
            with panics_caught():
                return str(self._tokenizer.decode(list(ids), skip_special_tokens=not are_special_shown))
        except Exception as error:
            raise UsageProblem(
                f"the model's tokenizer.json cannot write {len(ids)} ids as text ({one_line(str(error), 200)}); ask the hub's "
                "owner to correct it"
            ) from error

    def _checked(self, encoding: Any) -> Any:
        """Check that the model has an embedding for each id."""
        most = self._vocab_size
        if most is not None and (above := next((one for one in encoding.ids if one >= most), None)) is not None:
            raise DataProblem(
                f"the text has the token {self._tokenizer.id_to_token(above)!r} with the id {above}, but the model has ids "
                f"up to {most - 1}; take it out of the text"
            )
        return encoding


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the ids at the beginning that are equal in both."""
    at = 0
    while at < min(len(one), len(other)) and one[at] == other[at]:
        at += 1
    return at


def _sample(start: int, whole: Sequence[int], max_length: int | None) -> Sample | None:
    """Make a sample of ids, cut on the right; None where no completion id is left.

    Args:
        start: the index of the first completion id.
    """
    ids = whole[:max_length]
    return Sample(tuple(ids), start) if start < len(ids) else None


@dataclass(frozen=True)
class Renderer:
    """The way from a row to text and sample: by the templates, for a conversation by the model's own chat template."""

    prompt: TextTemplate
    completion: TextTemplate
    chat: ChatTemplates | ChatTemplate | None = None

    def texts(self, example: TextExample | ChatExample) -> tuple[str, str]:
        """Write (prompt, completion) of a pair; of a conversation (what the assistant answers to, the whole).

        Raises:
            DataProblem: it is a conversation, and the model has no chat template, or one that refuses it.
        """
        if isinstance(example, TextExample):
            return example.prompt, example.completion
        prompt, whole = self.conversation(example)
        return prompt, whole.text

    def conversation(self, example: ChatExample) -> tuple[str, Rendered]:
        """Write a conversation with the model's chat template: what the assistant answers to, and the whole.

        Raises:
            DataProblem: the model has no chat template, or one that refuses it.
        """
        if self.chat is None:
            raise DataProblem(
                "the row is a conversation, and this model has no chat template; write rows with prompt and completion"
            )
        messages, tools, documents = example.messages, example.tools, example.documents
        whole = self.chat.rendered(messages, add_generation_prompt=False, tools=tools, documents=documents)
        before = messages[:-1]
        return self.chat.rendered(before, add_generation_prompt=True, tools=tools, documents=documents).text, whole

    def sample(self, example: TextExample | ChatExample, tokenizer: SampleTokenizer) -> Sample | Skipped:
        """Make the sample of a row, uncut.

        Raises:
            DataProblem: it cannot be rendered, or the model has no embedding for an id.
        """
        if isinstance(example, TextExample):
            made = tokenizer.sample(example.prompt, example.completion)
        else:
            try:
                prompt, whole = self.conversation(example)
            except TooLong:
                return Skipped("long")
            made = tokenizer.chat_sample(prompt, whole.text, generated=whole.generated)
        # A template may write nothing of an answer, such as a call of a tool that it does not know.
        has_words = made is not None and any(one not in tokenizer.ends for one in made.ids[made.start :])
        return made if made is not None and has_words else Skipped("empty")

    def samples(self, data: LocalData, tokenizer: SampleTokenizer) -> Iterator[tuple[int, Sample | Skipped]]:
        """Yield the line and the sample of each row, uncut.

        Raises:
            DataProblem: a row cannot be used or rendered; names its line.
        """
        for line, example in data.examples(self.prompt, self.completion):
            if isinstance(example, Skipped):
                yield line, example
                continue
            with data.at(line):
                made = self.sample(example, tokenizer)
            yield line, made


def read_samples(
    data: LocalData,
    prompt: TextTemplate,
    completion: TextTemplate,
    tokenizer: SampleTokenizer,
    max_length: int,
    chat: ChatTemplates | ChatTemplate | None = None,
) -> SampleSet:
    """Read all rows as samples.

    Args:
        max_length: ids of a sample at most; a longer one is cut on the right.
        chat: the model's chat template, for conversations; None: it has none.

    Raises:
        DataProblem: no row has a completion id left (names the max_length that keeps 90 % of them), or a row cannot be
            used or rendered.
    """
    samples: list[Sample] = []
    needed: list[int] = []
    skipped = SkippedRows()
    for line, made in Renderer(prompt, completion, chat).samples(data, tokenizer):
        if isinstance(made, Skipped):
            skipped.add(made.reason, line)
            continue
        needed.append(made.start + 1)
        if made.start < max_length:
            samples.append(Sample(made.ids[:max_length], made.start))
        else:
            skipped.add("cut", line)
    if not samples:
        if not needed:
            data.refuse_without(skipped.total, skipped)
        raise nothing_left(data.path, needed, max_length)
    return SampleSet(tuple(samples), skipped)


def nothing_left(path: Path, needed: Sequence[int], max_length: int) -> DataProblem:
    """Make the error that no completion is left, with the max_length that keeps most of them.

    Args:
        needed: for each row with a completion, ids up to its first completion id.
    """
    enough = sorted(needed)
    return DataProblem(
        f"none of the {len(needed)} rows of {path} has a completion within {max_length} ids; max_length = "
        f"{enough[(9 * len(enough) - 1) // 10]} keeps 90 % of them, so shorten prompts or ask the hub's owner"
    )
