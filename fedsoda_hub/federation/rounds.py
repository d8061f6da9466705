"""Decide federated rounds: events in, effects out. No sockets, tensors, clock or disk.

The rules: docs/protocol.md (p3-rounds). `LedgerState` folds the ledger's records; `RoundMachine` adds what is volatile:
who is connected, who uploads, which job runs. `owed` is what the state still owes, and so also all that a restart does
after replay. What is decided within an open round is `collecting.py`'s, between rounds `schedule.py`'s, what the owner asks `steering.py`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from itertools import islice
from typing import assert_never

from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.messages import EdgeId
from fedsoda_hub.federation import collecting, jobs, steering
from fedsoda_hub.federation import events as ev
from fedsoda_hub.federation import records as rec
from fedsoda_hub.federation.events import Append, Effect, Ignore, RoundEvent, Send, StartJob
from fedsoda_hub.federation.open_round import OpenRound
from fedsoda_hub.federation.schedule import Rules, choose_cohort, job_before_next_round, trained_factor
from fedsoda_hub.federation.state import LedgerState

# The records that results of jobs become; with its record written, a job is over.
_RESULTS = (rec.RunPrepared, rec.RoundClosed, rec.Realigned, rec.Repruned, rec.Probed, rec.Evaluated)
MAX_RETURNS = 20  # of one edge to one round from pauses: each is a record, and an edge could write them without end
MAX_NAMED = 5  # edges in a sentence


class RoundMachine:
    """The decisions of a run: `handle` answers an event; the caller performs the effects in order and calls `apply` for
    each Append.

    rules: those in force.
    """

    def __init__(self, rules: Rules, state: LedgerState) -> None:
        self._of_file = rules
        self.rules = steering.rules_in_force(rules, state)
        self.state = state
        self.size_classes: dict[EdgeId, int] = {}  # as each edge said when it was last ready
        self._open = OpenRound(state)
        self._to_farewell: set[EdgeId] = set()  # eligible or paused, and without a Farewell
        self._uploading: set[EdgeId] = set()
        self._returns: Counter[EdgeId] = Counter()  # to the open round
        self._running: jobs.Job | None = None
        self._timer: tuple[int, float] | None = None
        self._waiting = ""

    def apply(self, record: rec.AnyRecord) -> None:
        """Fold in a record that is durable now."""
        before = self.state.deadline_at
        self.state.apply(record)
        self._open.fold(record, has_new_deadline=self.state.deadline_at != before)
        if isinstance(record, rec.RoundOpened):
            self._returns.clear()
        if isinstance(record, rec.RulesChanged):
            self.rules = steering.rules_in_force(self._of_file, self.state)
        has_new_timer = isinstance(record, rec.RulesChanged) and record.deadline_at is not None
        if has_new_timer or isinstance(record, rec.RoundOpened | rec.CohortExtended):
            self._timer = None
        if isinstance(record, _RESULTS):
            self._running = None  # not before: a result that could not be written down is not lost

    @property
    def eligible(self) -> Set[EdgeId]:
        """The edges that may be invited."""
        return self._open.here

    @property
    def is_computing(self) -> bool:
        """Whether a job runs whose result is not written down yet."""
        return self._running is not None

    @property
    def running(self) -> jobs.Job | None:
        """The job that runs, whose result is not written down yet."""
        return self._running

    @property
    def quorum(self) -> int:
        """The number of accepted updates that the open round needs."""
        return collecting.quorum(self.rules, self.state)

    def awaits_upload(self, edge: EdgeId) -> bool:
        """Tell whether an upload of this edge is under way, which a deadline would wait for."""
        return edge in self._uploading

    def why_useless(self, edge: EdgeId, number: int, digest: ms.Digest) -> str | None:
        """Return why the bytes of an update that arrives now are not needed; None: they are to be stored and judged."""
        if collecting.has_receipt(self.state, edge, number, digest):
            return "it was accepted before"
        is_merging = isinstance(self._running, jobs.Aggregate)
        return collecting.why_untimely(self.state, self._open, edge, number, is_merging=is_merging)

    # --- events ------------------------------------------------------------------------------------------

    def handle(self, event: RoundEvent) -> list[Effect]:
        """Return the effects of an event in the present phase; where it changes nothing, an Ignore with the reason."""
        state = self.state
        match event:
            case ev.EdgeReady():
                self.size_classes[event.edge] = event.size_class
                return self._is_back(event.edge)
            case ev.EdgeResumed():
                return self._is_back(event.edge)
            case ev.EdgeGone():
                self._forget(event.edge)
                self._to_farewell.discard(event.edge)
                return []
            case ev.EdgeAway():
                self._forget(event.edge)
                if event.how == "left":
                    self._to_farewell.discard(event.edge)
                if self._open.is_awaited(event.edge):
                    return [Append(rec.EdgeAnswered(round=state.round, edge=event.edge, how=event.how))]
                return []
            case ev.EdgeDeclined():
                if event.round == state.round and self._open.is_awaited(event.edge):
                    return [Append(rec.EdgeAnswered(round=state.round, edge=event.edge, how="declined"))]
                return [Ignore(f"{event.edge} is not awaited in round {event.round}")]
            case ev.UploadStarted():
                if event.round == state.round and self._open.is_awaited(event.edge):
                    self._uploading.add(event.edge)
                    return []
                return [Ignore(f"the upload of {event.edge} is judged when it is complete")]
            case ev.UploadStalled():
                self._uploading.discard(event.edge)
                return []
            case ev.UpdateArrived():
                self._uploading.discard(event.edge)
                return collecting.judge(state, self._open, event, is_merging=isinstance(self._running, jobs.Aggregate))
            case ev.DeadlineReached():
                is_due = self._timer == (event.round, event.at) and self._running is None
                if state.phase == "collecting" and is_due and not state.deadline_passed:
                    self._timer = None  # where the record cannot be written, `owed` sets another
                    return [Append(rec.DeadlinePassed(round=event.round))]
                return [Ignore(f"round {event.round} does not wait for this deadline any more")]
            case ev.JobDone():
                if event.job != self._running:
                    return [Ignore(f"no such {jobs.name_of(event.job)} is running")]
                return self._done(event.result)
            case ev.PauseAsked() | ev.ResumeAsked() | ev.FinishAsked() | ev.ChangeAsked():
                return steering.answer(self._of_file, state, event)

    def _is_back(self, edge: EdgeId) -> list[Effect]:
        """Make the edge eligible; if it had paused or left in the open round, await it again until the same deadline."""
        state = self.state
        self._open.come(edge)  # a new connection has no offer yet
        self._to_farewell.add(edge)
        self._uploading.discard(edge)  # an upload ends with the connection it came by
        if state.phase != "collecting" or state.answered.get(edge) not in ("paused", "left"):
            return []
        if self._returns[edge] >= MAX_RETURNS:
            return [Ignore(f"{edge} has been back to round {state.round} {MAX_RETURNS} times")]
        self._returns[edge] += 1
        return [Append(rec.CohortExtended(round=state.round, invited=(edge,), deadline_at=state.deadline_at))]

    def _forget(self, edge: EdgeId) -> None:
        self._open.go(edge)
        self._uploading.discard(edge)

    def _done(self, result: jobs.JobResult) -> list[Effect]:
        """Record a job's result, and send the edges what follows from it."""
        state, upcoming = self.state, self.state.round + 1
        match result:
            case jobs.PrepareResult():
                return [Append(_prepared(result))]
            case jobs.AggregateResult():
                notices = [
                    Send(edge, ms.RoundClosed(round=state.round, num_updates=len(state.accepted)))
                    for edge in self._open.ordered
                ]
                return [Append(_closed(state.round, result)), *notices]
            case jobs.RealignResult():
                return [Append(_realigned(upcoming, state.alignment + 1, result))]
            case jobs.RepruneResult():
                return [Append(_repruned(upcoming, result))]
            case jobs.ProbeResult():
                return [Append(rec.Probed(round=upcoming, kl=result.kl, cosine=result.cosine))]
            case jobs.EvaluateResult():
                return [Append(rec.Evaluated(round=state.round, result=result))]
            case _:
                assert_never(result)

    # --- what is owed ------------------------------------------------------------------------------------

    def owed(self, now: float) -> list[Effect]:
        """Return the effects that the state still owes. After an Append among them the caller asks again.

        Args:
            now: wall time, seconds since 1970.
        """
        state = self.state
        if self._running is not None:
            return []  # while a round collects, the only job that runs is the one that closes it
        match state.phase:
            case "preparing":
                return self._start(jobs.Prepare())
            case "collecting":
                return self._owed_collecting(now)
            case "idle":
                return self._owed_idle(now)
            case "ended":
                goodbye: list[Effect] = [
                    Send(edge, ms.Farewell(rounds=state.round, reason="the run is over"))
                    for edge in sorted(self._to_farewell)
                ]
                self._to_farewell.clear()
                return [*goodbye, ev.Finish()]

    def _start(self, job: jobs.Job) -> list[Effect]:
        self._running = job
        self._waiting = ""
        return [StartJob(job)]

    def _offers(self) -> list[Effect]:
        state, rule = self.state, self.rules.aggregation
        made: list[Effect] = [
            ev.SendOffer(
                edge,
                self.size_classes.get(edge, 0),
                trains=trained_factor(rule, state.round),
                moved=trained_factor(rule, state.round - 1),
            )
            for edge in sorted(self._open.to_offer)
        ]
        self._open.to_offer.clear()
        return made

    def _owed_collecting(self, now: float) -> list[Effect]:
        state, rules = self.state, self.rules
        awaited = self._open.awaited
        if state.accepted and not awaited:
            return self._start(collecting.merge(rules, state))
        if state.deadline_passed and not self._uploading:
            if state.accepted and len(state.accepted) >= self.quorum:
                return self._start(collecting.merge(rules, state))
            return self._extend(now)
        effects = self._offers()
        if self._timer is None and not state.deadline_passed:
            # Where the deadline passed while the hub was down, edges get one more stall window. Where it is further
            # ahead than a round may last, the clock has been put back since it was written down.
            at = min(state.deadline_at, now + rules.deadline_seconds)
            if now > at:
                at = now + rules.stall_seconds
            self._timer = (state.round, at)
            effects.append(ev.SetDeadline(state.round, at))
        if not awaited and self._open.has_uninvited:  # all answered, none with an update
            return [collecting.extended(rules, state, self._open.uninvited(state.invited), now)]
        if self._open.awaited_here:
            self._waiting = ""
        else:
            named = ", ".join(islice(awaited, MAX_NAMED)) or "any edge"
            others = f" and {len(awaited) - MAX_NAMED:,} more" if len(awaited) > MAX_NAMED else ""
            effects += self._wait(f"round {state.round} waits for {named}{others}, and none of them is connected")
        return effects

    def _extend(self, now: float) -> list[Effect]:
        """Extend the round below quorum at its deadline: it keeps its number and updates, and replacements are invited."""
        state = self.state
        if not self._open.has_unaccepted:
            return self._wait(
                f"round {state.round} has {len(state.accepted)} of {self.quorum} updates at its deadline, and no edge "
                "that could send another is connected"
            )
        return [collecting.extended(self.rules, state, collecting.replacements(state, self._open), now)]

    def _owed_idle(self, now: float) -> list[Effect]:
        state, rules = self.state, self.rules
        job = job_before_next_round(rules, state)
        is_held = state.steering.is_paused and state.round < rules.count
        if job is not None and (not is_held or isinstance(job, jobs.Evaluate)):
            return self._start(job)
        if state.round >= rules.count:
            return [Append(rec.RunEnded(rounds=state.round))]
        if is_held:
            return self._wait(f"the owner paused the run; round {state.round + 1} opens when it is resumed")
        upcoming = state.round + 1
        if len(self.eligible) < rules.min_edges:
            edges = "1 edge" if rules.min_edges == 1 else f"{rules.min_edges} edges"
            here = "1 is here" if len(self.eligible) == 1 else f"{len(self.eligible)} are here"
            return self._wait(f"round {upcoming} needs {edges}, {here}")
        self._waiting = ""
        opened = rec.RoundOpened(
            round=upcoming,
            cohort=choose_cohort(self._open.ordered, rules.cohort, rules.seed, upcoming),
            view=state.largest.adapter.digest,
            alignment=state.alignment,
            deadline_at=now + rules.deadline_seconds,
        )
        return [Append(opened)]

    def _wait(self, why: str) -> list[Effect]:
        """Tell people why the run waits, once for each reason and not at every event."""
        if why == self._waiting:
            return []
        self._waiting = why
        return [ev.Wait(why)]


# --- results as records: the largest sub-LLM's values are separate from the others' ---------------------------


def _prepared(result: jobs.PrepareResult) -> rec.RunPrepared:
    largest, *smaller = result.sub_llms
    return rec.RunPrepared(
        manifest=largest.manifest,
        adapter_view=largest.adapter_view,
        emulator_view=largest.emulator_view,
        public_kl=largest.public_kl,
        smaller=tuple(
            rec.PreparedClass(
                manifest=one.manifest,
                emulator_view=one.emulator_view,
                public_kl=one.public_kl,
                adapter_view=None if one.adapter_view == largest.adapter_view else one.adapter_view,
            )
            for one in smaller
        ),
        master=result.master if smaller else None,
    )


def _closed(round_number: int, result: jobs.AggregateResult) -> rec.RoundClosed:
    largest, *others = result.steps
    return rec.RoundClosed(
        round=round_number,
        master=result.master,
        view=largest.view,
        delta=largest.delta,
        moments=result.moments,
        cross_term=result.cross_term,
        standings=result.standings,
        smaller=tuple(rec.ClosedClass(view=step.view, delta=step.delta) for step in others),
    )


def _realigned(round_number: int, version: int, result: jobs.RealignResult) -> rec.Realigned:
    largest, *smaller = result.sub_llms
    return rec.Realigned(
        round=round_number,
        version=version,
        view=largest.view,
        delta=largest.delta,
        kl_before=largest.kl_before,
        kl_after=largest.kl_after,
        smaller=tuple(
            rec.RealignedClass(view=one.view, delta=one.delta, kl_before=one.kl_before, kl_after=one.kl_after)
            for one in smaller
        ),
    )


def _repruned(round_number: int, result: jobs.RepruneResult) -> rec.Repruned:
    largest, *smaller = result.sub_llms
    return rec.Repruned(
        round=round_number,
        master=result.master,
        manifest=largest.manifest,
        view=largest.view,
        smaller=tuple(rec.ReprunedClass(manifest=one.manifest, view=one.view) for one in smaller),
    )
