"""Look every few seconds who may stay: what the owner revoked or bound again, in another process, ends here; who came is noted.

Who may come in is decided where a request arrives, from `run/edges.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from typing import Protocol

from fedsoda_edge.errors import DiskFull
from fedsoda_edge.ports import Clock
from fedsoda_edge.protocol.messages import EdgeId
from fedsoda_hub.run.ledger import Ledger
from fedsoda_hub.run.tokens import Token
from fedsoda_hub.serving.proofs import Proofs

LOOK_SECONDS = 2.0
NOTED_SECONDS = 60.0  # after which it is noted again that an edge is still connected

_log = logging.getLogger("fedsoda_hub.serving")


class Admitted(Protocol):
    """The edges that are connected (`roster.Roster`)."""

    @property
    def connected(self) -> Collection[EdgeId]: ...
    def admitted(self) -> list[Token]:
        """Return what the connected edges came in with."""
        ...

    def passed(self) -> set[EdgeId]:
        """Return the edges that came or went since the last call."""
        ...

    def dismiss(self, token: Token, reason: str) -> None:
        """End the connection that came in with this, for that reason."""
        ...


class Admission:
    """The look at who may stay, and the note of who was seen."""

    def __init__(self, ledger: Ledger, present: Admitted, proofs: Proofs, clock: Clock) -> None:
        self._ledger = ledger
        self._present = present
        self._proofs = proofs
        self.tickets = proofs.tickets
        self._clock = clock
        self._version = -1  # of what was looked at last
        self._noted_at = clock.monotonic()

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await self._clock.sleep(LOOK_SECONDS)
            await self.look()

    async def close(self) -> None:
        """Take no further proof, and note who was seen."""
        self._proofs.close()
        await self.look()

    async def look(self) -> None:
        """End what may not stay, and note who was seen since the last look."""
        passed = self._present.passed()
        held = list(dict.fromkeys((*self._present.admitted(), *self.tickets.held())))
        for token, reason in await asyncio.to_thread(self._shut_out, held, has_news=bool(passed)):
            self.tickets.end(token.edge, token.key)
            self._present.dismiss(token, reason)
        if self._clock.monotonic() - self._noted_at >= NOTED_SECONDS:
            self._noted_at = self._clock.monotonic()
            passed |= set(self._present.connected)
        await asyncio.to_thread(self._note, passed)

    def _shut_out(self, held: list[Token], *, has_news: bool) -> list[tuple[Token, str]]:
        version = self._ledger.database.changes_of_others()
        if version == self._version and not has_news:
            return []
        self._version = version
        return self._ledger.edges.shut_out(held)

    def _note(self, passed: set[EdgeId]) -> None:
        if not passed:
            return
        try:
            self._ledger.edges.note_seen(dict.fromkeys(passed, self._clock.wall()))
        except DiskFull as error:  # it is for people, and must not stop a round
            _log.debug("! who was seen is not noted: %s", error)
