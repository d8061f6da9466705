"""Parse `fedsoda-hub config`, and show every setting of a run: its value, its default, where it comes from, what it means.

Which settings there are is declared in `settings/tables.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from fedsoda_edge.ports.console import finish, note, reporting, show
from fedsoda_edge.ports.setting_table import SettingRow, SettingTable, written
from fedsoda_edge.units import counted
from fedsoda_hub.cli.options import Debug, Json, RunFile

if TYPE_CHECKING:
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
        show(SettingTable([_row(row) for row in rows]))
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


def _row(row: ConfigRow) -> SettingRow:
    said = f"{row.meaning} ({row.allowed})" if row.allowed else row.meaning
    return SettingRow(row.key, written(row.value), written(row.default), row.source, said, row.is_changed)
