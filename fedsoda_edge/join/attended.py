"""Do work that may last for hours, as the greeting of a hub that prepares its run, and hear the device's owner meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fedsoda_edge.join.control import LOOK_SECONDS
from fedsoda_edge.join.pause import Look, Pauses

T = TypeVar("T")


async def attended(work: Coroutine[Any, Any, T], pauses: Pauses, heed: Callable[[Look], Awaitable[None]]) -> T | None:
    """Return what the work returns; None: it was broken off, since the owner asked to finish.

    Args:
        heed: does what a look asks for, twice a second.
    """
    task = asyncio.create_task(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=LOOK_SECONDS)
            if not task.done():
                await heed(await pauses.look(None))
                if pauses.is_finishing:
                    return None
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
