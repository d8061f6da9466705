"""What a hub shows of an open round: who answered, who is in, when it is due."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from fedsoda_edge.ports.log_lines import LINES, LogChoices
from fedsoda_edge.protocol.messages import Digest, EdgeId
from fedsoda_edge.units import counted
from fedsoda_hub import events
from fedsoda_hub.cli.display import HubDisplay, _OpenRound, next_step
from fedsoda_hub.federation.state import LedgerState
from fedsoda_hub.run.status import live_status, run_status

D = Digest("d" * 64)
A, B, C = EdgeId("a"), EdgeId("b"), EdgeId("c")
OPENED = events.RoundOpened(rounds=9, round=2, cohort=(A, B), view=D, alignment=0, deadline_at=1060.0)
ACCEPTED = events.UpdateAccepted(rounds=9, round=2, edge=A, digest=D, num_examples=8, loss=0.5, size_class=0)


def closed(number: int, updates: int) -> events.RoundClosed:
    return events.RoundClosed(
        rounds=9,
        round=number,
        master=D,
        view=D,
        delta=D,
        moments=None,
        cross_term=None,
        smaller=(),
        standings=(),
        loss=0.5,
        updates=updates,
        bytes_up=10,
        bytes_down=20,
    )


class Shown(HubDisplay):
    """Keeps what would be shown."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(jsonl=False)
        self.bars: list[list[Any]] = []
        self.ended = 0
        monkeypatch.setattr("time.time", lambda: 1000.0)
        monkeypatch.setattr(self._line, "show", lambda *bar, is_awaited=False: self.bars.append(list(bar)))
        monkeypatch.setattr(self._line, "end", self._count_end)
        monkeypatch.setattr(self._line, "say", lambda text, *_: None)

    def _count_end(self) -> None:
        self.ended += 1


def steps(edge: EdgeId, step: int, of: int) -> events.EdgeProgress:
    return events.EdgeProgress(edge=edge, round=2, step=step, steps=of, loss=None, tokens_per_second=None)


def test_the_bar_of_a_round_counts_local_steps_and_says_who_answered_and_when_it_is_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = Shown(monkeypatch)
    for edge in (A, B, C):
        shown.say(events.EdgeConnected(edge=edge, software="1"))
    assert shown.bars == []
    shown.say(OPENED)
    assert shown.bars[-1] == ["round 2", 0, None, "0 of 2 answered, 3 edges connected, due in 60 s"]
    shown.say(steps(A, 10, 40))
    assert shown.bars[-1][:3] == ["round 2", 10, 81]
    shown.say(steps(C, 10, 40))  # was not asked
    assert shown.bars[-1][:3] == ["round 2", 10, 81]
    shown.say(ACCEPTED)
    shown.say(events.EdgeDisconnected(edge=C))
    assert shown.bars[-1] == ["round 2", 40, 81, "1 of 2 answered, 2 edges connected, due in 60 s"]


def test_an_extended_cohort_is_counted_with_its_new_due_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(monkeypatch)
    shown.say(OPENED)
    shown.say(events.EdgeAnswered(rounds=9, round=2, edge=B, how="declined"))
    shown.say(events.CohortExtended(rounds=9, round=2, invited=(B, C), deadline_at=1300.0))
    assert shown.bars[-1][3] == "0 of 3 answered, 0 edges connected, due in 5 min"


def test_a_round_that_closed_has_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(monkeypatch)
    shown.say(OPENED)
    count = len(shown.bars)
    shown.say(closed(2, updates=2))
    assert (len(shown.bars), shown.ended) == (count, 1)


def test_one_is_no_plural_and_sizes_are_written_as_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    shown = HubDisplay(jsonl=False)
    shown.say(
        events.DiskProgress(
            job="prepare", stage="caching teacher targets", needed_bytes=700_000_000, free_bytes=20_000_000_000
        )
    )
    errors = {"error_before": 0.333, "error_whole": 0.08, "error": 0.089}
    shown.say(events.BorderMapProgress(job="prepare", stage="fitting the border map", **errors))
    shown.say(
        events.HealedShapeProgress(job="prepare", stage="choosing groups", layers_per_group=3, groups=4, error=0.0312)
    )
    shown.say(events.LeftOutProgress(job="prepare", stage="not healed", why="layer 0 has no down_proj"))
    shown.say(
        events.ShapeProgress(
            job="prepare", stage="choosing groups", layers_per_group=3, groups=4, kl=0.2512, cosine=0.8128
        ),
    )
    shown.say(msgspec.structs.replace(ACCEPTED, round=1, num_examples=1))
    shown.say(closed(1, updates=1))
    shown.say(closed(1, updates=2))
    state = LedgerState(run_id="1", phase="ended", round=1)
    summary = live_status(run_status("t", 1, [], state), [])
    shown.say(events.RunEnded(rounds=1, summary=summary))
    assert capsys.readouterr().err.splitlines() == [
        "caching teacher targets: needs 668 MiB of disk, 18.6 GiB are free",
        "fitting the border map: on held-out prompts, border states differ from the full emulator's by 33.3% without it, by 8.9% with it",
        "choosing groups: with 4 x 3 layers removed and healed, border states differ by 3.1%",
        "not healed: layer 0 has no down_proj",
        "choosing groups: with 4 x 3 layers removed, public KL is 0.251 and the cosine of the adapter's gradients 0.813",
        "round 1: a, 1 example, loss 0.500",
        "round 1 closed: 1 update, loss 0.500; 10 B up, 20 B down so far",
        "round 1 closed: 2 updates, loss 0.500; 10 B up, 20 B down so far",
        "the run is over after 1 round",
    ]
    assert (
        _OpenRound(local={"a": (0, 0)}, due_at=60.0).detail(1, 0.0) == "0 of 1 answered, 1 edge connected, due in 60 s"
    )


SETTINGS = {
    "name": events.SettingInForce(value="x", source="run.toml"),
    "[task] prompt": events.SettingInForce(value="Review: {text}\nLabel:", source="run.toml"),
    "[lora] rank": events.SettingInForce(value=8, source="default"),
    "[public] text": events.SettingInForce(value=None, source="default"),
}


def test_of_the_settings_a_person_sees_what_was_given_a_line_each_and_the_rest_where_details_are_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["settings from run.toml:", '  name = "x"', '  [task] prompt = "Review: {text}\\nLabel:"']
    HubDisplay(jsonl=False).say(events.SettingsInForce(values=SETTINGS))
    assert capsys.readouterr().err.splitlines() == [
        *given,
        "1 other setting at the default; fedsoda-hub config shows them",
    ]
    HubDisplay(jsonl=False, defaults={"name": "x"}).say(events.SettingsInForce(values=SETTINGS))
    assert "name" not in capsys.readouterr().err  # it is written in the file, as it would be without
    HubDisplay(jsonl=False, is_detailed=True).say(events.SettingsInForce(values=SETTINGS))
    assert capsys.readouterr().err.splitlines() == [*given, "defaults:", "  [lora] rank = 8"]


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (
            LedgerState(),
            "next: prepare the bundle from the full model, which takes a while; edges that join meanwhile wait",
        ),
        (LedgerState(phase="idle", round=2), "next: round 3 of 9, as soon as enough edges are connected"),
        (
            LedgerState(phase="collecting", round=3, cohort=[A, B]),
            "next: continue round 3 of 9, which has 0 of 2 updates",
        ),
        (
            LedgerState(phase="ended", round=9),
            "next: nothing, the run is over after 9 rounds; edges that join learn that",
        ),
    ],
)
def test_what_happens_next_is_said_at_the_start(state: LedgerState, said: str) -> None:
    assert next_step(state, 9) == said


def test_a_number_of_things_is_one_thing_or_several() -> None:
    assert [counted(number, "sample") for number in (0, 1, 1234)] == ["0 samples", "1 sample", "1,234 samples"]


@pytest.mark.parametrize("jsonl", [False, True])
def test_a_log_has_the_sentences_of_the_display_with_level_and_event(
    capsys: pytest.CaptureFixture[str], jsonl: bool
) -> None:
    with LINES.kept(LogChoices("json")):
        display = HubDisplay(jsonl)
        display.say(events.EdgeConnected(edge=A, software="1"))
        display.say(events.EdgeAnswered(rounds=9, round=2, edge=B, how="declined"))
        display.say(events.OutOfDisk(message="the disk is full"))
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["level"], line["event"], line["message"]) for line in lines] == [
        ("info", "edge_connected", "a connected"),
        ("warning", "edge_answered", "round 2: no update from b (declined)"),
        ("error", "disk_full", "the disk is full"),
    ]
