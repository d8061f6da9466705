"""The log of a whole join, in a file: a line a fact with the sentences of the display, and no secret, also with --debug."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedsoda_edge.cli.commands import app
from fedsoda_edge.testing import ScriptedHub
from tests.hurried_clock import HurriedClock
from tests.joins import ports_of_commands
from tests.test_schemas import ROWS

TOKEN = "fs1-0123456789-secret"


@pytest.fixture(autouse=True)
def _sigterm_as_it_was() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("events", [[], ["--jsonl"]])
def test_a_log_says_what_the_display_says_and_no_secret(tmp_path: Path, scripted: Path, events: list[str]) -> None:
    log = tmp_path / "join.log"
    (tmp_path / "visits.jsonl").write_text(ROWS)
    words = ["join", "http://hub", "--data", str(tmp_path / "visits.jsonl"), "--log-format", "json", "--debug"]
    with ports_of_commands(ScriptedHub(rounds=1, bundle=scripted), clock=HurriedClock(0.01)):
        ran = CliRunner().invoke(app, [*words, "--log-file", str(log), *events], env={"FEDSODA_TOKEN": TOKEN})
    assert ran.exit_code == 0, ran.output
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["level"] for line in lines} >= {"debug", "info"}
    told = {line["event"]: line["message"] for line in lines if "event" in line}
    assert told["joined"].startswith("joined run ")
    assert told["accepted"].startswith("round 1: the hub has the update (")
    assert told["farewell"].startswith("done: ")
    assert [json.loads(line)["message"] for line in ran.stderr.splitlines()] == [line["message"] for line in lines]
    for said in (log.read_text(), ran.stderr):
        assert TOKEN not in said
        assert "visit 1" not in said  # a row
