"""Read rows from text: JSON Lines, JSON, CSV and TSV, one after the other in constant memory.

Errors name the file, the line and the remedy, and none of the text. What a row means is left to `examples.py`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from fedsoda_edge.data.formats import HEAD, KNOWN, Bytes, Content, DataRow, open_bytes
from fedsoda_edge.errors import DataProblem
from fedsoda_edge.units import counted

MAX_VALUE = 128 << 20  # characters of a line or value: an unclosed bracket or quote reads no more than this
SAMPLE = 200  # records that a dialect is chosen by
_BLANK = "\ufeff \t\r\n"  # a byte order mark is also where two files were joined
_SPACE = re.compile(f"[{_BLANK}]*")
_BESIDE_ITS_END = 16  # characters: a literal or an escape that the end of the text cuts is found so far before it


def text_rows(path: Path, content: Content) -> Iterator[tuple[int, DataRow]]:
    """Yield (line, row) of a text; in a JSON list the line is the row's number from 1.

    Raises:
        DataProblem: a line is not what its format asks for, or not in its encoding.
    """
    with open_bytes(path, content.packing) as raw:
        newline = "" if content.kind == "delimited" else None
        # What is not in the encoding becomes surrogates, which `_checked` finds with their line and column.
        with io.TextIOWrapper(
            io.BufferedReader(_Raw(raw), 1 << 20), content.encoding, "surrogateescape", newline
        ) as file:
            try:
                yield from _delimited_rows(path, file) if content.kind == "delimited" else _json_rows(path, file)
            except UnicodeError as error:  # UTF-16 that is cut or damaged
                raise DataProblem(f"the data {path} is not {content.encoding} ({error}); save it as UTF-8") from error


class _Raw(io.RawIOBase):
    """Bytes of any unpacking reader, of which some know only `read`."""

    def __init__(self, file: Bytes) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _checked(path: Path, line: int, text: str) -> str:
    """Check that a text was in its encoding."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        raise DataProblem(
            f"{path}:{line}: not UTF-8: the byte 0x{byte:02x} at column {error.start + 1}; save the file as UTF-8"
        ) from None
    return text


# -- JSON ---------------------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, object]]) -> DataRow:
    """Make an object, of which each key stands once."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(next(key for key in keys if keys.count(key) > 1))
    return row


class _TwiceError(ValueError):
    """A key that stands twice in an object: which of its values is meant is not known."""


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _json_rows(path: Path, file: IO[str]) -> Iterator[tuple[int, DataRow]]:
    """Read a list of objects, or one object a line; from a line on that is not one object, objects of several lines."""
    line, first = 0, ""
    while not first.strip(_BLANK):
        line, first = line + 1, file.readline(HEAD)
        if not first:
            return
    if first.lstrip(_BLANK).startswith("["):
        yield from _list_rows(path, _Values(path, file, first, line))
    else:
        yield from _line_rows(path, file, first + ("" if first.endswith("\n") else _line(path, line, file)), line)


def _line_rows(path: Path, file: IO[str], text: str, line: int) -> Iterator[tuple[int, DataRow]]:
    while text:
        stripped = _checked(path, line, text).strip(_BLANK)
        if stripped:
            try:
                row = _DECODER.decode(stripped)
            except (ValueError, RecursionError) as error:
                if isinstance(error, json.JSONDecodeError) and _goes_on(error, stripped):
                    yield from _stream_rows(path, _Values(path, file, text, line))
                    return
                raise _not_json(path, line, error, "write one object a line", stripped) from error
            yield line, _row(path, line, row)
        line += 1
        text = _line(path, line, file)


def _goes_on(error: json.JSONDecodeError, text: str) -> bool:
    """Tell whether a line is the beginning of an object of several, or several objects."""
    return text.startswith("{") and (_is_cut(error, text) or text[error.pos :].startswith("{"))


def _line(path: Path, line: int, file: IO[str]) -> str:
    text = file.readline(MAX_VALUE)
    if len(text) == MAX_VALUE:
        raise DataProblem(f"{path}:{line}: this line has more than {MAX_VALUE} characters; write one object a line")
    return text


def _row(path: Path, line: int, value: object) -> DataRow:
    if not isinstance(value, dict):
        raise DataProblem(f"{path}:{line}: this is {_sort(value)}, not an object; write one {{...}} a line")
    return value


def _sort(value: object) -> str:
    return {list: "a list", str: "a string", type(None): "null", bool: "a boolean"}.get(type(value), "a number")


def _not_json(path: Path, line: int, error: Exception, remedy: str, text: str = "") -> DataProblem:
    if isinstance(error, _TwiceError):
        return DataProblem(f"{path}:{line}: the key {str(error)[:80]!r} stands twice in an object; leave one")
    if isinstance(error, RecursionError):
        return DataProblem(f"{path}:{line}: not JSON that can be read: it is nested too deeply; {remedy}")
    if "\0" in text:
        remedy = "NUL bytes are in it, as after a crash of what wrote it; cut them off"
    if isinstance(error, json.JSONDecodeError):
        return DataProblem(f"{path}:{line}: not JSON: {error.msg} (column {error.colno}); {remedy}")
    return DataProblem(f"{path}:{line}: not JSON that can be read: {str(error).partition(';')[0]}; {remedy}")


def _is_cut(error: json.JSONDecodeError, text: str) -> bool:
    """Tell whether an error of the decoder could be gone once there is more text."""
    if error.msg == "Extra data":
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - _BESIDE_ITS_END


class _Values:
    """JSON values that may take several lines, read one by one from a text.

    Args:
        begun: text of the file that was read already, which begins at `line`.
    """

    def __init__(self, path: Path, file: IO[str], begun: str, line: int) -> None:
        self._path = path
        self._file = file
        self._text = begun
        self._at = 0
        self._line = line
        self._counted = 0  # up to where in the text the lines are counted
        self._column = 0  # of the text's first character in its line, from 0
        self._is_over = False

    @property
    def line(self) -> int:
        """The line of the place that is read next."""
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def _more(self) -> bool:
        """Read on; drop what was decoded."""
        line = self.line
        rest = self._text[self._at :]
        more = self._file.read(max(HEAD, len(rest)))  # doubled, so that long values are not decoded again too often
        if not more or len(rest) > MAX_VALUE:
            self._is_over = True
            return False
        last = self._text.rfind("\n", 0, self._at)
        self._column = self._at - last - 1 + (self._column if last < 0 else 0)
        self._text, self._at, self._counted, self._line = rest + _checked(self._path, line, more), 0, 0, line
        return True

    def next_character(self) -> str:
        """Skip white space; return the character behind it without reading it, "" at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None, "the pattern takes nothing too"
            self._at = found.end()
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        """Read one character."""
        self._at += 1

    def value(self, remedy: str) -> object:
        """Read one value.

        Raises:
            DataProblem: there is none.
        """
        while True:
            try:
                found, end = _DECODER.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                line = self.line
                if isinstance(error, json.JSONDecodeError):
                    if _is_cut(error, self._text) and not self._is_over and self._more():
                        continue
                    line += self._text.count("\n", self._at, error.pos)
                    error.colno += self._column if error.lineno == 1 else 0
                raise _not_json(self._path, line, error, remedy) from error
            if end == len(self._text) and not isinstance(found, dict) and self._more():
                continue  # a number may be longer
            self._at = end
            return found


def _list_rows(path: Path, values: _Values) -> Iterator[tuple[int, DataRow]]:
    values.next_character()
    values.skip()
    number, character = 0, values.next_character()
    while character != "]":
        number += 1
        value = values.value("correct that line")
        if not isinstance(value, dict):
            raise DataProblem(
                f"{path} is not a list of objects: item {number} is {_sort(value)}; write [{{...}}, ...], or one "
                "object a line"
            )
        yield number, value
        character = values.next_character()
        if character == ",":
            values.skip()
            if values.next_character() == "]":
                raise DataProblem(f"{path}:{values.line}: not JSON: a comma before the closing bracket; delete it")
        elif character != "]":
            where = "the file ends" if not character else "there is no comma"
            raise DataProblem(f"{path}:{values.line}: not JSON: {where} after item {number}; correct that line")
    values.skip()
    if values.next_character():
        raise DataProblem(f"{path}:{values.line}: text follows the list; write one list alone, or one object a line")


def _stream_rows(path: Path, values: _Values) -> Iterator[tuple[int, DataRow]]:
    while values.next_character():
        line = values.line
        yield line, _row(path, line, values.value("write one object a line, or a list of objects"))


# -- CSV and TSV --------------------------------------------------------------------------------------------

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_TOLD = re.compile(r'"?sep=(.)"?\r?\n?$')  # the line by which Excel is told the delimiter


def _divided_by(character: str) -> type[csv.Dialect]:
    """Make the dialect of a delimiter, with quotes that are doubled."""

    class Dialect(csv.excel):
        delimiter = character
        strict = True  # an unclosed quote is an error, not the rest of the file

    return Dialect


def _dialects(*, has_escapes: bool = False) -> Iterator[type[csv.Dialect]]:
    """List ways to write a table, the usual ones first: quotes doubled or behind a backslash, or without meaning."""
    for character in _DELIMITERS:
        yield _divided_by(character)
    for character in _DELIMITERS if has_escapes else ():
        escaped = _divided_by(character)
        escaped.doublequote, escaped.escapechar = False, "\\"
        yield escaped
    plain = _divided_by("\t")
    plain.quoting, plain.quotechar = csv.QUOTE_NONE, None
    yield plain


def _delimited_rows(path: Path, file: IO[str]) -> Iterator[tuple[int, DataRow]]:
    """Read a table whose first record names its columns. Values stay text."""
    csv.field_size_limit(MAX_VALUE)
    head = file.read(HEAD)
    lines = io.StringIO(head, newline="").readlines()
    told = _TOLD.match(lines[0])
    dialect = _dialect(path, lines, is_cut=len(head) == HEAD) if told is None else _divided_by(told[1])
    reader = csv.reader(_after(lines, file), dialect, skipinitialspace=_has_spaces(lines[0], dialect))
    names: list[str] = []
    line = 1
    try:
        for record in reader:
            if names and record:
                if dialect.delimiter == "|":
                    _refuse_markdown(path, line, record, dashes=1 if lines[0].startswith("|") else 3)
                yield line, _record(path, line, names, record)
            elif any(record) and not (line == 1 and told):
                names = _names(path, line, record)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataProblem(
            f"{path}:{line}: not a table with {_DELIMITERS.get(dialect.delimiter, dialect.delimiter)} between its columns: "
            f'{error}; put text with quotes or line ends in quotes, and double the quotes in it: "he said ""no"""'
        ) from error


def _refuse_markdown(path: Path, line: int, record: Sequence[str], *, dashes: int) -> None:
    """Refuse the line of dashes below the header of a table in Markdown, whose cells hold spaces and bars of their own."""
    if all(re.fullmatch(rf"\s*:?-{{{dashes},}}:?\s*", value) or not value.strip() for value in record) and any(record):
        raise DataProblem(
            f"{path}:{line}: this is the line below the header of a table in Markdown; save the table as CSV"
        )


def _after(lines: list[str], file: IO[str]) -> Iterator[str]:
    """Yield the lines of a text, of which these were read already, with their ends."""
    yield from lines[:-1]
    # The last one may be cut, also between \r and \n.
    yield from io.StringIO(lines[-1] + file.readline(), newline="")
    yield from file


def _dialect(path: Path, lines: Sequence[str], *, is_cut: bool) -> type[csv.Dialect]:
    """Choose the way of writing in which the most records have as many columns as the header, and that is two or more.

    Args:
        is_cut: whether there is more text behind these lines.

    Raises:
        DataProblem: the text is not a table.
    """
    best, most = None, 0.5
    for dialect in _dialects(has_escapes=any('\\"' in line for line in lines)):
        records = _records(lines, dialect, is_cut=is_cut)
        if records and len(records[0]) > 1:
            share = sum(len(record) == len(records[0]) for record in records) / len(records)
            if share > most:
                best, most = dialect, share
    if best is not None:
        return best
    if '"' in "".join(lines):  # in the wrong place, or not closed: the table is read up to there, and its line is told
        for dialect in _dialects():
            if dialect.delimiter in lines[0]:
                return dialect
    if {".csv", ".tsv"} & {suffix.lower() for suffix in path.suffixes}:  # one column looks like any text
        return next(_dialects())
    try:
        value = json.loads(lines[0])
    except ValueError:
        raise DataProblem(
            f"{path}:1: this is neither an object {{...}} nor the header of a table of two columns or more; {KNOWN}"
        ) from None
    raise DataProblem(f"{path}:1: this is {_sort(value)}, not an object; write one {{...}} a line")


def _records(lines: Sequence[str], dialect: type[csv.Dialect], *, is_cut: bool) -> list[list[str]]:
    """Read the first records, which may be none that this dialect can read."""
    reader, records = csv.reader(lines, dialect), list[list[str]]()
    try:
        for record in islice(reader, SAMPLE):
            if any(record):
                records.append(record)
    except csv.Error:
        if not is_cut or reader.line_num < len(lines):
            return []
        return records  # a quote that is closed behind the cut
    return records[:-1] if is_cut and reader.line_num == len(lines) and records[1:] else records


def _has_spaces(header: str, dialect: type[csv.Dialect]) -> bool:
    """Tell whether a space stands behind every delimiter of the header, which then belongs to no value."""
    return dialect.delimiter != "\t" and 0 < header.count(dialect.delimiter) == header.count(f"{dialect.delimiter} ")


def _names(path: Path, line: int, record: Sequence[str]) -> list[str]:
    names = [_checked(path, line, name).strip().lstrip("\ufeff") for name in record]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise DataProblem(f"{path}:{line}: two columns are called {twice[:80]!r}; rename one")
    return names


def _record(path: Path, line: int, names: Sequence[str], record: Sequence[str]) -> DataRow:
    if len(record) != len(names):
        raise DataProblem(
            f"{path}:{line}: {counted(len(record), 'value')}, but the header names {counted(len(names), 'column')}; put "
            "text that holds the delimiter or a line end in quotes"
        )
    # A column without a name is an index, or what a delimiter at the end of each line makes.
    return {name: _checked(path, line, value) for name, value in zip(names, record, strict=True) if name}
