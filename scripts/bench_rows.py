"""Measure how rows are read: rows a second and peak memory for a file of each format, all checked as a join checks them.

Each file is written by one child process and read by another, whose peak memory is compared with that after its imports:
above 300 MiB the script fails. `--planted-defect` holds all rows and must fail at a million.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import gzip
import json
import lzma
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import IO, Any

from fedsoda_edge.ports.system import peak_rss_bytes

MOST = 300 << 20
COLUMNS = ("text", "department")


def rows(count: int) -> Iterator[dict[str, str]]:
    """Make rows of about 100 characters, no two alike."""
    for number in range(count):
        text = (
            f"report {number}: the pump in ward {number * 7919 % 9973} leaks since {number % 31} days, said the nurse"
        )
        yield {"text": text, "department": ("plumbing", "electric", "heating")[number % 3]}


def _lines(file: IO[str], count: int) -> None:
    for row in rows(count):
        file.write(json.dumps(row) + "\n")


def write_json_lines(path: Path, count: int) -> None:
    """Write JSON Lines."""
    with path.open("w") as file:
        _lines(file, count)


def write_list(path: Path, count: int) -> None:
    """Write one JSON list on one line."""
    with path.open("w") as file:
        for number, row in enumerate(rows(count)):
            file.write((", " if number else "[") + json.dumps(row))
        file.write("]")


def write_csv(path: Path, count: int) -> None:
    """Write CSV."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows(count))


def write_gzip(path: Path, count: int) -> None:
    """Write JSON Lines packed with gzip."""
    with gzip.open(path, "wt", compresslevel=1) as file:
        _lines(file, count)


def write_bzip2(path: Path, count: int) -> None:
    """Write JSON Lines packed with bzip2."""
    with bz2.open(path, "wt", compresslevel=1) as file:
        _lines(file, count)


def write_xz(path: Path, count: int) -> None:
    """Write JSON Lines packed with xz."""
    with lzma.open(path, "wt", preset=0) as file:
        _lines(file, count)


def write_zstd(path: Path, count: int) -> None:
    """Write JSON Lines packed with zstd."""
    import zstandard

    with zstandard.open(path, "wt") as file:
        _lines(file, count)


def _batches(count: int) -> Iterator[Any]:
    import pyarrow

    coming = rows(count)
    while part := list(islice(coming, 10_000)):
        yield pyarrow.RecordBatch.from_pylist(part)


def _table(count: int) -> Any:
    import pyarrow

    return pyarrow.Table.from_batches(_batches(count))


def write_parquet(path: Path, count: int) -> None:
    """Write Parquet, all rows in one group as pandas does."""
    import pyarrow.parquet

    pyarrow.parquet.write_table(_table(count), path)


def write_arrow(path: Path, count: int) -> None:
    """Write an Arrow file."""
    import pyarrow.feather

    pyarrow.feather.write_feather(_table(count), str(path))


def write_dataset(path: Path, count: int) -> None:
    """Save a dataset as `datasets` does."""
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset(_table(count)).save_to_disk(path)


def write_excel(path: Path, count: int) -> None:
    """Write a workbook, of which Excel holds at most 1,048,576 rows."""
    cell = '<c t="inlineStr"><is><t>{}</t></is></c>'
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    relations = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as book:
        book.writestr("[Content_Types].xml", "<Types/>")
        book.writestr(
            "xl/workbook.xml",
            f'<workbook xmlns="{main}" xmlns:r="{relations}"><sheets><sheet name="rows" sheetId="1" r:id="r1"/></sheets>'
            "</workbook>",
        )
        package = "http://schemas.openxmlformats.org/package/2006/relationships"
        for name, kind, target in (
            ("_rels/.rels", "officeDocument", "xl/workbook.xml"),
            ("xl/_rels/workbook.xml.rels", "worksheet", "worksheets/sheet1.xml"),
        ):
            book.writestr(
                name,
                f'<Relationships xmlns="{package}"><Relationship Id="r1" Type="{relations}/{kind}" Target="{target}"/>'
                "</Relationships>",
            )
        with book.open("xl/worksheets/sheet1.xml", "w") as sheet:
            sheet.write(f'<worksheet xmlns="{main}"><sheetData>'.encode())
            sheet.write(f"<row>{''.join(cell.format(name) for name in COLUMNS)}</row>".encode())
            for row in rows(min(count, 1_048_575)):
                sheet.write(f"<row>{''.join(cell.format(value) for value in row.values())}</row>".encode())
            sheet.write(b"</sheetData></worksheet>")


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "JSON Lines": write_json_lines,
    "JSON list": write_list,
    "CSV": write_csv,
    "JSON Lines, gzip": write_gzip,
    "JSON Lines, zstd": write_zstd,
    "JSON Lines, bzip2": write_bzip2,
    "JSON Lines, xz": write_xz,
    "Parquet": write_parquet,
    "Arrow": write_arrow,
    "saved dataset": write_dataset,
    "Excel": write_excel,
}


def read(path: Path, *, holds_all: bool) -> dict[str, float]:
    """Check all rows of a file; return their number, the seconds, and the bytes of peak memory above imports."""
    from fedsoda_edge.data.local_data import LocalData
    from fedsoda_edge.protocol.template import TextTemplate

    templates = TextTemplate("Report: {text}\nDepartment:"), TextTemplate("{department}")
    with ExitStack() as stack:
        # The libraries of the format are imported with a file of one row.
        small = Path(stack.enter_context(tempfile.TemporaryDirectory())) / path.name
        WRITERS[path.name.replace("_", " ")](small, 1)
        LocalData(small).check(*templates)
    before, began = peak_rss_bytes(), time.perf_counter()
    held = list(LocalData(path).rows()) if holds_all else []
    count = LocalData(path).check(*templates)
    seconds = time.perf_counter() - began
    return {"rows": count, "held": len(held), "seconds": seconds, "bytes": peak_rss_bytes() - before}


def main() -> None:
    """Print one JSON object; exit with 1 where reading takes more than MOST."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--only", default="", help="formats whose name has this in it")
    parser.add_argument("--planted-defect", action="store_true", help="hold all rows, which must fail")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read(options.read, holds_all=options.planted_defect)))
        return
    if options.write:
        WRITERS[options.write.name.replace("_", " ")](options.write, options.rows)
        return
    found: dict[str, dict[str, float]] = {}
    for name in WRITERS:
        if options.only not in name:
            continue
        with tempfile.TemporaryDirectory(prefix="fedsoda-rows-") as directory:
            path = Path(directory) / name.replace(" ", "_")
            again = [sys.executable, "-W", "ignore", __file__, "--rows", str(options.rows)]
            subprocess.run([*again, "--write", str(path)], check=True)
            planted = ["--planted-defect"] if options.planted_defect else []
            ran = subprocess.run([*again, "--read", str(path), *planted], check=True, capture_output=True, text=True)
            measured = json.loads(ran.stdout)
        found[name] = {
            "rows": measured["rows"],
            "rows_per_second": round(measured["rows"] / measured["seconds"]),
            "peak_mib_above_imports": round(measured["bytes"] / (1 << 20), 1),
        }
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    print(json.dumps(found, indent=1))
    over = [name for name, one in found.items() if one["peak_mib_above_imports"] > MOST / (1 << 20)]
    if over:
        raise SystemExit(f"more than {MOST >> 20} MiB: {', '.join(over)}")


if __name__ == "__main__":
    main()
