"""Sum the bytes that travelled by edge and by round, for pages: at once where that costs nothing, else while the last sums are shown."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from fedsoda_hub.run.ledger import Ledger

STALE_SECONDS = 30.0  # after which sums are made again within a round
FEW_ROWS = 50_000  # whose sums cost nothing


class ByteSums:
    """The bytes up and down, by edge and by round, as the ledger had them a moment ago. now: seconds from any start."""

    def __init__(self, ledger: Ledger, now: Callable[[], float]) -> None:
        self.by_edge: Mapping[str, tuple[int, int]] = {}
        self.by_round: Mapping[int, tuple[int, int]] = {}
        self._ledger = ledger
        self._now = now
        self._rounds = -1  # closed ones, when they were made
        self._made_at = 0.0
        self._making: asyncio.Task[None] | None = None

    async def refresh(self, rounds: int) -> None:
        """Make the sums again where they are due.

        Args:
            rounds: how many have closed.
        """
        if self._rounds < 0 or len(self.by_edge) * len(self.by_round) < FEW_ROWS:
            await self._make(rounds)
        elif self._making is None and (rounds != self._rounds or self._now() - self._made_at > STALE_SECONDS):
            self._making = asyncio.get_running_loop().create_task(self._make(rounds))
            self._making.add_done_callback(self._made)

    async def _make(self, rounds: int) -> None:
        self.by_edge = await asyncio.to_thread(self._ledger.traffic_by_edge)
        self.by_round = await asyncio.to_thread(self._ledger.traffic_by_round)
        self._rounds, self._made_at = rounds, self._now()

    def _made(self, task: asyncio.Task[None]) -> None:
        self._making = None
        if not task.cancelled():
            task.result()

    def close(self) -> None:
        """Make no more sums."""
        if self._making is not None:
            self._making.cancel()
