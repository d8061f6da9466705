"""Hold one conversation to its rules, on either side: what may be said when. Frames in, messages out, no I/O.

    edge                      hub
    Hello            ->
                     <-       Welcome | Refusal
    Ready            ->
    BlobRequest      ->
                     <-       BlobChunk ...
                     <-       RoundOffer
    UpdateStart      ->
    UpdateChunk ...  ->
                     <-       Receipt | Refusal

Sockets are left to `hub_transport.py` and the hub's `listener.py`, what to answer to `join` and the hub's `serving`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from fedsoda_edge.errors import ProtocolViolation
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.codec import MAX_CHUNK_BYTES, decode, encode


@dataclass(frozen=True)
class Blob:
    """A whole blob that arrived in chunks and has its digest."""

    digest: ms.Digest
    data: bytes


@dataclass(frozen=True)
class Upload:
    """A whole update that arrived in chunks and has its digest."""

    start: ms.UpdateStart
    data: bytes


class _Assembly:
    """The chunks of one blob so far, in order, up to the size that was announced."""

    def __init__(self, digest: ms.Digest, total: int) -> None:
        self.digest = digest
        self.total = total
        self._data = bytearray()

    @property
    def size(self) -> int:
        """Bytes that have arrived."""
        return len(self._data)

    def add(self, digest: ms.Digest, offset: int, payload: bytes) -> bytes | None:
        """Add the next chunk; give the whole blob once it is there, and None before.

        Raises:
            ProtocolViolation: it is not the chunk that was due, or the whole has another digest.
        """
        if digest != self.digest or offset != len(self._data):
            raise ProtocolViolation(
                f"a chunk of {digest[:12]} at {offset} came, but {self.digest[:12]} at {len(self._data)} was due"
            )
        if len(self._data) + len(payload) > self.total or not payload:
            raise ProtocolViolation(
                f"chunks of {digest[:12]} have {len(self._data) + len(payload)} bytes, {self.total} were announced"
            )
        self._data += payload
        if len(self._data) < self.total:
            return None
        found = hashlib.sha256(self._data).hexdigest()
        if found != self.digest:
            raise ProtocolViolation(f"a blob has digest {found[:12]}, it was announced as {self.digest[:12]}")
        return bytes(self._data)


def chunks(data: bytes, offset: int = 0) -> Iterator[tuple[int, memoryview]]:
    """Cut data into chunks of at most MAX_CHUNK_BYTES, from `offset` on: (offset, piece)."""
    view = memoryview(data)
    for at in range(offset, len(data), MAX_CHUNK_BYTES):
        yield at, view[at : at + MAX_CHUNK_BYTES]


class EdgeSession:
    """The edge's side of one connection. state: new, greeted (Hello was sent), open, over."""

    def __init__(self) -> None:
        self.state = "new"
        self._blob: _Assembly | None = None

    def send(self, message: ms.EdgeMessage, payload: bytes | memoryview = b"") -> bytes:
        """Make the frame of a message that may be said now; our own code must not break the rules (AssertionError)."""
        if isinstance(message, ms.Hello):
            assert self.state == "new", "Hello comes first and once"
            self.state = "greeted"
        else:
            assert self.state == "open", f"{type(message).__name__} may not be said in state {self.state}"
        if isinstance(message, ms.Leave):
            self.state = "over"
        return encode(message, payload)

    def request(self, blob: ms.BlobRef) -> bytes:
        """Make the frame that requests a blob, whose chunks are gathered until it is whole."""
        assert self._blob is None, "one blob at a time"
        self._blob = _Assembly(blob.digest, blob.bytes)
        return self.send(ms.BlobRequest(digest=blob.digest))

    def receive(self, frame: bytes) -> ms.HubMessage | Blob | None:
        """Read the hub's message, or a whole blob; None for a chunk before the last.

        Raises:
            ProtocolViolation: the hub broke the rules.
        """
        message, payload = decode(frame)
        if not isinstance(message, ms.HubMessage):
            raise ProtocolViolation(f"the hub sent {type(message).__name__}, which only edges say")
        if self.state == "greeted":
            if not isinstance(message, ms.Welcome | ms.Refusal):
                raise ProtocolViolation(f"the hub answered Hello with {type(message).__name__}")
            self.state = "open" if isinstance(message, ms.Welcome) else "over"
        elif self.state != "open" or isinstance(message, ms.Welcome):
            raise ProtocolViolation(f"the hub sent {type(message).__name__} in state {self.state}")
        if not isinstance(message, ms.BlobChunk):
            return message
        if self._blob is None or message.total != self._blob.total:
            raise ProtocolViolation(f"the hub sent a chunk of {message.digest[:12]} that was not asked for")
        data = self._blob.add(message.digest, message.offset, payload)
        if data is None:
            return None
        self._blob = None
        return Blob(message.digest, data)


class HubSession:
    """The hub's side of one connection. state: new, greeted (Hello came), open (Welcome was sent), ready, over."""

    def __init__(self, max_update_bytes: int) -> None:
        self.state = "new"
        self._max_update_bytes = max_update_bytes
        self._start: ms.UpdateStart | None = None
        self._upload: _Assembly | None = None

    @property
    def upload_progress(self) -> int | None:
        """Bytes that have arrived of the upload under way; None where there is none."""
        return None if self._upload is None else self._upload.size

    def send(self, message: ms.HubMessage, payload: bytes | memoryview = b"") -> bytes:
        """Make the frame of a message that may be said now; our own code must not break the rules (AssertionError)."""
        if isinstance(message, ms.Welcome):
            assert self.state == "greeted", "Welcome answers Hello, once"
            self.state = "open"
        elif isinstance(message, ms.Refusal) and message.fatal:
            self.state = "over"
        else:
            assert self.state in ("open", "ready"), f"{type(message).__name__} may not be said in state {self.state}"
        if isinstance(message, ms.Farewell):
            self.state = "over"
        return encode(message, payload)

    def receive(self, frame: bytes) -> ms.EdgeMessage | Upload | None:
        """Read the edge's message, or a whole upload; None for a chunk before the last.

        Raises:
            ProtocolViolation: the edge broke the rules.
        """
        message, payload = decode(frame)
        if not isinstance(message, ms.EdgeMessage):
            raise ProtocolViolation(f"the edge sent {type(message).__name__}, which only hubs say")
        if isinstance(message, ms.Hello) != (self.state == "new"):
            raise ProtocolViolation(f"the edge sent {type(message).__name__} in state {self.state}")
        if self.state == "greeted":
            raise ProtocolViolation(f"the edge sent {type(message).__name__} before the Welcome")
        if self.state == "over":
            raise ProtocolViolation(f"the edge sent {type(message).__name__} after the end")
        match message:
            case ms.Hello():
                self.state = "greeted"
            case ms.Ready():
                self.state = "ready"
            case ms.UpdateStart():
                if self.state != "ready":
                    raise ProtocolViolation("the edge sent an update before it was ready")
                if self._upload is not None:
                    raise ProtocolViolation(
                        f"the edge announced {message.digest[:12]} when {self._upload.size} of {self._upload.total} bytes of "
                        f"{self._upload.digest[:12]} had come; one update is under way at a time"
                    )
                if not 0 < message.bytes <= self._max_update_bytes:
                    raise ProtocolViolation(
                        f"an update of {message.bytes} bytes was announced, and {self._max_update_bytes} are allowed at most"
                    )
                self._start, self._upload = message, _Assembly(message.digest, message.bytes)
            case ms.UpdateChunk():
                if self._upload is None or self._start is None:
                    raise ProtocolViolation("the edge sent a chunk of an update it had not announced")
                data = self._upload.add(message.digest, message.offset, payload)
                if data is None:
                    return None
                start, self._start, self._upload = self._start, None, None
                return Upload(start, data)
            case ms.Resumed() if self.state != "ready":
                raise ProtocolViolation(
                    "the edge resumed before it was ready, so it would be invited and could not answer"
                )
            case ms.Leave():
                self.state = "over"
        return message
