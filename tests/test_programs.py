"""What programs can rely on of every command, whichever there are: --schema, errors with a code, and a last line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
import typer.main
from jsonschema import Draft202012Validator

from fedsoda_edge import errors
from fedsoda_edge.ports import console
from fedsoda_edge.ports.program import names_in
from tests.test_schemas import APPS, Ran, run

ROOT = Path(__file__).resolve().parents[1]
EVERY = [(program, name) for program, (_, app) in APPS.items() for name in names_in(typer.main.get_command(app))]
every_command = pytest.mark.parametrize(("program", "command"), EVERY, ids=[f"{one} {name}" for one, name in EVERY])


def has_lines(program: str, command: str) -> bool:
    found: Any = typer.main.get_command(APPS[program][1])
    for word in command.split():
        found = found.commands[word]
    return any(parameter.name == "jsonl" for parameter in found.params)


@every_command
def test_a_command_prints_the_schema_of_what_it_prints_and_does_nothing_else(program: str, command: str) -> None:
    ran = run(program, *command.split(), "--schema")
    assert ran.status == 0
    schema = json.loads(ran.out)
    Draft202012Validator.check_schema(schema)
    wrong = run(program, *command.split(), "--no-such-option", "--json")
    Draft202012Validator(schema).validate(json.loads(wrong.out))
    assert not Draft202012Validator(schema).is_valid({"schema": 1, "status": "ok", "strange": True})
    assert set(schema["$defs"]) <= set(APPS[program][0].parts)
    if has_lines(program, command):
        lines = json.loads(run(program, *command.split(), "--schema", "--jsonl").out)
        Draft202012Validator.check_schema(lines)
        last = run(program, *command.split(), "--no-such-option", "--jsonl")
        Draft202012Validator(lines).validate(json.loads(last.out))
        assert not Draft202012Validator(lines).is_valid(json.loads(wrong.out))


@every_command
def test_an_error_names_a_code_who_can_end_it_and_a_command_that_there_is(program: str, command: str) -> None:
    answer = json.loads(run(program, *command.split(), "--no-such-option", "--json").out)
    assert (answer["exit_status"], answer["code"], answer["recovery"]) == (2, "usage", "fix-input")
    assert answer["helps"] == f"{program} {command} --help"


def test_every_error_has_a_code_of_its_own_and_a_way_out() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.FedSODAError)]
    roots = {errors.FedSODAError, errors.LocalError, errors.RemoteError}
    codes = [kind.code for kind in {*kinds} - roots]
    assert len({*codes}) == len(codes)
    assert "failed" not in codes
    for kind in {*kinds} - roots:
        required = kind.__init__.__code__.co_argcount - 1 - len(kind.__init__.__defaults__ or ())
        way_out = kind(*(1,) * required).way_out()
        assert way_out.recovery in get_args(errors.Recovery)
        known = {"{command} --help", "{command} --debug", "df -h", ""}
        edge = {f"fedsoda-edge {name}" for name in names_in(typer.main.get_command(APPS["fedsoda-edge"][1]))}
        assert way_out.helps in known | edge


@pytest.mark.parametrize(
    ("error", "code", "recovery", "status"),
    [
        (OSError(28, "No space left on device"), "disk-full", "fix-machine", 3),
        (ConnectionResetError(104, "reset"), "network", "retry", 3),
        (OSError(24, "Too many open files"), "too-many-files", "fix-machine", 3),
        (PermissionError(13, "Permission denied", "/x"), "no-permission", "fix-machine", 2),
        (FileNotFoundError(2, "No such file", "/x"), "machine", "fix-machine", 2),
        (KeyError("x"), "defect", "defect", 1),
        (errors.WorkerFailed("the worker was killed", "", True), "worker-failed", "fix-machine", 1),
        (errors.WorkerFailed("the worker failed"), "worker-failed", "defect", 1),
        (KeyboardInterrupt(), "interrupted", "retry", 130),
    ],
    ids=str,
)
@pytest.mark.parametrize("option", ["--json", "--jsonl"])
def test_what_ends_a_command_is_told_to_programs_once(
    error: BaseException, code: str, recovery: str, status: int, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended, console.reporting(option == "--json", option == "--jsonl", False):
        raise error
    [line] = capsys.readouterr().out.splitlines()
    answer = json.loads(line)
    assert (answer["code"], answer["recovery"], answer["exit_status"], ended.value.exit_code) == (
        code, recovery, status, status,
    )  # fmt: skip
    APPS["fedsoda-edge"][0].check("error" if option == "--json" else "end", answer)


class Unheard(BaseException):
    """No Exception, as asyncio's CancelledError is none."""


@pytest.mark.parametrize("error", [Unheard(), console.Terminated("SIGTERM"), RuntimeError("before the command began")])
def test_whatever_ends_a_command_outside_of_its_own_block_jsonl_has_a_last_line(error: BaseException) -> None:
    """Here where its options are read from config.toml, before the command begins."""
    with mock.patch("fedsoda_edge.join.home.default_home", side_effect=error):
        ran: Ran = run("fedsoda-edge", "join", "http://hub", "--data", "x.jsonl", "--jsonl")
    [last] = APPS["fedsoda-edge"][0].events(ran.out)
    assert last["status"] == ("ok" if isinstance(error, console.Terminated) else "error")


def test_a_signal_that_comes_while_modules_are_loaded_ends_with_a_last_line(tmp_path: Path) -> None:
    """The help needs some 0.3 s, of which the first part is the interpreter's own; a signal in the rest is told."""
    code = (
        "import os, signal, sys\n"
        "from fedsoda_edge.ports import console\n"
        "from fedsoda_edge.cli.commands import app\n"
        "import fedsoda_edge.join.home as home\n"
        "home.default_home = lambda: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.argv = ['fedsoda-edge', 'join', 'http://hub', '--data', 'x', '--jsonl']\n"
        "console.run(app)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FEDSODA_HOME": str(tmp_path)}
    began = time.monotonic()
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert time.monotonic() - began < 60
    assert ran.returncode == 0
    [last] = APPS["fedsoda-edge"][0].events(ran.stdout)
    assert last["stopped"] == signal.SIGTERM.name
