"""Read rows from Parquet, Arrow, saved Hugging Face datasets and Excel, some hundred at a time.

Nothing is copied to a cache and nothing is mapped: a file of 10 GB takes no more memory than a small one, Excel excepted.
The libraries are the worker's; the agent imports none of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsoda_edge.data.formats import EXTRA, Content, DataRow
from fedsoda_edge.errors import DataProblem, UsageProblem

if TYPE_CHECKING:
    import pyarrow

BATCH = 256  # rows that are Python values at a time


def table_rows(path: Path, content: Content) -> Iterator[tuple[int, DataRow]]:
    """Yield (number, row) from 1; in Excel the number is that of the sheet's row.

    Raises:
        DataProblem: the file is damaged, or two columns have one name.
        UsageProblem: the library of its format is not installed.
    """
    if content.kind == "excel":
        yield from _sheet_rows(path)
        return
    try:
        import pyarrow
    except ImportError:
        raise UsageProblem(f"reading {path} needs the pyarrow library: {EXTRA}, or save it as JSON Lines") from None
    found = (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
    number = 0
    try:
        for batch in _batches(path, content):
            nested = _checked_columns(path, batch.schema)
            if content.kind != "parquet":  # which is decoded, while Arrow is taken as it lies on the disk
                batch.validate(full=True)
            for at in range(0, batch.num_rows, BATCH):
                for row in batch.slice(at, BATCH).to_pylist():
                    number += 1
                    for name in nested:
                        row[name] = _without_absent(row[name])
                    yield number, row
    except found as error:
        what = "a directory of Dataset.save_to_disk" if content.kind == "dataset" else f"{content.name}, whole"
        said = str(error).rstrip(".").partition("\n")[0][:200]
        raise DataProblem(f"the data {path} cannot be read: {said} (row {number + 1}); it must be {what}") from error


def _batches(path: Path, content: Content) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    if content.kind == "parquet":
        # Without pre-buffering, which reads whole row groups: writers put a million rows into one.
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            yield from file.iter_batches(BATCH, use_threads=False)
    elif content.kind == "arrow file":
        with pyarrow.OSFile(str(path)) as source, pyarrow.ipc.open_file(source) as file:
            yield from (file.get_batch(at) for at in range(file.num_record_batches))
    else:
        files = [path] if content.kind == "arrow stream" else _dataset_files(path)
        for one in files:
            with pyarrow.OSFile(str(one)) as source, pyarrow.ipc.open_stream(source) as stream:
                yield from stream


def _dataset_files(path: Path) -> list[Path]:
    """List the files of a saved dataset, in the order of its rows."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state.get("_indices_data_files"):
        raise ValueError(
            "its rows are chosen by a list of indices, as old versions of datasets wrote it: save it again"
        )
    names = [one["filename"] for one in state["_data_files"]]
    if odd := next((name for name in names if Path(name).name != name or "\\" in name), None):
        raise ValueError(f"state.json names the file {odd[:80]!r}, which is not one of this directory: save it again")
    return [path / name for name in names]


def _checked_columns(path: Path, schema: pyarrow.Schema) -> list[str]:
    """List the columns whose values have parts."""
    import pyarrow.types

    twice = next((name for name in schema.names if schema.names.count(name) > 1), None)
    if twice is not None:
        raise DataProblem(f"{path}: two columns are called {twice[:80]!r}; rename one")
    return [field.name for field in schema if pyarrow.types.is_nested(field.type)]


def _without_absent(value: object) -> object:
    """Leave out keys whose value is None: Arrow gives every struct all keys that any of them has."""
    if isinstance(value, dict):
        return {name: _without_absent(part) for name, part in value.items() if part is not None}
    return [_without_absent(part) for part in value] if isinstance(value, list) else value


# -- Excel --------------------------------------------------------------------------------------------------


@contextmanager
def _workbook(path: Path) -> Iterator[Any]:
    try:
        import python_calamine as calamine
    except ImportError:
        raise UsageProblem(f"reading {path} needs the python-calamine library: {EXTRA}, or save it as CSV") from None
    try:
        with calamine.CalamineWorkbook.from_path(path) as book:
            yield book
    except (calamine.CalamineError, OSError) as error:
        said = str(error).partition("\n")[0][:200] or type(error).__name__
        raise DataProblem(f"the data {path} cannot be read as a workbook: {said}; save it as CSV") from error


def _sheet_rows(path: Path) -> Iterator[tuple[int, DataRow]]:
    """Read the first sheet that has cells; its first row with a value names the columns."""
    with _workbook(path) as book:
        for name in book.sheet_names:
            sheet = book.get_sheet_by_name(name)
            if sheet.start is not None:
                yield from _named(path, name, enumerate(sheet.iter_rows(), start=1))
                return


def _named(path: Path, sheet: str, rows: Iterable[tuple[int, list[Any]]]) -> Iterator[tuple[int, DataRow]]:
    names: list[str] = []
    for number, cells in rows:
        if all(cell == "" for cell in cells):
            continue
        if names:
            yield number, {name: _cell(cell) for name, cell in zip(names, cells, strict=False) if name}
            continue
        names = [str(_cell(cell)).strip() for cell in cells]
        twice = next((name for name in names if name and names.count(name) > 1), None)
        if twice is not None:
            raise DataProblem(f"{path}: two columns of the sheet {sheet!r} are called {twice[:80]!r}; rename one")


def _cell(value: object) -> object:
    """Give a whole number as Excel shows it: a workbook has no integers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
