"""A child process on pipes: length-prefixed JSON both ways, tensors as files. It owns torch, its parent does not.

The child runs in its own process group and ends when its stdin closes, even in the middle of work: after a
kill -9 of the parent nothing stays on the GPU. Errors of our tree cross as data, never as pickles. What a
command means is the worker's (`fedsoda_edge.worker`) or the hub's (`fedsoda_hub.compute`) business.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any, BinaryIO

from fedsoda_edge.errors import FedSODAError, WorkerFailed, by_name
from fedsoda_edge.ports.system import group_of_its_own, peak_rss_bytes, was_killed

Values = dict[str, Any]
Report = Callable[[Values], None]
Handler = Callable[[Values, Report], Values]

MAX_FRAME_BYTES = 64 << 20


def _frame(message: Values) -> bytes:
    data = json.dumps(message, allow_nan=False).encode()
    return len(data).to_bytes(4, "big") + data


# --- the parent's side ---------------------------------------------------------------------------------


class Child:
    """One child process. Calls run one after the other; progress comes back while they run."""

    def __init__(self, module: str, environment: Mapping[str, str] | None = None) -> None:
        self.module = module
        # OpenMP threads that spin at barriers starve each other wherever other programs compute too.
        self._environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **(environment or {})}
        self._process: asyncio.subprocess.Process | None = None
        self._last_words: deque[str] = deque(maxlen=30)
        self._drain: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()
        self.peak_rss_bytes = 0

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self.module,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment,
            **group_of_its_own(),
        )
        self._drain = asyncio.create_task(self._keep_last_words(self._process))

    async def _keep_last_words(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while line := await process.stderr.readline():
            self._last_words.append(line.decode(errors="replace").rstrip())

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self._process.returncode is None else None

    @property
    def rss_bytes(self) -> int | None:
        """What the process holds now; None where there is none."""
        import psutil

        try:
            return None if self.pid is None else int(psutil.Process(self.pid).memory_info().rss)
        except psutil.Error:
            return None

    async def call(self, command: str, arguments: Values, on_progress: Report | None = None) -> Values:
        """Run one command and return its result.

        Raises:
            FedSODAError: what the command raised.
            WorkerFailed: the child ended, or raised something that is not ours.
        """
        async with self._lock:
            if self.pid is None:
                await self.start()
            assert self._process is not None
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            try:
                self._process.stdin.write(_frame({"do": command, "with": arguments}))
                await self._process.stdin.drain()
                while True:
                    size = int.from_bytes(await self._process.stdout.readexactly(4), "big")
                    reply = json.loads(await self._process.stdout.readexactly(size))
                    if "progress" not in reply:
                        break
                    if on_progress is not None:
                        on_progress(reply["progress"])
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                status = await self._process.wait()
                if self._drain is not None:
                    await self._drain
                raise WorkerFailed(
                    f"the process {self.module} ended with status {status} during {command!r}"
                    + (" (killed, most likely out of memory)" if was_killed(status) else ""),
                    "\n".join(self._last_words),
                    was_killed(status),
                ) from error
            self.peak_rss_bytes = max(self.peak_rss_bytes, int(reply.get("peak_rss_bytes", 0)))
            if "error" in reply:
                raise _rebuilt(reply["error"])
            return dict(reply["result"])

    async def close(self) -> None:
        """Close its stdin, which ends it, and wait."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):
            self._process.stdin.close()
        await self._process.wait()
        if self._drain is not None:
            await self._drain
        # Pipes whose transports outlive the loop warn at interpreter exit.
        self._process._transport.close()  # type: ignore[attr-defined]


def _rebuilt(error: Values) -> FedSODAError:
    kind = by_name(error["name"])
    if kind is None:
        return WorkerFailed(error["text"], error.get("details", ""))
    return kind(**error["fields"])


# --- the child's side ----------------------------------------------------------------------------------


def serve(handlers: Mapping[str, Handler]) -> None:
    """Answer commands on stdin until it closes. What the program prints goes to stderr."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    commands: SimpleQueue[Values] = SimpleQueue()
    threading.Thread(target=_read_commands, args=(sys.stdin.buffer, commands), daemon=True).start()
    while True:
        command = commands.get()
        try:
            result = handlers[command["do"]](command["with"], lambda values: _write(out, _frame({"progress": values})))
            reply = _frame({"result": result, "peak_rss_bytes": peak_rss_bytes()})  # NaN raises here
        except FedSODAError as error:
            reply = _frame({"error": {"name": type(error).__name__, "fields": error.fields()}})
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            reply = _frame({"error": {"name": "", "text": text, "details": traceback.format_exc()}})
        _write(out, reply)


def _write(out: BinaryIO, frame: bytes) -> None:
    out.write(frame)
    out.flush()


def _read_commands(stdin: BinaryIO, commands: SimpleQueue[Values]) -> None:
    while head := stdin.read(4):
        size = int.from_bytes(head, "big")
        if len(head) < 4 or size > MAX_FRAME_BYTES:
            break
        commands.put(json.loads(stdin.read(size)))
    os._exit(0)  # the parent is gone or done: never work on as an orphan
