"""A clock whose timers go off when the test says so: nobody waits for seconds to pass."""

from __future__ import annotations

import asyncio

from fedsoda_edge.ports import SystemClock


class HandClock(SystemClock):
    """Time is the system's; a sleep of `seconds` ends with `wake(seconds)`."""

    def __init__(self) -> None:
        self._sleeping: list[tuple[float, asyncio.Event]] = []

    async def sleep(self, seconds: float) -> None:
        sleeper = (seconds, asyncio.Event())
        self._sleeping.append(sleeper)
        try:
            await sleeper[1].wait()
        finally:
            self._sleeping.remove(sleeper)

    def sleeps(self, seconds: float) -> bool:
        """Whether somebody waits for so many seconds."""
        return any(asked == seconds for asked, _ in self._sleeping)

    def wake(self, seconds: float) -> None:
        """Let so many seconds pass for whoever waits for them."""
        for asked, woken in self._sleeping:
            if asked == seconds:
                woken.set()
