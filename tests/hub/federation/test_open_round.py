"""What the index of the open round says is what a look at all edges says, and an event costs no more where there are many."""

from __future__ import annotations

import math
import random
import sys
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest

from fedsoda_edge.protocol.messages import EdgeId
from fedsoda_hub.federation import events as ev
from fedsoda_hub.federation import records as rec
from fedsoda_hub.federation import rounds as rounds_module
from fedsoda_hub.federation.open_round import OpenRound
from fedsoda_hub.federation.rounds import MAX_RETURNS
from fedsoda_hub.federation.state import LedgerState
from tests.hub.federation.test_rounds import RULES, Run, collecting_run, digest, edge

NAMES = [edge(name) for name in "abcdefgh"]


def looked_up(state: LedgerState, here: set[EdgeId]) -> dict[str, Any]:
    """The same by looking at every edge."""
    awaited = [one for one in state.cohort if one not in state.accepted and one not in state.answered]
    return {
        "awaited": awaited,
        "awaited_here": {one for one in awaited if one in here},
        "has_uninvited": bool(here - set(state.cohort)),
        "has_unaccepted": bool(here - set(state.accepted)),
        "uninvited": sorted(here - set(state.cohort)),
        "ordered": sorted(here),
    }


def told(found: OpenRound) -> dict[str, Any]:
    return {
        "awaited": list(found.awaited),
        "awaited_here": found.awaited_here,
        "has_uninvited": found.has_uninvited,
        "has_unaccepted": found.has_unaccepted,
        "uninvited": found.uninvited(len(NAMES)),
        "ordered": found.ordered,
    }


@pytest.mark.parametrize("seed", range(20))
def test_after_any_history_the_index_says_what_a_look_at_all_edges_says(seed: int) -> None:
    chance, state = random.Random(seed), LedgerState(phase="collecting")
    found, here = OpenRound(state), set[EdgeId]()

    def fold(record: rec.AnyRecord) -> None:
        before = state.deadline_at
        state.apply(record)
        found.fold(record, has_new_deadline=state.deadline_at != before)

    for step in range(200):
        one = chance.choice(NAMES)
        match chance.randrange(7):
            case 0 | 1:
                found.come(one)
                here.add(one)
            case 2:
                found.go(one)
                here.discard(one)
            case 3 if step % 5 == 0:
                cohort = tuple(sorted(chance.sample(NAMES, 3)))
                fold(rec.RoundOpened(round=step, cohort=cohort, view=digest("v"), alignment=0, deadline_at=float(step)))
            case 4 if state.round:
                invited = tuple(chance.sample(NAMES, 2))
                invited = tuple(name for name in invited if name not in state.accepted)
                fold(rec.CohortExtended(round=state.round, invited=invited, deadline_at=chance.choice((0.0, 1.0))))
            case 5 if found.is_awaited(one):
                accepted = rec.UpdateAccepted(
                    round=state.round, edge=one, digest=digest(step), num_examples=1, loss=1.0
                )
                fold(accepted)
            case 6 if found.is_awaited(one):
                fold(rec.EdgeAnswered(round=state.round, edge=one, how="declined"))
        wanted = looked_up(state, here)
        assert sorted(told(found).pop("awaited")) == sorted(wanted.pop("awaited"))
        assert {name: value for name, value in told(found).items() if name != "awaited"} == wanted
        assert found.to_offer <= found.awaited_here
        again = OpenRound(state)  # a restart, and all who were here come again
        for name in here:
            again.come(name)
        assert again.awaited_here == found.awaited_here
        assert again.to_offer == again.awaited_here


def test_replacements_are_taken_in_turn_and_begin_again_at_the_first_name() -> None:
    found = OpenRound(LedgerState(phase="collecting", cohort=[edge("c")]))
    for name in "abcdef":
        found.come(edge(name))
    assert found.uninvited(2) == ["a", "b"]
    found.fold(rec.CohortExtended(round=1, invited=(edge("d"),), deadline_at=0.0), has_new_deadline=True)
    assert found.uninvited(1) == ["e"]
    assert found.uninvited(3) == ["a", "e", "f"]


# --- the cost of an event -------------------------------------------------------------------------------


class Counted:
    """Counts the lines that the machine's files run, and every element that one of their loops or copies touches."""

    def __init__(self) -> None:
        self.lines = 0

    def __enter__(self) -> Counted:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, _: object) -> Any:
        return self._line if "/federation/" in frame.f_code.co_filename else None

    def _line(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            self.lines += 1
        return self._line


class EdgeName(str):
    """An edge id that counts how often it is compared or hashed: copies of sets and lists, and sorting, do one or both."""

    touched = 0

    def __hash__(self) -> int:
        EdgeName.touched += 1
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        EdgeName.touched += 1
        return super().__eq__(other)

    def __lt__(self, other: str) -> bool:
        EdgeName.touched += 1
        return super().__lt__(other)


def played(num_edges: int, cohort: int) -> dict[str, float]:
    """Lines and touched names of the dearest event of each kind, in a federation of so many edges."""
    run = Run(replace(RULES, min_edges=num_edges, cohort=cohort, count=1, quorum=1.0))
    names = [EdgeName(f"edge-{number:05d}") for number in range(num_edges)]
    run.holds_jobs = True
    run._settle = lambda: None  # type: ignore[method-assign]  # one call of `owed` for each event, counted with it
    cost: dict[str, float] = {}

    def do(event: ev.RoundEvent) -> None:
        EdgeName.touched = 0
        with Counted() as counted:
            effects = run.machine.handle(event)
            for effect in effects:
                if isinstance(effect, ev.Append):
                    run.machine.apply(effect.record)
            effects = run.machine.owed(run.now)
        kind = type(event).__name__
        cost[kind] = max(cost.get(kind, 0.0), counted.lines + EdgeName.touched)

    for name in names:
        run.machine.handle(ev.EdgeReady(EdgeId(name)))
    [opened] = run.machine.owed(run.now)
    assert isinstance(opened, ev.Append)
    run.machine.apply(opened.record)
    run.machine.owed(run.now)  # the offers
    cohort_of_run = set(run.state.cohort)
    invited = [name for name in names if name in cohort_of_run]
    for name in invited[:20]:
        do(ev.UploadStarted(EdgeId(name), 1))
        do(ev.UploadStalled(EdgeId(name)))
        do(ev.EdgeGone(EdgeId(name)))
        do(ev.EdgeReady(EdgeId(name)))
        do(ev.EdgeAway(EdgeId(name), "paused"))
        do(ev.EdgeResumed(EdgeId(name)))
    for name in invited[:10]:
        do(ev.EdgeDeclined(EdgeId(name), 1, "busy"))
    for name in invited[10:15]:
        do(run.update(name))
    do(ev.DeadlineReached(1, 0.0))
    return cost


@pytest.mark.parametrize("cohort", [32, 10**6], ids=["a few are invited", "all are invited"])
def test_no_event_costs_more_than_the_logarithm_of_the_number_of_edges(cohort: int) -> None:
    few, many = played(100, cohort), played(3_200, cohort)
    doublings = math.log2(3_200 / 100)
    for kind, cost in few.items():
        assert many[kind] <= cost + 6 * doublings, (kind, cost, many[kind])


def test_a_look_at_all_edges_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = rounds_module.RoundMachine.owed

    def slow(self: Any, now: float) -> Any:
        sorted(self.eligible)
        return original(self, now)

    monkeypatch.setattr(rounds_module.RoundMachine, "owed", slow)
    few, many = played(50, 32), played(200, 32)
    assert many["UploadStarted"] > few["UploadStarted"] + 6 * 2


def test_a_pause_tells_the_others_nothing_and_cannot_be_written_down_without_end() -> None:
    run = collecting_run(RULES, "abc")
    before = len(run.offers)
    for _ in range(MAX_RETURNS + 10):
        run.do(ev.EdgeAway(edge("a"), "paused"))
        run.do(ev.EdgeResumed(edge("a")))
    assert run.offers[before:] == ["a"] * MAX_RETURNS
    written = [type(record) for record in run.ledger.records()]
    assert (written.count(rec.CohortExtended), written.count(rec.EdgeAnswered)) == (MAX_RETURNS, MAX_RETURNS + 1)
    run.send_update("b")
    run.send_update("c")
    assert run.state.losses == [1.0]  # the round does not wait for it


def test_a_wait_for_many_names_a_few() -> None:
    names = [f"e{number}" for number in range(9)]
    run = Run(replace(RULES, min_edges=9, cohort=9))
    run.ready(*names)
    for name in names:
        run.do(ev.EdgeGone(edge(name)))
    assert run.waiting[-1] == "round 1 waits for e0, e1, e2, e3, e4 and 4 more, and none of them is connected"
