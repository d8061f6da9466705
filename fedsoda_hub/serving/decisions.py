"""Run the loop of decisions: handle one event after the other, perform its effects, then all that is owed.

What is decided is `federation/rounds.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import Protocol

from fedsoda_edge.errors import DiskFull
from fedsoda_edge.ports import Clock
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.trace import changed
from fedsoda_hub import events
from fedsoda_hub.federation import events as ev
from fedsoda_hub.federation import records as rec
from fedsoda_hub.federation.jobs import Job
from fedsoda_hub.federation.refusals import RefusalKind
from fedsoda_hub.federation.rounds import RoundMachine
from fedsoda_hub.run.ledger import Ledger
from fedsoda_hub.serving import offers
from fedsoda_hub.serving.monitoring import Monitoring
from fedsoda_hub.serving.shelf import Shelf
from fedsoda_hub.serving.uploads import Uploads
from fedsoda_hub.settings.run import RunSettings

DISK_RETRY_SECONDS = 10.0
_log = logging.getLogger("fedsoda_hub.serving")


class Post(Protocol):
    """The way to edges (`roster.Roster`)."""

    def send(self, edge: ms.EdgeId, message: ms.HubMessage) -> None: ...
    def handled(self, event: ev.RoundEvent) -> None: ...
    @property
    def travelled(self) -> tuple[int, int]: ...
    async def flush_traffic(self) -> None: ...


class Jobs(Protocol):
    """The port for torch work (`torch_jobs.TorchJobs`). opened: set when jobs can start."""

    @property
    def opened(self) -> asyncio.Event: ...
    def start(self, job: Job) -> None: ...


@dataclass(frozen=True)
class Settle:
    """A reminder that what is owed may be possible by now, although nothing happened."""


@dataclass(frozen=True)
class OwnerRequest:
    """A request of the owner. answer: why it is not done; None: it is in the ledger."""

    event: ev.OwnerAsked
    answer: asyncio.Future[str | None]


Inbox = asyncio.Queue[ev.RoundEvent | Settle | OwnerRequest]


class Decisions:
    """The machine and its timers. is_over: set when the run is over and every connected edge has its Farewell."""

    def __init__(
        self,
        settings: RunSettings,
        machine: RoundMachine,
        inbox: Inbox,
        ledger: Ledger,
        clock: Clock,
        shelf: Shelf,
        uploads: Uploads,
        post: Post,
        jobs: Jobs,
        monitoring: Monitoring,
        say: events.HubSay,
    ) -> None:
        self.is_over = asyncio.Event()
        self._settings = settings
        self._machine = machine
        self._inbox = inbox
        self._ledger = ledger
        self._clock = clock
        self._shelf = shelf
        self._uploads = uploads
        self._post = post
        self._jobs = jobs
        self._monitoring = monitoring
        self._say = say
        self._timers: asyncio.TaskGroup | None = None
        self._deadline: asyncio.Task[None] | None = None
        self._has_garbage = False

    async def run(self) -> None:
        """Decide until cancelled, beginning with what a restart owes."""
        async with asyncio.TaskGroup() as self._timers:
            await self._jobs.opened.wait()
            await self._settle()
            while True:
                event = await self._inbox.get()
                if isinstance(event, OwnerRequest):
                    await self._answer(event)
                elif not isinstance(event, Settle):
                    await self._perform(self._machine.handle(event), event)
                    self._post.handled(event)
                if isinstance(event, ev.UpdateArrived) and event.problem is None:
                    self._uploads.judged(event.edge, event.digest, self._machine.state)
                await self._settle()

    async def _answer(self, asked: OwnerRequest) -> None:
        """Do what the owner asks, and tell the one who waits for it how it went."""
        effects = self._machine.handle(asked.event)
        is_done = await self._perform(effects, asked.event)
        why = next((effect.because for effect in effects if isinstance(effect, ev.Ignore)), None)
        if not asked.answer.done():
            asked.answer.set_result(None if is_done else why or "the hub's disk is full, so nothing is changed")

    async def _settle(self) -> None:
        await self._tidy()
        while await self._perform(self._machine.owed(self._clock.wall()), Settle()):
            await self._tidy()
        if not self._machine.is_computing:
            await self._uploads.forget_refused(self._machine.state)

    async def _tidy(self) -> None:
        """Delete what the run needs no more since a job was recorded, before anything else is started."""
        if self._has_garbage and not self._machine.is_computing:
            self._has_garbage = False
            await self._uploads.tidy(self._machine.state, self._shelf.lent_blobs)

    async def _perform(self, effects: list[ev.Effect], cause: ev.RoundEvent | Settle) -> bool:
        """Perform effects in order, and tell whether a record was appended.

        After a record that cannot be written, the effects that follow are not performed.
        """
        appended = False
        for effect in effects:
            match effect:
                case ev.Append(record):
                    try:
                        await asyncio.to_thread(self._ledger.append, record)
                    except DiskFull as error:
                        self._say_disk_full(error, cause)
                        return False
                    appended = True
                    await self._recorded(record)
                case ev.Send(edge, message, refused):
                    if refused is not None:
                        self._monitoring.metrics.refused(refused)
                    self._post.send(edge, message)
                case ev.SendOffer():
                    self._offer(effect)
                case ev.SetDeadline(number, at):
                    self._set_deadline(number, at)
                case ev.StartJob(job):
                    self._jobs.start(job)
                case ev.Wait(why):
                    _log.debug("= waiting")
                    self._say(events.Waiting(why=why))
                case ev.Finish():
                    self.is_over.set()
                case ev.Ignore():
                    _log.debug("= %s is ignored", type(cause).__name__)
        return appended

    def _offer(self, asked: ev.SendOffer) -> None:
        state = self._machine.state
        made = offers.offer(asked, state, self._settings, self._shelf.ref, self._monitoring.due_seconds())
        self._post.send(asked.edge, made)

    def _say_disk_full(self, error: DiskFull, cause: ev.RoundEvent | Settle) -> None:
        self._say(events.OutOfDisk(message=str(error)))
        if isinstance(cause, ev.UpdateArrived):
            self._monitoring.metrics.refused(RefusalKind.DISK_FULL)
            self._post.send(cause.edge, ms.Refusal(round=cause.round, reason=str(error), retry=True))
        # A job's result is reported again as it was; `owed` finds everything else again.
        self._report_after(DISK_RETRY_SECONDS, cause if isinstance(cause, ev.JobDone) else Settle())

    async def _recorded(self, record: rec.AnyRecord) -> None:
        """Fold in a record that is durable now, act on it, and say it."""
        state = self._machine.state
        before = state.phase
        self._machine.apply(record)
        _log.debug("= %s round=%d", type(record).__name__, state.round)
        if state.phase != before:
            _log.debug(changed("run", before, state.phase))
        self._shelf.follow([record])
        if isinstance(record, rec.RunPrepared | rec.RoundClosed | rec.Realigned | rec.Repruned):
            self._has_garbage = True
        if isinstance(record, rec.RoundClosed):
            await self._post.flush_traffic()
            with contextlib.suppress(DiskFull):  # it only bounds replay
                await asyncio.to_thread(self._ledger.snapshot, state)  # nobody else changes the state meanwhile
        fact = events.event_of_record(
            record,
            self._machine.rules.count,
            state,
            self._post.travelled,
            await self._monitoring.status() if isinstance(record, rec.RunEnded) else None,
        )
        if fact is not None:
            self._say(fact)

    # --- timers ------------------------------------------------------------------------------------------

    def _set_deadline(self, number: int, at: float) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        delay = max(0.0, at - self._clock.wall())
        self._deadline = self._report_after(delay, ev.DeadlineReached(number, at))

    def _report_after(self, seconds: float, event: ev.RoundEvent | Settle) -> asyncio.Task[None]:
        async def report() -> None:
            await self._clock.sleep(seconds)
            self._inbox.put_nowait(event)

        assert self._timers is not None, "timers are set only while `run` runs"
        return self._timers.create_task(report())
