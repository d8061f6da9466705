"""Questions come from rows by template; a generated answer is right by its text or by its last number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedsoda_edge.errors import DataProblem
from fedsoda_edge.protocol.template import TextTemplate
from fedsoda_hub.evaluation.questions import Question, choices_of, is_right, read_questions


def test_choices_are_the_distinct_completions_if_at_most_20() -> None:
    twenty = [Question("p", f"answer {i:02}") for i in range(20)]
    assert choices_of(twenty * 2) == [f"answer {i:02}" for i in range(20)]
    assert choices_of([*twenty, Question("p", "one more")]) == []
    assert choices_of(twenty, "none") == []


@pytest.mark.parametrize(
    ("made", "wanted", "right"),
    [
        (" Paris ", "Paris", True),
        ("paris", "Paris", False),
        ("3 + 4 = 7, so 7", "#### 7", True),
        ("so 1,234.", "the sum is 1234", True),
        ("it is 70", "7", False),
        ("-7", "7", False),
        ("no number", "7", False),
        ("7 apples and 3 pears", "7 apples", False),
        ("She pays 1,000 + 234 = <<1000+234=1234>>1234.\n#### 1,234", "1000 + 234 = 1234\n#### 1234", True),
        ("so $1,234.00.", "#### 1234", True),
        ("16-3", "#### 3", True),  # a difference, no negative number
        ("it fell to $-3", "#### -3", True),
        ("1,2,3", "#### 123", False),
        ("3/2", "1/2", False),
        ("1999-05-02", "2020-01-02", False),
    ],
)
def test_a_generated_answer_is_right_by_its_text_or_its_last_number(made: str, wanted: str, right: bool) -> None:
    assert is_right(made, wanted) is right


def test_what_begins_another_row_stops_a_generation(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    templates = TextTemplate("Question: {q}\nAnswer:"), TextTemplate("{a}")

    def stops(*answers: str, shots: int = 0, prompt: TextTemplate = templates[0]) -> set[tuple[str, ...]]:
        rows = [{"q": f"{n}?", "a": a, "prompt": f"Question: {n}?", "completion": a} for n, a in enumerate(answers)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {question.stops for question in read_questions(file, prompt, templates[1], shots=shots)}

    assert stops("1", "2", shots=1) == {("\n\n", "\nQuestion:")}  # where lm-evaluation-harness stops GSM8K, and sooner
    assert stops("1", "2") == {("\nQuestion:",)}  # nothing was shown that a blank line would separate
    assert stops("1", "two\n\nlines", shots=1) == {("\nQuestion:",)}  # answers may hold blank lines
    assert stops("1", "2", shots=1, prompt=TextTemplate("{q}\nAnswer:")) == {("\n\n",)}
    assert stops("1", "so\nQuestion: why?", prompt=templates[0]) == {()}
    file.write_text('{"prompt": "Question: 1?", "completion": "1"}\n')
    assert read_questions(file, *templates)[0].stops == ("\nQuestion:",)
    file.write_text('{"prompt": "Sum: 1?", "completion": "1"}\n')
    assert read_questions(file, *templates)[0].stops == ()  # rendered by another template


def test_rows_may_come_by_the_template_or_already_rendered(tmp_path: Path) -> None:
    prompt, completion = TextTemplate("Say {word}:"), TextTemplate("{answer}")
    raw, rendered = tmp_path / "raw.jsonl", tmp_path / "rendered.jsonl"
    raw.write_text('{"word": "a", "answer": "yes"}\n')
    rendered.write_text('{"prompt": "Say a:", "completion": "yes"}\n')
    assert read_questions(raw, prompt, completion) == read_questions(rendered, prompt, completion)


def test_shots_are_other_rows_with_their_answers_drawn_by_seed_and_row(tmp_path: Path) -> None:
    rows = [{"q": f"question {number}", "a": f"answer {number}"} for number in range(9)]
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    templates = TextTemplate("Q: {q}\nA:"), TextTemplate("{a}")
    asked = read_questions(file, *templates, shots=4, seed=1)
    for number, question in enumerate(asked):
        *examples, last = question.prompt.split("\n\n")
        assert last == f"Q: question {number}\nA:"
        shown = {int(example.split()[-1]) for example in examples}
        assert len(shown) == 4
        assert number not in shown
        assert all(
            example == f"Q: question {n}\nA: answer {n}" for example in examples for n in [int(example.split()[-1])]
        )
    assert read_questions(file, *templates, shots=4, seed=1) == asked
    assert read_questions(file, *templates, shots=4, seed=2) != asked
    with pytest.raises(DataProblem, match=r"shots = 9 needs 10 rows, but .* has 9"):
        read_questions(file, *templates, shots=9)
