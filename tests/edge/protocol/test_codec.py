"""The wire: recorded bytes per protocol version, sizes before parsing, nothing but messages comes out."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsoda_edge.errors import ProtocolViolation
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.codec import MAX_CHUNK_BYTES, MAX_FRAME_BYTES, MAX_HEADER_BYTES, decode, encode, wire_bytes

GOLDEN = Path(__file__).parents[2] / "golden" / f"protocol_{ms.PROTOCOL_VERSION}.json"
DIGEST = ms.Digest("ab" * 32)
VIEW = ms.ViewRef(digest=DIGEST, delta=ms.BlobRef(digest=DIGEST, bytes=1300), snapshot=None)

EXAMPLES: list[tuple[ms.AnyMessage, bytes]] = [
    (
        ms.Hello(
            protocol=1,
            software="0.1.0",
            device_id="d-1",
            device=ms.DeviceFacts(ram_bytes=1 << 33, vram_bytes=0, disk_bytes=1 << 40, threads=2, accelerator="cpu"),
        ),
        b"",
    ),
    (ms.Ready(num_examples=120), b""),
    (ms.BlobRequest(digest=DIGEST, offset=7), b""),
    (
        ms.UpdateStart(
            round=3, base=DIGEST, alignment=1, digest=DIGEST, bytes=3, codec="int8", num_examples=120, loss=0.5
        ),
        b"",
    ),
    (ms.UpdateChunk(digest=DIGEST, offset=0), b"\x00\x01\xff"),
    (ms.Decline(round=3, reason="the owner is away"), b""),
    (ms.Progress(round=3, step=1, steps=9, loss=None, tokens_per_second=99.5), b""),
    (ms.Paused(reason="on battery"), b""),
    (ms.Resumed(), b""),
    (ms.Leave(reason="--max-rounds"), b""),
    (
        ms.Welcome(
            protocol=1,
            run_id="r",
            run_name="triage",
            edge=ms.EdgeId("clinic-7"),
            manifest=ms.BlobRef(digest=DIGEST, bytes=4000),
            rounds=20,
            rounds_done=2,
            template=ms.Template(prompt="Review: {sentence}", completion="{label}"),
            max_length=512,
            codec="int8",
            seed=0,
            stall_seconds=60.0,
        ),
        b"",
    ),
    (
        ms.RoundOffer(
            round=3,
            rounds=20,
            view=VIEW,
            alignment=1,
            emulator=VIEW,
            local=ms.LocalSettings(
                epochs=1,
                max_steps=0,
                batch_size=8,
                learning_rate=1e-4,
                weight_decay=0.01,
                max_grad_norm=1.0,
                proximal_mu=0.01,
                max_length=512,
            ),
            due_seconds=3600.0,
        ),
        b"",
    ),
    (
        ms.Preparing(
            protocol=1,
            run_id="r",
            run_name="triage",
            stage="aligning",
            done=81,
            total=200,
            seconds=460.0,
            seconds_left=660.0,
        ),
        b"",
    ),
    (ms.BlobChunk(digest=DIGEST, offset=0, total=3), b"abc"),
    (ms.Receipt(round=3, digest=DIGEST), b""),
    (ms.Refusal(reason="round 1 is closed; wait for the next offer", round=1), b""),
    (ms.RoundClosed(round=3, num_updates=4), b""),
    (ms.Farewell(rounds=20, reason="the run is over"), b""),
]


def name_of(example: tuple[ms.AnyMessage, bytes]) -> str:
    return type(example[0]).__name__


def record() -> None:
    """Write the golden bytes; only for a new protocol version. `python -m tests.edge.protocol.test_codec`"""
    frames = {name_of(example): encode(*example).hex() for example in EXAMPLES}
    GOLDEN.write_text(json.dumps(frames, indent=1) + "\n")


def test_every_message_is_recorded() -> None:
    said = {kind.__name__ for kind in ms.EdgeMessage.__args__ + ms.HubMessage.__args__}
    assert set(json.loads(GOLDEN.read_text())) == {name_of(example) for example in EXAMPLES} == said


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_the_recorded_bytes_are_read_and_written(example: tuple[ms.AnyMessage, bytes]) -> None:
    frame = bytes.fromhex(json.loads(GOLDEN.read_text())[name_of(example)])
    assert decode(frame) == example
    assert encode(*example) == frame


def frame(header: bytes, payload: bytes = b"") -> bytes:
    return len(header).to_bytes(4, "big") + header + payload


def test_a_newer_side_may_say_more() -> None:
    assert decode(frame(b'{"type":"ready","num_examples":3,"mood":"good"}')) == (ms.Ready(num_examples=3), b"")


def test_what_most_offers_do_not_say_takes_no_bytes() -> None:
    """An offer of both factors is the one that edges knew before there were others."""
    [offer] = [example[0] for example in EXAMPLES if isinstance(example[0], ms.RoundOffer)]
    assert (offer.trains, offer.has_feedback, offer.view.moved) == ("both", True, "both")
    half = msgspec.structs.replace(offer, trains="B", view=msgspec.structs.replace(VIEW, moved="A"))
    assert decode(encode(half)) == (half, b"")
    with pytest.raises(ProtocolViolation, match="Invalid enum value 'C'"):
        decode(encode(half).replace(b'"trains":"B"', b'"trains":"C"'))


def test_a_round_that_cannot_be_trained_is_not_offered() -> None:
    [offer] = [example[0] for example in EXAMPLES if isinstance(example[0], ms.RoundOffer)]
    with pytest.raises(ProtocolViolation, match=r"Expected `int` >= 1 - at `\$\.local\.batch_size`"):
        decode(encode(msgspec.structs.replace(offer, local=ms.LocalSettings(batch_size=0))))


CHUNK = b'{"type":"update_chunk","digest":"%s","offset":0}' % DIGEST.encode()


@pytest.mark.parametrize(
    "attack",
    [
        b"",
        b"\0\0\0",
        b"\0\0\0\0",
        b"\xff\xff\xff\xff{}",
        frame(b"[" * MAX_HEADER_BYTES),
        frame(b"{" + b" " * MAX_HEADER_BYTES),
        frame(b'{"type":"exec","code":"1"}'),
        frame(b'{"num_examples":3}'),
        frame(b'{"type":"ready","num_examples":"3"}'),
        frame(b'{"type":"ready","num_examples":NaN}'),
        frame(b'{"type":"resumed"}', b"a payload"),
        frame(CHUNK, bytes(MAX_CHUNK_BYTES + 1)),
        bytes(MAX_FRAME_BYTES + 1),
    ],
)
def test_what_is_no_frame_is_a_violation(attack: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        decode(attack)


def test_the_largest_chunk_is_read() -> None:
    assert decode(frame(CHUNK, bytes(MAX_CHUNK_BYTES)))[1] == bytes(MAX_CHUNK_BYTES)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from(EXAMPLES),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, 500),
)
def test_a_mutated_frame_is_a_message_or_a_violation(
    example: tuple[ms.AnyMessage, bytes], changes: list[tuple[int, int]], cut: int
) -> None:
    mutated = bytearray(encode(*example))
    for at, value in changes:
        mutated[at % len(mutated)] = value
    try:
        message, _ = decode(bytes(mutated[: max(cut, 1)]))
    except ProtocolViolation:
        return
    assert isinstance(message, ms.AnyMessage)


@pytest.mark.parametrize(
    ("size", "masked", "on_the_wire"),
    [(125, False, 127), (126, False, 130), (65535, True, 65543), (65536, True, 65550)],  # RFC 6455, 5.2
)
def test_framing_bytes_are_counted(size: int, masked: bool, on_the_wire: int) -> None:
    assert wire_bytes(bytes(size), masked=masked) == on_the_wire


if __name__ == "__main__":
    record()
