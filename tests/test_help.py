"""What both commands say of themselves: an example per command that parses, completion, where options may stand."""

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
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.join.home import option_defaults

PROGRAMS = {"fedsoda-edge": fedsoda_edge.cli.commands.app, "fedsoda-hub": fedsoda_hub.cli.commands.app}
OPTIONS = {"join": {"device", "data", "threads"}, "status": set(), "data": {"check": {"device", "column"}}}


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


# --- config.toml ---------------------------------------------------------------------------------------------


def test_a_key_at_the_top_is_for_every_command_that_has_it_and_a_commands_own_goes_before(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    assert option_defaults(path, OPTIONS) == {}
    path.write_text('device = "cpu"\nthreads = 2\n[join]\nthreads = 1\n[data.check]\ncolumn = ["a=b"]\n')
    assert option_defaults(path, OPTIONS) == {
        "join": {"device": "cpu", "threads": 1},
        "status": {},
        "data": {"check": {"device": "cpu", "column": ["a=b"]}},
    }
    path.write_text('data = "rows.jsonl"\n')  # an option's name here, though a command has it too
    assert option_defaults(path, OPTIONS)["join"] == {"data": "rows.jsonl"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('devise = "cpu"', "a key devise that no command knows; the nearest is device"),
        ("[joyn]\nthreads = 1", "a key joyn that no command knows; the nearest is join"),
        ("[join]\nthread = 1", "a key join.thread that no command knows; the nearest is join.threads"),
        ("[status]\nthreads = 1", "a key status.threads that no command knows; status takes no options"),
        ("join = 1", "join = 1, and join is a command; write its options below [join]"),
        ("[data]\ncheck = 3", "data.check = 3, and data.check is a command; write its options below [data.check]"),
        ("device = ", "cannot be read as TOML"),
    ],
)
def test_a_key_that_no_command_knows_is_refused_with_the_nearest(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(UsageProblem) as refused:
        option_defaults(tmp_path / "config.toml", OPTIONS)
    assert message in str(refused.value)


def test_an_option_goes_before_its_variable_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDSODA_HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "config.toml").write_text(
        'device = "cuda"\nthreads = 3\n[join]\nurl = "http://127.0.0.1:1"\nmax_rounds = 2\n'
        f'data = "{(tmp_path / "rows.jsonl").as_posix()}"\n'
    )
    monkeypatch.setenv("FEDSODA_DEVICE", "cpu")
    monkeypatch.setenv("FEDSODA_THREADS", "1")
    monkeypatch.delenv("FEDSODA_TOKEN", raising=False)
    monkeypatch.setattr("sys.argv", ["fedsoda-edge", "join", "--threads", "2"])
    with pytest.raises(SystemExit):
        fedsoda_edge.cli.commands.main()
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(
        f"settings: url http://127.0.0.1:1, data {tmp_path / 'rows.jsonl'}, max_rounds 2 (config.toml); "
        "device cpu (FEDSODA_DEVICE); threads 2 (option); defaults: cache bf16, cache_key forget, unattended False"
    )
    assert said[1].startswith("error: no token")


def test_a_wrong_value_is_told_with_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said() -> str:
        with pytest.raises(SystemExit) as end:
            fedsoda_edge.cli.commands.main()
        assert end.value.code == 2
        return capsys.readouterr().err

    monkeypatch.setenv("FEDSODA_HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["fedsoda-edge", "join", "http://h", "--data", "d"])
    (tmp_path / "config.toml").write_text('max_rounds = "many"\n')
    assert "(max_rounds = 'many' in config.toml)" in said()
    monkeypatch.setenv("FEDSODA_MAX_ROUNDS", "few")
    assert "(it is 'few' there)" in said()
