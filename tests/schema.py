"""Hold what a command printed against the JSON Schemas in the packages' `schemas.json`. A number is finite, and 1.0 is no integer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from jsonschema.validators import extend

ROOT = Path(__file__).resolve().parents[1]


def _is_integer(_: object, value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(_: object, value: object) -> bool:
    return _is_integer(_, value) or (isinstance(value, float) and math.isfinite(value))


# As the draft has it, 1.0 is an integer and NaN a number that is neither below nor above any other.
_Strict = extend(
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine_many({"integer": _is_integer, "number": _is_number}),
)


def read_json(text: str) -> Any:
    """Raises AssertionError where it is no JSON, as NaN and the infinities are none."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {text}")

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError as error:
        raise AssertionError(f"{error}: {text}") from error


class Outputs:
    """What one program may print. Every method raises AssertionError where something else was printed."""

    def __init__(self, program: str) -> None:
        self.document: dict[str, Any] = json.loads(
            (ROOT / program.replace("-", "_") / "schemas.json").read_text(encoding="utf-8")
        )
        self.parts: dict[str, Any] = self.document["$defs"]

    @property
    def entries(self) -> set[str]:
        """Reports and events; parts that they share begin with a capital."""
        return {name for name in self.parts if name[0].islower()}

    def check(self, entry: str, value: Any) -> None:
        assert entry in self.entries, f"there is no schema of {entry!r}"
        reference = f"#/$defs/{entry.replace(' ', '%20')}"
        error = best_match(_Strict({**self.document, "$ref": reference}).iter_errors(value))
        assert error is None, f"{entry}: {error.json_path}: {error.message}"

    def check_event(self, event: dict[str, Any]) -> None:
        self.check(str(event.get("event")), event)

    def report(self, command: str, stdout: str) -> dict[str, Any]:
        """The one object of `--json`: the command's report, or what takes its place."""
        assert len(stdout.splitlines()) == 1, f"not one line: {stdout}"
        found: dict[str, Any] = read_json(stdout)
        self.check("error" if "error" in found else "terminated" if "stopped" in found else command, found)
        return found

    def events(self, stdout: str) -> list[dict[str, Any]]:
        """The lines of `--jsonl`, of which the last one alone is terminal."""
        found: list[dict[str, Any]] = [read_json(line) for line in stdout.splitlines()]
        for event in found:
            self.check_event(event)
        terminal = [place for place, event in enumerate(found) if "terminal" in event]
        assert terminal == [len(found) - 1], "the last event alone is terminal"
        return found


EDGE, HUB = Outputs("fedsoda-edge"), Outputs("fedsoda-hub")
