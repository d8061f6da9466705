"""Read rows of any format that is known, found by content."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedsoda_edge.data.formats import DataRow, content_of, readable
from fedsoda_edge.data.table_rows import table_rows
from fedsoda_edge.data.text_rows import text_rows


def read_rows(path: Path) -> Iterator[tuple[int, DataRow]]:
    """Yield (line, row) in file order; in JSON lists and binary formats the line is the row's number from 1.

    Raises:
        DataProblem: the file is missing or damaged, or a line is not what its format asks for.
        UsageProblem: the library of a binary format is not installed.
    """
    with readable(path):
        content = content_of(path)
        yield from text_rows(path, content) if content.is_text else table_rows(path, content)
