"""Every format gives the same rows, whatever the file is called; what is no data is refused by what it is."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import random
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsoda_edge.data import text_rows
from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.errors import DataProblem, UsageProblem
from fedsoda_edge.protocol.template import TextTemplate
from tests.edge.data.rows import COMPLETION, PROMPT, ROWS, workbook

LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
Rows = Sequence[Mapping[str, object]]


def delimited(rows: Rows, **how: str) -> bytes:
    file = io.StringIO(newline="")
    table = csv.DictWriter(file, list(rows[0]), **how)  # type: ignore[arg-type]
    table.writeheader()
    table.writerows(rows)
    return file.getvalue().encode()


def table_bytes(kind: str, rows: Rows) -> bytes:
    table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
    if kind == "parquet":
        pyarrow.parquet.write_table(table, sink)
    elif kind == "feather":
        pyarrow.feather.write_feather(table, sink)
    else:
        new = pyarrow.ipc.new_file if kind == "arrow file" else pyarrow.ipc.new_stream
        with new(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


WRITTEN: dict[str, Callable[[], bytes]] = {
    "JSON Lines": LINES.encode,
    "JSON list": json.dumps(ROWS).encode,
    "pretty list": json.dumps(ROWS, indent=2).encode,
    "pretty objects": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode,
    "objects on one line": "".join(map(json.dumps, ROWS)).encode,
    "CSV": lambda: delimited(ROWS),
    "TSV": lambda: delimited(ROWS, delimiter="\t"),
    "semicolons": lambda: delimited(ROWS, delimiter=";"),
    "bars": lambda: delimited(ROWS, delimiter="|"),
    "told delimiter": lambda: b"sep=;\r\n" + delimited(ROWS, delimiter=";"),
    "gzip": lambda: gzip.compress(LINES.encode()),
    "gzip of two": lambda: b"".join(gzip.compress(line.encode()) for line in LINES.splitlines(keepends=True)),
    "gzip of CSV": lambda: gzip.compress(delimited(ROWS)),
    "zstd": lambda: zstandard.compress(LINES.encode()),
    "zstd of two": lambda: b"".join(zstandard.compress(line.encode()) for line in LINES.splitlines(keepends=True)),
    "bzip2": lambda: bz2.compress(LINES.encode()),
    "xz": lambda: lzma.compress(LINES.encode()),
    "Parquet": lambda: table_bytes("parquet", ROWS),
    "Arrow file": lambda: table_bytes("arrow file", ROWS),
    "Arrow stream": lambda: table_bytes("arrow stream", ROWS),
    "Feather": lambda: table_bytes("feather", ROWS),
    "Excel": lambda: workbook([list(ROWS[0]), *(list(row.values()) for row in ROWS)]),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_format_is_found_by_content(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rows.WRONG"
    path.write_bytes(WRITTEN[kind]())
    data = LocalData(path)
    assert [row for _, row in data.rows()] == ROWS
    assert data.check(PROMPT, COMPLETION) == 2
    with pytest.raises(DataProblem, match=r":\d: no column 'tag'; there are label, text; "):
        data.check(PROMPT, TextTemplate("{tag}"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_text_is_read_in_its_encoding_and_with_its_line_ends(tmp_path: Path, encoding: str, ends: str) -> None:
    rows = [{"text": "café 😀\u2028", "label": "\x85ja"}, {"text": "b", "label": "c"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    mark = "\ufeff" if encoding.endswith("e") else ""
    for content in (lines, ["text,label", "café 😀\u2028,\x85ja", "b,c"]):
        (tmp_path / "d").write_bytes((mark + ends.join(content)).encode(encoding))
        assert [row for _, row in LocalData(tmp_path / "d").rows()] == rows


def test_a_saved_dataset_is_read_without_its_library(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    saved = datasets.Dataset.from_list(ROWS * 5).select([9, 0, 3])
    saved.save_to_disk(tmp_path / "d", num_shards=2)
    assert [row for _, row in LocalData(tmp_path / "d").rows()] == list(saved)
    datasets.DatasetDict(train=saved).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataProblem, match=r"holds the splits train; name one of them, such as .*/splits/train"):
        LocalData(tmp_path / "splits").check(PROMPT, COMPLETION)
    assert len(list(LocalData(tmp_path / "splits" / "train").rows())) == 3


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ('text,label\n"two\nlines, ""so""",b\n', [{"text": 'two\nlines, "so"', "label": "b"}]),
        ("text;label\na, b;c\nd, e;f\n", [{"text": "a, b", "label": "c"}, {"text": "d, e", "label": "f"}]),
        ("text, label\na, b\n", [{"text": "a", "label": "b"}]),
        (",text,label\n0,a,b\n", [{"text": "a", "label": "b"}]),  # pandas' index
        ("text,label,\na,b,\n", [{"text": "a", "label": "b"}]),
        ("\n\ntext,label\n\na,b\n\n", [{"text": "a", "label": "b"}]),
        ("text,label\n007,1.0\n", [{"text": "007", "label": "1.0"}]),  # types stay text
        ('text,label\n"he said \\"no\\", so",b\nx,c\n', [{"text": 'he said "no", so', "label": "b"}, {"text": "x", "label": "c"}]),
        ('text\tlabel\n"quo\tb\nx "y" z\tc\n', [{"text": '"quo', "label": "b"}, {"text": 'x "y" z', "label": "c"}]),
        ('text,label\n"' + "x y " * 50_000 + '",b\nc,d\n', [{"text": "x y " * 50_000, "label": "b"}, {"text": "c", "label": "d"}]),
    ],
)  # fmt: skip
def test_tables_are_read_as_they_are_written(tmp_path: Path, content: str, rows: Rows) -> None:
    (tmp_path / "d").write_text(content, newline="")
    assert [row for _, row in LocalData(tmp_path / "d").rows()] == rows


def test_the_line_of_a_table_is_that_of_its_record(tmp_path: Path) -> None:
    (tmp_path / "d").write_text('text,label\n"a\n\nb",c\n\nd,e\n')
    assert [line for line, _ in LocalData(tmp_path / "d").rows()] == [2, 6]
    (tmp_path / "d").write_bytes(workbook([["text", "label"], [1, "b"], ["", ""], [1.5, True]], first=3))
    assert list(LocalData(tmp_path / "d").rows()) == [
        (4, {"text": 1, "label": "b"}),
        (6, {"text": 1.5, "label": True}),
    ]


def archive(kind: str) -> bytes:
    sink = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(sink, "w") as packed:
            packed.writestr("d.jsonl", LINES)
    else:
        with tarfile.open(fileobj=sink, mode="w:gz") as packed:
            packed.addfile(tarfile.TarInfo("d.jsonl"))
    return sink.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "label": "b"}\n\n{oops\n', r":3: not JSON: .* write one object a line"),
        ('{"text": "a", "label": "b",}', r":1: not JSON: .* \(column 2\d\); write one object a line"),
        ('{"text": "a"},\n{"text": "b"},\n', r":1: not JSON: Extra data \(column 14\); write one object a line"),
        ("[1, 2]\n", r" is not a list of objects: item 1 is a number; write \[{...}, ...\], or one object a line"),
        ("null\n", r":1: this is null, not an object"),
        ("[\n{oops", r":2: not JSON: .* \(column 2\); correct that line"),
        ('[{"a": 1} {"a": 2}]', r":1: not JSON: there is no comma after item 1"),
        ('[{"a": 1},\n]', r":2: not JSON: a comma before the closing bracket"),
        ('[{"a": 1}', r":1: not JSON: the file ends after item 1"),
        ('[{"a": 1}]\n{"a": 2}', r":2: text follows the list"),
        ('{\n "a": 1\n}\n{\n "a": oops\n}', r":5: not JSON: .* \(column 7\)"),
        ('{"text": "a", "text": "b"}', r":1: the key 'text' stands twice in an object; leave one"),
        ("[" * 100_000, r":1: not JSON that can be read: it is nested too deeply"),
        ('{"text": ' + "9" * 5000 + "}", r":1: not JSON that can be read: Exceeds the limit"),
        (b'{"a": 1}\n{"a": "caf\xe9"}', r":2: not UTF-8: the byte 0xe9 at column 11; save the file as UTF-8"),
        (b"text,label\ncaf\xe9,b\n", r":2: not UTF-8: the byte 0xe9 at column 4"),
        ('{"a": "b"}\n\0\0\0\0', r":2: not JSON: .* NUL bytes are in it"),
        ("text,label\na,b,c\nd,e\nf,g\nh,i\n", r":2: 3 values, but the header names 2 columns"),
        ("text,label\na,b\nd\n", r":3: 1 value, but the header names 2 columns"),
        ("text,text,label\na,b,c\n", r":1: two columns are called 'text'; rename one"),
        ('text,label\n"a,b\nc,d\n', r":2: not a table with commas between its columns: .* in quotes"),
        ("Dear Sir,\nthe pump leaks.\nYours\n", r":1: this is neither an object {...} nor the header of a table"),
        ("| a | b |\n|---|:-:|\n| c | d |\n", r":2: this is the line below the header of a table in Markdown"),
        ("\n", r" has no rows; write at least one"),
        ("[]", r" has no rows; write at least one"),
        ("text,label\n", r" has no rows; write at least one"),
        ("\ufeff", r" has no rows; write at least one"),
        (b"", r" has no rows; write at least one"),
        (" \n<!DOCTYPE html><p>404", r" is a web page or XML and not rows"),
        ("version https://git-lfs.github.com/spec/v1\noid", r" is a Git LFS pointer .*: git lfs pull"),
        (archive("zip"), r" is a ZIP archive of d.jsonl; unpack it"),
        (archive("tar"), r" is a tar archive; unpack it"),
        (b"PK\x03\x04and no more", r" is a damaged ZIP archive or workbook"),
        (pickle.dumps(ROWS), r" is a pickle, which is never read since it can run code"),
        (b"SQLite format 3\0", r" is an SQLite database; export the table as CSV"),
        (b"%PDF-1.7", r" is a PDF document"),
        (b"PAR1 and no more", r" cannot be read: .*; it must be Parquet, whole"),
        (b"\xff\xff\xff\xff and no more", r" cannot be read: .*; it must be Arrow, whole"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1 and no more", r" cannot be read as a workbook: .*; save it as CSV"),
        (gzip.compress(table_bytes("parquet", ROWS)), r" is Parquet packed with gzip; unpack it"),
        (workbook([["a", "a"], [1, 2]]), r": two columns of the sheet 'rows' are called 'a'; rename one"),
    ],
)  # fmt: skip
def test_what_is_not_rows_is_told_with_its_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    (tmp_path / "d.jsonl").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataProblem, match=rf"d\.jsonl{message}"):
        list(LocalData.from_jsonl(tmp_path / "d.jsonl").rows())


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataProblem, match=r"gone.jsonl cannot be read: No such file or directory; check the path"):
        list(LocalData(tmp_path / "gone.jsonl").rows())
    (tmp_path / "d").mkdir()
    with pytest.raises(
        DataProblem, match=r"d cannot be read: it is a directory .*, and is empty; name one file of rows"
    ):
        list(LocalData(tmp_path / "d").rows())
    (tmp_path / "d" / "a.csv").write_text("a,b")
    with pytest.raises(DataProblem, match=r", and holds a.csv; name one file of rows"):
        list(LocalData(tmp_path / "d").rows())
    (tmp_path / "d" / "state.json").write_text("[]")
    with pytest.raises(DataProblem, match=r"d cannot be read: .*; it must be a directory of Dataset.save_to_disk"):
        list(LocalData(tmp_path / "d").rows())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "d")
    with pytest.raises(DataProblem, match=r"is a pipe or a device; rows are read more than once"):
        list(LocalData(tmp_path / "d").rows())


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "d")
    with pytest.raises(DataProblem, match=r"d: two columns are called 'text'; rename one"):
        list(LocalData(tmp_path / "d").rows())


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress, bz2.compress, lzma.compress])
def test_a_packed_file_that_is_cut_is_never_read_as_a_shorter_one(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    text = "".join(json.dumps({"text": f"{n * 7919 % 1009}", "label": "b"}) + "\n" for n in range(400)).encode()
    packed = pack(text)
    for size in (*range(6, len(packed), max(1, len(packed) // 40)), len(packed) - 1):
        (tmp_path / "d").write_bytes(packed[:size])
        with pytest.raises(DataProblem):
            list(LocalData(tmp_path / "d").rows())
    (tmp_path / "d").write_bytes(packed)
    assert len(list(LocalData(tmp_path / "d").rows())) == 400


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=8), VALUES, max_size=4), min_size=1, max_size=8),
    indent=st.sampled_from([None, 0, 3]),
    as_list=st.booleans(),
    ascii_only=st.booleans(),
    head=st.integers(1, 40),
)
def test_json_that_is_read_piece_by_piece_is_what_the_whole_would_be(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[dict[str, object]],
    indent: int | None,
    as_list: bool,
    ascii_only: bool,
    head: int,
) -> None:
    monkeypatch.setattr(text_rows, "HEAD", head)
    how = {"indent": indent, "ensure_ascii": ascii_only}
    text = json.dumps(rows, **how) if as_list else "\n".join(json.dumps(row, **how) for row in rows)  # type: ignore[arg-type]
    (tmp_path / "d").write_bytes(text.encode())
    assert [row for _, row in LocalData(tmp_path / "d").rows()] == rows


def is_refused(data: LocalData) -> bool:
    try:
        data.check(PROMPT, COMPLETION)
    except (DataProblem, UsageProblem):
        return True
    return False


def test_no_damage_of_a_file_is_more_than_a_problem_of_the_data(tmp_path: Path) -> None:
    """300 files of all formats with bytes flipped, left out, doubled or cut: each is read, or refused in a sentence."""
    draw = random.Random(0)
    kinds = list(WRITTEN.values())
    path = tmp_path / "d"
    refused = 0
    for number in range(300):
        data = bytearray(kinds[number % len(kinds)]())
        for _ in range(draw.randint(1, 4)):
            at, size = draw.randrange(len(data) or 1), draw.randint(1, 12)
            match draw.choice(["flip", "drop", "double", "cut", "fill"]):
                case "flip":
                    data[at : at + 1] = bytes([draw.randrange(256)])
                case "drop":
                    del data[at : at + size]
                case "double":
                    data[at:at] = data[at : at + size]
                case "cut":
                    del data[max(1, at) :]
                case "fill":
                    data[at : at + size] = bytes(size)
        path.write_bytes(data)
        refused += is_refused(LocalData(path))
    assert 100 < refused < 300
