"""Look at data before a run does: what is taken and skipped and why, samples as they are trained on, lengths, labels.

Rows are read one after the other, and none is kept but the few that are shown. Nothing of it leaves the device. Showing it
is left to `fedsoda-edge data check`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from fedsoda_edge.data.chat_losses import LOSSES, Loss, lost_in
from fedsoda_edge.data.examples import REASONS, ChatExample, Reason, Skipped, TextExample, alike_key
from fedsoda_edge.data.local_data import LocalData, SkippedRows
from fedsoda_edge.data.samples import Renderer, Sample, SampleTokenizer, join_text, nothing_left
from fedsoda_edge.protocol.template import TextTemplate

if TYPE_CHECKING:
    from fedsoda_edge.data.chat import ChatTemplate, ChatTemplates

SHOWN = 3  # samples
DEFAULT_MAX_LENGTH = 512  # ids, where no run says it
BINS = 10  # bars of the histogram at most
MAX_COLUMNS = 1000  # that are listed
MAX_LABELS = 50  # that are listed; more different completions are no labels
COUNTED_LABELS = 1000  # different completions, beyond which none is counted


@dataclass(frozen=True)
class Piece:
    """An id, and the text that the vocabulary has for it."""

    id: int
    piece: str


@dataclass(frozen=True)
class Shown:
    """A sample as text, and as the ids that are learned.

    joined: what is put between prompt and completion. supervised: the completion's ids, the end token among them; empty
    without a tokenizer.
    """

    line: int
    prompt: str
    completion: str
    joined: str
    supervised: Sequence[Piece] = ()


@dataclass(frozen=True)
class SkippedFor:
    """The rows that are skipped for one reason."""

    reason: Reason
    why: str
    rows: int
    first_line: int


@dataclass(frozen=True)
class LostFor:
    """The conversations that lose something in the model's chat template, in one way."""

    loss: Loss
    why: str
    rows: int
    first_line: int


@dataclass(frozen=True)
class Label:
    """A completion and how many rows have it."""

    label: str
    rows: int


@dataclass(frozen=True)
class Bar:
    """A bar of the histogram: the number of rows with `at_least` to `up_to` ids."""

    at_least: int
    up_to: int
    rows: int


@dataclass(frozen=True)
class Lengths:
    """The lengths of samples before they are cut, in ids."""

    min: int
    median: int
    p90: int
    max: int
    histogram: Sequence[Bar]


@dataclass(frozen=True)
class Inspection:
    """The findings about the data. Fields with None need a tokenizer.

    format: what the file is, by its content. rows: all of them. taken, skipped: how many are trained on, and how many are
    not. skipped_for: why not. columns: the Python types of each column's values, by name. duplicates: rows that repeat the
    text of an earlier one. num_labels: how many different completions there are; None: more than COUNTED_LABELS. labels: the
    completions with their counts, where they are at most MAX_LABELS. alike: those that differ by white space or case alone.
    truncated: rows that are cut. cut_ids: ids that are cut off in all. lost: what the chat template does not write of
    conversations.
    """

    format: str
    rows: int
    taken: int
    skipped: int
    skipped_for: Sequence[SkippedFor]
    columns: Mapping[str, str]
    samples: Sequence[Shown]
    duplicates: int
    num_labels: int | None
    labels: Sequence[Label]
    alike: Sequence[Sequence[Label]]
    lengths: Lengths | None = None
    truncated: int | None = None
    cut_ids: int | None = None
    lost: Sequence[LostFor] = ()


class _Completions:
    """The completions of pairs, counted while there are few different ones."""

    def __init__(self) -> None:
        self._counts: Counter[str] | None = Counter()

    def add(self, completion: str) -> None:
        if self._counts is not None:
            self._counts[completion] += 1
            if len(self._counts) > COUNTED_LABELS:
                self._counts = None

    @property
    def number(self) -> int | None:
        return None if self._counts is None else len(self._counts)

    @property
    def few(self) -> list[Label]:
        counts = self._counts or Counter[str]()
        return _labels(counts) if len(counts) <= MAX_LABELS else []

    @property
    def alike(self) -> list[list[Label]]:
        groups: dict[str, dict[str, int]] = {}
        for label, rows in (self._counts or {}).items():
            groups.setdefault(alike_key(label).casefold(), {})[label] = rows
        return [_labels(group) for group in groups.values() if len(group) > 1]


def _labels(counts: Mapping[str, int]) -> list[Label]:
    return [Label(label, rows) for label, rows in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))]


def inspect(
    data: LocalData,
    prompt: TextTemplate,
    completion: TextTemplate,
    *,
    tokenizer: SampleTokenizer | None = None,
    max_length: int = DEFAULT_MAX_LENGTH,
    chat: ChatTemplates | ChatTemplate | None = None,
) -> Inspection:
    """Read all rows as a run would.

    Args:
        tokenizer: None: lengths are not measured.
        max_length: ids of a sample at most.
        chat: the model's chat template; None: a conversation is shown as its last two messages.

    Raises:
        DataProblem: a row cannot be used, none has anything to learn, or none a completion id within max_length.
    """
    renderer, reader = Renderer(prompt, completion, chat), data.reader(prompt, completion)
    columns: dict[str, dict[str, None]] = {}
    shown: list[Shown] = []
    seen: set[bytes] = set()
    skipped, completions = SkippedRows(), _Completions()
    lengths, needed = Counter[int](), Counter[int]()
    rows = taken = truncated = cut_ids = 0
    for line, row in data.rows():
        rows += 1
        for name, value in row.items():
            if name in columns or len(columns) < MAX_COLUMNS:
                columns.setdefault(name, {})[_kind(value)] = None
        with data.at(line):
            example = reader.read(row)
            if isinstance(example, Skipped):
                skipped.add(example.reason, line)
                continue
            made = None if tokenizer is None else renderer.sample(example, tokenizer)
            if isinstance(made, Skipped):
                skipped.add(made.reason, line)
                continue
            if made is not None:
                lengths[len(made.ids)] += 1
                needed[made.start + 1] += 1
                if made.start >= max_length:
                    skipped.add("cut", line)
                    continue
                truncated += len(made.ids) > max_length
                cut_ids += max(0, len(made.ids) - max_length)
            if len(shown) < SHOWN:
                shown.append(_shown(line, example, renderer, made, tokenizer, max_length))
        taken += 1
        seen.add(_digest(example))
        if isinstance(example, TextExample):
            completions.add(example.completion)
    if not taken:
        if not needed:
            data.refuse_without(rows, skipped)
        raise nothing_left(data.path, list(needed.elements()), max_length)
    return Inspection(
        format=data.content.name,
        rows=rows,
        taken=taken,
        skipped=skipped.total,
        skipped_for=[
            SkippedFor(reason, REASONS[reason], count, skipped.first_line[reason])
            for reason, count in skipped.by_reason.items()
        ],
        # Half a character in a name could not be shown.
        columns={name.encode(errors="backslashreplace").decode(): " or ".join(of) for name, of in columns.items()},
        samples=shown,
        duplicates=taken - len(seen),
        num_labels=completions.number,
        labels=completions.few,
        alike=completions.alike,
        lengths=None if tokenizer is None else _lengths(lengths),
        truncated=None if tokenizer is None else truncated,
        cut_ids=None if tokenizer is None else cut_ids,
        lost=() if renderer.chat is None else _lost(data, renderer),
    )


def _lost(data: LocalData, renderer: Renderer) -> list[LostFor]:
    return [LostFor(loss, LOSSES[loss], lost.rows, lost.first_line) for loss, lost in lost_in(data, renderer).items()]


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _digest(example: TextExample | ChatExample) -> bytes:
    """Make 8 bytes by which rows of the same text are found: among a million others one pair in 10**7 files is alike."""
    return hashlib.blake2b(json.dumps(dataclasses.asdict(example), default=str).encode(), digest_size=8).digest()


def _shown(
    line: int,
    example: TextExample | ChatExample,
    renderer: Renderer,
    made: Sample | None,
    tokenizer: SampleTokenizer | None,
    max_length: int,
) -> Shown:
    pieces: tuple[Piece, ...] = ()
    if made is not None and tokenizer is not None:
        ids = made.ids[made.start : max_length]
        pieces = tuple(Piece(*pair) for pair in zip(ids, tokenizer.pieces(ids), strict=True))
    if isinstance(example, TextExample):
        whole = join_text(example.prompt, example.completion)
        between = whole[len(example.prompt) : len(whole) - len(example.completion)]
        return Shown(line, example.prompt, example.completion, between, pieces)
    if renderer.chat is None:
        *before, last = (_spoken(message) for message in example.messages)
        return Shown(line, "\n".join(before[-1:]), last, "", pieces)
    prompt, whole = renderer.texts(example)
    return Shown(line, prompt, whole.removeprefix(prompt), "", pieces)


def _spoken(message: Mapping[str, object]) -> str:
    """Write what a message says, or the tools that it calls."""
    return str(message.get("content") or json.dumps(message.get("tool_calls"), ensure_ascii=False, default=str))


def _lengths(counts: Counter[int]) -> Lengths:
    sizes = sorted(counts)
    up_to = list(accumulate(counts[size] for size in sizes))

    def at(place: int) -> int:
        return next(size for size, end in zip(sizes, up_to, strict=True) if place < end)

    total, low, high = up_to[-1], sizes[0], sizes[-1]
    width = -(-(high - low + 1) // BINS)
    bars: Counter[int] = Counter()
    for size in sizes:
        bars[(size - low) // width] += counts[size]
    return Lengths(
        min=low,
        median=at(total // 2),
        p90=at((9 * total - 1) // 10),
        max=high,
        histogram=[
            Bar(low + bar * width, min(high, low + (bar + 1) * width - 1), rows) for bar, rows in sorted(bars.items())
        ],
    )
