"""Several things are waited for, one comes first, and nothing of the others is left running."""

from __future__ import annotations

import asyncio

import pytest

from fedsoda_hub.serving.first_of import first_of


async def never(ended: list[str]) -> None:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        ended.append("let go of")
        raise


async def fails() -> None:
    raise OSError("the door fell shut")


def alone() -> bool:
    return asyncio.all_tasks() == {asyncio.current_task()}


def test_the_first_that_returns_ends_the_others() -> None:
    async def play() -> None:
        ended: list[str] = []
        await first_of(never(ended), asyncio.sleep(0), never(ended))
        await asyncio.sleep(0)
        assert ended == ["let go of"] * 2
        assert alone()

    asyncio.run(play())


def test_what_the_first_raises_is_raised() -> None:
    async def play() -> None:
        ended: list[str] = []
        with pytest.raises(OSError, match="the door fell shut"):
            await first_of(never(ended), fails())
        await asyncio.sleep(0)
        assert ended == ["let go of"]

    asyncio.run(play())


def test_who_is_cancelled_while_waiting_lets_go_of_all() -> None:
    async def play() -> None:
        ended: list[str] = []
        waiting = asyncio.create_task(first_of(never(ended), never(ended)))
        for _ in range(3):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        await asyncio.sleep(0)
        assert waiting.cancelled()
        assert ended == ["let go of"] * 2
        assert alone()

    asyncio.run(play())
