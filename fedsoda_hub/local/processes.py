"""Run a federation of the real commands as processes on this machine, over loopback, for the demo and for comparisons.

What an edge or hub does is its command's own matter; a federation in one process is `in_process.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedsoda_edge import events as edge_events
from fedsoda_edge.errors import WorkerFailed
from fedsoda_edge.ports.system import group_of_its_own, stop_signal
from fedsoda_hub import events
from fedsoda_hub.events import HubSay
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import opened
from fedsoda_hub.run.tokens import write_secret
from fedsoda_hub.settings.run import RunSettings

EdgeSay = Callable[[edge_events.AnyEvent | edge_events.JoinEnded], None]


async def federate(
    settings: RunSettings,
    edges: Mapping[str, Path],
    homes: Path,
    stop: asyncio.Future[str],
    say: HubSay,
    say_of: Callable[[str], EdgeSay],
    environment: Mapping[str, str],
    of_hub: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Run `serve` and a `join` for each edge, to the end of the run or until `stop`; a second call continues it.

    Args:
        edges: the data file of each edge, by its id.
        homes: the directory in which edges keep their state and their tokens.
        stop: done when the federation shall end early.
        say: takes the hub's events.
        say_of: returns what takes an edge's events.
        environment: variables of the edges, beside FEDSODA_HOME.
        of_hub: variables of the hub.

    Raises:
        WorkerFailed: a process ended with a status other than 0.
    """
    listening: asyncio.Future[events.Listening] = asyncio.get_running_loop().create_future()

    def heard(line: bytes) -> None:
        event = events.read(line)
        if isinstance(event, events.Listening):
            listening.set_result(event)
        if event is not None:
            say(event)

    processes = [Process("fedsoda_hub", ["serve", settings.path, "--exit-when-done", "--jsonl"], of_hub)]
    following: list[asyncio.Task[None]] = []
    try:
        await processes[0].start()
        following.append(asyncio.create_task(processes[0].follow(heard)))
        first: set[asyncio.Future[Any]] = {following[0], listening, stop}
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if following[0].done():
            following[0].result()
            raise WorkerFailed("the hub ended before any edge could join", "")
        for name, data in edges.items() if listening.done() else ():
            hub = listening.result()
            join = ["join", hub.url, "--token-file", str(_token(settings, name, homes)), "--data", str(data)]
            join += ["--pin", hub.pin] if hub.pin is not None else []
            home = {"FEDSODA_HOME": str(homes / name), "no_proxy": "*"}  # the hub is on this machine
            processes.append(Process("fedsoda_edge", [*join, "--jsonl"], {**environment, **home}))
            await processes[-1].start()
            following.append(asyncio.create_task(processes[-1].follow(_read(say_of(name)))))
        pending: set[asyncio.Future[Any]] = {*following}
        while pending and not stop.done():
            done, _ = await asyncio.wait({*pending, stop}, return_when=asyncio.FIRST_COMPLETED)
            pending -= done
            for task in done:
                task.result()  # the first failure ends everything
    finally:
        for process in processes:
            await process.stop()
        for task in following:
            task.cancel()


def _read(say: EdgeSay) -> Callable[[bytes], None]:
    def hear(line: bytes) -> None:
        if (event := edge_events.read(line)) is not None:
            say(event)

    return hear


def _token(settings: RunSettings, name: str, homes: Path) -> Path:
    """Return the file with the edge's token; it is made at the first start."""
    path = homes / f"{name}.token"
    if not path.exists():
        with opened(RunDirectory(settings.run_dir)) as ledger:
            if name in {token.edge for token in ledger.tokens.all() if not token.revoked}:
                ledger.tokens.revoke(name)  # a start was killed before it wrote the file, so nobody has this token
            secret = ledger.tokens.create(name)
        homes.mkdir(parents=True, exist_ok=True)
        write_secret(path, secret)
    return path


class Process:
    """One of the real commands as a process in its own group."""

    def __init__(self, module: str, arguments: list[str], environment: Mapping[str, str]) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        # Variables that are set for this command, such as FEDSODA_JSON, are not meant for those that it starts.
        ours = {name: value for name, value in os.environ.items() if not name.startswith("FEDSODA_")}
        self._environment = {**ours, **environment}
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the process."""
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment,
            limit=1 << 22,
            **group_of_its_own(),
        )

    async def follow(self, hear: Callable[[bytes], None]) -> None:
        """Pass on each line that the process prints, until it ends.

        Raises:
            WorkerFailed: it ended with a status other than 0.
        """
        assert self._process is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        words = asyncio.create_task(self._process.stderr.read())
        async for line in self._process.stdout:
            hear(line)
        status = await self._process.wait()
        said = (await words).decode(errors="replace").strip()
        if status != 0:
            raise WorkerFailed(f"{' '.join(self._command[2:4])} ended with status {status}: {said[-400:]}", said)

    async def stop(self) -> None:
        """End the process and everything that it started."""
        if self._process is None or self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(stop_signal())
        try:
            async with asyncio.timeout(10):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
