"""A join that a service manager started: what it says on the manager's socket, also where its hub is away."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fedsoda_edge.cli.commands import app
from fedsoda_edge.errors import HubUnreachable, RefusedByHub
from fedsoda_edge.testing import ScriptedHub
from tests.hurried_clock import HurriedClock
from tests.joins import ports_of_commands
from tests.manager import Manager
from tests.test_schemas import ROWS


class Slow(ScriptedHub):
    """Is away three times."""

    def __init__(self, bundle: Path) -> None:
        super().__init__(rounds=1, bundle=bundle)
        self.tries = 0

    async def connect(self) -> None:
        self.tries += 1
        if self.tries <= 3:
            raise HubUnreachable("TCP: nothing answers", "TCP")
        await super().connect()


class Closed(ScriptedHub):
    async def connect(self) -> None:
        raise RefusedByHub("this device is revoked")


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    before = signal.getsignal(signal.SIGTERM)
    yield made
    signal.signal(signal.SIGTERM, before)
    made.close()


def joined(hub: ScriptedHub, tmp_path: Path) -> Result:
    (tmp_path / "visits.jsonl").write_text(ROWS)
    words = ["join", "http://hub", "--data", str(tmp_path / "visits.jsonl"), "--unattended"]
    with ports_of_commands(hub, clock=HurriedClock(0.01)):
        return CliRunner().invoke(app, words, env={"FEDSODA_TOKEN": "t"})


def test_a_join_is_ready_while_its_hub_is_away_and_says_what_its_status_says(
    tmp_path: Path, manager: Manager, monkeypatch: pytest.MonkeyPatch, scripted: Path
) -> None:
    monkeypatch.setattr("fedsoda_edge.ports.service.STATUS_SECONDS", 0.005)
    ran = joined(Slow(scripted), tmp_path)
    assert ran.exit_code == 0, ran.output
    heard = manager.heard()
    assert heard.count("READY=1") == 1
    assert heard.count("STOPPING=1") == 1
    assert heard.count("WATCHDOG=1") >= 3
    said = [line.removeprefix("STATUS=") for line in heard if line.startswith("STATUS=")]
    assert any("hub http" in line or "run " in line for line in said), said
    assert not any(name in os.environ for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"))


def test_a_join_that_is_refused_is_never_ready(tmp_path: Path, manager: Manager) -> None:
    ran = joined(Closed(), tmp_path)
    assert ran.exit_code == 5, ran.output
    assert "READY=1" not in manager.heard()
