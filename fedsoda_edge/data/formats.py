"""Read rows from JSON Lines, JSON, Parquet and saved Hugging Face datasets; errors name the file, the line, the remedy.

JSON needs no library, so the agent can read it; the other formats are read in the worker. What a row means is left to
`local_data.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fedsoda_edge.errors import DataProblem, UsageProblem

DataRow = dict[str, object]  # foreign JSON: columns and types are the file's


def is_text(path: Path) -> bool:
    """Tell whether the file is JSON, which any process can read; other formats need libraries that the agent lacks."""
    return path.suffix != ".parquet" and not path.is_dir()


def read_rows(path: Path) -> Iterator[tuple[int, DataRow]]:
    """Yield (line, row) in file order; in JSON lists and binary formats the line is the row's number from 1.

    Raises:
        DataProblem: the file is missing or damaged, or a line is not a JSON object.
        UsageProblem: the libraries of a binary format are not installed.
    """
    return _text_rows(path) if is_text(path) else _table_rows(path)


def _text_rows(path: Path) -> Iterator[tuple[int, DataRow]]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from _list_rows(path, file) if path.suffix == ".json" else _line_rows(path, file)
    except OSError as error:
        raise DataProblem(f"the data {path} cannot be read: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise DataProblem(f"the data {path} is not UTF-8 ({error.reason}); save it as UTF-8") from error


def _list_rows(path: Path, file: IO[str]) -> Iterator[tuple[int, DataRow]]:
    try:
        found = json.load(file)
    except json.JSONDecodeError as error:
        raise DataProblem(
            f"{path}:{error.lineno}: not JSON: {error.msg} (column {error.colno}); correct that line"
        ) from error
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise DataProblem(
            f"{path} is not a list of objects; write [{{...}}, ...], or JSON Lines in a file named .jsonl"
        )
    yield from enumerate(found, start=1)


def _line_rows(path: Path, file: IO[str]) -> Iterator[tuple[int, DataRow]]:
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataProblem(
                f"{path}:{line}: not JSON: {error.msg} (column {error.colno}); write one object a line"
            ) from error
        if not isinstance(row, dict):
            raise DataProblem(f"{path}:{line}: this is a {type(row).__name__}, not an object; write one {{...}} a line")
        yield line, row


def _table_rows(path: Path) -> Iterator[tuple[int, DataRow]]:
    try:
        import datasets
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageProblem(
            f"reading {path} needs the datasets library: pip install 'fedsoda[datasets]', or save it as JSON Lines"
        ) from None
    try:
        if path.is_dir():
            table = datasets.load_from_disk(str(path))
            if isinstance(table, dict):
                one = next(iter(table))
                raise DataProblem(f"{path} holds the splits {', '.join(table)}; name one of them, such as {path / one}")
            rows: Iterator[DataRow] = iter(table)
        else:
            # Not through `datasets`, which would leave a copy of private rows in its cache.
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(1024)
            rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield number, dict(row)
    except (OSError, pyarrow.ArrowException, ValueError, KeyError) as error:
        wanted = "a directory of Dataset.save_to_disk" if path.is_dir() else "a Parquet file"
        raise DataProblem(f"the data {path} cannot be read: {str(error).rstrip('.')}; it must be {wanted}") from error
