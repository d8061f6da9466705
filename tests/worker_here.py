"""The edge's worker without its process: the same calls and answers, in a thread of this one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

import msgspec

from fedsoda_edge.errors import FedSODAError, WorkerFailed
from fedsoda_edge.protocol import commands as cmd
from fedsoda_edge.protocol.calls import Call, ProgressT, ResultT, progress_type, result_type
from fedsoda_edge.worker.worker import Worker

T = TypeVar("T")

KILLED = WorkerFailed("the worker was killed", "")


class _Ended(Exception):
    """Raised within a call whose worker was closed, when it next says how far it is."""


class WorkerHere:
    """A `TorchPort` without the seconds that a process takes to start.

    Args:
        failures: what its `Train` calls raise, one after the other, before any succeeds. A WorkerFailed ends it.
        dies: how many times it is killed in the middle of a round, after the second step.
        process_bytes: what each of its processes says that it held before it read anything; None: measured.
    """

    rss_bytes = 0
    peak_rss_bytes = 600_000_000

    def __init__(
        self, *failures: FedSODAError, dies: int = 0, process_bytes: Callable[[int], int] | None = None
    ) -> None:
        self.pid: int | None = None
        self.calls: list[type[msgspec.Struct]] = []
        self.num_started = 0
        self._failures = list(failures)
        self._dies = dies
        self._process_bytes = process_bytes
        self._worker: Worker | None = None

    async def start(self) -> None:
        self.num_started += 1
        self.pid = self.num_started
        self._worker = Worker(process_bytes=self._process_bytes and self._process_bytes(self.num_started))

    async def call(
        self, call: Call[ResultT, ProgressT], on_progress: Callable[[ProgressT], None] | None = None
    ) -> ResultT:
        if self.pid is None:
            await self.start()
        self.calls.append(type(call))
        if isinstance(call, cmd.Train) and self._failures:
            failure = self._failures.pop(0)
            if isinstance(failure, WorkerFailed):
                await self.close()
            raise failure
        worker, loop = self._worker, asyncio.get_running_loop()
        assert worker is not None

        def report(progress: object) -> None:
            if self._worker is not worker:
                raise _Ended
            if on_progress is not None:
                loop.call_soon_threadsafe(on_progress, _crossed(progress, progress_type(call)))
            if isinstance(progress, cmd.TrainingStep) and progress.step == 2 and self._dies:
                self._dies -= 1
                self.pid = self._worker = None
                raise KILLED

        answer = await asyncio.to_thread(worker.answer, _crossed(call, cmd.Command), report)  # type: ignore[arg-type]
        return _crossed(answer, result_type(call))

    async def close(self) -> None:
        self.pid = self._worker = None


def _crossed(value: object, kind: type[T]) -> T:
    """Return the value as the other end of a pipe reads it."""
    return msgspec.json.decode(msgspec.json.encode(value), type=kind)
