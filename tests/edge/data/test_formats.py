"""Every format gives the same rows; what cannot be read is said with file, line and what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.errors import DataProblem
from fedsoda_edge.protocol.template import TextTemplate
from tests.edge.data.rows import COMPLETION, PROMPT, ROWS, write


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"text": "a", "label": "b"}\n\n{oops\n', r"d.jsonl:3: not JSON: .* write one object a line"),
        ("d.jsonl", "[1, 2]\n", r"d.jsonl:1: this is a list, not an object; write one {...} a line"),
        ("d.jsonl", b"\xff\xfe", r"d.jsonl is not UTF-8 \(invalid start byte\); save it as UTF-8"),
        ("d.json", "[\n{oops", r"d.json:2: not JSON: .*; correct that line"),
        (
            "d.json",
            '{"text": "a"}',
            r"d.json is not a list of objects; write \[{...}, ...\], or JSON Lines in a file named .jsonl",
        ),
        ("d.jsonl", "\n", r"d.jsonl has no rows; write at least one"),
        ("d.json", "[]", r"d.json has no rows; write at least one"),
    ],
)
def test_what_is_not_rows_is_told_with_its_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataProblem, match=message):
        list(LocalData.from_jsonl(tmp_path / name).rows())


def test_a_file_that_is_not_there_is_told_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(DataProblem, match=r"gone.jsonl cannot be read: No such file or directory; check the path"):
        list(LocalData(tmp_path / "gone.jsonl").rows())


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "dataset"])
def test_every_format_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    data = saved(tmp_path, kind, ROWS)
    assert [row for _, row in data.rows()] == ROWS
    assert [line for line, _ in data.rows()] == [1, 2]
    assert data.check(PROMPT, COMPLETION) == 2
    with pytest.raises(DataProblem, match=r":1: no column 'tag'; there are label, text; "):
        data.check(PROMPT, TextTemplate("{tag}"))
    with pytest.raises(DataProblem, match=r":1: no column 'passage'; there are label, text"):
        LocalData(data.path, {"text2": "passage"}).check(TextTemplate("{text2}"), COMPLETION)


def saved(directory: Path, kind: str, rows: Sequence[Mapping[str, object]]) -> LocalData:
    if kind == "jsonl":
        return write(directory / "d.jsonl", *rows)
    if kind == "json":
        (directory / "d.json").write_text(json.dumps(rows))
        return LocalData.from_jsonl(directory / "d.json")
    import datasets
    import pyarrow
    import pyarrow.parquet

    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), directory / "d.parquet")
        return LocalData.from_parquet(directory / "d.parquet")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(directory / "d")
    return LocalData.from_dataset(directory / "d")


def test_a_damaged_table_and_a_dataset_of_splits_are_said_to_be_that(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "d.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataProblem, match=r"d\.parquet cannot be read"):
        LocalData(tmp_path / "d.parquet").check(PROMPT, COMPLETION)
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataProblem, match=r"holds the splits train; name one of them, such as .*/splits/train"):
        LocalData(tmp_path / "splits").check(PROMPT, COMPLETION)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataProblem, match=r"empty cannot be read"):
        LocalData(tmp_path / "empty").check(PROMPT, COMPLETION)
