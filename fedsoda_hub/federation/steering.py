"""Decide what the owner asks of a run that is served: pause, resume, end after this round, other count, quorum, deadline.

What is asked outlives the hub, since it is in the ledger; what RUN.toml says of a key counts again once it says something else
than it said then.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import assert_never

from fedsoda_hub.federation import events as ev
from fedsoda_hub.federation import records as rec
from fedsoda_hub.federation.events import Append, Effect, Ignore
from fedsoda_hub.federation.schedule import Rules
from fedsoda_hub.federation.state import LedgerState

MAX_COUNT = 100_000
MAX_DEADLINE_SECONDS = 366 * 86_400.0
OVER = "the run is over; with a larger [rounds] count in RUN.toml, the next start of the hub continues it"


def rules_in_force(of_file: Rules, state: LedgerState) -> Rules:
    """Return the rules of RUN.toml with what the owner changed since.

    Args:
        of_file: the rules of RUN.toml.
    """
    changed = {key: one.value for key, one in state.steering.changed.items()}
    return replace(
        of_file,
        count=count_in_force(of_file.count, state),
        quorum=float(changed.get("quorum", of_file.quorum)),
        deadline_seconds=float(changed.get("deadline_seconds", of_file.deadline_seconds)),
    )


def count_in_force(count: int, state: LedgerState) -> int:
    """Return how many rounds the run has, where RUN.toml says `count`."""
    changed = state.steering.changed.get("count")
    return count if changed is None else int(changed.value)


def answer(of_file: Rules, state: LedgerState, asked: ev.OwnerAsked) -> list[Effect]:
    """Return the record of what the owner asks, or an Ignore that says why it is not done.

    Args:
        of_file: the rules of RUN.toml.
    """
    if state.phase == "ended":
        return [Ignore(OVER)]
    match asked:
        case ev.PauseAsked():
            return [Ignore("the run is paused already")] if state.steering.is_paused else [Append(rec.RunPaused())]
        case ev.ResumeAsked():
            return [Append(rec.RunResumed())] if state.steering.is_paused else [Ignore("the run is not paused")]
        case ev.FinishAsked():
            if state.phase == "preparing" or not state.round:
                return [Ignore("no round has begun, so there is nothing to end; pause the run, or stop the hub")]
            if count_in_force(of_file.count, state) <= state.round:
                return [Ignore(f"the run ends after round {state.round} already")]
            return [_changed(of_file, state, {"count": float(state.round)}, 0.0)]
        case ev.ChangeAsked():
            given = {"count": asked.count, "quorum": asked.quorum, "deadline_seconds": asked.deadline_seconds}
            values = {key: value for key, value in given.items() if value is not None}
            problem = _problem(state, values)
            return [Ignore(problem)] if problem else [_changed(of_file, state, values, asked.at)]
        case _:
            assert_never(asked)


def _problem(state: LedgerState, values: dict[str, float]) -> str | None:
    """Return why these values cannot be the rules from now on; None: they can."""
    if not values:
        return "nothing is asked; name count, quorum or deadline_seconds"
    count, quorum, deadline = values.get("count"), values.get("quorum"), values.get("deadline_seconds")
    least = max(1, state.round)
    if count is not None and not least <= count <= MAX_COUNT:
        begun = f"; round {state.round} has begun" if state.round else ""
        return f"count is {count:g}, and must be {least} to {MAX_COUNT}{begun}"
    if quorum is not None and not 0 < quorum <= 1:
        return f"quorum is {quorum:g}, and must be more than 0 and at most 1"
    if deadline is not None and not (math.isfinite(deadline) and 1 <= deadline <= MAX_DEADLINE_SECONDS):
        return f"deadline_seconds is {deadline:g}, and must be 1 to {MAX_DEADLINE_SECONDS:.0f}"
    return None


def _changed(of_file: Rules, state: LedgerState, values: dict[str, float], now: float) -> Effect:
    """Make the record of a change; a new deadline moves that of the open round by as much, but not into the past."""
    instead_of = {"count": of_file.count, "quorum": of_file.quorum, "deadline_seconds": of_file.deadline_seconds}
    deadline_at = None
    if "deadline_seconds" in values and state.phase == "collecting" and not state.deadline_passed:
        before = rules_in_force(of_file, state).deadline_seconds
        deadline_at = max(now, state.deadline_at - before + values["deadline_seconds"])
    return Append(
        rec.RulesChanged(
            values=values, instead_of={key: float(instead_of[key]) for key in values}, deadline_at=deadline_at
        )
    )
