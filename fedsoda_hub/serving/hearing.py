"""Pass on what edges say, a few events of each at a time, so that none can fill the inbox of the round machine."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from fedsoda_edge.protocol.messages import EdgeId
from fedsoda_hub.federation import events as ev

MAX_UNHEARD = 4  # events of one edge that wait to be handled

SaidEvent = (
    ev.EdgeReady
    | ev.EdgeResumed
    | ev.EdgeAway
    | ev.EdgeDeclined
    | ev.UploadStarted
    | ev.UploadStalled
    | ev.UpdateArrived
)


class Hearing:
    """The hearing of edges, in turns. report: takes their events."""

    def __init__(self, report: Callable[[ev.RoundEvent], None]) -> None:
        self.report = report
        self._unheard: Counter[EdgeId] = Counter()  # events that are not handled yet
        self._turns: dict[EdgeId, asyncio.Event] = {}

    def tell(self, event: SaidEvent) -> None:
        """Report what an edge said."""
        self._unheard[event.edge] += 1
        self.report(event)

    def handled(self, event: ev.RoundEvent) -> None:
        """Note that the round machine has handled an event."""
        if isinstance(event, SaidEvent):
            self._unheard[event.edge] -= 1
            if not self._unheard[event.edge]:
                del self._unheard[event.edge]
            if (turn := self._turns.pop(event.edge, None)) is not None:
                turn.set()

    async def wait(self, edge: EdgeId) -> None:
        """Return when all but a few of the edge's events are handled."""
        while self._unheard[edge] >= MAX_UNHEARD:
            await self._turns.setdefault(edge, asyncio.Event()).wait()
