"""Draw settings for people: a table where the terminal is wide, and below that a line for each with its meaning under it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    Value = str | float | bool | Sequence[object] | None

WIDE = 120  # columns; five columns of text in fewer cut keys in two


@dataclass(frozen=True)
class SettingRow:
    """One setting as people read it. default: "" where there is none. is_marked: whether it is of note."""

    key: str
    value: str
    default: str
    source: str
    meaning: str
    is_marked: bool


def written(value: Value) -> str:
    """Write a value as people write it in a file."""
    return "" if value is None else json.dumps(value, ensure_ascii=False)


class SettingTable:
    """A drawing for rich of these rows."""

    def __init__(self, rows: Sequence[SettingRow]) -> None:
        self._rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        if options.max_width < WIDE:
            for row in self._rows:
                head = Text(f"{'*' if row.is_marked else ' '} {row.key} = {row.value}", "bold" if row.is_marked else "")
                tail = (
                    f"  ({row.source}; default {row.default})" if row.is_marked and row.default else f"  ({row.source})"
                )
                yield head.append(tail, "dim")
                yield Padding(Text(row.meaning), (0, 0, 0, 6))
            return
        table = Table("", "key", "value", "default", "from", "meaning")
        table.columns[1].no_wrap = table.columns[4].no_wrap = True
        for column in table.columns[2:4]:
            column.overflow, column.max_width = "fold", 28
        for row in self._rows:
            style = "bold" if row.is_marked else ""
            cells = ("*" if row.is_marked else "", row.key, row.value, row.default, row.source)
            table.add_row(*(Text(cell, style=style) for cell in cells), Text(row.meaning))
        yield table
