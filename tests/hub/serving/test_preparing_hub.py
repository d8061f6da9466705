"""A hub listens from its first second: who comes while it prepares the run is told how far it is, waits, and is welcomed."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from fedsoda_edge.edge import Edge, look_at
from fedsoda_edge.errors import HubUnreachable, UsageProblem
from fedsoda_edge.protocol import messages as ms
from fedsoda_hub.federation import jobs
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.process import read_note
from fedsoda_hub.serving.greeting import TELL_SECONDS
from fedsoda_hub.serving.neighbours import who_listens
from fedsoda_hub.serving.ordering import ask_running_hub
from fedsoda_hub.settings.run import RunSettings
from tests.hub.serving.test_daemon import (
    Hub,
    Torch,
    connected,
    hello,
    joined,
    opened,
    serving,
    until,
    update,
    write_run,
)


class SlowTorch(Torch):
    """Prepares as far as the test says."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self.stages: asyncio.Queue[jobs.Stage | None] = asyncio.Queue()  # None: it is prepared

    async def call(self, call: Any, on_progress: Any = None) -> Any:
        if isinstance(call, jobs.Prepare):
            while (stage := await self.stages.get()) is not None:
                on_progress(stage)
        return await super().call(call, on_progress)


def aligning(done: int) -> jobs.Stage:
    return jobs.Stage(stage="aligning", done=done, total=200)


@contextlib.asynccontextmanager
async def preparing(settings: RunSettings) -> AsyncIterator[tuple[Hub, SlowTorch]]:
    """A hub that listens and prepares its run."""
    from tests.hub.hand_clock import HandClock

    events: list[dict[str, Any]] = []
    torch, clock = SlowTorch(settings.run_dir), HandClock()
    daemon = opened(settings, lambda event: events.append(as_values(event)), torch, clock)
    hub = Hub(daemon, torch, clock, events, asyncio.create_task(daemon.run(exit_when_done=False)))
    try:
        await hub.until("listening")
        await until(lambda: daemon.machine.running)
        yield hub, torch
    finally:
        hub.running.cancel()
        await asyncio.wait([hub.running])


def as_values(event: msgspec.Struct) -> dict[str, Any]:
    values: dict[str, Any] = msgspec.to_builtins(event, str_keys=True)
    return values


def waiting_hello(device: str) -> ms.Hello:
    return msgspec.structs.replace(hello(device), waits=True)


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    return write_run(tmp_path, rounds={"min_edges": 1, "count": 1})


def test_an_edge_that_comes_early_is_told_how_far_the_hub_is_and_trains_when_it_is_prepared(
    settings: RunSettings,
) -> None:
    async def talk() -> None:
        async with preparing(settings) as (hub, torch), connected(hub.url, hub.token("a")) as edge:
            await edge.say(waiting_hello("laptop"))
            first = await edge.hear(ms.Preparing)
            [seen] = (await hub.daemon.monitoring.status()).edges
            assert (seen.connected, seen.eligible, seen.why) == (True, False, "waits for the end of the preparation")
            assert (first.run_name, first.run_id, first.stage) == ("small", hub.daemon.machine.state.run_id, "")
            for done in (1, 2):
                torch.stages.put_nowait(aligning(done))
                await hub.until("progress", done=done)
            hub.clock.wake(TELL_SECONDS)
            later = await edge.hear(ms.Preparing)
            assert (later.stage, later.done, later.total) == ("aligning", 2, 200)
            assert later.seconds_left is not None
            async with asyncio.timeout(10):
                torch.stages.put_nowait(None)
                await edge.hear(ms.Welcome)
            assert hub.daemon.roster.why_idle(ms.EdgeId("a")) == "fetches the bundle and reads its data"
            await edge.say(ms.Paused(reason="on\nbattery"))
            await until(
                lambda: hub.daemon.roster.why_idle(ms.EdgeId("a")) == "paused: on\N{REPLACEMENT CHARACTER}battery"
            )
            await edge.say(ms.Ready(num_examples=3))
            await until(lambda: hub.daemon.roster.why_idle(ms.EdgeId("a")) is None)
            await edge.upload(await edge.hear(ms.RoundOffer), update(0.5))
            await edge.hear(ms.Receipt)
            await edge.hear(ms.Farewell)

    asyncio.run(talk())


def test_an_edge_of_an_older_release_waits_without_a_word_that_it_does_not_know(settings: RunSettings) -> None:
    async def talk() -> None:
        async with preparing(settings) as (hub, torch), connected(hub.url, hub.token("a")) as edge:
            await edge.say(hello("laptop"))
            await hub.until("edge_connected")
            torch.stages.put_nowait(aligning(1))
            await hub.until("progress")
            hub.clock.wake(TELL_SECONDS)
            torch.stages.put_nowait(None)
            await edge.hear(ms.Welcome)
            assert [type(message).__name__ for message in edge.heard] == ["Welcome"]

    asyncio.run(talk())


def test_an_edge_that_goes_while_it_waits_is_gone_and_may_come_again(settings: RunSettings) -> None:
    async def talk() -> None:
        async with preparing(settings) as (hub, torch):
            token = hub.token("a")
            async with connected(hub.url, token) as edge:
                await edge.say(waiting_hello("laptop"))
                await edge.hear(ms.Preparing)
            await hub.until("edge_gone")
            async with connected(hub.url, token) as edge:
                await edge.say(waiting_hello("laptop"))
                await edge.hear(ms.Preparing)
                torch.stages.put_nowait(None)
                await edge.hear(ms.Welcome)

    asyncio.run(talk())


def test_an_edge_that_speaks_before_its_welcome_is_refused(settings: RunSettings) -> None:
    async def talk() -> None:
        async with preparing(settings) as (hub, _), connected(hub.url, hub.token("a")) as edge:
            await edge.say(waiting_hello("laptop"))
            await edge.hear(ms.Preparing)
            edge.session.state = "open"
            await edge.say(ms.Ready(num_examples=3))
            refusal = await edge.hear(ms.Refusal)
            assert (refusal.fatal, refusal.reason) == (True, "the edge sent Ready before the Welcome")
            assert await edge.is_hung_up_on()

    asyncio.run(talk())


def test_health_and_status_of_a_preparing_hub_say_how_far_it_is(settings: RunSettings) -> None:
    async def talk() -> None:
        async with preparing(settings) as (hub, torch), httpx.AsyncClient(base_url=hub.url, trust_env=False) as client:
            assert (await client.get("/healthz")).json() == {"hub": "fedsoda", "protocol": 1, "state": "preparing"}
            for done in (1, 2):
                torch.stages.put_nowait(aligning(done))
            await until(lambda: hub.said("progress", done=2))
            status = (await client.get("/v1/status")).json()
            assert (status["phase"], status["work"]["stage"], status["work"]["done"]) == ("preparing", "aligning", 2)
            assert status["work"]["seconds_left"] is not None
            assert (status["hub"]["state"], status["hub"]["pid"]) == ("preparing", os.getpid())
            torch.stages.put_nowait(None)
            await hub.until("waiting")
            status = (await client.get("/v1/status")).json()
            assert (status["work"], status["waiting"]) == (None, "round 1 needs 1 edge, 0 are here")
            assert (await client.get("/healthz")).json()["state"] == "serving"
            noted = read_note(RunDirectory(settings.run_dir).process)
            assert noted is not None
            assert noted.hub.state == "serving"

    asyncio.run(talk())


def test_plan_is_told_to_ask_again(tmp_path: Path, settings: RunSettings) -> None:
    async def talk() -> None:
        async with preparing(settings) as (hub, torch):
            torch.stages.put_nowait(jobs.Stage(stage="reading the full LLM", done=0, total=0))
            await hub.until("progress")
            (tmp_path / "a.token").write_text(hub.token("a"))
            with pytest.raises(HubUnreachable) as told:
                await look_at(Edge(hub.url, token_file=tmp_path / "a.token"))
            assert told.value.exit_status == 3
            assert str(told.value) == (
                "the hub of the run small answers, and is preparing: reading the full LLM; try again later"
            )

    asyncio.run(talk())


# --- hubs beside each other ------------------------------------------------------------------------------------------


def test_a_port_that_another_runs_hub_has_is_refused_with_its_run_process_and_directory(tmp_path: Path) -> None:
    async def talk() -> None:
        async with serving(write_run(tmp_path / "one")) as hub:
            port = hub.daemon.url.rpartition(":")[2]
            said = await asyncio.to_thread(who_listens_as_another_process, "127.0.0.1", int(port))
            assert said == f"the hub of run small (pid {os.getpid()}) in {hub.daemon.disk.directory.path} listens there"
            with pytest.raises(UsageProblem, match=f"127.0.0.1:{port} cannot be used .*: this process listens there"):
                async with serving(write_run(tmp_path / "two", listen={"port": int(port)})) as second:
                    await second.running

    asyncio.run(talk())


def who_listens_as_another_process(host: str, port: int) -> str:
    from unittest import mock

    with mock.patch("fedsoda_hub.serving.neighbours.listener_on", return_value=None):
        return who_listens(host, port)


def test_status_does_not_take_the_hub_of_a_copy_for_this_runs(tmp_path: Path) -> None:
    async def talk() -> None:
        async with serving(write_run(tmp_path / "one")) as hub:
            here = hub.daemon.disk.directory
            found = await asyncio.to_thread(ask_running_hub, here)
            assert found is not None
            assert found.run == "small"
            copy = RunDirectory(tmp_path / "copy")
            copy.path.mkdir()
            for name in ("address", "admin.token", "tls.pin"):
                if (here.path / name).exists():
                    (copy.path / name).write_bytes((here.path / name).read_bytes())
            assert await asyncio.to_thread(ask_running_hub, copy) is None
            async with joined(hub.url, hub.token("a")):
                pass

    asyncio.run(talk())
