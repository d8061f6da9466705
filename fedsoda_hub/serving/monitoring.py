"""Report the run's status now, for whoever may ask: /healthz, /v1/status and the event of a run's end.

What the ledger alone knows is `run/status.py`'s, /metrics is `metrics.py`'s, the port is `listener.py`'s.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping
from typing import Literal, Protocol

import msgspec

from fedsoda_edge.ports import Clock
from fedsoda_edge.protocol.messages import EdgeId, Progress
from fedsoda_hub import events
from fedsoda_hub.federation.jobs import name_of
from fedsoda_hub.federation.rounds import RoundMachine
from fedsoda_hub.run.ledger import Ledger
from fedsoda_hub.run.pace import Pace
from fedsoda_hub.run.process import ProcessNote
from fedsoda_hub.run.status import LiveStatus, RunningJob, live_status, run_status
from fedsoda_hub.serving.metrics import Metrics
from fedsoda_hub.settings.run import RunSettings


class Present(Protocol):
    """The roster as far as a status needs it: who is connected, and where each edge's local round is."""

    @property
    def connected(self) -> set[EdgeId]: ...
    def why_idle(self, edge: EdgeId) -> str | None:
        """Say why a connected edge does not work, as far as its connection tells; None: it may."""
        ...

    @property
    def progress(self) -> Mapping[EdgeId, Progress]: ...
    async def flush_traffic(self) -> None: ...


Health = Literal["preparing", "serving", "over"]


class Monitoring:
    """The hub's knowledge of the run.

    url: where it serves; empty before it does. metrics: what /metrics shows. note: of this process, for others.
    """

    def __init__(
        self,
        settings: RunSettings,
        machine: RoundMachine,
        ledger: Ledger,
        clock: Clock,
        present: Present,
        admin_secret: str,
        metrics: Metrics,
        note: ProcessNote,
    ) -> None:
        self.url = ""
        self.metrics = metrics
        self._settings = settings
        self._machine = machine
        self._ledger = ledger
        self._clock = clock
        self._present = present
        self._admin_secret = admin_secret
        self.note = note
        self._pace = Pace()
        self._disk: str | None = None  # what could not be written for lack of space

    def heard(self, event: events.HubEvent) -> None:
        """Note what an event of the hub says of its job, and of its disk."""
        match event:
            case events.StageProgress():
                now = self._clock.monotonic()
                self._pace.note(event.job, event.stage, event.done, event.total, now)
            case events.OutOfDisk():
                self._disk = event.message
            case events.Fact():
                self._disk = None  # it is written down

    @property
    def health(self) -> Health:
        """The state of the hub, as /healthz tells everybody."""
        phase = self._machine.state.phase
        return "preparing" if phase == "preparing" else "over" if phase == "ended" else "serving"

    def work(self) -> RunningJob | None:
        """Return how far the job is that is computed now; None: none is."""
        job = self._machine.running
        return None if job is None else self._pace.working(name_of(job), self._clock.monotonic())

    def is_admin(self, secret: str) -> bool:
        """Compare a secret with that of the run's owner, in constant time."""
        return hmac.compare_digest(secret.encode(), self._admin_secret.encode())

    def due_seconds(self) -> float:
        """Return the seconds from now to the open round's deadline; 0: it has passed."""
        ahead = self._machine.state.deadline_at - self._clock.wall()
        return min(max(0.0, ahead), self._machine.rules.deadline_seconds)  # further: the clock was put back

    async def status(self, *, has_traffic: bool = True) -> LiveStatus:
        """Report the run's status with what only the hub knows.

        Args:
            has_traffic: with the bytes of each edge and round, of which a long run of many edges has a million.
        """
        await self._present.flush_traffic()
        known_edges = await asyncio.to_thread(self._ledger.edges.all)
        traffic = await asyncio.to_thread(self._ledger.traffic) if has_traffic else []
        machine, settings = self._machine, self._settings
        progress, connected = self._present.progress, self._present.connected
        edges = [
            msgspec.structs.replace(
                known,
                connected=known.edge in connected,
                eligible=known.edge in machine.eligible,
                size_class=machine.size_classes.get(known.edge),
                step=progress[known.edge].step if known.edge in progress else None,
                steps=progress[known.edge].steps if known.edge in progress else None,
                why=self._present.why_idle(known.edge),
                standing=machine.state.measured.standings.get(known.edge),
            )
            for known in known_edges
        ]
        is_open = machine.state.phase == "collecting"
        return live_status(
            run_status(settings.name, machine.rules.count, traffic, machine.state, settings.task.best_by),
            edges,
            url=self.url,
            due_seconds=self.due_seconds() if is_open else None,
            work=self.work(),
            waiting=self._disk or machine.waiting,
            hub=self.note.now,
        )
