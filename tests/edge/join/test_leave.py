"""A join that ends before its run does says so in its last sentence: `--max-rounds` and `finish`."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedsoda_edge.cli.commands import app
from fedsoda_edge.join import control
from fedsoda_edge.join.home import Home
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.codec import decode
from fedsoda_edge.testing import ScriptedHub
from tests.hurried_clock import HurriedClock
from tests.joins import ports_of_commands
from tests.said import for_people
from tests.test_schemas import ROWS


class AsksToFinish(ScriptedHub):
    """The owner of the device says `finish` when this edge says Ready; then no round is offered."""

    async def send(self, frame: bytes) -> None:
        if isinstance(decode(frame)[0], ms.Ready):
            control.ask(Home().control, "finish")
        else:
            await super().send(frame)


class PreparesForHours(ScriptedHub):
    """It prepares its run, and the owner of the device does not want to wait."""

    async def send(self, frame: bytes) -> None:
        said = self._session.receive(frame)
        assert isinstance(said, ms.Hello)
        assert said.waits
        self._say(ms.Preparing(protocol=1, run_id="r", run_name="triage", stage="aligning", done=1, total=2))
        control.ask(Home().control, "finish")


@pytest.fixture
def _sigterm_as_it_was() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("_sigterm_as_it_was")
@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        (["--max-rounds", "1"], ScriptedHub, "left the run: took part in 1 round"),
        (["--jsonl"], AsksToFinish, "left the run: the owner of the device finished"),
        ([], PreparesForHours, "left the run: the owner of the device finished"),
    ],
)
def test_a_join_that_leaves_says_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scripted: Path,
    options: list[str],
    kind: type[ScriptedHub],
    sentence: str,
) -> None:
    hub = kind(rounds=5, bundle=scripted)
    monkeypatch.setenv("FEDSODA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FEDSODA_TOKEN", "t")
    (tmp_path / "visits.jsonl").write_text(ROWS)
    with ports_of_commands(hub, clock=HurriedClock(0.01)):
        words = ["join", "http://hub", "--data", str(tmp_path / "visits.jsonl"), *options]
        ran = CliRunner().invoke(app, words)
    assert ran.exit_code == 0, ran.output
    if "--jsonl" in options:
        # An early sweep, which ends on its own, may have the last word.
        assert {"event": "notice", "message": sentence} in [json.loads(line) for line in ran.stdout.splitlines()]
    else:
        assert for_people(ran.stderr).splitlines()[-1] == sentence
