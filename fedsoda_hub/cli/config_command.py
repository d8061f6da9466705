"""Parse `fedsoda-hub config`, and show every setting of a run: its value, its default, where it comes from, what it means.

Which settings there are is declared in `settings/tables.py`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import msgspec

from fedsoda_edge.ports.console import finish, note, reporting
from fedsoda_edge.units import counted
from fedsoda_hub.cli.options import Debug, Json, RunFile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedsoda_hub.settings.keys import SettingValue
    from fedsoda_hub.settings.run import RunSettings


class ConfigRow(msgspec.Struct, frozen=True, kw_only=True):
    """One setting of a run.

    default: None: every run must give it, or there is none. source: the name of the file that gives it, or "default".
    allowed: which values it takes, in words; "": all of its sort.
    """

    key: str
    value: SettingValue
    default: SettingValue
    is_changed: bool
    source: str
    meaning: str
    allowed: str


def config(run: RunFile, as_json: Json = False, debug: Debug = False) -> None:
    """Show every setting of a run: value, default, where it comes from, what it means."""
    with reporting(as_json, False, debug):
        from fedsoda_hub.settings.run import read_settings

        settings = read_settings(run)
        rows = config_rows(settings)
        _show(rows)
        changed = counted(sum(row.is_changed for row in rows), "setting")
        note(
            f"{changed} of {len(rows)} of {settings.path} differ from the defaults of {settings.method.name}: marked *"
        )
        finish({"status": "ok", "file": settings.path, "settings": msgspec.to_builtins(rows)}, as_json, False)


def config_rows(settings: RunSettings) -> list[ConfigRow]:
    """List the settings in the order of their tables."""
    from fedsoda_hub.settings.keys import keys_of
    from fedsoda_hub.settings.run import defaults_of, effective
    from fedsoda_hub.settings.tables import Tables

    defaults, keys = defaults_of(settings), keys_of(Tables)
    return [
        ConfigRow(
            key=name,
            value=one.value,
            default=defaults[name],
            is_changed=one.value != defaults[name],
            source=one.source,
            meaning=keys[name].description,
            allowed=keys[name].values.allowed,
        )
        for name, one in effective(settings).items()
    ]


def _show(rows: Sequence[ConfigRow]) -> None:
    from rich.table import Table
    from rich.text import Text

    from fedsoda_edge.ports.console import show

    table = Table("", "key", "value", "default", "from", "meaning", title_justify="left")
    for row in rows:
        cells = ("*" if row.is_changed else "", row.key, _shown(row.value), _shown(row.default), row.source)
        said = f"{row.meaning} ({row.allowed})" if row.allowed else row.meaning
        table.add_row(*(Text(cell, style="bold" if row.is_changed else "") for cell in cells), Text(said))
    show(table)


def _shown(value: SettingValue) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False)
