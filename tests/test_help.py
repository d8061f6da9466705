"""What both commands say of themselves: an example per command that parses, and completion in a shell."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import fedsoda_edge.cli.commands
import fedsoda_hub.cli.commands

PROGRAMS = {"fedsoda-edge": fedsoda_edge.cli.commands.app, "fedsoda-hub": fedsoda_hub.cli.commands.app}


def commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


EVERY = [one for name, app in PROGRAMS.items() for one in commands(typer.main.get_command(app), name)]


@pytest.mark.parametrize(("path", "command"), EVERY, ids=[path for path, _ in EVERY])
def test_help_teaches_with_an_example_that_the_command_takes(path: str, command: Any) -> None:
    example = (command.epilog or "").split("\n")[0]
    assert example.startswith(f"Example: {path}"), f"{path} has no example of its own"
    words = shlex.split(example.removeprefix(f"Example: {path}").partition(" > ")[0])
    command.make_context(path, words)  # parses, and does nothing: it raises on what the command does not know
    assert command.help, f"{path} does not say what it does"


@pytest.mark.parametrize(
    ("program", "words", "wanted"),
    [
        ("fedsoda-edge", "fedsoda-edge do", "doctor"),
        ("fedsoda-edge", "fedsoda-edge join --un", "--unattended"),
        ("fedsoda-hub", "fedsoda-hub token re", "revoke"),
    ],
)
def test_a_shell_completes_commands_and_options(program: str, words: str, wanted: str) -> None:
    completed = subprocess.run(
        [Path(sys.executable).with_name(program)],
        env=os.environ
        | {
            f"_{program.upper().replace('-', '_')}_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert wanted in completed.stdout.split()
