"""What a person and a program read of a join: a sentence an event on stderr, or its JSON on stdout."""

from __future__ import annotations

import json

import pytest

from fedsoda_edge import events as ev
from fedsoda_edge.cli.display import JoinDisplay, sentence
from tests.schema import EDGE


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (ev.Joined(run="triage", edge="clinic-7", rounds=1), "joined run triage as clinic-7 (1 round)"),
        (
            ev.DataRead(rows=9, num_examples=8, num_skipped=1, threads=2),
            "8 samples, 1 skipped (data check says why); waiting for a round",
        ),
        (ev.SweepDone(num_examples=8, num_kept=8, kept_bytes=9, num_damaged=0), ""),
        (
            ev.RoundTrained(
                round=3, edge="a", num_examples=8, num_steps=6, num_tokens=9, micro_batch=4, seconds=1.25, loss=None
            ),
            "round 3: trained 6 steps in 1.2 s, loss not a number",
        ),
        (
            ev.Accepted(round=3, num_examples=8, loss=0.5, bytes=77),
            "round 3: the hub has the update (77 bytes); waiting for the other edges",
        ),
        (
            ev.Refused(round=3, reason="round 3 is closed", num_examples=8, loss=0.5, bytes=77),
            "round 3: the hub refused the update: round 3 is closed",
        ),
        (ev.JoinPaused(reason="on battery", seconds=None), "paused: on battery"),
        (ev.JoinPaused(reason="by its owner", seconds=2520.0), "paused by its owner, for another 42 min"),
        (ev.RunFinished(rounds=2, reason="all rounds are done"), "done: all rounds are done after 2 rounds"),
        (ev.RoundOver(round=3, updates=2), ""),
    ],
)
def test_an_event_is_a_sentence_for_people_or_nothing(event: ev.AnyEvent, expected: str) -> None:
    assert sentence(event) == expected


def test_border_states_that_the_disk_does_not_keep_are_told_with_what_to_do() -> None:
    said = sentence(ev.SweepDone(num_examples=8, num_kept=2, kept_bytes=2048, num_damaged=0))
    assert said.startswith("the disk keeps the border states of 2 of 8 samples (2.00 KiB)")
    assert "--max-disk" in said


def test_jsonl_prints_each_event_as_it_is_promised(capsys: pytest.CaptureFixture[str]) -> None:
    with JoinDisplay(jsonl=True) as display:
        display.say(ev.Training(round=1, step=1, steps=2, loss=None, tokens_per_second=9.5))
        display.say(ev.Reconnected())
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    for line in lines:
        EDGE.check_event(line)
    assert lines == [
        {
            "event": "training",
            "round": 1,
            "stage": "train",
            "step": 1,
            "steps": 2,
            "loss": None,
            "tokens_per_second": 9.5,
        },
        {"event": "reconnected"},
    ]
    assert err == ""


def test_a_log_has_one_line_of_a_hub_that_prepares_and_then_no_more_than_of_other_work(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with JoinDisplay(jsonl=False) as display:
        for done in range(1, 9):
            said = f"preparing: aligning {done} of 200, about 11 min left"
            display.say(ev.HubPreparing(run="triage", message=said, done=done, total=200, seconds_left=660.0))
        display.say(ev.Joined(run="triage", edge="clinic-7", rounds=1))
    assert capsys.readouterr().err.splitlines() == [
        "waiting for the hub of triage, which is preparing: aligning 1 of 200, about 11 min left",
        "joined run triage as clinic-7 (1 round)",
    ]
