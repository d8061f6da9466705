"""Answer a Hello: with the Welcome of a prepared run, or with how far the preparation is until the Welcome can follow.

Who may come in, and who is connected, is `roster.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from fedsoda_edge.ports import Clock
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.units import one_line
from fedsoda_hub.federation.state import LedgerState
from fedsoda_hub.run.status import RunningJob
from fedsoda_hub.serving import offers
from fedsoda_hub.serving.first_of import first_of
from fedsoda_hub.serving.shelf import Shelf
from fedsoda_hub.serving.signer import Signer
from fedsoda_hub.settings.run import RunSettings

TELL_SECONDS = 5.0  # between two looks at how far the preparation is, for the edges that wait


class Waits(Protocol):
    """The connection of an edge that waits for its Welcome (`connection.Connection`)."""

    @property
    def edge(self) -> ms.EdgeId: ...
    @property
    def protocol(self) -> int: ...
    def prepares(self, said: ms.Preparing) -> None: ...
    def answer(self, answer: ms.Welcome) -> None: ...


class Greeting:
    """The hub's first answer to edges.

    Args:
        work: returns what is computed now; None: nothing is.
    """

    def __init__(
        self,
        settings: RunSettings,
        state: LedgerState,
        shelf: Shelf,
        signer: Signer,
        clock: Clock,
        work: Callable[[], RunningJob | None],
    ) -> None:
        self.signer = signer
        self._settings = settings
        self._state = state
        self._shelf = shelf
        self._clock = clock
        self._work = work

    def of(self, edge: ms.EdgeId, protocol: int) -> ms.Preparing | ms.Welcome:
        """Answer an edge that may come in and speaks this version of the protocol with the hub."""
        if not self._shelf.stocked.is_set():
            return msgspec.structs.replace(self._preparing(), protocol=protocol)
        return self._welcome(edge, protocol)

    def _welcome(self, edge: ms.EdgeId, protocol: int) -> ms.Welcome:
        welcome = offers.welcome(edge, self._state, self._settings, self._shelf.ref)
        return msgspec.structs.replace(welcome, protocol=protocol, signed=self.signer.bundles())

    def _preparing(self) -> ms.Preparing:
        work = self._work() or RunningJob(job="")
        return ms.Preparing(
            protocol=ms.PROTOCOL_VERSION,
            run_id=self._state.run_id,
            run_name=self._settings.name,
            stage=one_line(work.stage or "", 200),
            done=work.done or 0,
            total=work.total or 0,
            seconds=work.seconds,
            seconds_left=work.seconds_left,
        )

    async def run(self, waiting: Callable[[], Sequence[Waits]]) -> None:
        """Tell edges that wait how far the preparation is, as often as that changes, and welcome them after it."""
        said: ms.Preparing | None = None
        while not self._shelf.stocked.is_set():
            await first_of(self._shelf.stocked.wait(), self._clock.sleep(TELL_SECONDS))
            if self._shelf.stocked.is_set():
                break
            before, said = said, self._preparing()
            for connection in waiting() if said != before else ():
                connection.prepares(msgspec.structs.replace(said, protocol=connection.protocol))
        for connection in waiting():
            connection.answer(self._welcome(connection.edge, connection.protocol))
