"""Rows have what the run's template asks for; what is missing is told with file, line, and what its caller can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsoda_edge.data.local_data import LocalData, remedy_for_columns
from fedsoda_edge.errors import DataProblem
from tests.edge.data.rows import BY_DEFAULT, COMPLETION, MESSAGES, PROMPT, write


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "a", "tag": "b"}'], r"d.jsonl:1: no column 'label'; there are tag, text"),
        (
            ['{"text": "a", "label": 1}'],
            r"d.jsonl:1: 'label' is 1, not a string; completions are text, so write it in quotes",
        ),
        ([], r"has no rows"),
    ],
)
def test_rows_without_what_the_template_asks_for_are_named(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(DataProblem, match=message):
        write(tmp_path / "d.jsonl", *lines).check(PROMPT, COMPLETION)


def test_columns_may_have_another_name(tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", {"passage": "a", "label": "b"})
    assert LocalData(data.path, {"text": "passage"}).check(PROMPT, COMPLETION) == 1


def test_a_missing_column_is_told_with_what_its_caller_can_do(tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", {"passage": "a", "label": "b"})
    said = f"{data.path}:1: no column 'text'; there are label, passage; "
    with pytest.raises(DataProblem) as problem:
        data.check(PROMPT, COMPLETION)
    assert str(problem.value) == said + "rename one, or name its column: columns={'text': 'COLUMN'}"  # in Python
    fields: dict[str, Any] = problem.value.fields()
    crossed = DataProblem(**fields)  # from the process that reads binary formats
    assert (str(crossed), crossed.missing) == (str(problem.value), "text")
    with pytest.raises(DataProblem) as problem, remedy_for_columns("rename one, or give --column {}=COLUMN"):
        data.check(PROMPT, COMPLETION)
    assert str(problem.value) == said + "rename one, or give --column text=COLUMN"
    gone = pytest.raises(DataProblem, match=r"cannot be read: No such file or directory; check the path$")
    with gone, remedy_for_columns("rename {}"):
        LocalData(tmp_path / "gone.jsonl").check(PROMPT, COMPLETION)


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        (MESSAGES[:1], "the last message has the role 'user'; it must be the assistant's"),
        ([], "messages must be a list of"),
        ([{"role": "assistant", "content": 3}], "messages must be a list of"),
        ("hello", "messages must be a list of"),
    ],
)
def test_a_conversation_without_an_answer_is_refused_with_its_line(
    tmp_path: Path, messages: object, sentence: str
) -> None:
    with pytest.raises(DataProblem, match=f"d.jsonl:2: .*{sentence}"):
        write(tmp_path / "d.jsonl", {"messages": MESSAGES}, {"messages": messages}).check(*BY_DEFAULT)
