"""Tell the service manager how a join is, where one started it. Which messages there are is `ports/service.py`'s."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from fedsoda_edge import events as ev
from fedsoda_edge.join.status import read_status, sentences
from fedsoda_edge.ports.service import Supervisor


class AttendedJoin:
    """A join that a service manager may attend.

    Args:
        status: the file that says what the join does (`Home.status`).
    """

    def __init__(self, supervisor: Supervisor, status: Path) -> None:
        self._supervisor = supervisor
        self._status = status

    def hears(self, event: ev.AnyEvent) -> None:
        """Take one event: from the first one of the agent on, the service is up, also where its hub is away."""
        if not isinstance(event, ev.SettingsGiven):
            self._supervisor.ready()

    async def attend(self) -> None:
        """Say that the event loop lives, and what the join does, until cancelled."""
        await self._supervisor.attend(self._sentence)

    async def _sentence(self) -> str:
        found = await asyncio.to_thread(read_status, self._status)
        if found is None or found.pid != os.getpid():  # an earlier join wrote it
            return "connecting"
        return "; ".join(sentences(found, is_running=True, now=time.time()))
