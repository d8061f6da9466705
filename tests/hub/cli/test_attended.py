"""A hub that a service manager started: ready when it listens, alive as long as its loop is, and what it does in a sentence."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsoda_edge.ports.service import Supervisor
from fedsoda_hub.cli.attended import served
from fedsoda_hub.events import HubEvent, Listening
from tests.hub.hand_clock import HandClock
from tests.hub.serving.test_daemon import Torch, joined, opened, until, write_run
from tests.manager import Manager

BEAT = 0.04


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    monkeypatch.setattr("fedsoda_edge.ports.service.STATUS_SECONDS", 0.01)
    made = Manager(str(tmp_path / "notify"))
    yield made
    made.close()


def test_a_hub_is_ready_when_it_listens_and_its_status_follows_the_run(tmp_path: Path, manager: Manager) -> None:
    settings = write_run(tmp_path / "run")
    heard: list[str] = []

    def says(event: HubEvent) -> None:
        heard.extend(manager.heard())
        if isinstance(event, Listening):
            assert "READY=1" not in heard

    async def work() -> None:
        daemon = opened(settings, says, Torch(settings.run_dir), HandClock())
        supervisor = Supervisor(str(tmp_path / "notify"), BEAT)
        serving = asyncio.create_task(served(daemon, supervisor, exit_when_done=False))

        def has_heard(line: str) -> bool:
            heard.extend(manager.heard())
            return any(line in one for one in heard)

        await until(lambda: has_heard("READY=1"))
        await until(lambda: has_heard("STATUS=waiting: "))
        tokens = daemon.disk.ledger.tokens
        async with joined(daemon.url, tokens.create("a")), joined(daemon.url, tokens.create("b"), "phone"):
            await until(lambda: has_heard("STATUS=round 1 of 2: 0 of 2 updates are in, 2 still train"))
            manager.heard()
            time.sleep(3 * BEAT)  # the loop hangs, and nothing speaks for it
            assert manager.heard() == []
            await until(lambda: "WATCHDOG=1" in manager.heard())
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        assert has_heard("STOPPING=1")

    asyncio.run(work())
