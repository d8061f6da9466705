"""The hub reads rows through the reader of the edges: any format, rows without an answer left out, wrong values refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fedsoda_edge.data.samples import SampleTokenizer
from fedsoda_edge.errors import DataProblem, UsageProblem
from fedsoda_edge.protocol.template import TextTemplate
from fedsoda_hub.compare.dealt import write_rows
from fedsoda_hub.evaluation.questions import Question, choices_of, read_questions
from fedsoda_hub.preparation.public_text import read_blocks, read_like_task
from fedsoda_hub.settings.toml import read_toml

TEMPLATES = TextTemplate("Say {text}:"), TextTemplate("{label}")


def lines(path: Path, *rows: Mapping[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_questions_are_read_from_any_format(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}]
    asked = read_questions(lines(tmp_path / "d.jsonl", *rows), *TEMPLATES)
    with (tmp_path / "d.txt").open("w", newline="") as file:
        table = csv.DictWriter(file, ["text", "label"], delimiter=";")
        table.writeheader()
        table.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d")
    assert read_questions(tmp_path / "d.txt", *TEMPLATES) == read_questions(tmp_path / "d", *TEMPLATES) == asked


def test_rows_without_an_answer_are_no_questions_and_others_are_refused(tmp_path: Path) -> None:
    good, blank, null = {"text": "a", "label": "b"}, {"text": "a", "label": " "}, {"text": None, "label": "b"}
    assert len(read_questions(lines(tmp_path / "d", blank, good, null), *TEMPLATES)) == 1
    with pytest.raises(
        DataProblem, match=r"none of the 2 rows of .*d can be used: 1: nothing to learn: .* in line 1\)"
    ):
        read_questions(lines(tmp_path / "d", blank, null), *TEMPLATES)
    with pytest.raises(DataProblem, match=r"d:2: 'text' is \{'a': 1\}, an object and not text"):
        read_questions(lines(tmp_path / "d", good, {"text": {"a": 1}, "label": "b"}), *TEMPLATES)


def test_choices_that_differ_by_white_space_are_refused_with_both_spellings() -> None:
    asked = [Question("p", answer) for answer in ("yes", "no", "yes ", "yes")]
    with pytest.raises(
        DataProblem, match=r"'yes' \(of 2 rows\) and 'yes ' \(of 1 row\) .* differ by white space alone"
    ):
        choices_of(asked)
    assert choices_of(asked, "none") == []
    assert choices_of([Question("p", "Yes"), Question("p", "yes")]) == ["Yes", "yes"]


def test_rows_like_the_tasks_may_lack_answers(tmp_path: Path, tiny_llama: Path) -> None:
    tokenizer = SampleTokenizer(tiny_llama / "tokenizer.json", 2)
    rows: list[dict[str, object]] = [{"text": f"row {n}"} for n in range(60)]
    rows += [{"text": None}, {"text": "a", "label": "b"}, {"text": "a", "label": ""}]
    found = read_like_task(lines(tmp_path / "d", *rows), *TEMPLATES, tokenizer, 64)
    assert len(found) == 62
    sample = tokenizer.sample("Say a:", "b")
    assert sample is not None
    assert found[-2].tolist() == list(sample.ids)
    assert found[-1].tolist() == tokenizer.encode("Say a:")
    with pytest.raises(UsageProblem, match=r"like_task: .*d:1: 'text' is \['a'\], a list and not text"):
        read_like_task(lines(tmp_path / "d", {"text": ["a"]}), *TEMPLATES, tokenizer, 64)


def test_a_byte_order_mark_is_no_part_of_what_people_write(tmp_path: Path, tiny_llama: Path) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "run.toml").write_bytes('name = "é"\n'.encode(encoding))
        assert read_toml(tmp_path / "run.toml") == {"name": "é"}
        (tmp_path / "public.txt").write_bytes(("the rain " * 400).encode(encoding))
        used, _ = read_blocks(tmp_path / "public.txt", tiny_llama / "tokenizer.json", None, 4, 16)
        if encoding == "utf-8":
            plain = used[0]
        assert used[0].tolist() == plain.tolist()
    (tmp_path / "public.txt").write_bytes(b"caf\xe9 " * 900)
    with pytest.raises(UsageProblem, match=r"public.txt cannot be read \(byte 4: .*\); name a file of UTF-8 text"):
        read_blocks(tmp_path / "public.txt", tiny_llama / "tokenizer.json", None, 4, 16)


def test_dealt_rows_keep_what_json_can_hold(tmp_path: Path) -> None:
    from datetime import date
    from decimal import Decimal

    row: dict[str, object] = {
        "text": Decimal("1E+2"),
        "label": "b",
        "day": date(2026, 1, 2),
        "raw": b"x",
        "half": "\ud83d",
    }
    write_rows(tmp_path / "d", [row])
    assert json.loads((tmp_path / "d").read_text()) == {"text": "100", "label": "b", "half": "\ud83d"}
