"""Rows become samples as docs/methods.md (m8-sample) says: one string tokenized once, cut on the right, then eos."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsoda_edge.data.chat import ChatTemplate
from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.data.samples import SampleTokenizer, join_text, read_samples
from fedsoda_edge.errors import DataProblem, UsageProblem
from tests.edge.data.rows import BY_DEFAULT, COMPLETION, MESSAGES, PROMPT, write


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


def test_a_conversation_is_trained_on_its_last_answer(tmp_path: Path, tiny_llama: Path) -> None:
    tokenizer = SampleTokenizer(tiny_llama / "tokenizer.json", 2)
    chat = ChatTemplate(
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
        {"bos_token": "<s>", "eos_token": "</s>"},
    )
    data = write(tmp_path / "d.jsonl", {"messages": MESSAGES})
    assert data.check(*BY_DEFAULT) == 1
    [sample] = read_samples(data, *BY_DEFAULT, tokenizer, 512, chat).samples
    assert (sample.ids[0], sample.ids.count(1), sample.ids[-1]) == (1, 1, 2)  # no second bos, no second eos
    assert tokenizer.decode(sample.ids[sample.start : -1]) == "no"
    with pytest.raises(
        DataProblem, match=r"d\.jsonl:1: the row is a conversation, and this model has no chat template"
    ):
        read_samples(data, *BY_DEFAULT, tokenizer, 512)


def test_a_run_without_conversations_asks_nothing_of_a_models_chat_template(tmp_path: Path, tiny_llama: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"chat_template": "{% no tag of anything %}"}')
    chat = ChatTemplate.read({config.name: config})
    tokenizer = SampleTokenizer(tiny_llama / "tokenizer.json", 2)
    rows = write(tmp_path / "d.jsonl", {"text": "a", "label": "yes"})
    assert len(read_samples(rows, PROMPT, COMPLETION, tokenizer, 64, chat).samples) == 1
    pairs = write(tmp_path / "p.jsonl", {"prompt": "a", "completion": "yes"})
    assert len(read_samples(pairs, *BY_DEFAULT, tokenizer, 64, chat).samples) == 1
    with pytest.raises(UsageProblem, match=r"chat template cannot be read"):
        read_samples(write(tmp_path / "c.jsonl", {"messages": MESSAGES}), *BY_DEFAULT, tokenizer, 64, chat)


def test_an_answer_of_which_a_template_writes_nothing_is_skipped(tmp_path: Path, tiny_llama: Path) -> None:
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}{% endfor %}</s>"
    chat = ChatTemplate(source + "{% if add_generation_prompt %}[assistant]{% endif %}", {})
    silent = ChatTemplate("{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}", {})
    tokenizer = SampleTokenizer(tiny_llama / "tokenizer.json", 2)
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather"}}]}
    data = write(tmp_path / "d.jsonl", {"messages": [MESSAGES[0], call]}, {"messages": MESSAGES})
    assert read_samples(data, *BY_DEFAULT, tokenizer, 64, chat).num_skipped == 0  # it learns to write [assistant]
    with pytest.raises(DataProblem, match=r"none of the 2 rows"):
        read_samples(data, *BY_DEFAULT, tokenizer, 64, silent)
