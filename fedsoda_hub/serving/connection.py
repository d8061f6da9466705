"""Lead one edge's conversation: frames in, messages to the roster; frames out through a queue.

Only calls of the channel may fail without being a defect: the other side may be gone at any time. `run` raises whatever
else is raised. What messages mean is `roster.py`'s.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedsoda_edge.errors import ProtocolViolation
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.codec import wire_bytes
from fedsoda_edge.protocol.session import HubSession, Upload, chunks
from fedsoda_edge.protocol.trace import Mark, line, went_wrong
from fedsoda_hub.run.status import LiveStatus
from fedsoda_hub.run.tokens import Token

HELLO_SECONDS = 20.0  # in which an edge must say Hello

_log = logging.getLogger("fedsoda_hub.serving")


class Guests(Protocol):
    """The hub's side that admits edges and hears their messages (`roster.Roster`)."""

    @property
    def stall_seconds(self) -> float: ...
    def token(self, secret: str) -> Token | None: ...
    def greet(self, connection: Connection, hello: ms.Hello) -> ms.Welcome | ms.Refusal | None:
        """Answer a Hello; None: the disk is full, so the device cannot be noted; it may come again."""
        ...

    async def said(self, connection: Connection, message: ms.EdgeMessage | Upload) -> None: ...
    def ended(self, connection: Connection) -> None: ...


class Lent(Protocol):
    """The hub's side that lends bytes (`shelf.Shelf`)."""

    @property
    def max_update_bytes(self) -> int: ...
    def bundle_file(self, digest: str) -> Path | None: ...
    def run_blob(self, digest: str) -> bytes | None: ...


class Asked(Protocol):
    """The hub's side that reports the run's status (`monitoring.Monitoring`)."""

    def is_admin(self, secret: str) -> bool: ...
    def status(self) -> LiveStatus: ...
    def metrics(self) -> str: ...


@dataclass(frozen=True)
class Hub:
    """The sides of the hub that a door needs."""

    guests: Guests
    shelf: Lent
    monitoring: Asked


class Channel(Protocol):
    """A way for one edge's frames: a websocket, or queues where hub and edge share a process.

    All three raise ConnectionError when the other side is gone.
    """

    async def send_bytes(self, data: bytes) -> None: ...
    async def receive_bytes(self) -> bytes:
        """Return the next frame. Raises ProtocolViolation where it is not binary."""
        ...

    async def close(self) -> None: ...


class Door(Protocol):
    """An entrance for edges. port: that of its address; 0: it has none."""

    @property
    def port(self) -> int: ...
    async def open(self, hub: Hub) -> None:
        """Let edges in from now on. Raises UsageProblem where another program has taken the address by now."""
        ...

    async def broken(self) -> None:
        """Wait until the door, or the hub's code behind it, fails; raise that."""
        ...

    async def close(self) -> None: ...


class Connection:
    """The hub's side of one edge's conversation. Frames leave through a queue, so that a slow edge never delays the hub.

    up, down: bytes of payload and framing that are not counted yet. size_class: the one that the edge's Ready named.
    place: that of the Hello. is_contested: whether another place came with the same identity.
    """

    def __init__(self, hub: Hub, token: Token, channel: Channel) -> None:
        self.edge = token.edge
        self.size_class = 0
        self.place = ""
        self.is_contested = False
        self.up = 0
        self.down = 0
        self.session = HubSession(hub.shelf.max_update_bytes)
        self._progress: int | None = None  # of the upload under way, as it was at `_moved_at`, in seconds of the loop
        self._moved_at = asyncio.get_running_loop().time()
        self.flushed = asyncio.Event()  # nothing leaves any more
        self._hub = hub
        self._channel = channel
        self._out: asyncio.Queue[bytes | None] = asyncio.Queue()

    def send(self, message: ms.HubMessage, payload: bytes | memoryview = b"") -> None:
        """Queue a message; after the end of the conversation it is dropped."""
        if self.session.state != "over":
            self._out.put_nowait(self.session.send(message, payload))
            if not payload:  # of chunks one line tells all
                self._trace(">", message)

    def close(self) -> None:
        """End the conversation when everything that is queued has left."""
        self.session.state = "over"
        self._out.put_nowait(None)

    async def run(self) -> None:
        """Talk until either side ends the conversation.

        Raises:
            ExceptionGroup: what the hub's own code raised.
        """
        async with asyncio.TaskGroup() as both:
            both.create_task(self._write())
            try:
                while (frame := await self._frame()) is not None:
                    self.up += wire_bytes(frame, masked=True)
                    await self._hear(frame)
            except ProtocolViolation as error:
                _log.debug(went_wrong(error))
                self.send(ms.Refusal(reason=str(error), fatal=True))
            finally:
                self._hub.guests.ended(self)
                self._out.put_nowait(None)

    async def _write(self) -> None:
        try:
            while (frame := await self._out.get()) is not None:
                await self._channel.send_bytes(frame)
                self.down += wire_bytes(frame, masked=False)
            await self._channel.close()
        except ConnectionError:
            pass  # the reading task gets this error too
        finally:
            self.flushed.set()

    async def _frame(self) -> bytes | None:
        """Wait for a frame; None: either side ended the conversation, no Hello came, or an upload has stalled."""
        if self.session.state == "over":
            return None
        # The only timeouts. An upload that makes progress never fails by wall clock: docs/protocol.md (p3-deadlines).
        stall = self._hub.guests.stall_seconds if self.session.upload_progress is not None else None
        if self.session.state == "new":
            stall = HELLO_SECONDS
        if self.session.upload_progress != self._progress:
            self._progress, self._moved_at = self.session.upload_progress, asyncio.get_running_loop().time()
        try:
            # Since the last byte of the upload: an edge that says other things meanwhile would hold up a round without end.
            async with asyncio.timeout_at(None if stall is None else self._moved_at + stall):
                return await self._channel.receive_bytes()
        except TimeoutError:
            what = "no Hello" if self.session.state == "new" else "upload stalls"
            _log.debug("! %s seconds=%g %s", what, stall, self.edge)
        except ConnectionError:
            pass
        return None

    async def _hear(self, frame: bytes) -> None:
        said = self.session.receive(frame)
        if isinstance(said, Upload):
            self._trace("<", ms.UpdateChunk(digest=said.start.digest, offset=0), f"payload={len(said.data)} ")
        elif said is not None:
            self._trace("<", said)
        match said:
            case None | ms.UpdateChunk():
                pass
            case ms.Hello():
                answer = self._hub.guests.greet(self, said)
                if answer is not None:
                    self.send(answer)
                if not isinstance(answer, ms.Welcome):
                    self.session.state = "over"
            case ms.BlobRequest():
                self._send_blob(said)
            case _:
                await self._hub.guests.said(self, said)

    def _send_blob(self, request: ms.BlobRequest) -> None:
        data = self._hub.shelf.run_blob(request.digest)
        if data is None or not 0 <= request.offset < len(data):
            raise ProtocolViolation(f"this round has no blob {request.digest[:12]} with a byte {request.offset}")
        self._trace(">", ms.BlobChunk(digest=request.digest, offset=request.offset, total=len(data)))
        for offset, piece in chunks(data, request.offset):
            self.send(ms.BlobChunk(digest=request.digest, offset=offset, total=len(data)), piece)

    def _trace(self, mark: Mark, message: ms.Message, note: str = "") -> None:
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug(line(mark, message, note + self.edge))
