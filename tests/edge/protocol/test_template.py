"""A run's template is text with columns in braces, and nothing that could reach further into a row."""

from __future__ import annotations

import pytest

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.template import TextTemplate


def test_columns_stand_in_the_order_of_the_text_and_doubled_braces_are_braces() -> None:
    template = TextTemplate("{{id}} {text} of {place}, {text}:")
    assert template.columns == ("text", "place")
    assert template.render({"text": "fever", "place": 7, "other": "x"}) == "{id} fever of 7, fever:"


@pytest.mark.parametrize("text", ["{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{", "{}"])
def test_a_template_has_columns_and_nothing_else(text: str) -> None:
    with pytest.raises(UsageProblem):
        TextTemplate(text)
