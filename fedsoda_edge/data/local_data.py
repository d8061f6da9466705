"""Describe private data (LocalData), and read its rows as what they mean for a run's template.

The agent holds the description and checks the rows. Nothing here knows the network, and the room that does cannot import
this one. What a row means is decided in `examples.py`; token ids are left to the worker (`samples.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedsoda_edge.data.examples import REASONS, Example, Reason, RowReader, Skipped
from fedsoda_edge.data.formats import Content, DataRow, content_of
from fedsoda_edge.data.reading import read_rows
from fedsoda_edge.errors import DataProblem
from fedsoda_edge.protocol.template import TextTemplate


@dataclass
class SkippedRows:
    """The number of rows that are skipped for each reason, and the line of the first."""

    by_reason: dict[Reason, int] = field(default_factory=dict)
    first_line: dict[Reason, int] = field(default_factory=dict)

    def add(self, reason: Reason, line: int) -> None:
        """Count a row."""
        self.by_reason[reason] = self.by_reason.get(reason, 0) + 1
        self.first_line.setdefault(reason, line)

    @property
    def total(self) -> int:
        """The number of rows that are skipped."""
        return sum(self.by_reason.values())

    @property
    def sentence(self) -> str:
        """The reasons with their counts in words."""
        return "; ".join(
            f"{count}: {REASONS[reason]} (first in line {self.first_line[reason]})"
            for reason, count in self.by_reason.items()
        )


@dataclass(frozen=True)
class LocalData:
    """The place of private rows, and the columns that a template's names stand for; no row is held.

    path: a file of any format that docs/guide.md (g3-join) lists, found by content, or the directory of a saved dataset.
    columns: the column in the file by the template's name for it.
    """

    path: Path
    columns: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_jsonl(cls, path: str | Path, *, columns: Mapping[str, str] | None = None) -> LocalData:
        """Describe a file of JSON Lines, JSON, CSV or TSV, packed or not.

        Args:
            columns: the column in the file by the template's name for it; names that are equal need no entry.
        """
        return cls(Path(path), dict(columns or {}))

    @classmethod
    def from_parquet(cls, path: str | Path, *, columns: Mapping[str, str] | None = None) -> LocalData:
        """Describe a Parquet file; `columns` as in `from_jsonl`."""
        return cls(Path(path), dict(columns or {}))

    @classmethod
    def from_dataset(cls, path: str | Path, *, columns: Mapping[str, str] | None = None) -> LocalData:
        """Describe a directory that `datasets.Dataset.save_to_disk` wrote; `columns` as in `from_jsonl`."""
        return cls(Path(path), dict(columns or {}))

    @property
    def content(self) -> Content:
        """The format of the file, by its content.

        Raises:
            DataProblem: it cannot be read, or is in no format that is known.
        """
        return content_of(self.path)

    @property
    def is_text(self) -> bool:
        """Whether any process can read the file; other formats need libraries that the agent lacks."""
        return self.content.is_text

    def rows(self) -> Iterator[tuple[int, DataRow]]:
        """Yield (line, row) in file order, columns renamed; in binary formats the line is the row's number from 1.

        Raises:
            DataProblem: the file is missing, empty or damaged, or a line is not a JSON object.
        """
        count = 0
        for line, row in read_rows(self.path):
            count += 1
            yield line, row | {name: row[column] for name, column in self.columns.items() if column in row}
        if not count:
            raise DataProblem(f"the data {self.path} has no rows; write at least one")

    def reader(self, prompt: TextTemplate, completion: TextTemplate) -> RowReader:
        """Make the reader of these rows by a run's template."""
        return RowReader(prompt, completion, self.columns, self.is_text)

    def examples(self, prompt: TextTemplate, completion: TextTemplate) -> Iterator[tuple[int, Example]]:
        """Yield (line, what it means) of every row, of those that are skipped too.

        Raises:
            DataProblem: as in `rows`, or a row cannot be used; names its line.
        """
        reader = self.reader(prompt, completion)
        for line, row in self.rows():
            try:
                example = reader.read(row)
            except DataProblem as problem:
                raise self._located(problem, line) from problem
            yield line, example

    @contextlib.contextmanager
    def at(self, line: int) -> Iterator[None]:
        """Add file and line to a problem of a row."""
        try:
            yield
        except DataProblem as problem:
            raise self._located(problem, line) from problem

    def _located(self, problem: DataProblem, line: int) -> DataProblem:
        return DataProblem(f"{self.path}:{line}: {problem.message}", problem.missing, problem.remedy)

    def check(self, prompt: TextTemplate, completion: TextTemplate) -> int:
        """Check every row and count them, also those that are skipped.

        Raises:
            DataProblem: as in `examples`, or every row would be skipped.
        """
        count, skipped = 0, SkippedRows()
        for line, example in self.examples(prompt, completion):
            count += 1
            if isinstance(example, Skipped):
                skipped.add(example.reason, line)
        self.refuse_without(count, skipped)
        return count

    def refuse_without(self, count: int, skipped: SkippedRows) -> None:
        """Refuse data of which every row is skipped.

        Raises:
            DataProblem: says why, by reason.
        """
        if count and skipped.total == count:
            raise DataProblem(
                f"none of the {count} rows of {self.path} can be used: {skipped.sentence}; write rows with a completion"
            )


@contextlib.contextmanager
def remedy_for_columns(remedy: str) -> Iterator[None]:
    """Let an error about a missing column say what the caller can do about it, which differs between SDK and command.

    Args:
        remedy: the sentence, such as "rename one, or name its column: --column {}=COLUMN"; {} becomes the template's
            name for the column.
    """
    try:
        yield
    except DataProblem as problem:
        if problem.missing:
            problem.remedy = remedy.format(problem.missing)
        raise
