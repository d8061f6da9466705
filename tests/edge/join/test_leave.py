"""A join that ends before its run does says so in its last sentence: `--max-rounds` and `finish`."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from typer.testing import CliRunner

from fedsoda_edge.cli.commands import app
from fedsoda_edge.join.agent import Agent
from fedsoda_edge.testing import ScriptedHub
from tests.test_schemas import ROWS
from tests.worker_here import WorkerHere


@pytest.fixture
def _sigterm_as_it_was() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("_sigterm_as_it_was")
@pytest.mark.parametrize(
    ("options", "is_finishing", "sentence"),
    [
        (["--max-rounds", "1"], False, "left the run: took part in 1 round"),
        (["--jsonl"], True, "left the run: the owner of the device finished"),
    ],
)
def test_a_join_that_leaves_says_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scripted: Path,
    options: list[str],
    is_finishing: bool,
    sentence: str,
) -> None:
    hub = ScriptedHub(rounds=5)
    hub._bundle = scripted
    monkeypatch.setenv("FEDSODA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FEDSODA_TOKEN", "t")
    if is_finishing:
        monkeypatch.setattr(Agent, "is_finishing", True)
    (tmp_path / "visits.jsonl").write_text(ROWS)
    with (
        mock.patch("fedsoda_edge.edge.HubTransport", return_value=hub),
        mock.patch("fedsoda_edge.edge.Child", return_value=WorkerHere()),
    ):
        words = ["join", "http://hub", "--data", str(tmp_path / "visits.jsonl"), *options]
        ran = CliRunner().invoke(app, words)
    assert ran.exit_code == 0, ran.output
    if "--jsonl" in options:
        # An early sweep, which ends on its own, may have the last word.
        assert {"event": "notice", "message": sentence} in [json.loads(line) for line in ran.stdout.splitlines()]
    else:
        assert ran.stderr.splitlines()[-1] == sentence
