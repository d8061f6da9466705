"""Two JSON Schemas, one written by hand and one that msgspec makes of a struct, in one form, so that they can be equal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

_WORDS = {"$comment", "$schema", "title", "description", "default"}  # what says nothing of a value


def of_struct(kind: Any) -> Any:
    """Return what JSON values of this type look like. A field with a default is written, too."""
    [schema], parts = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    return normal(schema, parts)


def normal(schema: Any, parts: Mapping[str, Any]) -> Any:
    """Return the schema without words and references; what may be null as one with `"null" in type`, sets sorted.

    Args:
        parts: what `$ref` names.
    """
    if not isinstance(schema, dict):
        return schema
    found = {key: value for key, value in schema.items() if key not in _WORDS}
    for reference in [found.pop("$ref", None), *(one["$ref"] for one in found.pop("allOf", ()))]:
        if reference is not None:
            found = _together(parts[reference.removeprefix("#/$defs/")], found)
    found = {key: value for key, value in found.items() if key not in _WORDS}
    if "$ref" in found or "allOf" in found:
        return normal(found, parts)
    if "const" in found:
        found["enum"] = [found.pop("const")]
    if "enum" in found:
        return {"enum": sorted(found["enum"])}
    for choice in ("anyOf", "oneOf"):
        if choice in found:
            ways = [normal(one, parts) for one in found.pop(choice)]
            found |= _or_null(ways)
    if isinstance(found.get("type"), str):
        found["type"] = [found["type"]]
    found["type"] = sorted(found["type"])
    if "properties" in found and "closed" not in found:  # one that may be null is in this form already
        closed = (found.pop("additionalProperties", None), found.pop("unevaluatedProperties", None))
        found["closed"] = False in closed
        defaults = {name for name, one in found["properties"].items() if "default" in one}
        found["properties"] = {name: normal(one, parts) for name, one in found["properties"].items()}
        found["required"] = sorted({*found.get("required", ()), *defaults})
    if "items" in found:
        found["items"] = normal(found["items"], parts)
    if isinstance(found.get("additionalProperties"), dict):
        found["additionalProperties"] = normal(found["additionalProperties"], parts)
    return found


def _or_null(ways: list[Any]) -> dict[str, Any]:
    [null] = [way for way in ways if way == {"type": ["null"]}]
    [other] = [way for way in ways if way is not null]
    return other | {"type": sorted([*other["type"], "null"])} if "type" in other else other


def _together(part: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part completed where it is used: properties and required ones of both, the rest of the later."""
    found = {**part, **more}
    if "properties" in part:
        found["properties"] = {**part["properties"], **more.get("properties", {})}
        found["required"] = [*part.get("required", ()), *more.get("required", ())]
    return found
