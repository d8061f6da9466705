"""Feed the pages that are open: what the run is now, made again once something happened, and of the edges only the rows that changed.

What it looks like is `views.py`'s. Beside what the ledger says once the hub serves, nothing is made while nobody looks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Protocol

import msgspec

from fedsoda_edge.protocol.messages import DeviceFacts, EdgeId
from fedsoda_hub.events import HubEvent, Listening
from fedsoda_hub.federation.rounds import RoundMachine
from fedsoda_hub.run.ledger import Ledger
from fedsoda_hub.run.status import LiveStatus
from fedsoda_hub.serving.byte_sums import ByteSums
from fedsoda_hub.serving.tally import Tally
from fedsoda_hub.serving.views import EdgeRow, RunView, edge_rows, run_view

FRESH_SECONDS = 0.5  # for which what was made is shown again, whatever happens
BUSY_SHARE = 0.05  # of the hub's time that may go to pages: what took 50 ms is made again after a second
IDLE_SECONDS = 15.0  # after which an open page hears a sign of life, so that proxies let the stream live
MAX_STREAMS = 32
RECORDS_AT_ONCE = 5000


class ConnectedEdges(Protocol):
    """The edges that are connected (`roster.Roster`)."""

    @property
    def devices(self) -> Mapping[EdgeId, DeviceFacts]: ...
    @property
    def travelled(self) -> tuple[int, int]: ...


class Reports(Protocol):
    """The side that reports the run's status (`monitoring.Monitoring`)."""

    async def status(self, *, has_traffic: bool) -> LiveStatus: ...


class PageState(msgspec.Struct, frozen=True):
    """The whole of what a page shows at once."""

    run: RunView
    edges: list[EdgeRow]


class Feed:
    """The state that pages show. monotonic, wall: seconds from any start, and since 1970."""

    def __init__(
        self,
        reports: Reports,
        machine: RoundMachine,
        ledger: Ledger,
        present: ConnectedEdges,
        monotonic: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._reports = reports
        self._machine = machine
        self._ledger = ledger
        self._present = present
        self._monotonic = monotonic
        self._wall = wall
        self._tally = Tally()
        self._sums = ByteSums(ledger, monotonic)
        self._state: PageState | None = None
        self._made_at = 0.0
        self._cost = 0.0
        self._making = asyncio.Lock()
        self._is_stale = True
        self._waiting: set[asyncio.Event] = set()
        self._is_closed = False
        self._reading: asyncio.Task[None] | None = None

    def heard(self, event: HubEvent) -> None:
        """Note that something happened, as a listener of the hub's events; once it serves, read what there is."""
        self.touch()
        if isinstance(event, Listening):
            self._reading = asyncio.get_running_loop().create_task(self._read_first())

    def touch(self) -> None:
        """Note that something changed that no event tells, such as who may join."""
        self._is_stale = True
        for waiting in self._waiting:
            waiting.set()

    def close(self) -> None:
        """End all streams."""
        self._is_closed = True
        self._sums.close()
        if self._reading is not None:
            self._reading.cancel()
        self.touch()

    async def state(self) -> PageState:
        """Return what there is to show; where nothing happened, or just now, what was shown before."""
        async with self._making:
            age = self._monotonic() - self._made_at
            is_needed = self._state is None or (self._is_stale and age >= self._pause) or age >= IDLE_SECONDS
            if self._state is None or is_needed:
                began = self._monotonic()
                self._is_stale = False
                self._state = await self._make()
                self._made_at = self._monotonic()
                self._cost = self._made_at - began
            return self._state

    @property
    def _pause(self) -> float:
        return max(FRESH_SECONDS, self._cost / BUSY_SHARE)

    async def _make(self) -> PageState:
        status = await self._reports.status(has_traffic=False)
        await asyncio.to_thread(self._read)
        await self._sums.refresh(len(self._tally.closed))
        machine, now = self._machine, self._wall()
        state, rules = machine.state, machine.rules
        run = run_view(
            status, state, rules, machine.running, self._tally, self._sums.by_round, self._present.travelled, now
        )
        return PageState(
            run, edge_rows(status.edges, state, self._tally, self._sums.by_edge, self._present.devices, now)
        )

    async def _read_first(self) -> None:
        """Read what the ledger says of the rounds before, so that the first who looks waits for none of it."""
        async with self._making:
            await asyncio.to_thread(self._read)
            await self._sums.refresh(len(self._tally.closed))

    def _read(self) -> None:
        """Read what the ledger says since the last time."""
        while found := self._ledger.since(self._tally.last, RECORDS_AT_ONCE):  # a long run has a million
            self._tally.fold(found)

    async def follow(self, is_welcome: Callable[[], bool]) -> AsyncIterator[bytes]:
        """Yield server-sent events: first all there is, then what changed, until the hub or the session ends.

        Args:
            is_welcome: tells whether the session still is one.
        """
        if len(self._waiting) >= MAX_STREAMS:
            yield b"event: full\ndata: {}\n\n"
            return
        changed = asyncio.Event()
        self._waiting.add(changed)
        sent: dict[str, EdgeRow] = {}
        try:
            while not self._is_closed and is_welcome():
                changed.clear()
                found = await self.state()
                rows = {row.edge: row for row in found.edges}
                is_first = not sent or not sent.keys() <= rows.keys()
                news = [row for edge, row in rows.items() if is_first or sent.get(edge) != row]
                sent = rows
                yield _event("run", found.run)
                if news or is_first:
                    yield _event("edges" if is_first else "changed", news)
                try:
                    await asyncio.wait_for(changed.wait(), IDLE_SECONDS)
                    await asyncio.sleep(self._pause)  # much that happens at once is told at once
                except TimeoutError:
                    yield b": here\n\n"
            yield b"event: over\ndata: {}\n\n"
        finally:
            self._waiting.discard(changed)


def _event(name: str, data: object) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"
