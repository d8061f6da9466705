"""Find out by its content what a file of rows is: format, compression, encoding. Names of files decide nothing.

What does not hold rows (a Git LFS pointer, a web page, an archive) is refused here, by what it is. Reading the rows is left
to `text_rows.py` and `table_rows.py`.
"""

from __future__ import annotations

import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from fedsoda_edge.errors import DataProblem, UsageProblem

DataRow = dict[str, object]  # foreign JSON: columns and types are the file's

HEAD = 64 << 10  # bytes that are looked at
_PACKED_BYTES = 1 << 10  # of zstd that are unpacked at once, to 32 MiB at most: four bytes may stand for 128 KiB
EXTRA = "pip install 'fedsoda[datasets]'"
Kind = Literal["json", "delimited", "excel", "parquet", "arrow file", "arrow stream", "dataset"]
Packing = Literal["", "gzip", "zstd", "bzip2", "xz"]
Bytes = IO[bytes] | io.BufferedIOBase  # what the unpacking readers are
_NAMES: dict[Kind, str] = {
    "json": "JSON",
    "delimited": "CSV or TSV",
    "excel": "Excel",
    "parquet": "Parquet",
    "arrow file": "Arrow",
    "arrow stream": "Arrow",
    "dataset": "saved dataset",
}
_PACKED: dict[bytes, Packing] = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
}
_TABLES: dict[bytes, Kind] = {
    b"PAR1": "parquet",
    b"ARROW1\0\0": "arrow file",
    b"\xff\xff\xff\xff": "arrow stream",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "excel",  # of before 2007
}
_FOREIGN: dict[bytes, str] = {
    b"version https://git-lfs": "a Git LFS pointer and not the data itself; fetch it: git lfs pull",
    b"PARE": "Parquet that is encrypted; save it without encryption",
    b"ORC": "an ORC file; save it as Parquet",
    b"Obj\x01": "an Avro file; save it as Parquet",
    b"FEA1": "a Feather file of version 1; save it as Parquet",
    b"SQLite format 3\0": "an SQLite database; export the table as CSV",
    b"\x89HDF\r\n": "an HDF5 file; save it as Parquet",
    b"\x93NUMPY": "a NumPy array; save it as Parquet",
    b"\x80\x04\x95": "a pickle, which is never read since it can run code; save it as Parquet",
    b"\x80\x05\x95": "a pickle, which is never read since it can run code; save it as Parquet",
    b"%PDF": "a PDF document; save its rows as CSV",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"Rar!": "a RAR archive; unpack it",
}
_PAGES = ("<!doctype", "<html", "<?xml", "<head", "<body", "<error")


@dataclass(frozen=True)
class Content:
    """The format of a file or directory of rows.

    packing: the compression of a text; "": none. encoding: of a text, as Python names it.
    """

    kind: Kind
    packing: Packing = ""
    encoding: str = "utf-8-sig"

    @property
    def is_text(self) -> bool:
        """Whether any process can read it; other formats need libraries that the agent lacks."""
        return self.kind in ("json", "delimited")

    @property
    def name(self) -> str:
        """The format in words."""
        return _NAMES[self.kind] + (f", {self.packing}" if self.packing else "")


def content_of(path: Path) -> Content:
    """Look at the beginning of a file, or into a directory.

    Raises:
        DataProblem: it is missing, no rows are in it, or it is in no format that is read.
        UsageProblem: it is packed with zstd, and the library for that is not installed.
    """
    with readable(path):
        if path.is_dir():
            return _directory(path)
        if path.exists() and not path.is_file():
            raise DataProblem(
                f"the data {path} is a pipe or a device; rows are read more than once, so save them in a file"
            )
        with path.open("rb") as file:
            head = file.read(HEAD)
        packing: Packing = next((packing for magic, packing in _PACKED.items() if head.startswith(magic)), "")
        if packing:
            with open_bytes(path, packing) as unpacked:
                head = unpacked.read(HEAD)
        if head[257:262] == b"ustar":
            raise DataProblem(f"the data {path} is a tar archive; unpack it and name one of its files")
        table = next((kind for magic, kind in _TABLES.items() if head.startswith(magic)), None)
        if head.startswith(b"PK\x03\x04"):
            table = _archive(path)
        if table and packing:
            raise DataProblem(f"the data {path} is {_NAMES[table]} packed with {packing}; unpack it")
        if table:
            return Content(table)
        foreign = next((what for magic, what in _FOREIGN.items() if head.startswith(magic)), None)
        if foreign:
            raise DataProblem(f"the data {path} is {foreign}")
        return _text(path, head, packing)


def _directory(path: Path) -> Content:
    if (path / "dataset_dict.json").exists():
        splits = sorted(one.name for one in path.iterdir() if (one / "state.json").exists())
        if not splits:
            raise DataProblem(f"the data {path} is a saved dataset without any split; save it again")
        raise DataProblem(f"{path} holds the splits {', '.join(splits)}; name one of them, such as {path / splits[0]}")
    if (path / "state.json").exists():
        return Content("dataset")
    files = sorted(one.name for one in path.iterdir() if one.is_file() and not one.name.startswith("."))
    there = f"holds {', '.join(files[:5])}{', ...' if len(files) > 5 else ''}" if files else "is empty"
    raise DataProblem(
        f"the data {path} cannot be read: it is a directory that Dataset.save_to_disk did not write, and {there}; name one "
        "file of rows"
    )


def _archive(path: Path) -> Kind:
    """Tell a workbook from other ZIP archives."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError) as error:
        raise DataProblem(f"the data {path} is a damaged ZIP archive or workbook ({error}); fetch it again") from error
    if any(name.startswith("xl/") for name in names) or "content.xml" in names:
        return "excel"
    there = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    raise DataProblem(f"the data {path} is a ZIP archive of {there or 'nothing'}; unpack it and name one of its files")


def _text(path: Path, head: bytes, packing: Packing) -> Content:
    encoding = json.detect_encoding(head)
    encoding = "utf-8-sig" if encoding == "utf-8" else encoding
    words = head.decode(encoding, errors="replace").lstrip("\ufeff \t\r\n")
    if words.lower().startswith(_PAGES):
        raise DataProblem(
            f"the data {path} is a web page or XML and not rows; if it was downloaded, look at it: it may be an error message"
        )
    if words[:1] in ("{", "[") or not words:
        return Content("json", packing, encoding)
    if "\0" in words:
        raise DataProblem(f"the data {path} is binary and in no format that is known; {KNOWN}")
    return Content("delimited", packing, encoding)


KNOWN = "save it as JSON Lines, JSON, CSV, TSV, Excel, Parquet, Arrow or with Dataset.save_to_disk"


@contextmanager
def open_bytes(path: Path, packing: Packing) -> Iterator[Bytes]:
    """Open a file for reading, unpacked."""
    match packing:
        case "gzip":
            with gzip.open(path) as file:
                yield file
        case "bzip2":
            import bz2  # some builds of Python lack these two

            with bz2.open(path) as file:
                yield file
        case "xz":
            import lzma

            try:
                with lzma.open(path) as file:
                    yield file
            except lzma.LZMAError as error:
                raise OSError(str(error)) from error
        case "zstd":
            try:
                import zstandard
            except ImportError:
                raise UsageProblem(f"reading {path} needs the zstandard library: {EXTRA}, or unpack it") from None
            with path.open("rb") as raw, io.BufferedReader(_Unpacked(raw, zstandard)) as file:
                yield file
        case _:
            with path.open("rb") as file:
                yield file


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Say what cannot be read as a problem of the data."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataProblem(f"the data {path} is damaged or cut short: {error}; fetch or write it again") from error
    except OSError as error:
        remedy = "check the path" if error.errno else "it is damaged; fetch or write it again"
        raise DataProblem(f"the data {path} cannot be read: {error.strerror or error}; {remedy}") from error


class _Unpacked(io.RawIOBase):
    """The bytes of a file that zstd packed. The library's own reader takes the end of a file that is cut for its end.

    Raises:
        OSError: on reading, when the file is damaged. EOFError: it is cut.
    """

    def __init__(self, raw: IO[bytes], zstandard: Any) -> None:
        self._raw = raw
        self._error: type[Exception] = zstandard.ZstdError
        # A window of up to 2 GB, as `zstd --long=31` writes; the library refuses more than 128 MB otherwise.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame = self._decompressor.decompressobj()
        self._is_within = False  # a frame
        self._held = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._is_within = self._decompressor.decompressobj(), False
            packed = packed or self._raw.read(_PACKED_BYTES)
            if not packed:
                if self._is_within:
                    raise EOFError("it ends within a frame")
                return 0
            self._is_within = True
            try:
                # A frame's rest is given on in small parts too: what one byte stands for is bounded by none.
                self._held = memoryview(self._frame.decompress(packed))
            except self._error as error:
                raise OSError(str(error)) from error
        size = min(len(buffer), len(self._held))
        buffer[:size], self._held = self._held[:size], self._held[size:]
        return size
