"""Rows become samples as contract.md "Sample" reads them; what cannot is said with file, line and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedsoda_edge.data import LocalData, SampleTokenizer, TextTemplate, join_text, read_samples
from fedsoda_edge.errors import DataProblem, UsageProblem

PROMPT, COMPLETION = TextTemplate("{text}:"), TextTemplate("{label}")


def write(path: Path, *lines: object) -> LocalData:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return LocalData.from_jsonl(path)


@pytest.mark.parametrize(
    ("prompt", "completion", "whole"),
    [("a:", "b", "a: b"), ("a: ", "b", "a: b"), ("a:\n", "b", "a:\nb"), ("a:", " b", "a: b"), ("", "b", "b")],
)
def test_one_space_stands_between_unless_there_is_white_space(prompt: str, completion: str, whole: str) -> None:
    assert join_text(prompt, completion) == whole


def test_a_sample_is_the_whole_string_tokenized_once_and_eos(tiny_llama: Path) -> None:
    tokenizer = SampleTokenizer(tiny_llama / "tokenizer.json", 2)
    sample = tokenizer.sample("in the", "rain")
    assert sample is not None
    assert list(sample.ids) == [*tokenizer.encode("in the rain"), 2]
    assert sample.ids[0] == 1
    assert list(sample.ids[: sample.start]) == tokenizer.encode("in the")
    # Ids that a merge across the seam changes belong to the completion.
    seam = tokenizer.sample("t", "h", None)
    assert seam is not None
    assert seam.start == 2


def test_samples_are_cut_on_the_right_and_those_without_completion_counted(tmp_path: Path, tiny_llama: Path) -> None:
    rows = [{"text": "x" * size, "label": "yes"} for size in (3, 5, 50)]
    tokenizer = SampleTokenizer(tiny_llama / "tokenizer.json", 2)
    made = read_samples(write(tmp_path / "d.jsonl", *rows), PROMPT, COMPLETION, tokenizer, max_length=8)
    assert [len(sample.ids) for sample in made.samples] == [8, 8]
    assert made.num_skipped == 1
    with pytest.raises(DataProblem, match=r"none of the 3 rows .* max_length = 53 keeps 90 %"):
        read_samples(LocalData(tmp_path / "d.jsonl"), PROMPT, COMPLETION, tokenizer, max_length=4)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "a", "label": "b"}', "{oops"], r"d.jsonl:2: not JSON"),
        (["[1, 2]"], r"d.jsonl:1: a list, not an object"),
        (['{"text": "a", "tag": "b"}'], r"d.jsonl:1: no column 'label'; there are tag, text"),
        (['{"text": "a", "label": 1}'], r"d.jsonl:1: 'label' is 1, which is no string; completions must be strings"),
        ([], r"has no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(DataProblem, match=message):
        write(tmp_path / "d.jsonl", *lines).check(PROMPT, COMPLETION)


def test_a_missing_file_and_columns_by_another_name(tmp_path: Path) -> None:
    with pytest.raises(DataProblem, match="cannot be read: No such file"):
        LocalData(tmp_path / "gone.jsonl").check(PROMPT, COMPLETION)
    data = write(tmp_path / "d.jsonl", {"passage": "a", "label": "b"})
    assert LocalData(data.path, {"text": "passage"}).check(PROMPT, COMPLETION) == 1


@pytest.mark.parametrize("text", ["{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{", "{}"])
def test_a_template_has_columns_and_nothing_else(text: str) -> None:
    with pytest.raises(UsageProblem):
        TextTemplate(text)
