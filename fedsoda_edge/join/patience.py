"""Decide when a failed try for the hub is made again, and when it is given up: one policy for all that needs the network.

The greeting, downloads, views and uploads each hold a Patience. Only progress, which their files define, begins it from
the start; a connection that opens and breaks again is none.
"""

from __future__ import annotations

import random

from fedsoda_edge.ports import Clock

GIVE_UP_SECONDS = 600.0  # without progress, where somebody attends; nobody is waited for without end
FIRST_SECONDS = 20.0  # before the first Welcome: by then a restarted hub is back, and a wrong address stays wrong
BASE_SECONDS = 1.0
MAX_BREAK_SECONDS = 30.0


class Patience:
    """The tries of one thing since its last progress.

    Breaks are exponential with full jitter: a random part of 1, 2, 4, ... seconds, at most 30, so that edges that lost
    their hub together do not come back together.

    Args:
        give_up_seconds: without progress, after which the last error stands; None: never.
    """

    def __init__(self, clock: Clock, give_up_seconds: float | None) -> None:
        self.give_up_seconds = give_up_seconds
        self._clock = clock
        self._since: float | None = None  # the first failure after the last progress
        self._tries = 0

    @classmethod
    def of(cls, clock: Clock, *, unattended: bool) -> Patience:
        """Return the patience of a join: without end where nobody attends it."""
        return cls(clock, None if unattended else GIVE_UP_SECONDS)

    @property
    def is_new(self) -> bool:
        """Whether nothing has failed since the last progress."""
        return self._tries == 0

    def progressed(self) -> None:
        """Note progress."""
        self._since, self._tries = None, 0

    async def after(self, error: Exception) -> None:
        """Wait before the next try.

        Raises:
            Exception: the error itself, once nothing has come for as long as the patience lasts.
        """
        now = self._clock.monotonic()
        if self._since is None:
            self._since = now
        pause = random.uniform(0.0, min(MAX_BREAK_SECONDS, BASE_SECONDS * 2.0 ** min(self._tries, 10)))
        self._tries += 1
        if self.give_up_seconds is not None:
            left = self._since + self.give_up_seconds - now
            if left <= 0:
                raise error
            pause = min(pause, left)
        await self._clock.sleep(pause)
