"""Run a whole federation in this process: the real daemon, agents, workers and codecs. Only the ports differ.

Frames cross queues instead of sockets, and all torch work runs in one thread, one command after the other, on adapters
that the edges share. So another edge costs its border states and its LoRA, and the results equal those of processes with
as many threads bit for bit. No clock decides anything here. Processes of their own are `processes.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import traceback
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import msgspec

from fedsoda_edge import events
from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.errors import FedSODAError, HubUnreachable, RefusedByHub, WorkerFailed
from fedsoda_edge.join.agent import Agent
from fedsoda_edge.join.conversation import RunOver
from fedsoda_edge.join.home import Home
from fedsoda_edge.join.settings import AgentSettings
from fedsoda_edge.model.sub_llm import SubLLM
from fedsoda_edge.ports import SystemClock, TorchPort
from fedsoda_edge.ports.child import ReportProgress
from fedsoda_edge.ports.system import peak_rss_bytes
from fedsoda_edge.protocol.calls import Call, ProgressT, ResultT, progress_type, result_type
from fedsoda_edge.protocol.codec import wire_bytes
from fedsoda_edge.protocol.messages import EdgeId
from fedsoda_edge.worker.worker import Worker
from fedsoda_hub.compute import Compute
from fedsoda_hub.events import HubSay
from fedsoda_hub.run.tokens import Token
from fedsoda_hub.serving.connection import Connection, Hub
from fedsoda_hub.serving.daemon import Daemon
from fedsoda_hub.settings.run import RunSettings

Answerer = Callable[[Any, ReportProgress], msgspec.Struct]  # answers one call of a union
PortOf = Callable[[str, TorchPort, Daemon], TorchPort]  # (edge, the worker made for it, hub) -> its worker
T = TypeVar("T")
PIECE_BYTES = 1 << 20
CLOSE_SECONDS = 5.0  # that edges may take to end after their Farewell


async def federate(
    settings: RunSettings,
    edges: Mapping[str, Path],
    homes: Path,
    stop: asyncio.Future[str],
    say: HubSay,
    say_of: Callable[[str], events.EventSink],
    port_of: PortOf = lambda edge, worker, daemon: worker,
) -> None:
    """Run one federation to its end, or until `stop`; a second call continues it.

    Args:
        edges: the data file of each edge, by its id.
        homes: the directory in which edges keep their state.
        stop: holds the name of a signal that ends the federation.
        say: takes the hub's events.
        say_of: returns what takes an edge's events.
        port_of: gives an edge its worker; another one than is made for it, where the edge is to attack.

    Raises:
        FedSODAError: what the hub or an edge raised first.
    """
    door = MemoryDoor()
    shared: WeakValueDictionary[bytes, SubLLM] = WeakValueDictionary()  # an adapter that no edge trains is freed
    with TorchThread() as thread:
        daemon = Daemon.open(settings, say, door=door, torch=thread.port(lambda: Compute().answer))
        tokens = daemon.disk.ledger.tokens
        known = {token.edge for token in tokens.all()}
        for name in edges:
            if name not in known:
                tokens.create(name)  # the edge must be known, although nobody shows a token here
        serving = asyncio.create_task(daemon.serve(stop, exit_when_done=True))
        agents = [
            Agent(
                MemoryTransport(door, name),
                port_of(name, thread.port(lambda: Worker(shared).answer), daemon),
                Home(homes / name),
                AgentSettings(settings.device, LocalData(data)),
                say_of(name),
                SystemClock(),
            )
            for name, data in edges.items()
        ]
        joining = [asyncio.create_task(_take_part(agent, door)) for agent in agents]
        try:
            # The first failure ends everything, and so does the end of the hub.
            pending: set[asyncio.Task[None]] = {serving, *joining}
            while serving in pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in (
                    serving,
                    *joining,
                ):  # the hub first: where it failed, an edge's error is only a consequence
                    if task in done:
                        task.result()
            if not stop.done():
                await asyncio.wait(joining, timeout=CLOSE_SECONDS)
        finally:
            for task in (*joining, serving):
                task.cancel()
            await asyncio.wait({*joining, serving})


async def _take_part(agent: Agent, door: MemoryDoor) -> None:
    """Take part in all rounds, as `fedsoda-edge join` does."""
    await door.is_open.wait()
    try:
        await agent.start()
        with contextlib.suppress(RunOver):
            while (offer := await agent.next_offer()) is not None:
                update = await agent.train(offer.round)
                await agent.submit(update.round, update.digest)
    finally:
        await agent.close()


# --- torch -------------------------------------------------------------------------------------------------


class TorchThread:
    """The one thread with torch: kernels have all cores to themselves, and only one worker uses a model at a time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "torch")

    def __enter__(self) -> TorchThread:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def port(self, make: Callable[[], Answerer]) -> InThread:
        """Return a port whose calls run in the thread.

        Args:
            make: makes a new answerer.
        """
        return InThread(self._pool, make)


class PortClosed(Exception):
    """The signal that ends a call whose port was closed; raised where the call reports progress."""


class InThread:
    """A `TorchPort` like `child.Child`, without a process."""

    _numbers = itertools.count(1)

    def __init__(self, pool: Executor, make: Callable[[], Answerer]) -> None:
        self.pid: int | None = None  # below 0, which no process has
        self._pool = pool
        self._make = make
        self._answer: Answerer | None = None
        self._lock = asyncio.Lock()

    @property
    def rss_bytes(self) -> int:
        """The peak of this process, so that a plan which adds it to what is free never asks for more than exists."""
        return peak_rss_bytes()

    peak_rss_bytes = rss_bytes

    async def start(self) -> None:
        """Make the answerer, in the thread."""
        self._answer = await asyncio.get_running_loop().run_in_executor(self._pool, self._make)
        self.pid = -next(self._numbers)

    async def call(
        self, call: Call[ResultT, ProgressT], on_progress: Callable[[ProgressT], None] | None = None
    ) -> ResultT:
        """Run one call in the thread; call, progress and result cross as JSON, as they would cross a pipe.

        Raises:
            FedSODAError: what the call raised.
            WorkerFailed: the call raised something else.
        """
        async with self._lock:
            if self.pid is None:
                await self.start()
            loop, pid, answer = asyncio.get_running_loop(), self.pid, self._answer
            assert answer is not None
            kind, failed = progress_type(call), loop.create_future()

            def take(progress: ProgressT) -> None:
                try:
                    if on_progress is not None:
                        on_progress(progress)
                except Exception as defect:  # a defect of the listener, not of the call
                    if not failed.done():
                        failed.set_exception(defect)

            def report(progress: msgspec.Struct) -> None:
                if self.pid != pid:
                    raise PortClosed
                loop.call_soon_threadsafe(take, _crossed(progress, kind))

            def work() -> ResultT:
                return _crossed(answer(_crossed(call, type(call)), report), result_type(call))

            done = loop.run_in_executor(self._pool, work)
            try:
                await asyncio.wait({done, failed}, return_when=asyncio.FIRST_COMPLETED)
                if failed.done():
                    failed.result()
                return await done
            except (FedSODAError, asyncio.CancelledError):
                raise
            except Exception as error:
                if failed.done() and error is failed.exception():
                    raise
                raise WorkerFailed(f"{type(error).__name__}: {error}", traceback.format_exc()) from error
            finally:
                done.cancel()
                failed.cancel()

    async def close(self) -> None:
        """End a running call when it next reports progress; later calls in the thread wait for that."""
        self.pid, self._answer = None, None


def _crossed(value: msgspec.Struct, kind: type[T]) -> T:
    """Return the value as it would come out of a pipe."""
    return msgspec.json.decode(msgspec.json.encode(value), type=kind)


# --- frames ------------------------------------------------------------------------------------------------


class MemoryDoor:
    """A `Door` of the daemon without an address."""

    port = 0

    def __init__(self) -> None:
        self.hub: Hub | None = None
        self.is_open = asyncio.Event()
        self._defects: asyncio.Queue[Exception] = asyncio.Queue()

    async def open(self, hub: Hub) -> None:
        """Let edges in."""
        self.hub = hub
        self.is_open.set()

    async def talk(self, connection: Connection) -> None:
        """Run a connection; an exception of the hub's own code ends the hub."""
        try:
            await connection.run()
        except Exception as defect:
            self._defects.put_nowait(defect)

    async def broken(self) -> None:
        """Wait for a defect of the hub's code, and raise it."""
        raise await self._defects.get()

    async def close(self) -> None:
        """Refuse everyone from now on."""
        self.hub = None


class _Line:
    """Both directions of one connection; None ends a direction. This is the hub's end, a `Channel`."""

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
    """A `Transport` to a hub of this process. up, down: the bytes that a websocket would have carried."""

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
        self._connection = asyncio.create_task(self._door.talk(Connection(self._hub, self._token, self._line)))

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
        path = self._hub.shelf.bundle_file(digest)
        if path is None:
            raise RefusedByHub("this run's bundle has no such file")
        with path.open("rb") as file:
            file.seek(offset)
            while piece := file.read(PIECE_BYTES):
                yield piece
