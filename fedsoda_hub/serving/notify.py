"""Tell an owner's program and webhook what happened: decide what is worth a notice, and let none of it hold up a round.

Each way has a bounded queue of its own. How a notice travels is `webhook.py`'s and `hook_command.py`'s.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from fedsoda_edge.ports import Clock
from fedsoda_edge.protocol.messages import EdgeId
from fedsoda_hub import events
from fedsoda_hub.federation.state import LedgerState
from fedsoda_hub.run.edges import KnownEdge
from fedsoda_hub.serving import notices
from fedsoda_hub.serving.first_of import first_of
from fedsoda_hub.settings.run import RunSettings

MAX_WAITING = 100  # notices of one way; the oldest give way to new ones
GONE_SECONDS = 86400.0  # after which an edge's absence is told
WATCH_SECONDS = 60.0  # between two looks at disk and edges
CLOSE_SECONDS = 10.0  # that the hub's end waits for what is still to be told

_log = logging.getLogger("fedsoda_hub.serving")


class NotDelivered(Exception):
    """A notice did not arrive, and why. is_final: nothing more is to be sent this way."""

    def __init__(self, why: str, *, is_final: bool = False) -> None:
        super().__init__(why)
        self.is_final = is_final


class Way(Protocol):
    """A way to the owner. name: one of `metrics.CHANNELS`."""

    @property
    def name(self) -> str: ...
    async def deliver(self, notice: notices.HubNotice, body: bytes) -> None:
        """Bring one notice there. Raises NotDelivered after the last try."""
        ...


class Outbox:
    """The notices that wait for one way. count: is told of each by the way's name what became of it."""

    def __init__(self, way: Way, count: Callable[[str, str], None]) -> None:
        self._way = way
        self._count = count
        self._waiting: deque[notices.HubNotice] = deque()
        self._has_some = asyncio.Event()
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._is_over = False

    @property
    def num_waiting(self) -> int:
        """The number of notices that wait, with the one that is on its way."""
        return len(self._waiting)

    def put(self, notice: notices.HubNotice) -> None:
        """Let a notice wait for its turn; where too many wait, the oldest is dropped."""
        if self._is_over:
            return
        if len(self._waiting) >= MAX_WAITING:
            del self._waiting[1]  # the first is on its way
            self._count(self._way.name, "dropped")
            _log.warning("[notify] %s: more than %d notices wait; the oldest is dropped", self._way.name, MAX_WAITING)
        self._waiting.append(notice)
        self._has_some.set()
        self._is_empty.clear()

    async def run(self) -> None:
        """Deliver one after the other until cancelled, or until the way is closed for good."""
        while not self._is_over:
            await self._has_some.wait()
            notice = self._waiting[0]
            try:
                await self._way.deliver(notice, msgspec.json.encode(notice))
                self._count(self._way.name, "delivered")
            except NotDelivered as error:
                self._count(self._way.name, "failed")
                _log.warning("[notify] %s: %s was not delivered: %s", self._way.name, notice.kind, error)
                self._is_over = error.is_final
            self._waiting.popleft()
            if self._is_over:
                self._waiting.clear()
            if not self._waiting:
                self._has_some.clear()
                self._is_empty.set()

    async def emptied(self) -> None:
        """Wait until nothing waits."""
        await self._is_empty.wait()


@dataclass(frozen=True)
class Watched:
    """The parts of the hub that are looked at beside its events. quorum: updates that the open round needs. known: scans a table."""

    directory: Path
    state: LedgerState
    quorum: Callable[[], int]
    connected: Callable[[], Iterable[EdgeId]]
    known: Callable[[], list[KnownEdge]]


class Notifier:
    """The notices of one hub. `hear` takes the daemon's events."""

    def __init__(
        self,
        settings: RunSettings,
        watched: Watched,
        clock: Clock,
        count: Callable[[str, str], None],
    ) -> None:
        self._settings = settings
        self._watched = watched
        self._clock = clock
        self._count = count
        self._outboxes: list[Outbox] = []
        self._workers: list[asyncio.Task[None]] = []
        self._opened: tuple[int, float] | None = None
        self._short_round = 0  # the last round that was told to be below quorum
        self._began_at = clock.monotonic()
        self._gone_at: dict[EdgeId, float] = {}
        self._left: set[EdgeId] = set()
        self._told_gone: set[EdgeId] = set()
        self._told_disk: str | None = None
        self._is_full = asyncio.Event()

    @property
    def num_waiting(self) -> int:
        """The number of notices that wait, on all ways."""
        return sum(outbox.num_waiting for outbox in self._outboxes)

    def open(self, ways: Iterable[Way]) -> None:
        """Begin to deliver, on a running loop."""
        self._outboxes = [Outbox(way, self._count) for way in ways]
        self._workers = [asyncio.create_task(outbox.run()) for outbox in self._outboxes]

    async def close(self) -> None:
        """Let what waits be delivered within CLOSE_SECONDS, then end."""
        if not self._workers:
            return
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                for outbox in self._outboxes:
                    await outbox.emptied()
        except TimeoutError:
            _log.warning("[notify] the hub ends, and %d notices were not delivered", self.num_waiting)
        for worker in self._workers:
            worker.cancel()
        await asyncio.wait(self._workers)

    # --- what happened -----------------------------------------------------------------------------------

    def hear(self, event: events.HubEvent) -> None:
        """Tell what an event says, if the owner wants to know it."""
        if not self._outboxes:
            return
        match event:
            case events.RoundOpened():
                self._opened = (event.round, self._clock.monotonic())
            case events.DeadlinePassed():
                self._tell_quorum(event.round)
            case events.RoundClosed():
                self._tell_round(event)
            case events.Evaluated(round=number, result=result):
                text = f"judged after round {number}{notices.shares(result.accuracy)}"
                self._tell(
                    notices.EvaluationNotice(
                        **self._about(text),
                        round=number,
                        accuracy=result.accuracy,
                        loss=result.loss,
                        num_examples=result.num_examples,
                    )
                )
            case events.RunEnded():
                self._tell_end(event.summary.rounds_closed)
            case events.ComputeFailed(job=job, message=message):
                self._tell(notices.ComputeNotice(**self._about(f"{job}: {message}"), job=job, message=message))
            case events.OutOfDisk():
                self._is_full.set()
            case events.EdgeConnected(edge=edge):
                self._gone_at.pop(edge, None)
                self._left.discard(edge)
                self._told_gone.discard(edge)
            case events.EdgeDisconnected(edge=edge):
                self._gone_at[edge] = self._clock.monotonic()
            case events.EdgeLeft(edge=edge):
                self._left.add(edge)

    def _about(self, text: str) -> notices.About:
        return notices.About(
            id=secrets.token_hex(16),
            at=self._clock.wall(),
            run=self._settings.name,
            run_id=self._watched.state.run_id,
            text=text,
        )

    def _tell(self, notice: notices.HubNotice) -> None:
        if notice.kind in self._settings.notify.events:
            for outbox in self._outboxes:
                outbox.put(notice)

    def _tell_quorum(self, number: int) -> None:
        state, needed = self._watched.state, self._watched.quorum()
        accepted = len(state.accepted)
        if accepted >= needed or self._short_round == number:
            return
        self._short_round = number
        text = (
            f"round {number} has {accepted} of {needed} updates at its deadline; it stays open and asks further edges"
        )
        self._tell(
            notices.QuorumNotice(
                **self._about(text), round=number, accepted=accepted, needed=needed, invited=state.invited
            )
        )

    def _tell_round(self, event: events.RoundClosed) -> None:
        is_timed = self._opened is not None and self._opened[0] == event.round
        seconds = self._clock.monotonic() - self._opened[1] if is_timed and self._opened is not None else None
        self._tell(
            notices.RoundNotice(
                **self._about(f"round {event.round} of {event.rounds} closed: loss {event.loss:.3f}"),
                round=event.round,
                rounds=event.rounds,
                loss=event.loss,
                updates=event.updates,
                seconds=seconds,
                bytes_up=event.bytes_up,
                bytes_down=event.bytes_down,
                cross_term=event.cross_term,
            )
        )

    def _tell_end(self, rounds: int) -> None:
        state = self._watched.state
        accuracy = {} if state.evaluation is None else state.evaluation.accuracy
        loss = state.losses[-1] if state.losses else None
        text = f"the run is over after {rounds} rounds{notices.shares(accuracy)}"
        self._tell(notices.RunOverNotice(**self._about(text), rounds=rounds, loss=loss, accuracy=accuracy))

    # --- what is looked at -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look at disk and edges until cancelled; raise what a worker raises, which would be a defect."""
        if not self._workers:
            return
        await first_of(*(_raising(worker) for worker in self._workers), self._watch())

    async def _watch(self) -> None:
        while True:
            await self._look_at_disk()
            await self._look_at_edges()
            await first_of(self._clock.sleep(WATCH_SECONDS), self._is_full.wait())

    async def _look_at_disk(self) -> None:
        is_full, limit = self._is_full.is_set(), self._settings.notify.disk_low_bytes
        self._is_full.clear()
        try:
            free = (await asyncio.to_thread(shutil.disk_usage, self._watched.directory)).free
        except OSError:
            return
        if free > limit * 1.1 and not is_full:
            self._told_disk = None
        found = "full" if is_full else "low" if free < limit else None
        if found is not None and self._told_disk not in (found, "full"):
            self._told_disk = found
            text = notices.disk_sentence(free, limit, is_full)
            self._tell(notices.DiskNotice(**self._about(text), free_bytes=free, limit_bytes=limit, is_full=is_full))

    async def _look_at_edges(self) -> None:
        if self._watched.state.phase == "ended":
            return
        known = await asyncio.to_thread(self._watched.known)
        here, now = set(self._watched.connected()), self._clock.monotonic()
        gone = [
            one.edge
            for one in known
            if one.used and not one.revoked and one.edge not in here | self._left | self._told_gone
            if now - self._gone_at.get(one.edge, self._began_at) >= GONE_SECONDS
        ]
        if gone:
            self._told_gone.update(gone)
            named = tuple(gone[: notices.MAX_NAMED])
            about = self._about(notices.gone_sentence(named, len(gone)))
            self._tell(notices.EdgesGoneNotice(**about, edges=named, count=len(gone)))


async def _raising(worker: asyncio.Task[None]) -> None:
    """Wait until a worker ends by a defect; one whose way was closed for good ends too, and that is none."""
    await asyncio.wait({worker})
    if not worker.cancelled():
        worker.result()
    await asyncio.Event().wait()
