"""Turn messages into frames and back: a frame is a 4-byte header length, a JSON header, and for chunks the payload.

Sizes are checked before anything is parsed. Which message may come when is left to `session.py`.
"""

from __future__ import annotations

import msgspec

from fedsoda_edge.errors import ProtocolViolation
from fedsoda_edge.protocol.messages import AnyMessage, BlobChunk, Message, UpdateChunk
from fedsoda_edge.units import one_line

MAX_HEADER_BYTES = 64 << 10
MAX_CHUNK_BYTES = 256 << 10
MAX_FRAME_BYTES = 4 + MAX_HEADER_BYTES + MAX_CHUNK_BYTES

_DECODER = msgspec.json.Decoder(AnyMessage)
_ENCODER = msgspec.json.Encoder()


def encode(message: Message, payload: bytes | memoryview = b"") -> bytes:
    """Make the frame of a message; only chunks carry a payload."""
    assert not payload or isinstance(message, UpdateChunk | BlobChunk), "only chunks carry a payload"
    assert len(payload) <= MAX_CHUNK_BYTES, "the sender cuts chunks"
    header = _ENCODER.encode(message)
    assert len(header) <= MAX_HEADER_BYTES, "messages are small"
    return b"".join((len(header).to_bytes(4, "big"), header, payload))


def decode(frame: bytes) -> tuple[AnyMessage, bytes]:
    """Read a frame: (message, payload).

    Raises:
        ProtocolViolation: the bytes are not a frame of this protocol.
    """
    size = int.from_bytes(frame[:4], "big")
    if len(frame) > MAX_FRAME_BYTES or len(frame) < 4 or size > min(MAX_HEADER_BYTES, len(frame) - 4):
        raise ProtocolViolation(
            f"a frame of {len(frame)} bytes announces a header of {size} bytes, so it is damaged; connect again"
        )
    try:
        message = _DECODER.decode(frame[4 : 4 + size])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        # The sentence goes back as a message, and messages are small: what is wrong may be as long as a header.
        raise ProtocolViolation(
            f"a frame holds no message of this protocol ({one_line(str(error), 200)}); upgrade the older side"
        ) from error
    payload = frame[4 + size :]
    if len(payload) > MAX_CHUNK_BYTES:
        raise ProtocolViolation(f"a chunk has {len(payload)} bytes, and at most {MAX_CHUNK_BYTES} are allowed")
    if payload and not isinstance(message, UpdateChunk | BlobChunk):
        raise ProtocolViolation(f"a {type(message).__name__} carries {len(payload)} bytes, and only chunks may do so")
    return message, payload


def wire_bytes(frame: bytes, *, masked: bool) -> int:
    """Count the bytes of one websocket message, payload and framing (RFC 6455, 5.2).

    Args:
        masked: whether a client sends it.
    """
    size = len(frame)
    return size + (2 if size < 126 else 4 if size < 1 << 16 else 10) + (4 if masked else 0)
