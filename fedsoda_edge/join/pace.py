"""Watch how fast a transfer comes, and end one that only keeps a device waiting.

Only the time that is spent on waiting for bytes counts: not what this device does with them, and not a pause.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from fedsoda_edge.errors import HubUnreachable

SLOWEST = 1000  # bytes a second, on average over a window: what takes longer would take hours for the smallest bundle
MAX_STALL_SECONDS = 300.0  # whatever a hub says


class TooSlow(HubUnreachable):
    """A transfer that was ended because it came too slowly. Its bytes are kept, and are no progress."""


async def paced(pieces: AsyncIterator[bytes], url: str, stall_seconds: float) -> AsyncGenerator[bytes]:
    """Yield the pieces while they come fast enough.

    Args:
        url: where they come from, for people.
        stall_seconds: the length of a window of waiting.

    Raises:
        TooSlow: less than SLOWEST bytes a second came in a window; what came was yielded.
    """
    window = _Window(url, min(stall_seconds, MAX_STALL_SECONDS))
    piece: asyncio.Task[bytes | None] | None = None
    try:
        while True:
            piece = asyncio.create_task(_next(pieces))
            while not piece.done():
                await window.wait(piece)
            found = piece.result()
            if found is None:
                return
            window.take(len(found))
            yield found
    finally:
        if piece is not None and not piece.done():
            piece.cancel()
            await asyncio.wait({piece})
        if isinstance(pieces, AsyncGenerator):  # what is not read to its end must not stay open
            await pieces.aclose()


class _Window:
    """The bytes that came while the last `seconds` were waited for."""

    def __init__(self, url: str, seconds: float) -> None:
        self._url = url
        self._seconds = seconds
        self._waited = 0.0
        self._came = 0

    async def wait(self, piece: asyncio.Task[bytes | None]) -> None:
        """Wait for the next piece, at most until the window ends. Raises TooSlow."""
        loop = asyncio.get_running_loop()
        since = loop.time()
        await asyncio.wait({piece}, timeout=max(0.0, self._seconds - self._waited))
        self._waited += loop.time() - since
        if not piece.done():
            self._judge()

    def take(self, size: int) -> None:
        """Count bytes that came. Raises TooSlow."""
        self._came += size
        self._judge()

    def _judge(self) -> None:
        if self._waited < self._seconds:
            return
        if self._came < SLOWEST * self._waited:
            raise TooSlow(
                f"only {self._came} bytes came from {self._url} in {self._waited:.3g} s, and a transfer below {SLOWEST} bytes "
                "a second is ended; join again, which continues it",
                "HTTP",
            )
        self._waited, self._came = 0.0, 0


async def _next(pieces: AsyncIterator[bytes]) -> bytes | None:
    """Return the next piece; None: there is none."""
    return await anext(pieces, None)
