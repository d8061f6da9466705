"""What a join prints can be read back as what it said."""

from __future__ import annotations

import json

import msgspec
import pytest

from fedsoda_edge import events as ev
from fedsoda_edge.protocol.needs import MemoryPlan, Part
from tests.schema import EDGE

PLAN = MemoryPlan(
    device="cpu",
    dtype="bfloat16",
    packed=False,
    recompute=False,
    frugal=False,
    micro_batch=8,
    batch_size=8,
    slice_bytes=64,
    process=10,
    weights=20,
    head=5,
    lora=3,
    activations=7,
    logits=2,
    sweep=30,
)
SAID: list[ev.AnyEvent] = [
    ev.Joined(run="triage", edge="ward", rounds=2),
    ev.memory("training on the CPU", PLAN, [Part("peak", 47)]),
    ev.Training(round=1, step=1, steps=2, loss=None, tokens_per_second=0.5),
    ev.JoinPaused(reason="on battery", seconds=None),
    ev.RunFinished(rounds=2, reason="done"),
]
REPORT = ev.JoinEnded(
    run="triage",
    edge="ward",
    rounds=[ev.RoundOutcome(round=1, loss=0.5, accepted=True)],
    num_examples=4,
    bytes=ev.ConversationBytes(up=1, down=2),
    agent_peak_rss_bytes=3,
    worker_peak_rss_bytes=9,
)


@pytest.mark.parametrize("event", SAID, ids=lambda event: type(event).__name__)
def test_a_line_that_a_join_printed_is_read_back(event: ev.AnyEvent) -> None:
    EDGE.check_event(json.loads(ev.line_of(event)))
    assert ev.read(ev.line_of(event)) == event


def test_the_report_of_a_join_that_ended_well_is_its_last_line() -> None:
    EDGE.check_event(json.loads(ev.line_of(REPORT)))
    assert ev.read(ev.line_of(REPORT).encode()) == REPORT


@pytest.mark.parametrize(
    "values",
    [
        {"status": "ok", "stopped": "SIGTERM"},
        {"status": "error", "error": "HubUnreachable", "message": "TCP: no", "exit_status": 3}
        | {"code": "hub-unreachable", "recovery": "retry", "helps": "fedsoda-edge doctor"},
    ],
)
def test_the_last_line_of_a_join_that_did_not_end_well_has_no_report(values: dict[str, object]) -> None:
    line = json.dumps({"schema": 1, "event": "end", "terminal": True, **values})
    EDGE.check_event(json.loads(line))
    assert ev.read(line) is None


@pytest.mark.parametrize("line", ['{"event": "yawn"}', '{"event": "joined", "run": "triage"}', "[]"])
def test_what_no_join_prints_is_not_read(line: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        ev.read(line)
