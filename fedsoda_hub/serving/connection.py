"""Lead one edge's conversation: frames in, messages to the roster; frames out through a bounded queue.

Only calls of the channel may fail without being a defect: the other side may be gone at any time. `run` raises whatever
else is raised. What messages mean is `roster.py`'s, how an upload reaches the disk `spool.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from fedsoda_edge.errors import ProtocolViolation
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.codec import wire_bytes
from fedsoda_edge.protocol.session import Gathered, HubSession, Upload
from fedsoda_edge.protocol.trace import Mark, line, went_wrong
from fedsoda_edge.protocol.versions import agreed_with
from fedsoda_hub.federation.refusals import RefusalKind
from fedsoda_hub.run.status import LiveStatus
from fedsoda_hub.run.tokens import Token
from fedsoda_hub.serving.desk import Desk
from fedsoda_hub.serving.metrics import Metrics

HELLO_SECONDS = 20.0  # in which an edge must say Hello
PIECE_BYTES = 64 << 10  # of a blob in one chunk: as much of it as a connection holds in memory
MAX_QUEUED_BYTES = 64 << 10  # of messages that an edge has not read; a round has less than 2 KiB for each

_log = logging.getLogger("fedsoda_hub.serving")


class Guests(Protocol):
    """The hub's side that admits edges and hears their messages (`roster.Roster`)."""

    @property
    def stall_seconds(self) -> float: ...
    def token(self, secret: str) -> Token | None: ...
    async def prove(self, request: bytes) -> tuple[int, bytes]:
        """Answer the body of a request to /v1/proof: (HTTP status, JSON)."""
        ...

    async def greet(self, connection: Connection, hello: ms.Hello) -> ms.Preparing | ms.Welcome | ms.Refusal | None:
        """Answer a Hello; None: the disk is full, so the device cannot be noted; it may come again.

        After Preparing the edge waits, until `Connection.answer` gets the answer that ends that.
        """
        ...

    def gather(self, edge: ms.EdgeId, start: ms.UpdateStart) -> Gathered:
        """Make the place for an announced update."""
        ...

    async def said(self, connection: Connection, message: ms.EdgeMessage | Upload) -> None: ...
    def ended(self, connection: Connection) -> None: ...


class Lent(Protocol):
    """The hub's side that lends bytes (`shelf.Shelf`)."""

    @property
    def max_update_bytes(self) -> int: ...
    def bundle_file(self, digest: str) -> Path | None: ...
    async def run_blob(self, digest: str) -> Path | None:
        """Find a view in force or the coded step to it; None: the blob is neither."""
        ...


class Asked(Protocol):
    """The hub's side that reports the run's status (`monitoring.Monitoring`)."""

    @property
    def metrics(self) -> Metrics: ...
    @property
    def health(self) -> str: ...
    def is_admin(self, secret: str) -> bool: ...
    async def status(self) -> LiveStatus: ...


@dataclass(frozen=True)
class Hub:
    """The sides of the hub that a door needs. desk: of its owner's page; None: it has none."""

    guests: Guests
    shelf: Lent
    monitoring: Asked
    desk: Desk | None = None


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


class _Lending:
    """A blob that is read from disk as the edge takes it: many connections share the system's cache, and no copies."""

    def __init__(self, digest: ms.Digest, offset: int, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self.digest = digest
        self.offset = offset
        self.total = os.fstat(self._file.fileno()).st_size

    def read(self) -> bytes:
        """Return the next piece; it may be shorter only at the end."""
        self._file.seek(self.offset)
        piece = self._file.read(PIECE_BYTES)
        self.offset += len(piece)
        return piece

    def close(self) -> None:
        self._file.close()


class Connection:
    """The hub's side of one edge's conversation. Frames leave through a queue, so that a slow edge never delays the hub.

    An edge that does not take a frame within `stall_seconds`, or lets too many messages wait, is ended.

    token: what it came in with. up, down: bytes of payload and framing that are not counted yet. size_class: the one that
    the edge's Ready named. hello: with which the edge came. is_contested: whether another place came with the same identity.
    """

    def __init__(self, hub: Hub, token: Token, channel: Channel) -> None:
        self.token = token
        self.size_class = 0
        self.hello: ms.Hello | None = None
        self.is_contested = False
        self.up = 0
        self.down = 0
        self.session = HubSession(hub.shelf.max_update_bytes, partial(hub.guests.gather, token.edge))
        # Of the upload under way: bytes, and when they were last seen to grow, in seconds of the loop.
        self._moved: tuple[int | None, float] = None, asyncio.get_running_loop().time()
        self.flushed = asyncio.Event()  # nothing leaves any more
        self._hub = hub
        self._channel = channel
        self._out: list[bytes | _Lending | None] = []  # an asyncio.Queue takes 2 KiB more
        self._is_out = asyncio.Event()
        self._queued_bytes = 0
        self._lending: _Lending | None = None
        self._held: asyncio.Timeout | None = None

    @property
    def edge(self) -> ms.EdgeId:
        """The edge that came in."""
        return self.token.edge

    @property
    def protocol(self) -> int:
        """The version of the protocol that is spoken here; 0: none is agreed on."""
        return 0 if self.hello is None else agreed_with(self.hello) or 0

    def send(self, message: ms.HubMessage) -> None:
        """Queue a message; after the end of the conversation it is dropped."""
        if self.session.state == "over":
            return
        frame = self.session.send(message)
        if self._queued_bytes + len(frame) > MAX_QUEUED_BYTES:
            self._end(f"{self._queued_bytes} bytes of messages wait to be read")
            return
        self._queued_bytes += len(frame)
        self._put(frame)
        self._trace(">", message)

    def prepares(self, said: ms.Preparing) -> None:
        """Tell an edge that waits how far the preparation is; one of an older release waits without a word."""
        if self.hello is not None and self.hello.waits:
            self.send(said)

    def answer(self, answer: ms.Welcome | ms.Refusal | None) -> None:
        """Say what ends the greeting; after anything but a Welcome the conversation ends."""
        self.session.max_update_bytes = self._hub.shelf.max_update_bytes
        if answer is not None:
            self.send(answer)
        if not isinstance(answer, ms.Welcome):
            self.session.state = "over"

    def close(self) -> None:
        """End the conversation when everything that is queued has left."""
        self.session.state = "over"
        self._put(None)

    def _end(self, why: str) -> None:
        """End the conversation at once: an edge that does not read would not read a goodbye either."""
        _log.debug("! %s %s", why, self.edge)
        self.session.state = "over"
        if self._held is not None:
            self._held.reschedule(asyncio.get_running_loop().time())

    async def run(self) -> None:
        """Talk until either side ends the conversation.

        Raises:
            ExceptionGroup: what the hub's own code raised.
        """
        with contextlib.suppress(TimeoutError):  # of `_end` alone; those of the hub's code are in a group
            async with asyncio.timeout(None) as self._held, asyncio.TaskGroup() as both:
                both.create_task(self._write())
                try:
                    while (frame := await self._frame()) is not None:
                        self.up += wire_bytes(frame, masked=True)
                        await self._hear(frame)
                except ProtocolViolation as error:
                    _log.debug(went_wrong(error))
                    self._hub.monitoring.metrics.refused(RefusalKind.BROKEN_PROTOCOL)
                    self.send(ms.Refusal(reason=str(error), fatal=True))
                finally:
                    self.session.drop_upload()
                    self._hub.guests.ended(self)
                    self._put(None)

    def _put(self, due: bytes | _Lending | None) -> None:
        self._out.append(due)
        self._is_out.set()

    async def _next(self) -> bytes | _Lending | None:
        while not self._out:
            self._is_out.clear()
            await self._is_out.wait()
        return self._out.pop(0)

    async def _write(self) -> None:
        try:
            while (due := await self._next()) is not None:
                if isinstance(due, _Lending):
                    await self._lend(due)
                else:
                    await self._pass(due)
                    self._queued_bytes -= len(due)
            await self._channel.close()
        except ConnectionError:
            pass  # the reading task gets this error too
        finally:
            if self._lending is not None:
                self._lending.close()
            self.flushed.set()

    async def _lend(self, blob: _Lending) -> None:
        while self._lending is not None and self.session.state != "over":
            offset = blob.offset
            piece = await asyncio.to_thread(blob.read)
            if self.session.state == "over":
                return
            assert piece, "blobs are written once and never shorter"
            frame = self.session.send(ms.BlobChunk(digest=blob.digest, offset=offset, total=blob.total), piece)
            if blob.offset >= blob.total:  # before it leaves: the edge may ask for the next one as soon as it came
                blob.close()
                self._lending = None
            await self._pass(frame)

    async def _pass(self, frame: bytes) -> None:
        """Send a frame; end the conversation where the edge does not take it."""
        seconds = self._hub.guests.stall_seconds
        try:
            async with asyncio.timeout(seconds):
                await self._channel.send_bytes(frame)
        except TimeoutError:
            self._end(f"nothing was read for {seconds:g} s")
            await asyncio.Event().wait()  # until the conversation ends
        self.down += wire_bytes(frame, masked=False)

    async def _frame(self) -> bytes | None:
        """Wait for a frame; None: either side ended the conversation, no Hello came, or an upload has stalled."""
        if self.session.state == "over":
            return None
        # The only timeouts. An upload that makes progress never fails by wall clock: docs/protocol.md (p3-deadlines).
        stall = self._hub.guests.stall_seconds if self.session.upload_progress is not None else None
        if self.session.state == "new":
            stall = HELLO_SECONDS
        if self.session.upload_progress != self._moved[0]:
            self._moved = self.session.upload_progress, asyncio.get_running_loop().time()
        try:
            # Since the last byte of the upload: an edge that says other things meanwhile would hold up a round without end.
            async with asyncio.timeout_at(None if stall is None else self._moved[1] + stall):
                return await self._channel.receive_bytes()
        except TimeoutError:
            what = "no Hello" if self.session.state == "new" else "upload stalls"
            _log.debug("! %s seconds=%g %s", what, stall, self.edge)
        except ConnectionError:
            pass
        return None

    async def _hear(self, frame: bytes) -> None:
        if self.session.upload_progress is None:
            said = self.session.receive(frame)
        else:  # a piece of an upload is written to disk
            said = await asyncio.to_thread(self.session.receive, frame)
        if isinstance(said, Upload):
            self._trace("<", ms.UpdateChunk(digest=said.start.digest, offset=0), f"payload={len(said.data)} ")
        elif said is not None:
            self._trace("<", said)
        match said:
            case None | ms.UpdateChunk():
                pass
            case ms.Hello():
                answer = await self._hub.guests.greet(self, said)
                if isinstance(answer, ms.Preparing):
                    self.prepares(answer)
                else:
                    self.answer(answer)
            case ms.BlobRequest():
                await self._send_blob(said)
            case _:
                await self._hub.guests.said(self, said)

    async def _send_blob(self, request: ms.BlobRequest) -> None:
        if self._lending is not None:
            raise ProtocolViolation(
                f"the blob {request.digest[:12]} was asked for while {self._lending.digest[:12]} is on its way; "
                "ask for one at a time"
            )
        path = await self._hub.shelf.run_blob(request.digest)
        blob = None if path is None else await asyncio.to_thread(_Lending, request.digest, request.offset, path)
        if blob is None or not 0 <= request.offset < blob.total:
            if blob is not None:
                blob.close()
            raise ProtocolViolation(f"this round has no blob {request.digest[:12]} with a byte {request.offset}")
        self._trace(">", ms.BlobChunk(digest=request.digest, offset=request.offset, total=blob.total))
        self._lending = blob
        self._put(blob)

    def _trace(self, mark: Mark, message: ms.Message, note: str = "") -> None:
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug(line(mark, message, note + self.edge))
