"""Rows become samples as contract.md "Sample" reads them; what cannot is said with file, line and what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from fedsoda_edge.data.chat import ChatTemplate
from fedsoda_edge.data.local_data import LocalData, SampleTokenizer, inspect, join_text, read_samples
from fedsoda_edge.errors import DataProblem, UsageProblem
from fedsoda_edge.protocol.template import TextTemplate

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


ROWS = [{"text": "in the rain", "label": "yes"}, {"text": "on a mat", "label": "no"}]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "dataset"])
def test_every_format_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    data = saved(tmp_path, kind, ROWS)
    assert [row for _, row in data.rows()] == ROWS
    assert [line for line, _ in data.rows()] == [1, 2]
    assert data.check(PROMPT, COMPLETION) == 2
    with pytest.raises(
        DataProblem,
        match=r":1: no column 'tag'; there are label, text; rename one, or let fedsoda-edge map it: --column tag=",
    ):
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
    with pytest.raises(DataProblem, match=r"holds the splits train; name one: .*/splits/train"):
        LocalData(tmp_path / "splits").check(PROMPT, COMPLETION)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataProblem, match=r"empty cannot be read"):
        LocalData(tmp_path / "empty").check(PROMPT, COMPLETION)


TALK = [
    {"role": "user", "content": "in the rain"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "on a mat"},
    {"role": "assistant", "content": "no"},
]
DEFAULT = TextTemplate("{prompt}"), TextTemplate("{completion}")


def test_a_conversation_is_trained_on_its_last_answer(tmp_path: Path, tiny_llama: Path) -> None:
    tokenizer = SampleTokenizer(tiny_llama / "tokenizer.json", 2)
    chat = ChatTemplate(
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
        {"bos_token": "<s>", "eos_token": "</s>"},
    )
    data = write(tmp_path / "d.jsonl", {"messages": TALK})
    assert data.check(*DEFAULT) == 1
    [sample] = read_samples(data, *DEFAULT, tokenizer, 512, chat).samples
    assert (sample.ids[0], sample.ids.count(1), sample.ids[-1]) == (1, 1, 2)  # no second bos, no second eos
    assert tokenizer.decode(sample.ids[sample.start : -1]) == "no"
    with pytest.raises(DataProblem, match=r"d\.jsonl:1: a conversation, and this model has no chat template"):
        read_samples(data, *DEFAULT, tokenizer, 512)


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        (TALK[:1], "the last message is of 'user'; it must be the assistant's"),
        ([], "messages must be a list of"),
        ([{"role": "assistant", "content": 3}], "messages must be a list of"),
        ("hello", "messages must be a list of"),
    ],
)
def test_a_conversation_without_an_answer_is_refused_with_its_line(
    tmp_path: Path, messages: object, sentence: str
) -> None:
    with pytest.raises(DataProblem, match=f"d.jsonl:2: .*{sentence}"):
        write(tmp_path / "d.jsonl", {"messages": TALK}, {"messages": messages}).check(*DEFAULT)


def test_a_check_counts_copies_and_what_truncation_cuts(tmp_path: Path, tiny_llama: Path) -> None:
    rows = [{"text": "x" * size, "label": "yes yes yes"} for size in (3, 3, 12, 50)]
    tokenizer = SampleTokenizer(tiny_llama / "tokenizer.json", 2)
    data = write(tmp_path / "d.jsonl", *rows)
    found = inspect(data, PROMPT, COMPLETION, tokenizer=tokenizer, max_length=20)
    made = [tokenizer.sample(PROMPT.render(row), COMPLETION.render(row)) for row in rows]
    lengths = sorted(len(sample.ids) for sample in made if sample)
    assert (found["rows"], found["duplicates"], found["skipped"], found["truncated"]) == (4, 1, 1, 1)
    assert (found["lengths"]["min"], found["lengths"]["max"]) == (lengths[0], lengths[-1])
    bars = found["lengths"]["histogram"]
    assert sum(bar["rows"] for bar in bars) == 4
    assert len(bars) <= 10
    assert bars[-1]["up_to"] >= lengths[-1]


def test_a_check_counts_conversations_as_they_are_trained_on(tmp_path: Path, tiny_llama: Path) -> None:
    """Also where the text without the answer is no beginning of the text with it, as thinking templates do."""
    tokenizer = SampleTokenizer(tiny_llama / "tokenizer.json", 2)
    chat = ChatTemplate(
        "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}<think>{% endif %}", {}
    )
    data = write(tmp_path / "d.jsonl", {"messages": TALK}, {"messages": TALK[:2]})
    trained = read_samples(data, *DEFAULT, tokenizer, 512, chat).samples
    found = inspect(data, *DEFAULT, tokenizer=tokenizer, chat=chat)
    lengths = sorted(len(sample.ids) for sample in trained)
    assert [found["lengths"]["min"], found["lengths"]["max"]] == lengths
    with pytest.raises(DataProblem, match=r"d\.jsonl:1: a conversation, and this model has no chat template"):
        inspect(data, *DEFAULT, tokenizer=tokenizer)
    assert inspect(data, *DEFAULT)["samples"][0] == {"prompt": "on a mat", "completion": "no"}
