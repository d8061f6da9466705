"""One conversation: who may say what when, and what arrives in chunks arrives whole or not at all."""

from __future__ import annotations

import hashlib

import pytest

from fedsoda_edge.errors import ProtocolViolation
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.codec import MAX_CHUNK_BYTES, encode
from fedsoda_edge.protocol.session import Blob, EdgeSession, HubSession, Upload, chunks
from tests.edge.protocol.test_codec import EXAMPLES

HELLO, WELCOME = (message for message, _ in EXAMPLES if isinstance(message, ms.Hello | ms.Welcome))
DATA = bytes(range(256)) * 1024 + b"the last chunk"
DIGEST = ms.Digest(hashlib.sha256(DATA).hexdigest())
LIMIT = 1 << 20


def start(size: int = len(DATA), digest: ms.Digest = DIGEST) -> ms.UpdateStart:
    return ms.UpdateStart(
        round=1, base=DIGEST, alignment=0, digest=digest, bytes=size, codec="int8", num_examples=3, loss=0.1
    )


def greeted() -> tuple[EdgeSession, HubSession]:
    assert isinstance(HELLO, ms.Hello)
    assert isinstance(WELCOME, ms.Welcome)
    edge, hub = EdgeSession(), HubSession(LIMIT)
    assert hub.receive(edge.send(HELLO)) == HELLO
    assert edge.receive(hub.send(WELCOME)) == WELCOME
    return edge, hub


def ready() -> tuple[EdgeSession, HubSession]:
    edge, hub = greeted()
    hub.receive(edge.send(ms.Ready(num_examples=3)))
    return edge, hub


def upload(edge: EdgeSession, hub: HubSession, data: bytes) -> list[object]:
    return [
        hub.receive(edge.send(ms.UpdateChunk(digest=DIGEST, offset=offset), piece)) for offset, piece in chunks(data)
    ]


def test_an_update_arrives_whole() -> None:
    edge, hub = ready()
    hub.receive(edge.send(start()))
    assert hub.upload_progress == 0
    assert upload(edge, hub, DATA) == [None, Upload(start(), DATA)]
    assert hub.upload_progress is None


def test_a_blob_arrives_whole() -> None:
    edge, hub = ready()
    hub.receive(edge.request(ms.BlobRef(digest=DIGEST, bytes=len(DATA))))
    got = [
        edge.receive(hub.send(ms.BlobChunk(digest=DIGEST, offset=offset, total=len(DATA)), piece))
        for offset, piece in chunks(DATA)
    ]
    assert got == [None, Blob(DIGEST, DATA)]


def test_hello_comes_first_and_once() -> None:
    with pytest.raises(ProtocolViolation):
        HubSession(LIMIT).receive(encode(ms.Ready(num_examples=3)))
    _, hub = greeted()
    with pytest.raises(ProtocolViolation):
        hub.receive(encode(HELLO))


@pytest.mark.parametrize("size", [-1, 0, LIMIT + 1, 1 << 62])
def test_an_update_of_an_impossible_size_is_refused_before_a_byte_of_it_is_kept(size: int) -> None:
    _, hub = ready()
    with pytest.raises(ProtocolViolation):
        hub.receive(encode(start(size)))
    assert hub.upload_progress is None


def test_an_update_needs_ready() -> None:
    _, hub = greeted()
    with pytest.raises(ProtocolViolation):
        hub.receive(encode(start()))


@pytest.mark.parametrize(
    ("digest", "offset", "payload"),
    [
        (DIGEST, 1, b"a gap"),
        (DIGEST, -1, b"before the start"),
        (ms.Digest("00" * 32), 0, b"another blob"),
        (DIGEST, 0, b""),
        (DIGEST, 0, DATA[:MAX_CHUNK_BYTES]),  # longer than the 10 bytes announced below
        (DIGEST, 0, b"0123456789"),  # as long, another digest
    ],
)
def test_chunks_that_are_not_the_announced_update_are_a_violation(
    digest: ms.Digest, offset: int, payload: bytes
) -> None:
    _, hub = ready()
    hub.receive(encode(start(10)))
    with pytest.raises(ProtocolViolation):
        hub.receive(encode(ms.UpdateChunk(digest=digest, offset=offset), payload))


def test_a_chunk_that_was_not_announced_or_asked_for_is_a_violation() -> None:
    edge, hub = ready()
    with pytest.raises(ProtocolViolation):
        hub.receive(encode(ms.UpdateChunk(digest=DIGEST, offset=0), b"a"))
    with pytest.raises(ProtocolViolation):
        edge.receive(encode(ms.BlobChunk(digest=DIGEST, offset=0, total=1), b"a"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example[0]).__name__)
def test_nobody_speaks_for_the_other_side(example: tuple[ms.AnyMessage, bytes]) -> None:
    edge, hub = ready()
    wrong_side = hub if isinstance(example[0], ms.HubMessage) else edge
    with pytest.raises(ProtocolViolation):
        wrong_side.receive(encode(*example))


def test_nothing_follows_leave() -> None:
    edge, hub = ready()
    hub.receive(edge.send(ms.Leave(reason="enough")))
    with pytest.raises(ProtocolViolation):
        hub.receive(encode(ms.Resumed()))
