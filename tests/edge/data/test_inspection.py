"""`data check` counts what a run would train on, cut away and skip."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsoda_edge.data.chat import ChatTemplate
from fedsoda_edge.data.inspection import Shown, inspect
from fedsoda_edge.data.samples import SampleTokenizer, read_samples
from fedsoda_edge.errors import DataProblem
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
    assert bars[-1].up_to >= lengths[-1]


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
    with pytest.raises(
        DataProblem, match=r"d\.jsonl:1: the row is a conversation, and this model has no chat template"
    ):
        inspect(data, *BY_DEFAULT, tokenizer=tokenizer)
    assert inspect(data, *BY_DEFAULT).samples[0] == Shown("on a mat", "no")
