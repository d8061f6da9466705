"""Share the event loop among connections by time: whoever sends much waits for those who send little.

What comes on a connection is looked at in turns, the first come first, and only so long between two looks at all sockets:
requests, frames of websockets and handshakes of TLS alike. Which bytes are worth a turn is `guarded.py`'s.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial

TURN_SECONDS = 0.005  # for all that came, between two looks at all sockets
FIRST_BYTES = 2  # of a frame: they say how many more its head has


class Turns:
    """The things that came and wait to be looked at. Make it where a loop runs."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Callable[[], object]] = deque()
        self._seconds_left = TURN_SECONDS
        self._is_due = False

    def take(self, transport: asyncio.Transport, look: Callable[[], object]) -> None:
        """Look at what came on a connection now where there is time, else later; until then no more is read from it."""
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._continue)
        if self._waiting or self._seconds_left <= 0:
            transport.pause_reading()
            self._waiting.append(partial(_resumed, transport, look))
        else:
            self._run(look)

    def _run(self, look: Callable[[], object]) -> None:
        began = self._loop.time()
        try:
            look()
        finally:
            self._seconds_left -= self._loop.time() - began

    def _continue(self) -> None:
        """Begin a share of time, behind what the sockets had to say."""
        self._seconds_left = TURN_SECONDS
        self._is_due = bool(self._waiting)
        if self._is_due:
            self._loop.call_soon(self._continue)
        while self._waiting and self._seconds_left > 0:
            self._run(self._waiting.popleft())


def _resumed(transport: asyncio.Transport, look: Callable[[], object]) -> None:
    if not transport.is_closing():
        transport.resume_reading()
        look()


class FrameHeads:
    """A count of a websocket's frames by their heads (RFC 6455, 5.2), before anything is made of them."""

    def __init__(self) -> None:
        self._head = b""  # of a frame, as far as it came
        self._left = 0  # bytes of a frame's payload that are still to come

    def count(self, data: bytes, most: int) -> tuple[int, int]:
        """Count the frames whose heads are whole now: those that carry messages, and those of control.

        Args:
            most: of both; with more, counting stops.
        """
        at, messages, controls = self._left, 0, 0
        data = self._head + data if self._head else data
        self._head = b""
        while at < len(data) and messages + controls <= most:
            end = at + FIRST_BYTES
            if end <= len(data):
                size = data[at + 1] & 0x7F
                wide = 2 if size == 126 else 8 if size == 127 else 0
                end += wide + (4 if data[at + 1] & 0x80 else 0)
            if end > len(data):
                self._head = data[at:]
                break
            if wide:
                size = int.from_bytes(data[at + FIRST_BYTES : at + FIRST_BYTES + wide], "big")
            if data[at] & 0x08:
                controls += 1
            else:
                messages += 1
            at = end + size
        self._left = max(0, at - len(data)) if not self._head else 0
        return messages, controls
