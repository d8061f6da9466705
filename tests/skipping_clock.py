"""A clock for which every sleep is over at once and takes its time all the same: minutes of patience pass in no time."""

from __future__ import annotations

import asyncio

from fedsoda_edge.ports import SystemClock


class SkippingClock(SystemClock):
    """Time is the system's, and what was slept. breaks: how long each sleep took."""

    def __init__(self) -> None:
        self.breaks: list[float] = []
        self.slept = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.slept

    async def sleep(self, seconds: float) -> None:
        self.breaks.append(seconds)
        self.slept += seconds
        await asyncio.sleep(0)
