"""Give every command of a program what all share: --schema, and a name for messages.

What a command may print is in the package's `schemas.json`, an entry for each report and each event; that it holds is
`tests/test_schemas.py`'s.
"""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import typer
import typer.main
from typer.core import TyperGroup

from fedsoda_edge.ports.console import ASKED, is_asked
from fedsoda_edge.ports.outlet import OUT

HELP = "print the JSON Schema of what --json prints, or with --jsonl of each of its lines, and do nothing else"
INSTEAD = ("error", "terminated")  # of a report
_REFERENCE = re.compile(r'"\$ref": "#/\$defs/([^"]+)"')


class Program(TyperGroup):
    """The commands of a program, of which each that prints JSON has --schema too."""

    package: ClassVar[str]

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__(*args, **values)
        option = _schema_option(self.package)
        for command in commands_in(self):
            names = {str(parameter.name) for parameter in command.params}
            if "as_json" in names and "schema" not in names:
                command.params.append(option)

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        """Parse, and keep the words of the command for messages."""
        ASKED.command = " ".join([self.package.replace("_", "-"), *path_of(self, args)])
        return super().parse_args(context, args)


def commands_in(group: Any) -> Iterator[Any]:
    """Yield every command of a group, those of its groups too."""
    for command in group.commands.values():
        if hasattr(command, "commands"):
            yield from commands_in(command)
        else:
            yield command


def names_in(group: Any, *path: str) -> Iterator[str]:
    """Yield the name of every command: "cache list"."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from names_in(command, *path, name)
        else:
            yield " ".join((*path, name))


def path_of(group: Any, words: list[str]) -> list[str]:
    """Return the leading words that name a command: ["cache", "list"]."""
    found: list[str] = []
    for word in words:
        if (command := getattr(group, "commands", {}).get(word)) is None:
            break
        found.append(word)
        group = command
    return found


def _schema_option(package: str) -> Any:
    def show(context: typer.Context, is_wanted: bool) -> None:
        if is_wanted and not context.resilient_parsing:
            root = context.find_root()
            name = context.command_path.removeprefix(root.command_path).strip()
            has_lines = any(parameter.name == "jsonl" for parameter in context.command.params)
            reports = None if not has_lines or not is_asked("--jsonl") else set(names_in(root.command))
            OUT.give(json.dumps(schema_of(package, name, reports), ensure_ascii=False) + "\n")
            ASKED.is_answered = True
            raise typer.Exit(0)

    def with_schema(
        schema: bool = typer.Option(
            False, "--schema", is_eager=True, callback=show, help=HELP, rich_help_panel="Output"
        ),
    ) -> None: ...

    holder = typer.Typer(add_completion=False)  # how an option is made otherwise differs between releases of typer
    holder.command()(with_schema)
    [option] = [one for one in typer.main.get_command(holder).params if one.name == "schema"]
    option.expose_value = False
    return option


def schema_of(package: str, command: str, reports: set[str] | None = None) -> dict[str, object]:
    """Make the JSON Schema of what a command prints.

    Args:
        command: its name: "cache list".
        reports: names of all commands, for that of a line of --jsonl, which is an event; None: for that of --json's object.
    """
    document = json.loads(importlib.resources.files(package).joinpath("schemas.json").read_text(encoding="utf-8"))
    parts: Mapping[str, Any] = document["$defs"]
    names = [command, *INSTEAD]
    if reports is not None:
        names = [name for name in parts if name[0].islower() and name not in (*reports, *INSTEAD)]
    needed = _needed(parts, names)
    return {
        "$schema": document["$schema"],
        "title": f"{package.replace('_', '-')} {command} {'--json' if reports is None else '--jsonl'}",
        "anyOf": [{"$ref": f"#/$defs/{name.replace(' ', '%20')}"} for name in names],
        "$defs": {name: parts[name] for name in parts if name in needed},
    }


def _needed(parts: Mapping[str, Any], names: list[str]) -> set[str]:
    """Name what these parts refer to, and what that refers to, with themselves."""
    needed, left = set(names), list(names)
    while left:
        for name in _REFERENCE.findall(json.dumps(parts[left.pop()])):
            if (one := name.replace("%20", " ")) not in needed:
                needed.add(one)
                left.append(one)
    return needed
