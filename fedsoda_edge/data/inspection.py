"""Look at data before a run does: schema, samples as they are trained on, lengths, what truncation cuts, duplicates.

Nothing of it leaves the device. Showing it is left to `fedsoda-edge data check`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedsoda_edge.data.formats import DataRow
from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.data.samples import Renderer, SampleTokenizer, nothing_left
from fedsoda_edge.protocol.template import TextTemplate

if TYPE_CHECKING:
    from fedsoda_edge.data.chat import ChatTemplate

SHOWN = 3  # samples
DEFAULT_MAX_LENGTH = 512  # ids, where no run says it
BINS = 10  # bars of the histogram


@dataclass(frozen=True)
class Shown:
    """A sample as text."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Bar:
    """A bar of the histogram: the number of rows with at most `up_to` ids, and more than the bar before."""

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

    columns: the Python type of each column's first value, by name. duplicates: rows that repeat the text of an earlier
    one. skipped: rows without a completion id within max_length. truncated: rows that are cut, among the others.
    """

    rows: int
    columns: Mapping[str, str]
    samples: Sequence[Shown]
    duplicates: int
    lengths: Lengths | None = None
    skipped: int | None = None
    truncated: int | None = None


def inspect(
    data: LocalData,
    prompt: TextTemplate,
    completion: TextTemplate,
    *,
    tokenizer: SampleTokenizer | None = None,
    max_length: int = DEFAULT_MAX_LENGTH,
    chat: ChatTemplate | None = None,
) -> Inspection:
    """Read all rows as a run would.

    Args:
        tokenizer: None: lengths are not measured.
        max_length: ids of a sample at most.
        chat: the model's chat template; None: a conversation is shown as its last two messages.

    Raises:
        DataProblem: a row cannot be used (`LocalData.check`), or no row has a completion id within max_length.
    """
    rows = data.check(prompt, completion)
    renderer = Renderer(prompt, completion, chat)
    columns: dict[str, str] = {}
    shown: list[Shown] = []
    seen: set[str] = set()
    for _, row in data.rows():
        for name, value in row.items():
            columns.setdefault(name, type(value).__name__)
        texts = _texts(renderer, row)
        if len(shown) < SHOWN:
            is_whole = renderer.is_chat(row) and chat is not None
            shown.append(Shown(texts[0], texts[1].removeprefix(texts[0]) if is_whole else texts[1]))
        seen.add(hashlib.sha256(json.dumps(texts).encode()).hexdigest())
    if tokenizer is None:
        return Inspection(rows, columns, shown, rows - len(seen))
    made = list(renderer.samples(data, tokenizer))
    needed = [0 if sample is None else sample.start + 1 for sample in made]
    skipped = sum(not 0 < n <= max_length for n in needed)
    if skipped == rows:
        raise nothing_left(data.path, needed, max_length)
    ordered = sorted(0 if sample is None else len(sample.ids) for sample in made)
    truncated = sum(n > max_length for n in ordered) - sum(n > max_length for n in needed)
    return Inspection(rows, columns, shown, rows - len(seen), _lengths(ordered), skipped, truncated)


def _texts(renderer: Renderer, row: DataRow) -> tuple[str, str]:
    if renderer.is_chat(row) and renderer.chat is None:
        messages: Any = row["messages"]  # `LocalData.check` has seen what they are
        *before, last = (message["content"] for message in messages)
        return "\n".join(before[-1:]), last
    return renderer.texts(row)


def _lengths(ordered: Sequence[int]) -> Lengths:
    width = max(1, -(-ordered[-1] // BINS))
    bars = [
        Bar((at + 1) * width, sum(at * width < max(n, 1) <= (at + 1) * width for n in ordered))
        for at in range(-(-ordered[-1] // width))
    ]
    return Lengths(ordered[0], ordered[len(ordered) // 2], ordered[(9 * len(ordered) - 1) // 10], ordered[-1], bars)
