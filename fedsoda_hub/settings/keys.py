"""Say in words what a key of a settings file accepts and means, from its field in `tables.py`.

Errors, `--help` and the guide take their words from here, so that a range is declared once. Reading a file is
`toml.py`'s.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin

import msgspec
from msgspec import Meta

from fedsoda_edge.errors import UsageProblem
from fedsoda_hub.settings.tables import MAX_SEED

TOML: TypeAlias = dict[str, object]  # a file as it was read: nothing in it is checked yet
SettingValue: TypeAlias = str | int | float | bool | list[Any] | None  # of a key that was checked


@dataclass(frozen=True)
class Values:
    """The values that something takes, in words. sort: "a whole number". allowed: "at least 1"; "": all of that sort."""

    sort: str
    allowed: str


@dataclass(frozen=True)
class Key:
    """One key of a table, or a table itself. type: as annotated. default: of an optional key."""

    table: str
    name: str
    type: Any
    is_required: bool
    default: object = None

    def __str__(self) -> str:
        """Write the key as messages do: "seed", "[lora] rank"."""
        return f"[{self.table}] {self.name}" if self.table else self.name

    @property
    def section(self) -> type[msgspec.Struct] | None:
        """The struct of a key that is a table."""
        kind, _ = _parts(self.type)
        return kind if isinstance(kind, type) and issubclass(kind, msgspec.Struct) else None

    @property
    def description(self) -> str:
        """The meaning of the key."""
        annotations = [*_members(self.type), self.type] if len(_members(self.type)) > 1 else [self.type]
        return "; ".join(said for each in annotations if (said := _parts(each)[1].description))

    @property
    def number(self) -> Key:
        """The key restricted to numbers where it takes a word such as "auto" too; any other key unchanged."""
        members = _members(self.type)
        return dataclasses.replace(self, type=members[0]) if len(members) > 1 else self

    @property
    def panel(self) -> str:
        """The panel of `--help` that shows the key; "": that help has one panel."""
        return str((_parts(self.type)[1].extra or {}).get("panel", ""))

    @property
    def values(self) -> Values:
        """The values that the key takes."""
        return _values(self.type)

    @property
    def items(self) -> Values:
        """The values that an item of the list takes."""
        return _values(*get_args(_parts(self.type)[0]))

    @property
    def bounds(self) -> tuple[int | None, int | None]:
        """The least and the largest whole number; None: unbounded, or not a whole number."""
        for kind, meta in map(_parts, _members(self.type)):
            if kind is int:
                return _whole(meta.ge), _whole(meta.le)
        return None, None


@functools.cache
def fields_of(section: type[msgspec.Struct], table: str = "") -> dict[str, Key]:
    """List the keys of one table by name, tables within it included."""
    found = {}
    for field in msgspec.structs.fields(section):
        has_factory = field.default_factory is not msgspec.NODEFAULT
        default = field.default_factory() if has_factory else field.default
        found[field.name] = Key(table, field.name, field.type, field.required, None if field.required else default)
    return found


@functools.cache
def keys_of(section: type[msgspec.Struct], table: str = "") -> dict[str, Key]:
    """List the keys of all tables below this one, as people write them: "seed", "[lora] rank"."""
    found = {}
    for key in fields_of(section, table).values():
        found.update({str(key): key} if key.section is None else keys_of(key.section, key.name))
    return found


def flat(tables: TOML) -> dict[str, object]:
    """Flatten nested tables to values by key, as people write keys: {"seed": 0, "[lora] rank": 8}."""
    found: dict[str, object] = {}
    for key, value in tables.items():
        if isinstance(value, dict):
            found.update({f"[{key}] {name}": inner for name, inner in value.items()})
        else:
            found[key] = value
    return found


def refuse_unless(holds: bool, key: object, value: object, allowed: str, file: str) -> None:
    """Raise UsageProblem with the key, its value and what is allowed, unless it holds."""
    if not holds:
        raise UsageProblem(f"{key} = {value!r} in {file}; it must be {allowed}")


# --- words ---------------------------------------------------------------------------------------------


def _parts(annotation: Any) -> tuple[Any, Meta]:
    """Split an annotation into the type and its `Meta`."""
    if get_origin(annotation) is Annotated:
        kind, meta = get_args(annotation)
        return kind, meta
    return annotation, Meta()


def _members(annotation: Any) -> list[Any]:
    """List the members of a union without None; any other type is its only member."""
    kind, _ = _parts(annotation)
    if not isinstance(kind, UnionType) and get_origin(kind) is not Union:
        return [annotation]
    return [member for member in get_args(kind) if member is not NoneType]


def _values(annotation: Any) -> Values:
    first, *others = _members(annotation)
    kind, meta = _parts(first)
    if others:
        [word] = get_args(*others)
        number = _values(first)
        return Values(number.sort, f'{number.allowed}, or "{word}"')
    if get_origin(kind) is Literal:
        words = get_args(kind)
        return Values("text in quotes", " or ".join(words) if len(words) < 3 else f"one of {', '.join(words)}")
    if get_origin(kind) is list:
        return Values("a list", "one or more, in [ ]" if meta.min_length else "")
    if kind is str:
        return Values("text in quotes", str((meta.extra or {}).get("allowed", "")))
    sorts = {int: "a whole number", float: "a number", bool: "true or false"}
    return Values(sorts[kind], _range(meta))


def _range(meta: Meta) -> str:
    if meta.ge is not None and meta.le is not None:
        return f"{_number(meta.ge)} to {_number(meta.le)}"
    bounds = {"above": meta.gt, "at least": meta.ge, "below": meta.lt, "at most": meta.le}
    return ", ".join(f"{word} {_number(bound)}" for word, bound in bounds.items() if bound is not None)


def _whole(bound: float | None) -> int | None:
    return None if bound is None else int(bound)


def _number(bound: float) -> str:
    return "2^63-1" if bound == MAX_SEED else str(bound)
