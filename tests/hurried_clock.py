"""A clock for which every sleep is over at once: breaks between tries take no time."""

from __future__ import annotations

import asyncio

from fedsoda_edge.ports import SystemClock


class HurriedClock(SystemClock):
    """Time is the system's; no sleep takes longer than `at_most` seconds."""

    def __init__(self, at_most: float = 0.0) -> None:
        self._at_most = at_most

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, self._at_most))
