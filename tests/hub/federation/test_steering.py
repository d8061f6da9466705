"""What an owner asks of a run while it goes on: each is a record, counts at once, and outlives the hub."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest

from fedsoda_hub.federation import events as ev
from fedsoda_hub.federation import jobs
from fedsoda_hub.federation import records as rec
from fedsoda_hub.federation.events import Append, Ignore
from fedsoda_hub.federation.steering import OVER
from tests.hub.federation.test_rounds import RULES, PowerCut, Run, collecting_run, edge


def logged(run: Run, kind: type[rec.Record]) -> list[Any]:
    return [record for record in run.ledger.records() if isinstance(record, kind)]


def refused(run: Run, event: ev.OwnerAsked) -> str:
    """Why the machine does not do what is asked; nothing is written down."""
    [effect] = run.machine.handle(event)
    assert isinstance(effect, Ignore)
    return effect.because


def close_round(run: Run, *names: str) -> None:
    for name in names:
        run.send_update(name)


# --- pause and resume ------------------------------------------------------------------------------------------------


def test_a_paused_run_closes_its_open_round_and_opens_no_other_until_it_is_resumed() -> None:
    run = collecting_run(RULES)
    run.do(ev.PauseAsked())
    assert run.state.phase == "collecting"
    close_round(run, "a", "b")
    assert (run.state.phase, run.state.losses) == ("idle", [1.0])
    assert run.waiting[-1] == "the owner paused the run; round 2 opens when it is resumed"
    run.ready("c")
    assert run.state.round == 1
    run.do(ev.ResumeAsked())
    assert (run.state.phase, run.state.round) == ("collecting", 2)


def test_a_pause_outlives_the_hub() -> None:
    run = Run(RULES)
    run.do(ev.PauseAsked())
    run.restart()
    run.ready("a")
    assert run.state.phase == "idle"
    assert run.waiting == ["the owner paused the run; round 1 opens when it is resumed"]


def test_a_paused_run_is_judged_after_its_round_and_not_aligned_for_the_next() -> None:
    run = collecting_run(replace(RULES, count=9, realign_every=2, has_eval=True, eval_every=1))
    run.do(ev.PauseAsked())
    close_round(run, "a", "b")
    assert (len(logged(run, rec.Evaluated)), len(logged(run, rec.Realigned))) == (1, 0)
    run.do(ev.ResumeAsked())
    assert len(logged(run, rec.Realigned)) == 1


def test_a_run_is_paused_once_and_resumed_once() -> None:
    run = Run(RULES)
    assert refused(run, ev.ResumeAsked()) == "the run is not paused"
    run.do(ev.PauseAsked())
    assert refused(run, ev.PauseAsked()) == "the run is paused already"


def test_a_pause_in_the_last_round_does_not_keep_the_run_from_its_end() -> None:
    run = collecting_run(replace(RULES, count=1))
    run.do(ev.PauseAsked())
    close_round(run, "a", "b")
    assert run.state.phase == "ended"


# --- the end ---------------------------------------------------------------------------------------------------------


def test_a_run_ends_after_the_round_that_is_open_and_is_judged_then() -> None:
    run = collecting_run(replace(RULES, count=20, has_eval=True))
    run.do(ev.FinishAsked())
    assert run.machine.rules.count == 1
    assert refused(run, ev.FinishAsked()) == "the run ends after round 1 already"
    close_round(run, "a", "b")
    assert (run.state.phase, run.state.evaluated_round, run.finished) == ("ended", 1, True)


def test_a_paused_run_that_is_to_end_ends_at_once() -> None:
    run = collecting_run(replace(RULES, count=20))
    run.do(ev.PauseAsked())
    close_round(run, "a", "b")
    run.do(ev.FinishAsked())
    assert run.state.phase == "ended"


def test_an_end_can_be_taken_back_with_another_count() -> None:
    run = collecting_run(replace(RULES, count=20))
    run.do(ev.FinishAsked())
    run.do(ev.ChangeAsked(run.now, count=3))
    close_round(run, "a", "b")
    assert (run.state.phase, run.state.round, run.machine.rules.count) == ("collecting", 2, 3)


def test_before_the_first_round_there_is_nothing_to_end() -> None:
    assert refused(Run(RULES), ev.FinishAsked()) == (
        "no round has begun, so there is nothing to end; pause the run, or stop the hub"
    )


@pytest.mark.parametrize("event", [ev.PauseAsked(), ev.ResumeAsked(), ev.FinishAsked(), ev.ChangeAsked(0.0, count=9)])
def test_an_end_is_an_end(event: ev.OwnerAsked) -> None:
    run = collecting_run(replace(RULES, count=1))
    close_round(run, "a", "b")
    assert refused(run, event) == OVER


# --- other rules -----------------------------------------------------------------------------------------------------


def test_another_deadline_moves_that_of_the_open_round_and_the_edges_are_told() -> None:
    run = collecting_run(RULES)  # opened at 1000, due at 1100
    run.now = 1010.0
    run.offers.clear()
    run.do(ev.ChangeAsked(run.now, deadline_seconds=600.0))
    assert run.state.deadline_at == 1600.0
    assert run.deadline == ev.SetDeadline(1, 1600.0)
    assert run.offers == ["a", "b"]
    [ignored] = run.machine.handle(ev.DeadlineReached(1, 1100.0))
    assert isinstance(ignored, Ignore)
    assert logged(run, rec.RulesChanged) == [
        rec.RulesChanged(values={"deadline_seconds": 600.0}, instead_of={"deadline_seconds": 100.0}, deadline_at=1600.0)
    ]


def test_a_deadline_that_would_have_passed_by_now_passes_now_and_not_in_the_past() -> None:
    run = collecting_run(replace(RULES, quorum=0.5))
    run.send_update("a")
    run.now = 1090.0
    run.do(ev.ChangeAsked(run.now, deadline_seconds=20.0))
    assert run.state.deadline_at == 1090.0
    run.reach_deadline()
    assert run.state.losses == [1.0]


def test_another_quorum_counts_for_the_open_round() -> None:
    run = collecting_run(RULES)
    run.send_update("a")
    run.do(ev.ChangeAsked(run.now, quorum=0.5))
    run.reach_deadline()
    assert run.state.losses == [1.0]


def test_a_change_outlives_the_hub_and_replays_to_the_same_state() -> None:
    run = collecting_run(RULES)
    run.do(ev.ChangeAsked(run.now, count=7, quorum=0.5, deadline_seconds=50.0))
    before = run.state
    run.restart()
    assert run.state == before
    assert (run.machine.rules.count, run.machine.rules.quorum, run.machine.rules.deadline_seconds) == (7, 0.5, 50.0)


def test_what_run_toml_says_counts_again_once_it_says_something_else_than_then() -> None:
    run = collecting_run(RULES)
    run.do(ev.ChangeAsked(run.now, count=7, deadline_seconds=50.0))
    same: rec.Keys = {
        "count": RULES.count,
        "quorum": RULES.quorum,
        "deadline_seconds": RULES.deadline_seconds,
        "port": 1,
    }
    run.ledger.append(rec.SettingsChanged(values=same))  # another port
    run.restart()
    assert (run.machine.rules.count, run.machine.rules.deadline_seconds) == (7, 50.0)
    run.rules = replace(RULES, count=12)
    run.ledger.append(rec.SettingsChanged(values={**same, "count": 12}))
    run.restart()
    assert (run.machine.rules.count, run.machine.rules.deadline_seconds) == (12, 50.0)


def test_a_run_that_was_ended_stays_so_until_run_toml_has_more_rounds_than_then() -> None:
    run = collecting_run(replace(RULES, count=20))
    run.do(ev.FinishAsked())
    close_round(run, "a", "b")
    same: rec.Keys = {"count": 20, "quorum": RULES.quorum, "deadline_seconds": RULES.deadline_seconds, "port": 1}
    run.ledger.append(rec.SettingsChanged(values=same))  # another port
    run.restart()
    assert run.state.phase == "ended"
    run.rules = replace(run.rules, count=21)
    run.ledger.append(rec.SettingsChanged(values={**same, "count": 21}))
    run.restart()
    run.ready("a", "b")
    assert (run.state.phase, run.state.round) == ("collecting", 2)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({}, "nothing is asked; name count, quorum or deadline_seconds"),
        ({"count": 0}, "count is 0, and must be 1 to 100000; round 1 has begun"),
        ({"count": 10**9}, "count is 1e+09, and must be 1 to 100000; round 1 has begun"),
        ({"quorum": 0.0}, "quorum is 0, and must be more than 0 and at most 1"),
        ({"quorum": 1.5}, "quorum is 1.5, and must be more than 0 and at most 1"),
        ({"quorum": float("nan")}, "quorum is nan, and must be more than 0 and at most 1"),
        ({"deadline_seconds": 0.0}, "deadline_seconds is 0, and must be 1 to 31622400"),
        ({"deadline_seconds": float("inf")}, "deadline_seconds is inf, and must be 1 to 31622400"),
    ],
)
def test_rules_that_cannot_be_are_refused_with_the_bounds(asked: dict[str, Any], why: str) -> None:
    assert refused(collecting_run(RULES), ev.ChangeAsked(0.0, **asked)) == why


@pytest.mark.parametrize("cut_at", range(1, 9))
@pytest.mark.parametrize("written", [True, False])
def test_whenever_the_power_goes_the_run_ends_as_asked(cut_at: int, written: bool) -> None:
    """Who asked asks again after a restart where it did not count."""
    run = Run(replace(RULES, count=5), cut_at=cut_at, written=written)

    def go_on() -> None:
        if run.was_cut:
            run.was_cut = False
            run.restart()
        run.ready("a")
        if run.state.round == 1 and run.machine.rules.count != 1:
            run.do(ev.FinishAsked())
        if run.state.phase == "collecting":
            run.send_update("a")

    for _ in range(3):
        with contextlib.suppress(PowerCut):
            go_on()
    assert (run.state.phase, run.state.round) == ("ended", 1)


def test_a_change_while_a_job_runs_waits_for_nothing() -> None:
    run = Run(replace(RULES, count=3), holds_jobs=True)  # preparing
    assert isinstance(run.machine.running, jobs.Prepare)
    [effect] = run.machine.handle(ev.ChangeAsked(0.0, count=2))
    assert isinstance(effect, Append)
    assert edge("a") not in run.machine.eligible
