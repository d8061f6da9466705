"""Run the round machine's jobs in the process that owns torch, with three tries, and report their results as events.

What the jobs do is `compute.py`'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import cast

from fedsoda_edge.errors import OutOfMemory, WorkerFailed
from fedsoda_edge.ports import TorchPort
from fedsoda_edge.protocol.calls import Call
from fedsoda_edge.protocol.trace import changed, went_wrong
from fedsoda_hub import events
from fedsoda_hub.federation import events as ev
from fedsoda_hub.federation.jobs import Job, JobProgress, JobResult, name_of
from fedsoda_hub.settings.open_run import OpenRun
from fedsoda_hub.settings.run import RunSettings

TRIES = 3
_log = logging.getLogger("fedsoda_hub.serving")


class TorchJobs:
    """The queue of jobs, done one after the other.

    opened: set when the process has the run's settings. report: takes the results. took: is told how many seconds each
    job took, with its tries.
    """

    def __init__(
        self,
        settings: RunSettings,
        port: TorchPort,
        report: Callable[[ev.RoundEvent], None],
        say: events.HubSay,
        took: Callable[[str, float], None],
    ) -> None:
        self.opened = asyncio.Event()
        self._settings = settings
        self._port = port
        self._report = report
        self._say = say
        self._took = took
        self._waiting: asyncio.Queue[Job] = asyncio.Queue()

    @property
    def num_waiting(self) -> int:
        """The number of jobs that wait for the one that runs."""
        return self._waiting.qsize()

    def start(self, job: Job) -> None:
        """Queue this job; its result is reported as JobDone."""
        self._waiting.put_nowait(job)

    async def run(self) -> None:
        """Do jobs until cancelled.

        Raises:
            FedSODAError: a job failed in a way that another try cannot help.
            OutOfMemory: memory ran out three times in one job, or the process was killed as often.
            WorkerFailed: the process ended three times in one job.
        """
        await self._open()
        self.opened.set()
        while True:
            job = await self._waiting.get()
            _log.debug(changed(f"job {name_of(job)}", "waits", "runs"))
            began = asyncio.get_running_loop().time()
            result = await self._done(job)
            self._took(name_of(job), asyncio.get_running_loop().time() - began)
            _log.debug(changed(f"job {name_of(job)}", "runs", "done"))
            self._report(ev.JobDone(job, result))

    async def _open(self) -> None:
        await self._port.call(OpenRun(settings=self._settings))

    async def _done(self, job: Job) -> JobResult:
        """Do one job. A process that ends (out of memory, for example) is started again, and the job with it."""
        name, call = name_of(job), cast("Call[JobResult, JobProgress]", job)
        tries = 0
        while True:
            try:
                if self._port.pid is None:
                    await self._open()
                return await self._port.call(call, lambda done: self._say(events.event_of_progress(name, done)))
            except (WorkerFailed, OutOfMemory) as error:
                tries += 1
                _log.debug(went_wrong(error))
                self._say(events.ComputeFailed(job=name, message=str(error), details=error.details))
                if tries == TRIES:
                    if isinstance(error, WorkerFailed) and error.was_killed:
                        raise _killed(name, error) from error
                    raise
                if isinstance(error, OutOfMemory):
                    await self._port.close()  # what it holds is not given back before it ends

    async def close(self) -> None:
        """End the process."""
        await self._port.close()


def _killed(job: str, error: WorkerFailed) -> OutOfMemory:
    return OutOfMemory(
        f"the process that computes was killed {TRIES} times during {job}, most likely since this machine has too little memory "
        "for it; end other programs, give it more memory, or lower what the run asks for ([public] sequences and length, "
        "[align] batch_size)",
        error.details,
    )
