"""Serve a run, and tell the service manager how that goes. Which messages there are is the edge's `ports/service.py`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from fedsoda_hub import events
from fedsoda_hub.run.sentence import sentence_of

if TYPE_CHECKING:
    from fedsoda_edge.ports.service import Supervisor
    from fedsoda_hub.serving.daemon import Daemon


async def served(daemon: Daemon, supervisor: Supervisor, *, exit_when_done: bool) -> None:
    """Serve as `Daemon.run` does: ready from when it listens, alive as long as its event loop is.

    Raises:
        UsageProblem, WorkerFailed, KeyboardInterrupt: as `Daemon.run`.
    """

    def hears(event: events.HubEvent) -> None:
        if isinstance(event, events.Listening):
            supervisor.ready()
        elif isinstance(event, events.StoppedBySignal):
            supervisor.stopping()

    async def sentence() -> str:
        return sentence_of(await daemon.monitoring.status())

    daemon.broadcast.begin(hears)
    attending = asyncio.create_task(supervisor.attend(sentence))
    try:
        await daemon.run(exit_when_done=exit_when_done)
    finally:
        supervisor.stopping()
        attending.cancel()
        await asyncio.gather(attending, return_exceptions=True)
