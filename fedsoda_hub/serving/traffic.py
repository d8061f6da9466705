"""Count the bytes that travel, and write them down now and then: telemetry, for which neither loop nor round waits."""

from __future__ import annotations

import asyncio
from collections import Counter

from fedsoda_edge.errors import DiskFull
from fedsoda_edge.protocol.messages import EdgeId
from fedsoda_hub.run.ledger import Ledger, RoundTraffic


class Traffic:
    """The bytes of each edge and round that the ledger does not have yet, and those of the run."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._up: Counter[tuple[EdgeId, int]] = Counter()
        self._down: Counter[tuple[EdgeId, int]] = Counter()
        self._all_up, self._all_down = ledger.travelled()

    @property
    def travelled(self) -> tuple[int, int]:
        """The bytes up and down of all edges since the run began."""
        return self._all_up, self._all_down

    def add(self, edge: EdgeId, round_number: int, up: int, down: int) -> None:
        """Count bytes of websocket payload and framing."""
        self._up[edge, round_number] += up
        self._down[edge, round_number] += down
        self._all_up += up
        self._all_down += down

    async def flush(self) -> None:
        """Write down what was counted; where the disk is full, the next call does."""
        up, down = self._up, self._down
        self._up, self._down = Counter(), Counter()
        rows = [RoundTraffic(edge, number, up[edge, number], down[edge, number]) for edge, number in up]
        if rows:
            try:
                await asyncio.to_thread(self._ledger.add_all_traffic, rows)
            except DiskFull:
                self._up.update(up)
                self._down.update(down)
