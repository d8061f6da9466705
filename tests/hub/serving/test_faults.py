"""Each part of a hub fails in turn while a round collects: the hub ends with the reason, lets go of the run, never hangs.

What it survives (a full disk, a child that dies once or twice, edges that vanish) is in `test_daemon.py`.
"""

from __future__ import annotations

import asyncio
import errno
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsoda_edge.errors import DiskFull, WorkerFailed
from fedsoda_edge.ports.disk import BlobStore
from fedsoda_edge.protocol import messages as ms
from fedsoda_hub.federation import jobs
from fedsoda_hub.run.ledger import Ledger
from fedsoda_hub.serving.listener import Server
from tests.hub.serving.test_daemon import Hub, Torch, opened, serving_two, started, until, update, write_run

Break = Callable[[Hub, pytest.MonkeyPatch, Exception], None]


def raising(failure: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise failure

    return fail


def decisions(hub: Hub, patch: pytest.MonkeyPatch, failure: Exception) -> None:
    patch.setattr(hub.daemon.machine, "handle", raising(failure))


def roster(hub: Hub, patch: pytest.MonkeyPatch, failure: Exception) -> None:
    patch.setattr(hub.daemon.roster, "said", raising(failure))


def ledger(hub: Hub, patch: pytest.MonkeyPatch, failure: Exception) -> None:
    patch.setattr(Ledger, "append", raising(failure))


def store(hub: Hub, patch: pytest.MonkeyPatch, failure: Exception) -> None:
    patch.setattr(BlobStore, "adopt", raising(failure))


def child(hub: Hub, patch: pytest.MonkeyPatch, failure: Exception) -> None:
    hub.torch.problems = [failure] * 3


def telling(hub: Hub, patch: pytest.MonkeyPatch, failure: Exception) -> None:
    """Whoever listens to the hub fails, as print does where stdout is closed."""
    patch.setattr(hub.daemon.roster, "_say", raising(failure))


@pytest.mark.parametrize(
    ("part", "failure"),
    [
        (decisions, RuntimeError("a defect")),
        (decisions, KeyError("a defect")),
        (roster, RuntimeError("a defect")),
        (ledger, sqlite3.OperationalError("disk I/O error")),
        (store, OSError(errno.EIO, "input/output error")),
        (child, WorkerFailed("killed", "out of memory")),
        (child, KeyError("a defect of the port")),
        (child, DiskFull("the disk is full")),
        (telling, BrokenPipeError("nobody reads")),
    ],
    ids=lambda value: value.__name__ if callable(value) else type(value).__name__,
)
def test_a_part_that_fails_ends_the_hub_with_its_own_words_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: Break, failure: Exception
) -> None:
    settings = write_run(tmp_path)

    async def talk() -> None:
        async with serving_two(settings) as (hub, a, b):
            await a.upload(await a.hear(ms.RoundOffer), update(0.5))
            await a.hear(ms.Receipt)
            offer = await b.hear(ms.RoundOffer)
            with monkeypatch.context() as patch:
                part(hub, patch, failure)
                await b.say(ms.Progress(round=1, step=1, steps=2))
                if part is not roster:
                    await b.upload(offer, update(0.25))
                async with asyncio.timeout(10):
                    with pytest.raises(type(failure)) as ended:
                        await hub.running
            assert ended.value is failure
            assert await a.is_hung_up_on()
            assert await b.is_hung_up_on()
            assert hub.torch.pid is None

    asyncio.run(talk())
    with started(settings) as again:  # lock and ledger are free
        state = again.machine.state
        assert (state.phase, state.round, "a" in state.accepted) == ("collecting", 1, True)


def test_a_server_that_ends_by_itself_ends_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = asyncio.Event()

    async def main_loop(_: Server) -> None:
        await over.wait()

    monkeypatch.setattr(Server, "main_loop", main_loop)

    async def talk() -> None:
        async with serving_two(write_run(tmp_path)) as (hub, a, _):
            await a.hear(ms.RoundOffer)
            over.set()
            async with asyncio.timeout(10):
                with pytest.raises(RuntimeError, match="uvicorn ended although the hub did not stop it"):
                    await hub.running
            assert await a.is_hung_up_on()

    asyncio.run(talk())


def test_a_hub_that_is_stopped_while_torch_loads_ends_at_once(tmp_path: Path) -> None:
    """Loading takes seconds, and a child that hangs would take for good."""
    settings = write_run(tmp_path)

    class Loading(Torch):
        async def call(self, call: Any, on_progress: Any = None) -> Any:
            self.calls.append(call)
            await asyncio.Event().wait()

    async def talk() -> None:
        torch = Loading(settings.run_dir)
        stop: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(opened(settings, lambda _: None, torch).serve(stop, exit_when_done=False))
        await until(lambda: torch.calls)
        stop.set_result("SIGTERM")
        await asyncio.wait_for(serving, 10)

    asyncio.run(talk())
    with started(settings):
        pass


def test_a_job_that_never_ends_does_not_keep_the_hub_from_being_stopped(tmp_path: Path) -> None:
    async def talk() -> None:
        async with serving_two(write_run(tmp_path)) as (hub, a, b):
            hub.torch.hangs_at = jobs.Aggregate
            for edge, value in ((a, 0.5), (b, 0.25)):
                await edge.upload(await edge.hear(ms.RoundOffer), update(value))
                await edge.hear(ms.Receipt)
            hub.running.cancel()
            await asyncio.wait({hub.running}, timeout=10)
            assert hub.running.done()

    asyncio.run(talk())
