"""The status of a join is what its events say, in words that need no log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsoda_edge.join.status import Status, read_status, sentences


class Clocks:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


JOINED: list[dict[str, Any]] = [
    {"event": "joined", "run": "triage", "edge": "clinic-7", "rounds": 20},
    {"event": "data", "rows": 5, "num_examples": 5},
    {"event": "offer", "round": 3, "due_seconds": 840.0},
    {"event": "training", "round": 3, "step": 40, "steps": 100, "loss": 0.52},
]
SWEEP = {"event": "sweep", "stage": "sweep", "done": 3, "total": 9}
REFUSED = {"event": "refused", "round": 3, "reason": "round 3 is closed; wait for the next offer", "loss": 0.5}
PAUSED = {"event": "paused", "reason": "by its owner", "seconds": 2520.0}
RESUMED = {"event": "resumed"}
LOST = {"event": "reconnecting", "message": "TCP: nothing answers at h:1; is the hub running?"}


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], ["connecting (pid PID)", "hub http://h"]),
        (
            JOINED,
            [
                "training (pid PID)",
                "run triage as clinic-7 at http://h",
                "round 3 of 20, step 40 of 100, loss 0.520, due in 14 min",
                "worker holds 2.00 GiB of memory",
            ],
        ),
        (
            [*JOINED, LOST],
            [
                "reconnecting (pid PID)",
                "run triage as clinic-7 at http://h",
                "round 3 of 20, step 40 of 100, loss 0.520, due in 14 min",
                "worker holds 2.00 GiB of memory",
                "last error: TCP: nothing answers at h:1; is the hub running?",
            ],
        ),
        (
            [*JOINED, REFUSED],
            [
                "waiting for a round (pid PID)",
                "run triage as clinic-7 at http://h",
                "round 3 of 20, loss 0.500",
                "worker holds 2.00 GiB of memory",
                "last error: round 3 is closed; wait for the next offer",
            ],
        ),
        (
            [*JOINED, PAUSED, LOST, {"event": "reconnected"}],
            [
                "paused by its owner, for another 42 min (pid PID)",
                "run triage as clinic-7 at http://h",
                "round 3 of 20, step 40 of 100, loss 0.520, due in 14 min",
                "worker holds 2.00 GiB of memory",
            ],
        ),
        (
            [*JOINED[:2], {"event": "paused", "reason": "on battery", "seconds": None}],
            ["paused: on battery (pid PID)", "run triage as clinic-7 at http://h", "worker holds 2.00 GiB of memory"],
        ),
        (
            [*JOINED[:2], PAUSED, RESUMED],
            ["waiting for a round (pid PID)", "run triage as clinic-7 at http://h", "worker holds 2.00 GiB of memory"],
        ),
        (
            [*JOINED, PAUSED, RESUMED],
            [
                "training (pid PID)",
                "run triage as clinic-7 at http://h",
                "round 3 of 20, step 40 of 100, loss 0.520, due in 14 min",
                "worker holds 2.00 GiB of memory",
            ],
        ),
        (
            [*JOINED, PAUSED, {"event": "accepted", "round": 3, "loss": 0.5}, LOST, {"event": "reconnected"}, RESUMED],
            [
                "waiting for a round (pid PID)",
                "run triage as clinic-7 at http://h",
                "round 3 of 20, loss 0.500",
                "worker holds 2.00 GiB of memory",
            ],
        ),
        (
            [JOINED[0], {"event": "download", "done": 1, "total": 2}, SWEEP],
            ["downloading (pid PID)", "run triage as clinic-7 at http://h", "worker holds 2.00 GiB of memory"],
        ),
        (
            [JOINED[0], {"event": "download", "done": 2, "total": 2}, JOINED[1], SWEEP],
            [
                "sweeping the data through the sub-emulator (pid PID)",
                "run triage as clinic-7 at http://h",
                "worker holds 2.00 GiB of memory",
            ],
        ),
    ],
    ids=[
        *("connecting", "training", "lost", "refused", "paused", "on battery", "resumed", "in hand", "handed in"),
        *("beside", "after"),
    ],
)
def test_a_running_join_says_what_it_does(tmp_path: Path, events: list[dict[str, Any]], expected: list[str]) -> None:
    status = Status(tmp_path / "status.json", "http://h", Clocks(), lambda: 2 << 30 if events else None)
    for event in events:
        status.note(event)
    status._write()
    found = read_status(tmp_path / "status.json")
    assert found is not None
    lines = sentences(found, is_running=True, now=1000.0)
    assert [line.replace(str(found["pid"]), "PID") for line in lines] == expected


def test_how_a_join_ended_stays_to_be_read(tmp_path: Path) -> None:
    def ended(*events: dict[str, Any], error: BaseException | None) -> list[str]:
        status = Status(tmp_path / "status.json", "http://h", Clocks(), lambda: None)
        for event in (*JOINED, *events):
            status.note(event)
        status.end(error)
        return sentences(status.values, is_running=False, now=2000.0)

    assert ended({"event": "farewell", "rounds": 20, "reason": ""}, error=None)[0] == "the run is over"
    assert ended(error=None)[0] == "stopped"
    assert ended(error=ValueError("the disk is full"))[::3] == ["stopped", "last error: the disk is full"]
    assert ended(error=KeyboardInterrupt())[-1] == "last error: KeyboardInterrupt"
    killed = Status(tmp_path / "status.json", "http://h", Clocks(), lambda: None)
    assert sentences(killed.values, is_running=False, now=0.0)[0] == "ended without a word"


def test_it_is_written_once_a_second_and_at_every_change_of_state(tmp_path: Path) -> None:
    clock, path = Clocks(), tmp_path / "status.json"
    status = Status(path, "http://h", clock, lambda: None)
    for event in JOINED:
        status.note(event)

    def step() -> Any:
        found = read_status(path)
        return found and found["step"]

    assert step() == 40
    status.note(JOINED[-1] | {"step": 41})
    assert step() == 40
    clock.now += 1.0
    status.note(JOINED[-1] | {"step": 42})
    assert step() == 42


def test_a_wall_clock_that_is_set_does_not_change_how_long_a_pause_is_for_long(tmp_path: Path) -> None:
    clock = Clocks()
    status = Status(tmp_path / "status.json", "http://h", clock, lambda: None)
    status.note(PAUSED)
    clock.now += 7200.0  # somebody set it
    status.still_paused(2490.0)
    found = read_status(tmp_path / "status.json")
    assert found is not None
    assert sentences(found, is_running=True, now=clock.now)[0].startswith("paused by its owner, for another 42 min (")


def test_a_home_without_a_join_has_no_status(tmp_path: Path) -> None:
    assert read_status(tmp_path / "status.json") is None
    (tmp_path / "status.json").write_text("{torn")
    assert read_status(tmp_path / "status.json") is None


@pytest.mark.parametrize("late", [JOINED[1], JOINED[3], {"event": "accepted", "round": 3, "loss": 0.5, "bytes": 9}])
def test_what_a_worker_says_after_the_farewell_takes_nothing_back(tmp_path: Path, late: dict[str, Any]) -> None:
    """A hub may say that the run is over while the data is still read, or before an answer came in."""
    status = Status(tmp_path / "status.json", "http://h", Clocks(), lambda: None)
    for event in (*JOINED, {"event": "farewell", "rounds": 20, "reason": "all rounds are done"}, late):
        status.note(event)
    status.end(None)
    found = read_status(tmp_path / "status.json")
    assert found is not None
    assert found["state"] == "the run is over"


def test_a_sweep_that_outlives_its_run_does_not_change_how_the_run_ended(tmp_path: Path) -> None:
    """The early sweep of a join whose run is over ends with its worker, which may come after the last word."""
    status = Status(tmp_path / "status.json", "http://h", Clocks(), lambda: 0)
    swept = {"event": "swept", "num_examples": 5, "num_kept": 5, "kept_bytes": 9, "num_damaged": 0}
    for event in (*JOINED[:2], {"event": "farewell", "rounds": 20, "reason": "all rounds are done"}, SWEEP, swept):
        status.note(event)
    status.end(None)
    status.note(SWEEP)
    found = read_status(tmp_path / "status.json")
    assert found is not None
    assert found["state"] == "the run is over"
