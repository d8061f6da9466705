"""A whole federation in this process: the real daemon, agents, workers and codecs. Only the ports differ.

Frames cross queues instead of sockets, and all torch work runs in one thread, one command after the other, on adapters
that the edges share. So an edge more costs its border states and its LoRA, and the bits are those of processes with as
many threads. No clock decides anything here.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import traceback
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.errors import FedSODAError, HubUnreachable, RefusedByHub, WorkerFailed
from fedsoda_edge.join.agent import Agent, AgentSettings
from fedsoda_edge.join.home import Home
from fedsoda_edge.model.sub_llm import SubLLM
from fedsoda_edge.ports import SystemClock
from fedsoda_edge.ports.child import Handler
from fedsoda_edge.ports.system import peak_rss_bytes
from fedsoda_edge.protocol.codec import wire_bytes
from fedsoda_edge.protocol.messages import EdgeId
from fedsoda_edge.worker.worker import Worker
from fedsoda_hub.compute import Compute
from fedsoda_hub.run.ledger import Token
from fedsoda_hub.serving.daemon import Daemon, Say
from fedsoda_hub.serving.listener import Connection, Hub
from fedsoda_hub.settings.run import RunSettings

PIECE_BYTES = 1 << 20
CLOSE_SECONDS = 5.0  # that edges may take to end after their Farewell


async def federate(
    settings: RunSettings,
    edges: Mapping[str, Path],
    homes: Path,
    stop: asyncio.Future[str],
    say: Say,
    say_of: Callable[[str], Say],
) -> None:
    """One run to its end, or until `stop`; a second call goes on.

    Args:
        edges: the data file of each. homes: where they keep their state. say_of: what takes an edge's events.
    """
    door = MemoryDoor()
    shared: WeakValueDictionary[bytes, SubLLM] = WeakValueDictionary()  # what no edge trains any more goes
    with TorchThread() as thread:
        daemon = Daemon(settings, say, door=door, compute=thread.port(lambda: Compute().commands))
        known = {token.edge for token in daemon.ledger.tokens()}
        for name in edges:
            if name not in known:
                daemon.ledger.create_token(name)  # that it may join; nobody has to show it here
        serving = asyncio.create_task(daemon.serve(stop, exit_when_done=True))
        agents = [
            Agent(
                MemoryTransport(door, name),
                thread.port(lambda: Worker(shared).commands),
                Home(homes / name),
                AgentSettings(settings.device, LocalData(data)),
                say_of(name),
                SystemClock(),
            )
            for name, data in edges.items()
        ]
        joining = [asyncio.create_task(_take_part(agent, door)) for agent in agents]
        try:
            # The first that fails ends it all, and so does a hub that ends.
            pending: set[asyncio.Task[None]] = {serving, *joining}
            while serving in pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            if not stop.done():
                await asyncio.wait(joining, timeout=CLOSE_SECONDS)
        finally:
            for task in (*joining, serving):
                task.cancel()
            await asyncio.wait({*joining, serving})


async def _take_part(agent: Agent, door: MemoryDoor) -> None:
    """What `fedsoda-edge join` does."""
    await door.is_open.wait()
    try:
        await agent.start()
        while (offer := await agent.next_offer()) is not None:
            await agent.train(offer.round)
            await agent.submit()
    finally:
        await agent.close()


# --- torch -------------------------------------------------------------------------------------------------


class TorchThread:
    """The one thread with torch: kernels have all cores to themselves, and no two workers use a model at a time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "torch")

    def __enter__(self) -> TorchThread:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def port(self, make: Callable[[], Mapping[str, Handler]]) -> InThread:
        return InThread(self._pool, make)


class Ended(Exception):
    """Raised within a command whose port was closed, where it says how far it is."""


class InThread:
    """A `TorchPort` like `child.Child`, without a process. make: fresh commands, which nothing was said to yet."""

    _numbers = itertools.count(1)

    def __init__(self, pool: Executor, make: Callable[[], Mapping[str, Handler]]) -> None:
        self.pid: int | None = None  # below 0: no process has it
        self._pool = pool
        self._make = make
        self._commands: Mapping[str, Handler] = {}
        self._lock = asyncio.Lock()

    @property
    def rss_bytes(self) -> int:
        """This process's, at its peak: a plan that counts it in and what is free never asks for more than there is."""
        return peak_rss_bytes()

    peak_rss_bytes = rss_bytes

    async def start(self) -> None:
        self._commands = await asyncio.get_running_loop().run_in_executor(self._pool, self._make)
        self.pid = -next(self._numbers)

    async def call(
        self, command: str, arguments: dict[str, Any], on_progress: Callable[[dict[str, Any]], None] | None = None
    ) -> dict[str, Any]:
        async with self._lock:
            if self.pid is None:
                await self.start()
            loop, pid = asyncio.get_running_loop(), self.pid

            def report(values: dict[str, Any]) -> None:
                if self.pid != pid:
                    raise Ended
                if on_progress is not None:
                    loop.call_soon_threadsafe(on_progress, _as_json(values))

            def work() -> dict[str, Any]:
                return _as_json(self._commands[command](_as_json(arguments), report))

            try:
                return await loop.run_in_executor(self._pool, work)
            except (FedSODAError, asyncio.CancelledError):
                raise
            except Exception as error:
                raise WorkerFailed(f"{type(error).__name__}: {error}", traceback.format_exc()) from error

    async def close(self) -> None:
        """What runs ends when it next says how far it is; whatever comes after it in the thread waits for that."""
        self.pid, self._commands = None, {}


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """As they would cross a pipe."""
    crossed: dict[str, Any] = json.loads(json.dumps(values, allow_nan=False))
    return crossed


# --- frames ------------------------------------------------------------------------------------------------


class MemoryDoor:
    """A `Door` of the daemon without an address."""

    port = 0

    def __init__(self) -> None:
        self.hub: Hub | None = None
        self.is_open = asyncio.Event()

    async def open(self, hub: Hub) -> None:
        self.hub = hub
        self.is_open.set()

    async def close(self) -> None:
        self.hub = None


class _Line:
    """Both ways of one connection; None ends a way. This is the hub's end, a `listener.Channel`."""

    def __init__(self) -> None:
        self.up: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.down: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.is_cut = False

    async def send_bytes(self, data: bytes) -> None:
        self.down.put_nowait(data)

    async def receive_bytes(self) -> bytes:
        frame = await self.up.get()
        if frame is None:
            raise ConnectionResetError("the edge is gone")
        return frame

    async def close(self) -> None:
        self.is_cut = True
        self.up.put_nowait(None)
        self.down.put_nowait(None)


class MemoryTransport:
    """A `Transport` to a hub of this process. up and down count what a websocket would carry, in bytes."""

    url = "this process"

    def __init__(self, door: MemoryDoor, edge: str) -> None:
        self._door = door
        self._token = Token(EdgeId(edge), None, False)
        self._line: _Line | None = None
        self._connection: asyncio.Task[None] | None = None
        self.up = self.down = 0

    async def connect(self) -> None:
        await self.close()
        self._line = _Line()
        self._connection = asyncio.create_task(Connection(self._hub, self._token, self._line).run())

    @property
    def _hub(self) -> Hub:
        if self._door.hub is None:
            raise HubUnreachable("the hub of this process has ended", "TCP")
        return self._door.hub

    async def send(self, frame: bytes) -> None:
        if self._line is None or self._line.is_cut:
            raise HubUnreachable("the connection ended", "TCP")
        self._line.up.put_nowait(frame)
        self.up += wire_bytes(frame, masked=True)

    async def frames(self) -> AsyncIterator[bytes]:
        assert self._line is not None, "the agent connects first"
        while (frame := await self._line.down.get()) is not None:
            self.down += wire_bytes(frame, masked=False)
            yield frame

    async def close(self) -> None:
        if self._line is not None and self._connection is not None:
            await self._line.close()
            await self._connection
            self._line = None

    async def fetch(self, digest: str, offset: int) -> AsyncIterator[bytes]:
        path = self._hub.bundle_file(digest)
        if path is None:
            raise RefusedByHub("no such file in this run's bundle")
        with path.open("rb") as file:
            file.seek(offset)
            while piece := file.read(PIECE_BYTES):
                yield piece
