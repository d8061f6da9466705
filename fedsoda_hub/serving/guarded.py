"""Hold connections of HTTP and websockets so that the other side can make none of them costly, whatever it sends or leaves unread.

uvicorn's protocols do the talking. Here reads and buffers are small, who does not read is ended, who floods with small frames
too, and an end waits for nobody. All that comes is looked at in turns (`turns.py`), so that a thousand who speak at once delay
nobody for long; whether the hub is alive is answered before all of them. How many there may be is `strangers.py`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

from fedsoda_hub.serving.strangers import Strangers
from fedsoda_hub.serving.turns import FrameHeads, Turns

READ_BYTES = 16 << 10  # at once: what waits for its turn
BUFFER_BYTES = 32 << 10  # that wait for the other side; above, nothing more is written
GOODBYE_SECONDS = 3.0  # in which the other side may answer the closing handshake, and read what is left
FRAMES_AT_ONCE = 128.0  # that carry messages; they are parsed, and answered, before anyone else's turn
FRAMES_A_SECOND = 100.0
CONTROLS_AT_ONCE = 32.0  # pings and pongs, which keep a connection open and say nothing
CONTROLS_A_SECOND = 2.0
FRAME_BYTES = 1024  # a frame for as many bytes is not counted: uploads have large ones
MAX_PARTS = 1024  # frames of one message
HEALTH = b"GET /healthz "


class Guarded(H11Protocol):
    """An HTTP connection that `Strangers` knows of."""

    strangers: Strangers  # these four are set by `guarded`
    turns: Turns
    stall_seconds: Callable[[], float]
    health: Callable[[], bytes]
    _stall: asyncio.TimerHandle | None = None

    @property
    def address(self) -> str:
        """The IP address of the other side."""
        return self.client[0] if self.client else ""

    def end(self) -> None:
        """End the connection at once: who is not heard is not answered either."""
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _keep_small(transport)
        if self.may_come():
            self.strangers.come(self, len(self.connections))
        else:
            self.end()

    def may_come(self) -> bool:
        """Tell whether its address may connect once more."""
        return self.strangers.may_connect(self.address)

    def connection_lost(self, exc: Exception | None) -> None:
        self.strangers.known(self)
        self._forget_stall()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        is_first = not self.scope
        if is_first and data.startswith(HEALTH) and data.find(b"\r\n\r\n") == len(data) - 4:
            self.transport.write(self.health())
            self.transport.close()
        else:
            self.turns.take(self.transport, partial(self._look_at, data))

    def _look_at(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before and not self.cycle.response_complete:
            self.strangers.known(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._forget_stall()
        super().resume_writing()

    def _watch(self, unread: int) -> None:
        """End the connection where nothing of what waits is read for long."""
        self._stall = self.loop.call_later(self.stall_seconds(), self._look, unread)

    def _look(self, before: int) -> None:
        unread = self.transport.get_write_buffer_size()
        if unread < before:
            self._watch(unread)
        else:
            self.strangers.complaints.add("ended: the other side does not read")
            self.end()

    def _forget_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def handle_websocket_upgrade(self, event: Any) -> None:
        self.strangers.known(self)
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing():
            self.strangers.come(self, len(self.connections))
        elif self._stall is None and (unread := self.transport.get_write_buffer_size()):
            self._watch(unread)  # it closes when the rest is read


class GuardedWebSocket(WebSocketsSansIOProtocol):
    """A websocket that `Strangers` knows of until its first message, and once it is said goodbye to."""

    strangers: Strangers  # these two are set by `guarded`
    turns: Turns
    _goodbye: asyncio.TimerHandle | None = None
    _has_spoken = False
    _messages_left = FRAMES_AT_ONCE
    _controls_left = CONTROLS_AT_ONCE
    _counted_at = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._heads = FrameHeads()

    @property
    def address(self) -> str:
        """The IP address of the other side."""
        return self.client[0] if self.client else ""

    def end(self) -> None:
        """End the connection at once: who is not heard is not answered either."""
        self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.strangers.come(self, len(self.connections))

    def connection_lost(self, exc: Exception | None) -> None:
        self.strangers.known(self)
        if self._goodbye is not None:
            self._goodbye.cancel()
        super().connection_lost(exc)

    # --- what comes ---------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if not self.handshake_initiated:
            super().data_received(data)  # the request, as the HTTP connection passes it on
        elif not self._is_flood(data):
            self.turns.take(self.transport, partial(super().data_received, data))

    def _is_flood(self, data: bytes) -> bool:
        """Count the frames that came; end a connection that sends too many small ones."""
        now = self.loop.time()
        seconds, self._counted_at = now - self._counted_at, now
        earned = seconds * FRAMES_A_SECOND + len(data) / FRAME_BYTES
        self._messages_left = min(FRAMES_AT_ONCE, self._messages_left + earned)
        self._controls_left = min(CONTROLS_AT_ONCE, self._controls_left + seconds * CONTROLS_A_SECOND)
        messages, controls = self._heads.count(data, int(FRAMES_AT_ONCE + CONTROLS_AT_ONCE))
        self._messages_left -= messages
        self._controls_left -= controls
        if self._messages_left < 0 or self._controls_left < 0:
            self._end_flood()
            return True
        return False

    def _end_flood(self) -> None:
        if not self.transport.is_closing():
            self.strangers.complaints.add("ended: too many small frames")
            self.strangers.keep_away(self.scope["client"][0] if self.scope["client"] else "")  # as a proxy told it
            self.end()

    def handle_cont(self, event: Frame) -> None:
        if len(self.frames) >= MAX_PARTS:
            self._end_flood()
        else:
            super().handle_cont(event)

    def handle_ping(self) -> None:
        if self.writable.is_set():
            super().handle_ping()
        else:  # each answer would wait in memory
            self.strangers.complaints.add("ended: the other side does not read")
            self.end()

    def send_receive_event_to_app(self) -> None:
        if not self._has_spoken:
            self._has_spoken = True
            self.strangers.known(self)
        super().send_receive_event_to_app()

    # --- what leaves --------------------------------------------------------------------------------------

    async def send(self, message: Any) -> None:
        if self.transport.is_closing() and not self.handshake_complete:
            raise ClientDisconnected  # a hub that ends has answered already
        await super().send(message)
        if message["type"] == "websocket.accept":  # of the request, 4 KiB, nothing is read any more
            cast(list[object], self.scope["headers"]).clear()
            self.request = self.response = None  # type: ignore[assignment]
        elif message["type"] == "websocket.close":
            self._leave()
        elif message["type"] == "websocket.http.response.body" and self.initial_response is not None:
            self.handshake_complete = True  # uvicorn takes a refusal for a defect of the application
            self.strangers.complaints.add(f"refused with status {self.initial_response[0]}")
        else:  # not before there is room again: the next piece is not read from disk while this one waits
            await self.writable.wait()

    def send_500_response(self) -> None:
        if not self.transport.is_closing():
            super().send_500_response()

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self._leave()

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        super().on_task_complete(task)
        self._leave()

    def _leave(self) -> None:
        """End the connection soon, whether the other side answers and reads or not."""
        if self._goodbye is None and not self.disconnected:
            self._goodbye = self.loop.call_later(GOODBYE_SECONDS, self.end)
            self.strangers.come(self, len(self.connections))


def _keep_small(transport: asyncio.Transport) -> None:
    transport.set_write_buffer_limits(BUFFER_BYTES)
    if hasattr(transport, "max_size"):  # asyncio's own reads 256 KiB at once; TLS has a buffer of its own
        transport.max_size = READ_BYTES


def guarded(
    strangers: Strangers, stall_seconds: Callable[[], float], health: Callable[[], bytes]
) -> tuple[type[Guarded], type[GuardedWebSocket]]:
    """Return the classes of a server's connections, all of which these strangers know of.

    Args:
        stall_seconds: gives the time after which one who does not read is ended.
        health: writes the answer to /healthz, head and body, which says that it closes the connection.
    """
    turns = Turns()
    return (
        type(
            "Guarded",
            (Guarded,),
            {
                "strangers": strangers,
                "turns": turns,
                "stall_seconds": staticmethod(stall_seconds),
                "health": staticmethod(health),
            },
        ),
        type("GuardedWebSocket", (GuardedWebSocket,), {"strangers": strangers, "turns": turns}),
    )
