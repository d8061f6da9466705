"""Tell which options of a command are in force, and where each comes from. Showing them is left to the displays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import typer

from fedsoda_edge.ports.log_options import LOG_OPTIONS
from fedsoda_edge.units import counted


@dataclass(frozen=True)
class EffectiveOption:
    """The value of an option that is in force, and where it comes from."""

    value: str | int | float | None
    source: str


def effective_settings(context: typer.Context) -> dict[str, EffectiveOption]:
    """Collect the options of the running command by name.

    Returns:
        For each option its value and its source: "option", "argument", the environment variable's name, "config.toml"
        or "default".
    """
    found = {}
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in ("as_json", "jsonl", "debug", *LOG_OPTIONS) or name not in context.params:
            continue
        value, origin = context.params[name], context.get_parameter_source(name)
        source = {"COMMANDLINE": "option", "ENVIRONMENT": str(parameter.envvar), "DEFAULT_MAP": "config.toml"}.get(
            origin.name if origin else "", "default"
        )
        if source == "option" and parameter.param_type_name == "argument":
            source = "argument"
        if isinstance(value, list | tuple):
            value = " ".join(map(str, value)) or None
        found[name] = EffectiveOption(value if isinstance(value, int | float | str | None) else str(value), source)
    return found


ON_COMMAND_LINE = ("option", "argument")  # the sources of `effective_settings` that stand on the command line


def settings_lines(settings: Mapping[str, tuple[Any, str]], *, is_detailed: bool, others: str = "--debug") -> str:
    """List the settings that were given, a line each, by where they come from.

    Args:
        settings: {name: (value, source)}; a value of None is left out.
        is_detailed: whether to list the defaults too. others: what shows the rest.
    """
    by_source: dict[str, list[str]] = {}
    for name, (value, source) in settings.items():
        if value is not None:
            where = "the command line" if source in ON_COMMAND_LINE else source
            shown = json.dumps(value, ensure_ascii=False)  # a prompt of several lines is one here
            by_source.setdefault(where, []).append(f"  {name} = {shown}")
    defaults = by_source.pop("default", [])
    lines = [line for source, given in by_source.items() for line in (f"settings from {source}:", *given)]
    if is_detailed:
        lines += ["defaults:", *defaults]
    elif defaults:
        lines.append(f"{counted(len(defaults), 'other setting')} at the default; {others} shows them")
    return "\n".join(lines)
