"""Parse `fedsoda-edge config`, and show with which options a join would begin here: of config.toml, of variables, defaults."""

from __future__ import annotations

from typing import Any

import msgspec
import typer

from fedsoda_edge.cli import options as opt
from fedsoda_edge.ports.console import finish, note, reporting, show
from fedsoda_edge.ports.given_options import effective_settings
from fedsoda_edge.ports.setting_table import SettingRow, SettingTable, written
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
        show(SettingTable([_row(row) for row in rows]))
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


def _row(row: OptionRow) -> SettingRow:
    is_given = row.source != "default"
    return SettingRow(row.option, written(row.value), written(row.default), row.source, row.meaning, is_given)
