"""`join --help` in panels: what most joins need on top, then data, limits, pauses, output."""

from __future__ import annotations

import re

import pytest
import typer.main

import fedsoda_edge.cli.commands

FIRST = ["--data", "--token-file", "--column", "--device", "--unattended"]
PANELS = {
    "Options": [*FIRST, "--help"],
    "Data": ["--max-disk", "--cache", "--cache-key"],
    "Limits": ["--max-rounds", "--threads", "--max-ram", "--max-vram"],
    "Pauses": ["--pause-on"],
    "Output": ["--json", "--jsonl", "--debug"],
}


def test_the_five_options_that_people_need_stand_first_and_each_other_in_its_panel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.argv", ["fedsoda-edge", "join", "--help"])
    with pytest.raises(SystemExit):
        fedsoda_edge.cli.commands.main()
    panels: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.splitlines():
        if title := re.match(r"\W*[╭+]\W+(\w[\w ]*\w)\W", line):
            panels[title[1]] = []
        elif option := re.match(r"\W+(--[a-z-]+) ", line):
            panels[next(reversed(panels))].append(option[1])
    assert panels == {"What to join": [], **PANELS}
    assert list(panels) == ["What to join", *PANELS]


def test_every_option_of_join_says_what_it_does() -> None:
    command = typer.main.get_command(fedsoda_edge.cli.commands.app).commands["join"]  # type: ignore[attr-defined]
    assert all(len(parameter.help or "") > 10 for parameter in command.params)
