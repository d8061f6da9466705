"""A line of the log says which message, which digest, how many, how long; and no text of anybody, wherever it stands."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest

from fedsoda_edge import errors
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol import trace

DIGEST = ms.Digest("9f2c" + "0" * 60)
SECRET = "fs1-a-patient-with-fever"
VIEW = ms.ViewRef(digest=DIGEST, delta=ms.BlobRef(digest=ms.Digest("1b07" + "0" * 60), bytes=70), snapshot=None)
LOCAL = ms.LocalSettings(
    epochs=1,
    max_steps=10,
    batch_size=8,
    learning_rate=0.0003,
    weight_decay=0.01,
    max_grad_norm=1.0,
    proximal_mu=0.01,
    max_length=512,
)


def test_a_message_that_came_is_a_line_with_its_digests_shortened() -> None:
    offer = ms.RoundOffer(
        round=3, rounds=8, view=VIEW, alignment=1, emulator=VIEW, local=LOCAL, due_seconds=600.0, trains="B"
    )
    assert trace.line("<", offer) == (
        "< RoundOffer round=3 rounds=8 view=sha256:9f2c… view.delta=sha256:1b07… view.delta.bytes=70 view.moved=both "
        "alignment=1 emulator=sha256:9f2c… emulator.delta=sha256:1b07… emulator.delta.bytes=70 emulator.moved=both "
        "local.epochs=1 local.max_steps=10 local.batch_size=8 local.learning_rate=0.0003 local.weight_decay=0.01 "
        "local.max_grad_norm=1 local.proximal_mu=0.01 local.max_length=512 due_seconds=600 trains=B has_feedback=true"
    )


def test_a_chunk_is_told_by_its_size() -> None:
    chunk = ms.UpdateChunk(digest=DIGEST, offset=262144)
    assert trace.line(">", chunk, "payload=1000") == "> UpdateChunk digest=sha256:9f2c… offset=262144 payload=1000"
    progress = ms.Progress(round=2, step=7, steps=60, loss=0.69314, tokens_per_second=1234.5)
    assert trace.line(">", progress) == "% Progress round=2 step=7 steps=60 loss=0.693 tokens_per_second=1234"


def test_states_and_what_went_wrong_have_their_marks() -> None:
    assert trace.changed("session", "greeted", "open") == "= session greeted -> open"
    assert trace.went_wrong(errors.HubUnreachable(SECRET, "TCP")) == "! HubUnreachable step=TCP"
    assert trace.went_wrong(errors.HubUnreachable(SECRET, SECRET)) == "! HubUnreachable"
    assert trace.went_wrong(errors.ProtocolMismatch(1, 2)) == "! ProtocolMismatch edge=1 hub=2"
    assert trace.went_wrong(errors.WorkerFailed(SECRET, SECRET, True)) == "! WorkerFailed was_killed=true"
    assert trace.went_wrong(ValueError(SECRET)) == "! ValueError"
    refusal = ms.Refusal(reason=SECRET, round=4, retry=True)
    assert trace.went_wrong(refusal) == "! Refusal round=4 retry=true fatal=false"


def test_a_note_stays_on_its_line() -> None:
    closed = ms.RoundClosed(round=1, num_updates=2)
    assert trace.line("<", closed, "edge=clinic-7") == "< RoundClosed round=1 num_updates=2 edge=clinic-7"
    assert trace.line("<", closed, "a\n! forged\x1b[2J") == "< RoundClosed round=1 num_updates=2 a?? forged??2J"
    assert len(trace.line("<", closed, "x" * 1000)) < 130


def test_a_state_of_the_other_sides_making_is_a_defect() -> None:
    with pytest.raises(AssertionError):
        trace.changed("session", "open", SECRET + "\n! forged")


# -- what is never shown ----------------------------------------------------------------------------------


def filled(kind: Any) -> Any:
    """A value of this type with SECRET in every string, digests and words of a Literal among them."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return kind(**{field.name: filled(field.type) for field in msgspec.structs.fields(kind)})
    if kind in (int, float, bool):
        return kind(1)
    arguments = [argument for argument in get_args(kind) if argument not in (type(None), Ellipsis)]
    if kind is str or not arguments or all(isinstance(argument, str) for argument in arguments):
        return SECRET  # text, a NewType of it, a Literal
    if getattr(kind, "__origin__", None) is tuple:
        return (filled(arguments[0]),)
    return filled(arguments[0])


MESSAGES: tuple[type[ms.Message], ...] = get_args(ms.AnyMessage)


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_no_text_of_a_message_is_ever_shown(kind: type[ms.Message]) -> None:
    message = filled(kind)
    if strings_in(message):
        assert SECRET in str(message)
    for line in (trace.line("<", message), trace.line(">", message, "payload=9"), trace.went_wrong(message)):
        assert "fs1" not in line
        assert "patient" not in line
        assert line.split()[1] == kind.__name__
        assert "\n" not in line


def strings_in(value: object) -> bool:
    if isinstance(value, msgspec.Struct):
        return any(strings_in(getattr(value, name)) for name in value.__struct_fields__)
    return isinstance(value, str) or (isinstance(value, tuple) and any(map(strings_in, value)))


def test_every_kind_of_value_is_in_some_message() -> None:
    """Else the test above would not see a new kind."""
    kinds = {type(getattr(filled(kind), name)) for kind in MESSAGES for name in kind.__struct_fields__}
    assert {int, float, bool, str, tuple, ms.ViewRef, ms.BlobRef, ms.Template} <= kinds


def test_only_a_whole_digest_counts_as_one() -> None:
    for wrong in ("9f2c", "9F2C" + "0" * 60, DIGEST + "0", SECRET):
        assert trace.line("<", ms.Receipt(round=1, digest=ms.Digest(wrong))) == "< Receipt round=1"
    hello = ms.Hello(protocol=1, software=DIGEST, device_id=DIGEST, device=filled(ms.DeviceFacts))
    assert "9f2c" not in trace.line(">", hello)  # a token may look like a digest


def test_lines_are_short() -> None:
    lines = [trace.line("<", filled(kind)) for kind in MESSAGES]
    assert max(map(len, lines)) < 500
