"""Render a run's text template: literal text with `{column}` places, as it travels in the Welcome.

Whether a row has the columns is left to `data/local_data.py`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.units import one_line

DEFAULT_PROMPT, DEFAULT_COMPLETION = "{prompt}", "{completion}"


@dataclass(frozen=True)
class TextTemplate:
    """A text with `{column}` places: no format specs, attributes or indexing, since it comes from the hub.

    Raises:
        UsageProblem: on construction, when the text has anything else in braces.
    """

    text: str

    def __post_init__(self) -> None:
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise UsageProblem(
                f"the template {one_line(self.text)!r} has unmatched braces ({error}); write {{{{ or }}}} for a brace itself"
            ) from error
        for _, name, spec, conversion in parts:
            if name is not None and (spec or conversion or not re.fullmatch(r"\w+", name)):
                raise UsageProblem(
                    f"the template {one_line(self.text)!r} has a place {{{one_line(name, 80)}}} that is not just a column; write {{column}}"
                )

    @cached_property
    def _parts(self) -> tuple[tuple[str, str | None], ...]:
        """The literal texts, each with the column behind it; parsed once, since every row of a file is rendered."""
        return tuple((literal, name) for literal, name, _, _ in string.Formatter().parse(self.text))

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns that the text names, in order, each once."""
        return tuple(dict.fromkeys(name for _, name in self._parts if name))

    @property
    def advice(self) -> str:
        """A sentence on a prompt that ends in a space, which a sample joins to the first word; "" for another text."""
        bare = self.text.rstrip(" \t")
        if bare == self.text:
            return ""
        return (
            "the prompt ends in a space, so what is trained and what is asked have different ids; write "
            f"prompt = {bare!r}: the space before a completion is added"
        )

    def render(self, row: Mapping[str, object]) -> str:
        """Put a row's values in their places.

        Raises:
            KeyError: the row lacks a column.
        """
        return "".join(literal if name is None else literal + str(row[name]) for literal, name in self._parts)
