"""Parse `fedsoda-edge config`, and show with which options a join would begin here: of config.toml, of variables, defaults."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import typer

from fedsoda_edge.cli import options as opt
from fedsoda_edge.ports.console import finish, note, reporting, show
from fedsoda_edge.ports.given_options import effective_settings
from fedsoda_edge.units import counted


class OptionRow(msgspec.Struct, frozen=True, kw_only=True):
    """One option of `join`. source: "config.toml", the name of a variable, or "default"."""

    option: str
    value: str | int | float | None
    default: str | int | float | None
    source: str
    meaning: str


def config(context: typer.Context, as_json: opt.JsonOption = False, debug: opt.DebugOption = False) -> None:
    """Show the options with which a join would begin here: value, default, where it comes from, what it means."""
    with reporting(as_json, False, debug):
        from fedsoda_edge.join.home import Home

        rows = _rows(context)
        _show(rows)
        given = sum(row.source != "default" for row in rows)
        note(f"{counted(given, 'option')} of {len(rows)} given, by {Home().config} or by variables")
        finish({"status": "ok", "file": str(Home().config), "options": msgspec.to_builtins(rows)}, as_json, False)


def _rows(context: typer.Context) -> list[OptionRow]:
    root: Any = context.find_root()
    join = root.command.commands["join"]
    with join.make_context("join", [], parent=root, resilient_parsing=True) as parsed:  # it needs no data to be asked
        found = opt.without_secrets(effective_settings(parsed))
    parameters = {str(one.name): one for one in join.params}
    return [
        OptionRow(
            option=parameters[name].opts[0] if name != "url" else "LINK|URL",
            value=one.value,
            default=parameters[name].default if isinstance(parameters[name].default, str | int) else None,
            source=one.source,
            meaning=parameters[name].help or "",
        )
        for name, one in found.items()
    ]


def _show(rows: list[OptionRow]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("option", "value", "default", "from", "meaning")
    for row in rows:
        style = "" if row.source == "default" else "bold"
        cells = (row.option, _shown(row.value), _shown(row.default), row.source)
        table.add_row(*(Text(cell, style=style) for cell in cells), Text(row.meaning))
    show(table)


def _shown(value: str | float | None) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False)
