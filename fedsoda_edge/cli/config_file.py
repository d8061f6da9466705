"""Read config.toml of a FEDSODA_HOME: options that need not be given each time; refuse those that no command knows.

Whether a value is allowed is left to the command.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from fedsoda_edge.errors import UsageProblem

Options: TypeAlias = Mapping[str, "set[str] | Options"]  # command: its options, or its own commands
Defaults: TypeAlias = dict[str, object]  # option: value, and command: its own


def option_defaults(path: Path, options: Options) -> Defaults:
    """Read the options that config.toml gives to each command, as Click's default_map.

    Keys at the top are for every command that has such an option; keys in a table, `[join]` or `[data.check]`, are for
    that command alone and override those at the top.

    Args:
        options: {command: set of its options, or {subcommand: ...}}.

    Raises:
        UsageProblem: the file is not TOML, no command has such an option (names the nearest), or a command's name has a
            value that is not a table.
    """
    try:
        data = path.read_bytes()
        given = tomllib.loads(data.decode(json.detect_encoding(data)))  # also with a BOM, as some editors write it
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageProblem(f"{path} cannot be read as TOML: {error}; correct the file, or delete it") from error
    known = _leaves(options)
    everywhere = {
        key: value
        for key, value in given.items()
        if not isinstance(value, dict) and (key in known or key not in options)  # `data` is an option and a command
    }
    _refuse_unknown(path, "", everywhere, known)

    def of(names: Options | set[str], table: object, where: str) -> Defaults:
        if not isinstance(table, dict):
            name = where.rstrip(".")
            raise UsageProblem(
                f"{path} has {name} = {table!r}, but {name} is a command; write its options below [{name}]"
            )
        if not isinstance(names, set):
            _refuse_unknown(path, where, table, set(names))
            return {name: of(inner, table.get(name, {}), f"{where}{name}.") for name, inner in names.items()}
        _refuse_unknown(path, where, table, names)
        return {key: value for key, value in everywhere.items() if key in names} | table

    return of(options, {key: value for key, value in given.items() if key not in everywhere}, "")


def _leaves(options: Options | set[str]) -> set[str]:
    """Collect the options of every command."""
    return options if isinstance(options, set) else set[str]().union(*map(_leaves, options.values()))


def _refuse_unknown(path: Path, where: str, table: Iterable[str], known: set[str]) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), 1, cutoff=0.0)
            what = f"the nearest is {where}{near[0]}" if near else f"{where.rstrip('.')} takes no options"
            raise UsageProblem(f"{path} has a key {where}{key} that no command knows; {what}")
