"""What a row means is decided in one place: text, a conversation, nothing to learn, or a refusal with line and column."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fedsoda_edge.data.examples import ChatExample, Example, RowReader, Skipped, TextExample, shown
from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.errors import DataProblem
from fedsoda_edge.protocol.template import TextTemplate
from tests.edge.data.rows import BY_DEFAULT, COMPLETION, MESSAGES, PROMPT, write

ASKED, ANSWERED = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}
CALLED = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def read(row: dict[str, Any], *, is_text: bool = True) -> Example:
    return RowReader(PROMPT, COMPLETION, {}, is_text).read(row)


def read_default(row: dict[str, Any]) -> Example:
    return RowReader(*BY_DEFAULT, {}).read(row)


@pytest.mark.parametrize(
    ("value", "text"),
    [("a\0b", "a\0b:"), ("", ":"), (7, "7:"), (-1.5, "-1.5:"), (10**30, f"{10**30}:"), (Decimal("1E+2"), "100:")],
)
def test_a_prompt_is_text_or_a_finite_number(value: object, text: str) -> None:
    assert read({"text": value, "label": "b"}) == TextExample(text, "b")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (True, "'text' is true, a boolean and not text"),
        (float("nan"), "'text' is nan, not a finite number"),
        (float("-inf"), "'text' is -inf, not a finite number"),
        (Decimal("NaN"), "'text' is Decimal('NaN'), not a finite number"),
        ({"title": "tap"}, "'text' is {'title': 'tap'}, an object and not text"),
        (["tap", "drips"], "'text' is ['tap', 'drips'], a list and not text"),
        (b"raw", "'text' is b'raw', bytes and not text"),
        (datetime.date(2026, 1, 2), "'text' is datetime.date(2026, 1, 2), date and not text"),
        ("drips \ud83d!", r"'text' has half a character, \ud83d, at character 7: UTF-8 cannot hold it"),
        pytest.param(10**5000, "a number has more than 4,300 digits", id="digits"),
    ],
)
def test_other_values_never_become_text(value: object, said: str) -> None:
    with pytest.raises(DataProblem) as problem:
        read({"text": value, "label": "b"})
    assert str(problem.value).startswith(said)


@pytest.mark.parametrize("value", [3, 1.0, True, ["b"], {"b": 1}, b"b", Decimal(1)])
def test_a_completion_is_text(value: object) -> None:
    with pytest.raises(DataProblem, match=r"'label' is .*, not a string; completions are text, so write it in quotes$"):
        read({"text": "a", "label": value})
    with pytest.raises(DataProblem, match=r"not a string; completions are text, so cast the column to strings$"):
        read({"text": "a", "label": value}, is_text=False)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": None, "label": "b"}, "null"),
        ({"text": "a", "label": None}, "null"),
        ({"text": "a", "label": ""}, "empty"),
        ({"text": "a", "label": " \n\t\u00a0"}, "empty"),
        ({"text": "a" * (1 << 20), "label": "b"}, "long"),
    ],
)
def test_what_cannot_be_learned_from_is_skipped(row: dict[str, Any], reason: str) -> None:
    assert read(row) == Skipped(reason)  # type: ignore[arg-type]


def test_a_completion_is_blank_when_its_values_are_whatever_stands_around_them() -> None:
    reader = RowReader(PROMPT, TextTemplate("{label}."), {})
    assert reader.read({"text": "a", "label": " "}) == Skipped("empty")
    assert RowReader(PROMPT, TextTemplate("yes"), {}).read({"text": "a"}) == TextExample("a:", "yes")


@pytest.mark.parametrize(
    ("row", "messages", "tools"),
    [
        ({"messages": [ASKED, ANSWERED]}, [ASKED, ANSWERED], None),
        ({"conversations": [ASKED, ANSWERED]}, [ASKED, ANSWERED], None),
        (
            {"id": 1, "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]},
            [{"role": "system", "content": "s"}, ASKED, ANSWERED],
            None,
        ),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, [ASKED, ANSWERED], None),
        ({"prompt": "a?", "prompt_id": "x", "messages": [ASKED, ANSWERED]}, [ASKED, ANSWERED], None),
        ({"prompt": None, "completion": None, "messages": [ASKED, ANSWERED]}, [ASKED, ANSWERED], None),
        ({"messages": [ASKED, CALLED]}, [ASKED, CALLED], None),
        ({"messages": [ASKED, CALLED | {"content": None}]}, [ASKED, CALLED | {"content": None}], None),
        ({"messages": [ASKED | {"name": None}, ANSWERED], "tools": []}, [ASKED, ANSWERED], None),
        ({"messages": [ASKED, ANSWERED], "tools": TOOLS}, [ASKED, ANSWERED], TOOLS),
        ({"messages": [ASKED, ANSWERED], "tools": json.dumps(TOOLS)}, [ASKED, ANSWERED], TOOLS),
        (
            {"messages": [ASKED, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]},
            [ASKED, ANSWERED],
            None,
        ),
    ],
)  # fmt: skip
def test_conversations_are_read_as_others_write_them(row: dict[str, Any], messages: object, tools: object) -> None:
    found = read_default(row)
    assert isinstance(found, ChatExample)
    assert (list(found.messages), found.tools) == (messages, tools)


def test_a_pair_goes_before_messages_and_a_template_of_the_run_before_both() -> None:
    assert read_default({"prompt": "a", "completion": "b", "messages": None}) == TextExample("a", "b")
    assert read_default({"prompt": "a", "completion": "b", "messages": [ASKED, ANSWERED]}) == TextExample("a", "b")
    with pytest.raises(DataProblem, match="no column 'text'; there are messages"):
        read({"messages": [ASKED, ANSWERED]})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [ASKED, ANSWERED | {"content": " "}]}, "empty"),
        ({"messages": [ASKED, ANSWERED | {"content": "", "tool_calls": []}]}, "empty"),
        ({"messages": [ASKED, ANSWERED | {"content": None}]}, "null"),
        ({"messages": [ASKED | {"content": None}, ANSWERED]}, "null"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": None}]}, "null"),
        ({"messages": None}, "null"),
        ({"messages": [ASKED, ANSWERED | {"content": "x" * (1 << 16)}]}, "long"),
    ],
)
def test_conversations_without_anything_to_learn_are_skipped(row: dict[str, Any], reason: str) -> None:
    assert read_default(row) == Skipped(reason)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [ASKED]}, "the last message has the role 'user'; it must be the assistant's"),
        ({"messages": [ASKED, ANSWERED | {"role": "Assistant"}]}, "the last message has the role 'Assistant'; it must be"),
        ({"messages": []}, "messages must be a list of"),
        ({"messages": "hello"}, "messages must be a list of .*, but is 'hello'"),
        ({"messages": {"role": "user"}}, "messages must be a list of"),
        ({"messages": [ASKED, "b"]}, "messages must be a list of"),
        ({"messages": [{"content": "a"}, ANSWERED]}, r"messages\[0\] has no role; messages must be a list of"),
        ({"messages": [ASKED | {"content": 3}, ANSWERED]}, r"messages\[0\] has the content 3; messages must be a list of"),
        ({"messages": [ASKED | {"content": [{"type": "image"}]}, ANSWERED]}, r"messages\[0\] has a part 'image'"),
        ({"conversations": [{"from": "function_call", "value": "a"}]}, r"conversations\[0\] is from 'function_call'; known"),
        ({"messages": [ASKED, ANSWERED | {"content": "\udc00"}]}, r"messages\[1\] has half a character, \\udc00"),
        ({"messages": [ASKED, CALLED | {"tool_calls": [{"a": "\udc00"}]}]}, r"messages\[1\] has half a character"),
        ({"messages": [ASKED, ANSWERED], "tools": "{oops"}, r"tools is '{oops', not a list of objects"),
        ({"messages": [ASKED, ANSWERED], "tools": 3}, r"tools is 3, not a list of objects"),
        ({"prompt": ["a", "b"], "completion": ["c", "d"]}, "prompt and completion are lists of 4 texts in all; write an obj"),
        ({"data": [{"prompt": "a", "completion": "b"}] * 3}, "this is one object, and the rows are the 3 objects in its 'd"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataProblem, match=f"^{said}"):
        read_default(row)


def test_keys_that_arrow_fills_in_are_left_out(tmp_path: Path) -> None:
    call = {"name": "f", "arguments": {"city": "Bern"}}
    rows = [
        {"messages": [ASKED, {"role": "assistant", "tool_calls": [call]}]},
        {"messages": [ASKED | {"name": "eva"}, ANSWERED, ASKED, {"role": "assistant", "tool_calls": [{"name": "g"}]}]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d")
    found = [example for _, example in LocalData(tmp_path / "d").examples(*BY_DEFAULT)]
    assert [list(one.messages) for one in found if isinstance(one, ChatExample)] == [row["messages"] for row in rows]


def test_an_error_shows_at_most_80_characters_of_a_value() -> None:
    for value in ("x" * 140_000, b"x" * 140_000, ["x" * 90] * 90, {"x" * 90: "y" * 90}, 10**200, 1.5, None, True):
        assert len(shown(value)) <= 80
    assert (shown(None), shown(True), shown("a"), shown(1.0)) == ("null", "true", "'a'", "1.0")
    with pytest.raises(DataProblem) as problem:
        read({f"secret {'x' * 500} {n}": 1 for n in range(100)})
    assert len(str(problem.value)) < 2000


def test_rows_that_are_skipped_are_counted_with_their_first_line(tmp_path: Path) -> None:
    good, null, blank = {"text": "a", "label": "b"}, {"text": None, "label": "b"}, {"text": "a", "label": " "}
    assert write(tmp_path / "d", null, good, blank, blank).check(PROMPT, COMPLETION) == 4
    with pytest.raises(DataProblem) as problem:
        write(tmp_path / "d", null, blank, blank).check(PROMPT, COMPLETION)
    assert str(problem.value) == (
        f"none of the 3 rows of {tmp_path / 'd'} can be used: 1: a value is null (first in line 1); 2: nothing to learn: "
        "the completion is empty or blank (first in line 2); write rows with a completion"
    )


def test_a_value_that_is_no_text_is_told_with_its_line(tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", {"passage": "a", "label": "b"}, {"passage": ["a"], "label": "b"})
    with pytest.raises(
        DataProblem, match=r"d\.jsonl:2: 'passage' is \['a'\], a list and not text; write text or a number"
    ):
        LocalData(data.path, {"text": "passage"}).check(PROMPT, COMPLETION)
    table = pyarrow.Table.from_pylist([{"messages": MESSAGES, "text": b"raw", "label": "b"}])
    pyarrow.parquet.write_table(table, tmp_path / "d")
    with pytest.raises(DataProblem, match=r"d:1: 'text' is b'raw', bytes and not text; cast the column to strings"):
        LocalData(tmp_path / "d").check(PROMPT, COMPLETION)
