"""Call a child process over pipes: length-prefixed JSON both ways, tensors as files. It owns torch, its parent does not.

The child runs in its own process group and ends when its stdin closes, even in the middle of work: after a
kill -9 of the parent nothing stays on the GPU. Calls, results and errors cross as typed data, never as pickles. What a
call means is left to the edge's worker (`fedsoda_edge.worker`) and the hub's (`fedsoda_hub.compute`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from queue import SimpleQueue
from typing import Any, BinaryIO

import msgspec

from fedsoda_edge.errors import DiskFull, FedSODAError, Field, OutOfMemory, WorkerFailed, by_name, panics_caught
from fedsoda_edge.ports.defects import machine_words, sentence_of, trace_of
from fedsoda_edge.ports.ends import is_out_of_memory
from fedsoda_edge.ports.system import group_of_its_own, peak_rss_bytes, was_killed
from fedsoda_edge.protocol.calls import Call, ProgressT, ResultT, progress_type, result_type

ReportProgress = Callable[[msgspec.Struct], None]

MAX_FRAME_BYTES = 64 << 20
_SECRETS = ("FEDSODA_TOKEN", "FEDSODA_LINK")  # variables of a command that talks to a hub, which a child does not
_SILENT = b"\f"  # a child's line on stderr after which it says nothing more there
END_SECONDS = 5.0  # that a process may take to end after its stdin closed, before it is killed


class ProgressReply(msgspec.Struct, frozen=True, tag_field="reply", tag="progress"):
    """The progress of the running call, as its progress type."""

    progress: msgspec.Raw


class ResultReply(msgspec.Struct, frozen=True, tag_field="reply", tag="result"):
    """The result of a call, as its result type. peak_rss_bytes: the most memory that the process has held so far."""

    result: msgspec.Raw
    peak_rss_bytes: int


class ErrorReply(msgspec.Struct, frozen=True, tag_field="reply", tag="error"):
    """The error that a call raised: a class of `errors.py` by its name, with its fields.

    name: "" for a defect, whose sentence is `text` and whose traceback is `details`.
    """

    name: str
    fields: dict[str, Field] = {}
    text: str = ""
    details: str = ""


_Reply = ProgressReply | ResultReply | ErrorReply
_reply = msgspec.json.Decoder(_Reply)


def _frame(message: msgspec.Struct) -> bytes:
    data = msgspec.json.encode(message)
    return len(data).to_bytes(4, "big") + data


# --- the parent's side ---------------------------------------------------------------------------------


class Child:
    """One child process, started again where it has ended. Calls run one after the other and report progress.

    Args:
        module: what the process runs, as `python -m` does.
        environment: variables beside those of this process.
    """

    def __init__(self, module: str, environment: Mapping[str, str] | None = None) -> None:
        self.module = module
        # OpenMP threads that spin at barriers starve each other wherever other programs compute too.
        ours = {name: value for name, value in os.environ.items() if name not in _SECRETS}
        self._environment = {"OMP_WAIT_POLICY": "PASSIVE", **ours, **(environment or {})}
        self._process: asyncio.subprocess.Process | None = None
        self._last_words: deque[str] = deque(maxlen=30)
        self._drain: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()
        self._has_answered = False  # the process that runs now
        self._is_given_up = False  # a call of it was broken off: its answer may still come, and is nobody's
        self.peak_rss_bytes = 0

    async def start(self) -> None:
        """Start the process."""
        if self._is_given_up:
            await self.close()
        self._has_answered = self._is_given_up = False
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
            if line.rstrip(b"\n") == _SILENT:
                self._last_words.clear()  # they would be taken for those of a crash that comes later
                continue
            self._last_words.append(line.decode(errors="replace").rstrip())

    @property
    def pid(self) -> int | None:
        """The process's number; None while no process runs that takes the next call."""
        return None if self._is_given_up else self._running_pid

    @property
    def _running_pid(self) -> int | None:
        return self._process.pid if self._process and self._process.returncode is None else None

    @property
    def rss_bytes(self) -> int | None:
        """Bytes of memory that the process holds now; None while no process runs."""
        import psutil

        pid = self._running_pid
        try:
            return None if pid is None else int(psutil.Process(pid).memory_info().rss)
        except psutil.Error:
            return None

    async def call(
        self, call: Call[ResultT, ProgressT], on_progress: Callable[[ProgressT], None] | None = None
    ) -> ResultT:
        """Run one call and return its result. A call that is cancelled ends the child before the next one begins.

        Raises:
            FedSODAError: what the call raised.
            WorkerFailed: the child ended, or has a defect.
        """
        result, progress = result_type(call), progress_type(call)
        async with self._lock:
            if self.pid is None:
                await self.start()
            assert self._process is not None
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            try:
                self._process.stdin.write(_frame(call))
                await self._process.stdin.drain()
                while True:
                    size = int.from_bytes(await self._process.stdout.readexactly(4), "big")
                    reply = _reply.decode(await self._process.stdout.readexactly(size))
                    self._has_answered = True
                    if not isinstance(reply, ProgressReply):
                        break
                    if on_progress is not None:
                        on_progress(msgspec.json.decode(reply.progress, type=progress))
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                status = await self._process.wait()
                if self._drain is not None:
                    await self._drain
                raise WorkerFailed(
                    f"the process {self.module} ended with status {status} during {type(call).__name__}"
                    + (" (it was killed, most likely because memory ran out)" if was_killed(status) else "")
                    + _last_said(self._last_words),
                    "\n".join(self._last_words),
                    was_killed(status),
                ) from error
            except BaseException:
                self._is_given_up = True
                raise
            if isinstance(reply, ErrorReply):
                raise _rebuilt(reply)
            self.peak_rss_bytes = max(self.peak_rss_bytes, reply.peak_rss_bytes)
            try:
                return msgspec.json.decode(reply.result, type=result)
            except msgspec.ValidationError as error:  # as NaN, which JSON does not have
                raise WorkerFailed(
                    f"the process {self.module} answered {type(call).__name__} with something other than a "
                    f"{result.__name__}: {error}"
                ) from error

    async def close(self) -> None:
        """End the process and wait for that. A child whose stdin closes ends at once, in the middle of work too.

        A child that has not answered yet may still be importing, and one that is stopped reads nothing: both are killed.
        """
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):
            self._process.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_SECONDS if self._has_answered else 0):
                await self._process.wait()
        if self._running_pid is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()
        if self._drain is not None:
            await self._drain
        # Pipes whose transports outlive the loop warn at interpreter exit.
        self._process._transport.close()  # type: ignore[attr-defined]


# What a process says at its end where this machine lacks something, and what to do about it.
_REMEDIES = (
    ("No usable temporary directory", "set TMPDIR to a directory that you may write to"),
    ("getpwuid", "this user has no entry in the system's list of users: set HOME and USER"),
    ("home directory", "set HOME to a directory that you may write to"),
    ("No module named", "install fedsoda again, with the same Python"),
)
_MOST_SAID = 300  # characters of the last line


def _last_said(words: Iterable[str]) -> str:
    """Quote the last line that a process wrote, with what to do where that is known; "" where it wrote none."""
    last = next((line.strip() for line in reversed(list(words)) if line.strip()), "")
    if not last:
        return ""
    remedy = next((remedy for mark, remedy in _REMEDIES if mark in last), "")
    return f": {last[:_MOST_SAID]}" + (f"; {remedy}" if remedy else "")


def _rebuilt(raised: ErrorReply) -> FedSODAError:
    kind = by_name(raised.name)
    if kind is None:
        return WorkerFailed(raised.text, raised.details)
    return kind(**raised.fields)


# --- the child's side ----------------------------------------------------------------------------------


def serve(
    calls: Any,
    answer: Callable[[Any, ReportProgress], msgspec.Struct],
    private: tuple[type[msgspec.Struct], ...] = (),
) -> None:
    """Answer calls on stdin until it closes. What the program prints goes to stderr.

    Args:
        calls: the union of the call types.
        answer: does one call and returns its result; it may report progress meanwhile.
        private: calls that read private text. From the first of them on only answers leave this process: what libraries
            print goes nowhere, and a defect is told without its words, since both may quote the text.
    """
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    waiting: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_read_calls, args=(sys.stdin.buffer, waiting), daemon=True).start()
    decode = msgspec.json.Decoder(calls).decode
    has_read = False
    while True:
        reply: _Reply
        call = decode(waiting.get())
        if isinstance(call, private) and not has_read:
            has_read = True
            _fall_silent()
        try:
            with panics_caught():
                result = answer(call, lambda progress: _write(out, ProgressReply(_raw(progress))))
            reply = ResultReply(_raw(result), peak_rss_bytes())
        except FedSODAError as error:
            reply = ErrorReply(type(error).__name__, error.fields())
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # a library in Rust panics with an exception of this class
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                full = DiskFull(f"the disk is full ({machine_words(error)}); free some space there, then try again")
                _write(out, ErrorReply(DiskFull.__name__, full.fields()))
                continue
            if is_out_of_memory(error):
                words = machine_words(error) or type(error).__name__
                short = OutOfMemory(
                    f"memory ran out during {type(call).__name__} ({words}); end other programs", trace_of(error)
                )
                reply = ErrorReply(OutOfMemory.__name__, short.fields())
            elif has_read:
                reply = ErrorReply("", text=sentence_of(error), details=trace_of(error))
            else:
                reply = ErrorReply("", text=f"{type(error).__name__}: {error}", details=traceback.format_exc())
        _write(out, reply)


def _fall_silent() -> None:
    """Send what the process prints from here on nowhere, and say so to the parent, which keeps the last lines."""
    sys.stderr.flush()
    sys.stdout.flush()
    os.write(2, _SILENT + b"\n")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _raw(value: msgspec.Struct) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


def _write(out: BinaryIO, reply: _Reply) -> None:
    out.write(_frame(reply))
    out.flush()


def _read_calls(stdin: BinaryIO, waiting: SimpleQueue[bytes]) -> None:
    while head := stdin.read(4):
        size = int.from_bytes(head, "big")
        if len(head) < 4 or size > MAX_FRAME_BYTES:
            break
        waiting.put(stdin.read(size))
    os._exit(0)  # the parent is gone or done: never work on as an orphan
