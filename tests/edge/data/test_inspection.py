"""`data check` counts what a run would train on, cut away and skip."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsoda_edge.data.chat import ChatTemplate
from fedsoda_edge.data.inspection import Piece, Shown, inspect
from fedsoda_edge.data.samples import SampleTokenizer, read_samples
from fedsoda_edge.errors import DataProblem
from fedsoda_edge.protocol.template import TextTemplate
from tests.edge.data.rows import BY_DEFAULT, COMPLETION, MESSAGES, PROMPT, write


def test_a_check_counts_copies_and_what_truncation_cuts(tmp_path: Path, tiny_llama: Path) -> None:
    rows = [{"text": "x" * size, "label": "yes yes yes"} for size in (3, 3, 12, 50)]
    tokenizer = SampleTokenizer(tiny_llama / "tokenizer.json", 2)
    data = write(tmp_path / "d.jsonl", *rows)
    found = inspect(data, PROMPT, COMPLETION, tokenizer=tokenizer, max_length=20)
    made = [tokenizer.sample(PROMPT.render(row), COMPLETION.render(row)) for row in rows]
    lengths = sorted(len(sample.ids) for sample in made if sample)
    assert (found.rows, found.duplicates, found.skipped, found.truncated) == (4, 1, 1, 1)
    assert found.lengths is not None
    assert (found.lengths.min, found.lengths.max) == (lengths[0], lengths[-1])
    bars = found.lengths.histogram
    assert sum(bar.rows for bar in bars) == 4
    assert len(bars) <= 10
    assert (bars[0].at_least, bars[-1].up_to) == (lengths[0], lengths[-1])
    assert all(sum(bar.at_least <= n <= bar.up_to for n in lengths) == bar.rows > 0 for bar in bars)
    assert [(why.reason, why.rows, why.first_line) for why in found.skipped_for] == [("cut", 1, 4)]
    assert found.cut_ids == len(made[2].ids) - 20 if made[2] else 0


def test_a_check_counts_conversations_as_they_are_trained_on(tmp_path: Path, tiny_llama: Path) -> None:
    """Also where the text without the answer does not begin the text with it, as thinking templates do."""
    tokenizer = SampleTokenizer(tiny_llama / "tokenizer.json", 2)
    chat = ChatTemplate(
        "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}<think>{% endif %}", {}
    )
    data = write(tmp_path / "d.jsonl", {"messages": MESSAGES}, {"messages": MESSAGES[:2]})
    trained = read_samples(data, *BY_DEFAULT, tokenizer, 512, chat).samples
    found = inspect(data, *BY_DEFAULT, tokenizer=tokenizer, chat=chat)
    lengths = sorted(len(sample.ids) for sample in trained)
    assert found.lengths is not None
    assert [found.lengths.min, found.lengths.max] == lengths
    assert [(lost.loss, lost.rows, lost.first_line) for lost in found.lost] == [("asked otherwise", 2, 1)]
    with pytest.raises(
        DataProblem, match=r"d\.jsonl:1: the row is a conversation, and this model has no chat template"
    ):
        inspect(data, *BY_DEFAULT, tokenizer=tokenizer)
    assert inspect(data, *BY_DEFAULT).samples[0] == Shown(1, "on a mat", "no", "")


def test_a_check_shows_the_ids_that_are_learned_with_the_joined_space_and_the_end_token(
    tmp_path: Path, tiny_llama: Path
) -> None:
    tokenizer = SampleTokenizer(tiny_llama / "tokenizer.json", 2)
    data = write(tmp_path / "d.jsonl", {"text": "in the", "label": "rain"}, {"text": "in the ", "label": "rain"})
    shown = inspect(data, TextTemplate("{text}"), COMPLETION, tokenizer=tokenizer).samples
    assert [one.joined for one in shown] == [" ", ""]
    for one in shown:
        sample = tokenizer.sample(one.prompt, one.completion)
        assert sample is not None
        assert [piece.id for piece in one.supervised] == list(sample.ids[sample.start :])
        assert one.supervised[-1] == Piece(2, "</s>")
        assert tokenizer.decode([piece.id for piece in one.supervised]).strip() == "rain"
    assert sample is not None
    [cut] = inspect(
        data, TextTemplate("{text}"), COMPLETION, tokenizer=tokenizer, max_length=len(sample.ids) - 1
    ).samples[:1]
    assert cut.supervised[-1].piece != "</s>"


def test_a_check_says_why_rows_are_skipped_and_which_completions_are_alike(tmp_path: Path) -> None:
    labels = ["yes", "yes ", "Yes", "no", "no", "", None, " "]
    data = write(tmp_path / "d.jsonl", *({"text": f"row {n}", "label": label} for n, label in enumerate(labels)))
    found = inspect(data, PROMPT, COMPLETION)
    assert (found.format, found.rows, found.taken, found.skipped) == ("JSON", 8, 5, 3)
    assert {(why.reason, why.rows, why.first_line) for why in found.skipped_for} == {("empty", 2, 6), ("null", 1, 7)}
    assert found.columns == {"text": "str", "label": "str or null"}
    assert [(one.label, one.rows) for one in found.labels] == [("no", 2), ("Yes", 1), ("yes", 1), ("yes ", 1)]
    assert [[one.label for one in group] for group in found.alike] == [["Yes", "yes", "yes "]]
    many = write(tmp_path / "d.jsonl", *({"text": "a", "label": f"{n}"} for n in range(1200)))
    assert (inspect(many, PROMPT, COMPLETION).labels, inspect(many, PROMPT, COMPLETION).num_labels) == ([], None)
