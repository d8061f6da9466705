"""A transfer that only keeps a device waiting is ended; one that comes, in whatever bursts, is not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from fedsoda_edge.join.pace import SLOWEST, TooSlow, paced

WINDOW = 0.2


async def pieces(*script: bytes | float, closed: list[bool] | None = None) -> AsyncIterator[bytes]:
    """Bytes, and seconds before the next ones."""
    try:
        for part in script:
            if isinstance(part, bytes):
                yield part
            else:
                await asyncio.sleep(part)
    finally:
        if closed is not None:
            closed.append(True)


async def take(source: AsyncIterator[bytes], between: float = 0.0) -> bytes:
    found = b""
    async for piece in paced(source, "http://slow", WINDOW):
        found += piece
        await asyncio.sleep(between)
    return found


def test_what_comes_at_once_passes() -> None:
    assert asyncio.run(take(pieces(b"a" * 10, b"b" * 10))) == b"a" * 10 + b"b" * 10


def test_a_burst_before_a_silence_counts_for_its_window() -> None:
    burst = bytes(int(SLOWEST * WINDOW * 3))
    assert asyncio.run(take(pieces(burst, WINDOW * 1.2, burst))) == burst * 2


@pytest.mark.parametrize("script", [[600.0], [b"a", 600.0], [part for _ in range(90) for part in (b"a", 0.02)]])
def test_silence_and_trickles_are_ended_with_the_rate_and_closed(script: list[bytes | float]) -> None:
    closed = list[bool]()
    with pytest.raises(TooSlow, match=r"came from http://slow in .* below 1000 bytes a second") as slow:
        asyncio.run(take(pieces(*script, closed=closed)))
    assert slow.value.exit_status == 3
    assert closed == [True]


def test_the_time_that_this_device_takes_does_not_count() -> None:
    assert asyncio.run(take(pieces(b"a", b"b", b"c"), between=WINDOW * 0.7)) == b"abc"


def test_a_pause_that_breaks_it_off_closes_what_is_read() -> None:
    closed = list[bool]()

    async def pause() -> None:
        task = asyncio.create_task(take(pieces(600.0, closed=closed)))
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.wait({task})

    asyncio.run(pause())
    assert closed == [True]
