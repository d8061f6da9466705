"""Describe private data (LocalData), and check that its rows have what a run's template asks for.

The agent holds the description and checks the rows. Nothing here knows the network, and the room that does cannot import
this one. Token ids are left to the worker (`samples.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsoda_edge.data.formats import DataRow, is_text, read_rows
from fedsoda_edge.errors import DataProblem
from fedsoda_edge.protocol.template import TextTemplate


@dataclass(frozen=True)
class LocalData:
    """The place of private rows, and the columns that a template's names stand for; no row is held.

    path: JSON Lines, JSON, Parquet (`.parquet`) or the directory of a saved Hugging Face dataset.
    columns: the column in the file by the template's name for it.
    """

    path: Path
    columns: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_jsonl(cls, path: str | Path, *, columns: Mapping[str, str] | None = None) -> LocalData:
        """Describe a file of JSON Lines, one object a line, or a JSON file that holds a list of objects.

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
    def is_text(self) -> bool:
        """Whether the file is JSON, which any process can read; other formats need libraries that the agent lacks."""
        return is_text(self.path)

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

    def check(self, prompt: TextTemplate, completion: TextTemplate) -> int:
        """Check every row and count them.

        Raises:
            DataProblem: a column is missing (lists those there are), a completion is not a string, or a conversation is
                not a list of messages that ends with the assistant's.
        """
        count = 0
        wanted = (*prompt.columns, *completion.columns)
        for line, row in self.rows():
            count += 1
            if is_chat(row, wanted):
                _check_messages(f"{self.path}:{line}", row["messages"])
                continue
            for name in wanted:
                if name not in row:
                    there = ", ".join(sorted(row.keys() - self.columns.keys()))
                    column = self.columns.get(name, name)
                    raise DataProblem(f"{self.path}:{line}: no column {column!r}; there are {there}", name)
            for name in completion.columns:
                if not isinstance(row[name], str):
                    raise DataProblem(
                        f"{self.path}:{line}: {name!r} is {row[name]!r}, not a string; completions are text, so write it "
                        "in quotes"
                    )
        return count


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


def is_chat(row: DataRow, wanted: Sequence[str]) -> bool:
    """Tell whether a row is a conversation: it has `messages`, and neither of the default template's two columns.

    Args:
        wanted: the columns that the run's template asks for.
    """
    return "messages" in row and set(wanted) == {"prompt", "completion"} and not set(wanted) & set(row)


def _check_messages(where: str, messages: Any) -> None:
    are_messages = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not are_messages or not messages:
        raise DataProblem(f'{where}: messages must be a list of {{"role": "...", "content": "..."}}')
    if messages[-1]["role"] != "assistant":
        raise DataProblem(
            f"{where}: the last message has the role {messages[-1]['role']!r}; it must be the assistant's, which is "
            "trained on"
        )
