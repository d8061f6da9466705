"""The status of a join is what its events say, in words that need no log."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsoda_edge import events as ev
from fedsoda_edge.errors import DataProblem, DiskFull
from fedsoda_edge.join.status import Status, read_status, sentences


class Clocks:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def trains(step: int) -> ev.Training:
    return ev.Training(round=3, step=step, steps=100, loss=0.52, tokens_per_second=9.5)


ACCEPTED = ev.Accepted(round=3, num_examples=5, loss=0.5, bytes=9)
JOINED: list[ev.AnyEvent] = [
    ev.Joined(run="triage", edge="clinic-7", rounds=20),
    ev.DataRead(rows=5, num_examples=5, num_skipped=0, threads=1),
    ev.RoundOffered(round=3, due_seconds=840.0),
    trains(40),
]
SWEEP = ev.Sweeping(done=3, total=9)
REFUSED = ev.Refused(round=3, reason="round 3 is closed; wait for the next offer", num_examples=5, loss=0.5, bytes=9)
PAUSED = ev.JoinPaused(reason="by its owner", seconds=2520.0)
RESUMED = ev.JoinResumed()
LOST = ev.Reconnecting("TCP: nothing answers at h:1; is the hub running?")
FAREWELL = ev.RunFinished(rounds=20, reason="all rounds are done")


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
                "reconnecting: the hub is away: TCP: nothing answers at h:1; is the hub running? (pid PID)",
                "run triage as clinic-7 at http://h",
                "round 3 of 20, step 40 of 100, loss 0.520, due in 14 min",
                "worker holds 2.00 GiB of memory",
            ],
        ),
        (
            [*JOINED, REFUSED],
            [
                "waiting for a round: the hub refused the update of round 3, and has not opened the next round (pid PID)",
                "run triage as clinic-7 at http://h",
                "round 3 of 20, loss 0.500",
                "worker holds 2.00 GiB of memory",
                "last error: round 3 is closed; wait for the next offer",
            ],
        ),
        (
            [*JOINED, PAUSED, LOST, ev.Reconnected()],
            [
                "paused by its owner, for another 42 min (pid PID)",
                "run triage as clinic-7 at http://h",
                "round 3 of 20, step 40 of 100, loss 0.520, due in 14 min",
                "worker holds 2.00 GiB of memory",
            ],
        ),
        (
            [*JOINED[:2], ev.JoinPaused(reason="on battery", seconds=None)],
            ["paused: on battery (pid PID)", "run triage as clinic-7 at http://h", "worker holds 2.00 GiB of memory"],
        ),
        (
            [*JOINED[:2], PAUSED, RESUMED],
            [
                "waiting for a round: the hub has not invited this edge to a round yet (pid PID)",
                "run triage as clinic-7 at http://h",
                "worker holds 2.00 GiB of memory",
            ],
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
            [*JOINED, PAUSED, ACCEPTED, LOST, ev.Reconnected(), RESUMED],
            [
                "waiting for a round: the hub waits for the updates of other edges to round 3 (pid PID)",
                "run triage as clinic-7 at http://h",
                "round 3 of 20, loss 0.500",
                "worker holds 2.00 GiB of memory",
            ],
        ),
        (
            [JOINED[0], ev.Downloading(done=1, total=2), SWEEP],
            ["downloading (pid PID)", "run triage as clinic-7 at http://h", "worker holds 2.00 GiB of memory"],
        ),
        (
            [JOINED[0], ev.Downloading(done=2, total=2), JOINED[1], SWEEP],
            [
                "sweeping the data through the sub-emulator (pid PID)",
                "run triage as clinic-7 at http://h",
                "worker holds 2.00 GiB of memory",
            ],
        ),
        (
            [
                ev.HubPreparing(
                    run="triage",
                    message="preparing: aligning 81 of 200, about 11 min left",
                    done=81,
                    total=200,
                    seconds_left=660.0,
                )
            ],
            [
                "waiting for the hub: the hub is preparing: aligning 81 of 200, about 11 min left (pid PID)",
                "run triage at http://h",
                "worker holds 2.00 GiB of memory",
            ],
        ),
        (
            [*JOINED, ev.Retrying(round=3, reason="the disk is full")],
            [
                "waiting to send the update again: the hub cannot take the update now: the disk is full (pid PID)",
                "run triage as clinic-7 at http://h",
                "round 3 of 20, step 40 of 100, loss 0.520, due in 14 min",
                "worker holds 2.00 GiB of memory",
            ],
        ),
    ],
    ids=[
        *("connecting", "training", "lost", "refused", "paused", "on battery", "resumed", "in hand", "handed in"),
        *("beside", "after", "hub prepares", "no room"),
    ],
)
def test_a_running_join_says_what_it_does(tmp_path: Path, events: list[ev.AnyEvent], expected: list[str]) -> None:
    status = Status(tmp_path / "status.json", "http://h", Clocks(), lambda: 2 << 30 if events else None)
    for event in events:
        status.note(event)
    status.write()
    found = read_status(tmp_path / "status.json")
    assert found is not None
    lines = sentences(found, is_running=True, now=1000.0)
    assert [line.replace(str(found.pid), "PID") for line in lines] == expected


def test_how_a_join_ended_stays_to_be_read(tmp_path: Path) -> None:
    def ended(*events: ev.AnyEvent, error: BaseException | None) -> list[str]:
        status = Status(tmp_path / "status.json", "http://h", Clocks(), lambda: None)
        for event in (*JOINED, *events):
            status.note(event)
        status.end(error)
        return sentences(status.now, is_running=False, now=2000.0)

    assert ended(FAREWELL, error=None)[0] == "the run is over"
    assert ended(error=None)[0] == "stopped"
    assert ended(error=DiskFull("the disk is full"))[::3] == ["stopped", "last error: the disk is full"]
    assert ended(error=KeyboardInterrupt())[-1] == "last error: KeyboardInterrupt"
    killed = Status(tmp_path / "status.json", "http://h", Clocks(), lambda: None)
    assert sentences(killed.now, is_running=False, now=0.0)[0] == (
        "ended unexpectedly: it was killed, or the machine ended it for lack of memory"
    )


def test_it_is_written_once_a_second_and_at_every_change_of_state(tmp_path: Path) -> None:
    clock, path = Clocks(), tmp_path / "status.json"
    status = Status(path, "http://h", clock, lambda: None)
    for event in JOINED:
        status.note(event)

    def step() -> int | None:
        found = read_status(path)
        return None if found is None else found.step

    assert step() == 40
    status.note(trains(41))
    assert step() == 40
    clock.now += 1.0
    status.note(trains(42))
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


def test_a_status_of_an_older_release_is_read_without_what_it_did_not_know(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state": "training", "pid": 7, "hub": "http://h", "colour": "red"}')
    found = read_status(tmp_path / "status.json")
    assert found is not None
    assert sentences(found, is_running=True, now=0.0) == ["training (pid 7)", "hub http://h"]


@pytest.mark.parametrize("late", [JOINED[1], JOINED[3], ACCEPTED])
def test_what_a_worker_says_after_the_farewell_takes_nothing_back(tmp_path: Path, late: ev.AnyEvent) -> None:
    """A hub may say that the run is over while the data is still read, or before an answer came in."""
    status = Status(tmp_path / "status.json", "http://h", Clocks(), lambda: None)
    for event in (*JOINED, FAREWELL, late):
        status.note(event)
    status.end(None)
    found = read_status(tmp_path / "status.json")
    assert found is not None
    assert found.state == "the run is over"


def test_a_sweep_that_outlives_its_run_does_not_change_how_the_run_ended(tmp_path: Path) -> None:
    """The early sweep of a join whose run is over ends with its worker, which may come after the last word."""
    status = Status(tmp_path / "status.json", "http://h", Clocks(), lambda: 0)
    swept = ev.SweepDone(num_examples=5, num_kept=5, kept_bytes=9, num_damaged=0)
    for event in (*JOINED[:2], FAREWELL, SWEEP, swept):
        status.note(event)
    status.end(None)
    status.note(SWEEP)
    found = read_status(tmp_path / "status.json")
    assert found is not None
    assert found.state == "the run is over"


@pytest.mark.parametrize(
    "error", [DataProblem("x.jsonl:7: 'age' is 'forty-two and a half', not a number"), KeyError("forty-two")]
)
def test_what_a_row_holds_stays_out_of_the_file(tmp_path: Path, error: Exception) -> None:
    status = Status(tmp_path / "status.json", "http://h", Clocks(), lambda: None)
    status.end(error)
    written = (tmp_path / "status.json").read_text()
    assert "forty" not in written
    assert ("fedsoda-edge data check" if isinstance(error, DataProblem) else "KeyError") in written
