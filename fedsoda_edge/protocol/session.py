"""Hold one conversation to its rules, on either side: what may be said when. Frames in, messages out, no I/O.

    edge                      hub
    Hello            ->
                     <-       Preparing ...       while the run is prepared, to an edge that waits
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from fedsoda_edge.errors import ProtocolViolation
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.codec import MAX_CHUNK_BYTES, decode, encode


@dataclass(frozen=True)
class Blob:
    """A whole blob that arrived in chunks and has its digest."""

    digest: ms.Digest
    data: bytes


class Gathered(Protocol):
    """The bytes of one blob that arrive in chunks, wherever they are kept."""

    @property
    def size(self) -> int:
        """Bytes that have arrived."""
        ...

    def add(self, payload: bytes) -> None: ...
    def digest(self) -> str:
        """Return the sha256 of all that was added."""
        ...

    def whole(self) -> bytes | memoryview:
        """Return all that was added."""
        ...

    def drop(self) -> None:
        """Forget what was added: it will not be whole."""
        ...


class InMemory:
    """A `Gathered` in memory, for whoever holds one blob at a time."""

    def __init__(self) -> None:
        self._data = bytearray()

    @property
    def size(self) -> int:
        """Bytes that have arrived."""
        return len(self._data)

    def add(self, payload: bytes) -> None:
        """Append a chunk."""
        self._data += payload

    def digest(self) -> str:
        """Return the sha256 of all that was added."""
        return hashlib.sha256(self._data).hexdigest()

    def whole(self) -> bytes:
        """Return all that was added."""
        return bytes(self._data)

    def drop(self) -> None:
        """Forget what was added."""
        self._data = bytearray()


@dataclass(frozen=True)
class Upload:
    """A whole update that arrived in chunks and has its digest. place: where its bytes lie."""

    start: ms.UpdateStart
    data: bytes | memoryview
    place: Gathered = field(default_factory=InMemory, compare=False)


class _Assembly:
    """The chunks of one blob so far, in order, up to the size that was announced."""

    def __init__(self, digest: ms.Digest, total: int, place: Gathered) -> None:
        self.digest = digest
        self.total = total
        self.place = place

    @property
    def size(self) -> int:
        """Bytes that have arrived."""
        return self.place.size

    def add(self, digest: ms.Digest, offset: int, payload: bytes) -> bool:
        """Add the next chunk, and tell whether the blob is whole.

        Raises:
            ProtocolViolation: it is not the chunk that was due, or the whole has another digest.
        """
        size = self.place.size
        if digest != self.digest or offset != size:
            raise ProtocolViolation(
                f"a chunk of {digest[:12]} at {offset} came, but {self.digest[:12]} at {size} was due"
            )
        if size + len(payload) > self.total or not payload:
            raise ProtocolViolation(
                f"chunks of {digest[:12]} have {size + len(payload)} bytes, {self.total} were announced"
            )
        self.place.add(payload)
        if size + len(payload) < self.total:
            return False
        found = self.place.digest()
        if found != self.digest:
            raise ProtocolViolation(f"a blob has digest {found[:12]}, it was announced as {self.digest[:12]}")
        return True


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
        self._blob = _Assembly(blob.digest, blob.bytes, InMemory())
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
            if not isinstance(message, ms.Preparing | ms.Welcome | ms.Refusal):
                raise ProtocolViolation(f"the hub answered Hello with {type(message).__name__}")
            if not isinstance(message, ms.Preparing):
                self.state = "open" if isinstance(message, ms.Welcome) else "over"
        elif self.state != "open" or isinstance(message, ms.Preparing | ms.Welcome):
            raise ProtocolViolation(f"the hub sent {type(message).__name__} in state {self.state}")
        if not isinstance(message, ms.BlobChunk):
            return message
        if self._blob is None or message.total != self._blob.total:
            raise ProtocolViolation(f"the hub sent a chunk of {message.digest[:12]} that was not asked for")
        if not self._blob.add(message.digest, message.offset, payload):
            return None
        data = bytes(self._blob.place.whole())
        self._blob = None
        return Blob(message.digest, data)


class HubSession:
    """The hub's side of one connection. state: new, greeted (Hello came), open (Welcome was sent), ready, over.

    max_update_bytes: of an update; before the run is prepared nobody knows it. paused: the reason for which the edge pauses, in
    its own words; None: it does not.

    Args:
        gather: makes the place for an announced update.
    """

    def __init__(
        self, max_update_bytes: int, gather: Callable[[ms.UpdateStart], Gathered] = lambda _: InMemory()
    ) -> None:
        self.state = "new"
        self.max_update_bytes = max_update_bytes
        self.paused: str | None = None
        self._gather = gather
        self._start: ms.UpdateStart | None = None
        self._upload: _Assembly | None = None

    @property
    def upload_progress(self) -> int | None:
        """Bytes that have arrived of the upload under way; None where there is none."""
        return None if self._upload is None else self._upload.size

    def drop_upload(self) -> None:
        """Forget what has arrived of an upload under way."""
        if self._upload is not None:
            self._upload.place.drop()
            self._start, self._upload = None, None

    def send(self, message: ms.HubMessage, payload: bytes | memoryview = b"") -> bytes:
        """Make the frame of a message that may be said now; our own code must not break the rules (AssertionError)."""
        if isinstance(message, ms.Welcome):
            assert self.state == "greeted", "Welcome answers Hello, once"
            self.state = "open"
        elif isinstance(message, ms.Preparing):
            assert self.state == "greeted", "Preparing comes between Hello and Welcome"
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
            case ms.Paused():
                self.paused = message.reason
            case ms.Ready():
                self.state, self.paused = "ready", None
            case ms.UpdateStart():
                if self.state != "ready":
                    raise ProtocolViolation("the edge sent an update before it was ready")
                if self._upload is not None:
                    raise ProtocolViolation(
                        f"the edge announced {message.digest[:12]} when {self._upload.size} of {self._upload.total} bytes of "
                        f"{self._upload.digest[:12]} had come; one update is under way at a time"
                    )
                if not 0 < message.bytes <= self.max_update_bytes:
                    raise ProtocolViolation(
                        f"an update of {message.bytes} bytes was announced, and {self.max_update_bytes} are allowed at most"
                    )
                self.drop_upload()
                self._start = message
                self._upload = _Assembly(message.digest, message.bytes, self._gather(message))
            case ms.UpdateChunk():
                if self._upload is None or self._start is None:
                    raise ProtocolViolation("the edge sent a chunk of an update it had not announced")
                if not self._upload.add(message.digest, message.offset, payload):
                    return None
                start, place, self._start, self._upload = self._start, self._upload.place, None, None
                return Upload(start, place.whole(), place)
            case ms.Resumed() if self.state != "ready":
                raise ProtocolViolation(
                    "the edge resumed before it was ready, so it would be invited and could not answer"
                )
            case ms.Resumed():
                self.paused = None
            case ms.Leave():
                self.state = "over"
        return message
