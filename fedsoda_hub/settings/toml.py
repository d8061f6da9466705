"""Read, check and write files of our tables: an unknown key is answered with the nearest, a refused value in words.

What the tables of a file mean together is for `run.py` and `compare/settings.py` to say.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fedsoda_edge.errors import UsageProblem
from fedsoda_hub.settings.combine import without_unused
from fedsoda_hub.settings.keys import TOML, Key, Values, fields_of, refuse_unless
from fedsoda_hub.settings.methods import keys_of_method
from fedsoda_hub.settings.tables import Section, Tables

S = TypeVar("S", bound=Section)


def read_toml(path: Path, example: str = "a RUN.toml (README, A run of your own)") -> TOML:
    """Read the tables of a file.

    Args:
        example: what to write if the file does not exist.

    Raises:
        UsageProblem: the file is missing or not TOML.
    """
    try:
        data = path.read_bytes()
        return tomllib.loads(data.decode(json.detect_encoding(data)))  # also with a BOM, as some editors write it
    except FileNotFoundError:
        raise UsageProblem(f"{path} is not there; write {example}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageProblem(f"{path} cannot be read ({error}); name a file of UTF-8 text that you may read") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageProblem(
            f"{path} is not TOML: {error}; correct that place: text is written in quotes, a table's name in [ ]"
        ) from error


def check(raw: TOML, section: type[msgspec.Struct], file: str, table: str = "") -> None:
    """Check every key and value of these tables by itself; what goes together is checked by `combine.settled`.

    Args:
        table: the name of the table that `raw` is; "": it is the whole file.

    Raises:
        UsageProblem: a key is unknown (names the nearest), a key without a default is missing, or a value is not of the
            key's sort or out of its range (names the value and what is allowed).
    """
    _check_keys(raw, section, file, table)
    _check_values(raw, section, file, table)


def table_of(value: object, section: type[S], name: str, file: str) -> S:
    """Read one table of a file of ours, such as [compare], checked like those of RUN.toml."""
    table = as_table(value, name, file)
    check(table, section, file, name)
    return msgspec.convert(table, section, strict=True)


def as_table(value: object, name: str, file: str) -> TOML:
    """Return a value of a file that has to be a table.

    Raises:
        UsageProblem: it is not one.
    """
    if not isinstance(value, dict):
        raise UsageProblem(f"{file}: {name} is {value!r}, but it is a table: write [{name}]")
    return value


def write_toml(tables: Tables) -> str:
    """Write the text of a RUN.toml with all settings that the method reads."""
    lines: list[str] = []  # JSON's scalars and lists are TOML's too
    written = without_unused(msgspec.to_builtins(tables), keys_of_method(tables.method))
    by_name = {key: written[key] for key in fields_of(Tables)}
    for key, value in sorted(by_name.items(), key=lambda item: isinstance(item[1], dict)):
        if isinstance(value, dict):
            lines.append(f"[{key}]")
        for name, scalar in value.items() if isinstance(value, dict) else [(key, value)]:
            if scalar is not None:
                lines.append(f"{name} = {json.dumps(scalar, ensure_ascii=False, allow_nan=False)}")
    return "\n".join(lines) + "\n"


def _check_keys(raw: TOML, section: type[msgspec.Struct], file: str, table: str) -> None:
    keys = fields_of(section, table)
    where = f"[{table}] " if table else ""
    for name, value in raw.items():
        if name not in keys:
            near = difflib.get_close_matches(name, keys, 1, cutoff=0.0)
            raise UsageProblem(
                f"{file} has no key {where}{name}; the nearest is {where}{near[0]}: correct or delete it"
            )
        if keys[name].section is not None:
            as_table(value, name, file)
    for name, key in keys.items():
        if key.section is not None:
            if key.is_required or name in raw:
                _check_keys(as_table(raw.get(name, {}), name, file), key.section, file, name)
        elif key.is_required and name not in raw:
            below = f" below [{table}]" if table else ""
            raise UsageProblem(f"{file} has no {key}; write {name} = ...{below}")


def _check_values(raw: TOML, section: type[msgspec.Struct], file: str, table: str) -> None:
    for name, value in raw.items():
        key = fields_of(section, table)[name]
        if key.section is not None:
            _check_values(as_table(value, name, file), key.section, file, name)
        else:
            _check_value(key, value, file)


def _check_value(key: Key, value: Any, file: str) -> None:
    try:
        made = msgspec.convert(value, key.type, strict=True)
    except msgspec.ValidationError as error:
        where, wrong, values = str(key), value, key.values
        if place := re.search(r" - at `\$\[(\d+)\]`$", str(error)):
            where, wrong, values = f"{key}[{place[1]}]", value[int(place[1])], key.items
        raise UsageProblem(f"{where} = {wrong!r} in {file}; it must be {_missed(values, str(error))}") from error
    # TOML has inf, which no lower bound excludes.
    is_finite = not isinstance(made, float) or math.isfinite(made)
    refuse_unless(is_finite, key, value, f"{key.values.allowed} and finite", file)


def _missed(values: Values, problem: str) -> str:
    """Say what a value must be, from msgspec's `Expected `int`, got `str``, `Expected `int` >= 1`, ..."""
    if problem.startswith("Number out of range"):
        return "a smaller number"
    if re.match(r"Expected `[^`]+`, got ", problem):
        return f"{values.sort}, {values.allowed}" if values.allowed else values.sort
    return values.allowed
