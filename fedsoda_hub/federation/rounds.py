"""Decide federated rounds: events in, effects out. No sockets, tensors, clock or disk.

The rules are federation.md's. `RunState` folds the ledger's records; `RoundMachine` adds what is volatile:
who is connected, who uploads, which job runs. `owed` is what the state still owes, and so also all that a
restart does after replay.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import msgspec

from fedsoda_edge.protocol.messages import Digest, EdgeId, Factor, Farewell, Receipt, Refusal
from fedsoda_edge.protocol.messages import RoundClosed as RoundClosedMessage
from fedsoda_hub.federation import events as ev
from fedsoda_hub.federation.events import Append, Compute, Effect, Event, Ignored, Send

AUTO = "auto"  # realign_every: when the sub-LLM has drifted, measured before every round that may bring a realignment
# method.md 8d has these three, but a cosine of 0.9: an alignment may begin below that, and what it does not reach it cannot mend.
AUTO_ROUNDS = 2  # from one realignment to the next, at least
KL_GROWTH = 1.1
COSINE_LEFT = 0.9  # of what the alignment's first probe found
MAX_EXAMPLES = 2**31
MAX_LOSS = 1e6  # nats; a larger one would make the round's mean, and what is shown of it, infinite


@dataclass(frozen=True)
class Rules:
    """[rounds] and what else of RUN.toml decides.

    has_eval: there is evaluation data. eval_every: judge after every so many rounds too, 0: at the end only.
    """

    count: int
    min_edges: int
    cohort: int
    quorum: float
    deadline_seconds: float
    stall_seconds: float
    realign_every: int | str
    seed: int
    has_eval: bool
    eval_every: int = 0
    reprune_every: int = 0


class Collected(msgspec.Struct, frozen=True):
    """An accepted update."""

    round: int
    digest: Digest
    num_examples: int
    loss: float
    size_class: int = 0


class SizeClass(msgspec.Struct):
    """A smaller sub-LLM that the run has beside its largest. view: of its adapter; None: it shares the largest's."""

    manifest: Digest
    public_kl: dict[str, float]
    emulator_view: Digest
    emulator_delta: Digest | None = None
    view: Digest | None = None
    view_delta: Digest | None = None


class RunState(msgspec.Struct):
    """The ledger, folded. phase: preparing, idle (between rounds), collecting, ended."""

    run_id: str = ""
    fixed: dict[str, Any] = {}
    phase: str = "preparing"
    manifest: Digest = Digest("")
    public_kl: dict[str, float] = {}
    round: int = 0  # the last opened; never reused, so a stale timer cannot hit a later one
    cohort: list[EdgeId] = []
    invited: int = 0  # how many the quorum counts
    deadline_at: float = 0.0
    deadline_passed: bool = False
    answered: dict[EdgeId, str] = {}
    accepted: dict[EdgeId, Collected] = {}
    receipts: dict[EdgeId, Collected] = {}  # the last of each edge, for receipts that got lost
    master: Digest = Digest("")
    view: Digest = Digest("")
    view_delta: Digest | None = None  # None: the view is the bundle's initial LoRA
    moments: Digest | None = None  # of the hub's optimiser
    alignment: int = 0
    emulator_view: Digest = Digest("")
    emulator_delta: Digest | None = None
    smaller: list[SizeClass] = []  # from size class 1 on; class 0 is in the fields above
    realigned_for: int = 0
    repruned_for: int = 0
    evaluation: dict[str, Any] | None = None
    evaluated_round: int = 0
    losses: list[float] = []  # weighted mean of each closed round
    cross_terms: dict[int, float] = {}  # by round
    realignments: list[dict[str, int | float]] = []
    probes: list[dict[str, int | float]] = []

    @property
    def aligned_kl(self) -> float:
        """Public KL after the last alignment, which `Probed` is held against."""
        return self.realignments[-1]["kl_after"] if self.realignments else self.public_kl["aligned"]

    @property
    def first_probe(self) -> dict[str, int | float]:
        """Of those since the last alignment; there is one."""
        return next(probe for probe in self.probes if probe["round"] > self.realigned_for)

    def emulator(self, size_class: int) -> tuple[Digest, Digest | None]:
        """(view, coded step to it or None) of the emulator LoRA that edges of the class hold."""
        of_class = self.smaller[size_class - 1] if size_class else self
        return of_class.emulator_view, of_class.emulator_delta

    def adapter(self, size_class: int) -> tuple[Digest, Digest | None]:
        """The same of the adapter LoRA."""
        held = self.smaller[size_class - 1] if size_class else None
        if held is None or held.view is None:
            return self.view, self.view_delta
        return held.view, held.view_delta

    @property
    def manifests(self) -> tuple[Digest, ...]:
        """Those in force, by size class."""
        return self.manifest, *(held.manifest for held in self.smaller)

    @property
    def with_own_view(self) -> list[SizeClass]:
        """Smaller classes whose adapter LoRA has a layout of its own."""
        return [held for held in self.smaller if held.view is not None]

    def apply(self, record: ev.AnyRecord) -> None:
        """Fold one record in."""
        match record:
            case ev.RunStarted():
                self.run_id, self.fixed = record.run_id, record.fixed
            case ev.SettingsChanged():
                if self.phase == "ended":
                    self.phase = "idle"  # a larger count goes on where the run ended
            case ev.Prepared():
                self.manifest, self.public_kl = record.manifest, record.public_kl
                self.master, self.view = record.master or record.adapter_view, record.adapter_view
                self.emulator_view = record.emulator_view
                self.smaller = [
                    SizeClass(one.manifest, one.public_kl, one.emulator_view, view=one.adapter_view)
                    for one in record.smaller
                ]
                self.phase = "idle"
            case ev.RoundOpened():
                self.round, self.cohort = record.round, list(record.cohort)
                self.invited, self.deadline_at = len(record.cohort), record.deadline_at
                self.deadline_passed, self.answered, self.accepted = False, {}, {}
                self.phase = "collecting"
            case ev.CohortExtended():
                for edge in record.invited:
                    self.answered.pop(edge, None)
                    if edge not in self.cohort:
                        self.cohort.append(edge)
                self.deadline_at, self.deadline_passed = record.deadline_at, False
            case ev.UpdateAccepted():
                update = Collected(record.round, record.digest, record.num_examples, record.loss, record.size_class)
                self.accepted[record.edge] = self.receipts[record.edge] = update
                self.answered.pop(record.edge, None)
            case ev.EdgeAnswered():
                self.answered[record.edge] = record.how
            case ev.DeadlinePassed():
                self.deadline_passed = True
            case ev.RoundClosed():
                total = sum(update.num_examples for update in self.accepted.values())
                mean = sum(update.loss * update.num_examples for update in self.accepted.values()) / total
                self.losses.append(mean)
                self.master, self.view, self.view_delta = record.master, record.view, record.delta
                for held, step in zip(self.with_own_view, record.smaller, strict=True):
                    held.view, held.view_delta = step.view, step.delta
                self.moments = record.moments
                if record.cross_term is not None:
                    self.cross_terms[record.round] = record.cross_term
                self.phase = "idle"
            case ev.Realigned():
                self.alignment, self.realigned_for = record.version, record.round
                self.emulator_view, self.emulator_delta = record.view, record.delta
                for held, made in zip(self.smaller, record.smaller, strict=True):
                    held.emulator_view, held.emulator_delta = made.view, made.delta
                self.realignments.append(
                    {"round": record.round, "kl_before": record.kl_before, "kl_after": record.kl_after}
                )
            case ev.Repruned():
                self.repruned_for, self.master = record.round, record.master
                self.manifest, self.view, self.view_delta = record.manifest, record.view, None
                for held, drawn in zip(self.smaller, record.smaller, strict=True):
                    held.manifest, held.view, held.view_delta = drawn.manifest, drawn.view, None
            case ev.Probed():
                self.probes.append({"round": record.round, "kl": record.kl, "cosine": record.cosine})
            case ev.Evaluated():
                self.evaluation, self.evaluated_round = record.result, record.round
            case ev.RunEnded():
                self.phase = "ended"


class RoundMachine:
    """`handle` answers an event; the caller performs effects in order and calls `apply` for each Append."""

    def __init__(self, rules: Rules, state: RunState) -> None:
        self.rules = rules
        self.state = state
        self.eligible: set[EdgeId] = set()
        self._connected: set[EdgeId] = set()  # eligible or paused: whom a Farewell reaches
        self._offered: dict[EdgeId, tuple[int, int]] = {}
        self._uploading: set[EdgeId] = set()
        self._told: set[EdgeId] = set()
        self._running: str | None = None
        self._timer: tuple[int, float] | None = None
        self._extensions = 0
        self._waiting = ""

    def apply(self, record: ev.AnyRecord) -> None:
        self.state.apply(record)
        if isinstance(record, ev.CohortExtended):
            self._extensions += 1
        if isinstance(record, ev.RoundOpened | ev.CohortExtended):
            self._timer = None
        if isinstance(record, ev.Prepared | ev.RoundClosed | ev.Realigned | ev.Repruned | ev.Probed | ev.Evaluated):
            self._running = None  # not before: a result that could not be written down is not lost

    @property
    def is_computing(self) -> bool:
        """A job runs whose result is not written down yet."""
        return self._running is not None

    @property
    def quorum(self) -> int:
        """Accepted updates that the open round needs."""
        return math.ceil(self.rules.quorum * self.state.invited)

    # --- events ------------------------------------------------------------------------------------------

    def handle(self, event: Event) -> list[Effect]:
        """The answer to an event in the present phase: effects, or why there are none."""
        state = self.state
        match event:
            case ev.EdgeReady():
                self.eligible.add(event.edge)
                self._connected.add(event.edge)
                self._told.discard(event.edge)
                self._uploading.discard(event.edge)  # an upload ends with the connection it came by
                self._offered.pop(event.edge, None)  # a new connection has no offer yet
                if state.phase == "collecting" and state.answered.get(event.edge) in ("paused", "left"):
                    # It is back while its round is open: it is awaited again, until the same time.
                    back = ev.CohortExtended(round=state.round, invited=(event.edge,), deadline_at=state.deadline_at)
                    return [Append(back)]
                return []
            case ev.EdgeGone():
                self._forget(event.edge)
                self._connected.discard(event.edge)
                return []
            case ev.EdgeAway():
                self._forget(event.edge)
                if event.how == "left":
                    self._connected.discard(event.edge)
                if self._is_awaited(event.edge):
                    return [Append(ev.EdgeAnswered(round=state.round, edge=event.edge, how=event.how))]
                return []
            case ev.Declined():
                if event.round == state.round and self._is_awaited(event.edge):
                    return [Append(ev.EdgeAnswered(round=state.round, edge=event.edge, how="declined"))]
                return [Ignored(f"{event.edge} is not awaited in round {event.round}")]
            case ev.UploadStarted():
                if event.round == state.round and self._is_awaited(event.edge):
                    self._uploading.add(event.edge)
                    return []
                return [Ignored(f"the upload of {event.edge} is judged when it is whole")]
            case ev.UploadStalled():
                self._uploading.discard(event.edge)
                return []
            case ev.UpdateArrived():
                self._uploading.discard(event.edge)
                return self._judge(event)
            case ev.DeadlineReached():
                is_due = self._timer == (event.round, event.at) and self._running is None
                if state.phase == "collecting" and is_due and not state.deadline_passed:
                    self._timer = None  # where the record cannot be written, `owed` sets another
                    return [Append(ev.DeadlinePassed(round=event.round))]
                return [Ignored(f"round {event.round} does not wait for its deadline any more")]
            case ev.ComputeDone():
                if event.job != self._running:
                    return [Ignored(f"no {event.job} is running")]
                return self._digest_result(event)

    def _forget(self, edge: EdgeId) -> None:
        self.eligible.discard(edge)
        self._uploading.discard(edge)
        self._offered.pop(edge, None)

    def _is_awaited(self, edge: EdgeId) -> bool:
        state = self.state
        return (
            state.phase == "collecting"
            and edge in state.cohort
            and edge not in state.accepted
            and edge not in state.answered
        )

    def _judge(self, update: ev.UpdateArrived) -> list[Effect]:
        """Accept an update once, or say why not."""
        state, edge = self.state, update.edge
        last = state.receipts.get(edge)
        if last is not None and (last.round, last.digest) == (update.round, update.digest):
            return [Send(edge, Receipt(round=update.round, digest=update.digest))]
        if state.phase != "collecting" or update.round != state.round or self._running == "aggregate":
            return [self._refusal(update, f"round {update.round} is closed; wait for the next offer")]
        if edge not in state.cohort:
            return [self._refusal(update, f"{edge} is not invited to round {update.round}; wait for the next offer")]
        if edge in state.accepted:
            return [self._refusal(update, f"round {update.round} already has another update of {edge}")]
        problem = update.problem
        view, _ = state.adapter(update.size_class)
        if update.base != view:
            problem = f"the update starts from view {update.base[:12]}, round {state.round} from {view[:12]}"
        elif update.alignment != state.alignment:
            problem = f"the update used alignment {update.alignment}, round {state.round} has {state.alignment}"
        elif not 1 <= update.num_examples <= MAX_EXAMPLES:
            problem = f"num_examples is {update.num_examples}; it must be 1 to {MAX_EXAMPLES}"
        elif update.loss is None or not 0 <= update.loss <= MAX_LOSS:
            found = "not a number" if update.loss is None or math.isnan(update.loss) else f"{update.loss:g}"
            problem = f"the loss is {found}; it must be 0 to {MAX_LOSS:g}: lower [local] learning_rate or check this edge's data"
        if problem:
            answered: list[Effect] = (
                [Append(ev.EdgeAnswered(round=state.round, edge=edge, how="refused"))] if self._is_awaited(edge) else []
            )
            return [*answered, self._refusal(update, problem)]
        assert update.loss is not None
        return [
            Append(
                ev.UpdateAccepted(
                    round=update.round,
                    edge=edge,
                    digest=update.digest,
                    num_examples=update.num_examples,
                    loss=update.loss,
                    size_class=update.size_class,
                )
            ),
            Send(edge, Receipt(round=update.round, digest=update.digest)),
        ]

    def _refusal(self, update: ev.UpdateArrived, reason: str) -> Send:
        return Send(update.edge, Refusal(round=update.round, reason=reason))

    def _digest_result(self, event: ev.ComputeDone) -> list[Effect]:
        state, result = self.state, event.result
        match event.job:
            case "prepare":
                smaller = msgspec.convert(result.get("smaller", ()), tuple[ev.PreparedClass, ...])
                return [Append(ev.Prepared(**result | {"smaller": smaller}))]
            case "aggregate":
                told = [
                    Send(edge, RoundClosedMessage(round=state.round, num_updates=len(state.accepted)))
                    for edge in sorted(self.eligible)
                ]
                steps = msgspec.convert(result.get("smaller", ()), tuple[ev.ClosedClass, ...])
                return [Append(ev.RoundClosed(round=state.round, **result | {"smaller": steps})), *told]
            case "realign":
                aligned = msgspec.convert(result.get("smaller", ()), tuple[ev.RealignedClass, ...])
                made = result | {"smaller": aligned}
                return [Append(ev.Realigned(round=state.round + 1, version=state.alignment + 1, **made))]
            case "reprune":
                drawn = msgspec.convert(result["smaller"], tuple[ev.ReprunedClass, ...])
                return [Append(ev.Repruned(round=state.round + 1, **result | {"smaller": drawn}))]
            case "probe":
                return [Append(ev.Probed(round=state.round + 1, **result))]
            case "evaluate":
                return [Append(ev.Evaluated(round=state.round, result=result))]
        raise AssertionError(f"no such job: {event.job}")

    # --- what is owed ------------------------------------------------------------------------------------

    def owed(self, now: float) -> list[Effect]:
        """What the state still owes. After an Append among them the caller asks again."""
        state = self.state
        if self._running is not None:
            return []  # no job runs while a round collects, but the one that closes it
        match state.phase:
            case "preparing":
                return self._start("prepare", {})
            case "collecting":
                return self._owed_collecting(now)
            case "idle":
                return self._owed_idle(now)
            case _:
                goodbye: list[Effect] = []
                for edge in sorted(self._connected - self._told):
                    self._told.add(edge)
                    goodbye.append(Send(edge, Farewell(rounds=state.round, reason="the run is over")))
                return [*goodbye, ev.Finish()]

    def _start(self, job: str, arguments: dict[str, Any]) -> list[Effect]:
        self._running = job
        self._waiting = ""
        return [Compute(job, arguments)]

    def _offers(self) -> list[Effect]:
        state = self.state
        made: list[Effect] = []
        for edge in sorted(self.eligible):
            if self._is_awaited(edge) and self._offered.get(edge) != (state.round, self._extensions):
                self._offered[edge] = (state.round, self._extensions)
                made.append(ev.Offer(edge))
        return made

    def _owed_collecting(self, now: float) -> list[Effect]:
        state = self.state
        awaited = [edge for edge in state.cohort if self._is_awaited(edge)]
        if state.accepted and not awaited:
            return self._aggregate()
        if state.deadline_passed and not self._uploading:
            if state.accepted and len(state.accepted) >= self.quorum:
                return self._aggregate()
            return self._extend(now)
        effects = self._offers()
        if self._timer is None and not state.deadline_passed:
            # The deadline passed while the hub was down: one more stall window.
            at = (
                max(state.deadline_at, now + self.rules.stall_seconds) if now > state.deadline_at else state.deadline_at
            )
            self._timer = (state.round, at)
            effects.append(ev.SetDeadline(state.round, at))
        if not awaited:  # all answered, none with an update
            fresh = sorted(self.eligible - set(state.cohort))
            if fresh:
                return [Append(self._extension(fresh[: state.invited], now))]
        if self.eligible.intersection(awaited):
            self._waiting = ""
        else:
            effects += self._wait(
                f"round {state.round} waits for {', '.join(awaited) or 'any edge'}: none is connected"
            )
        return effects

    def _aggregate(self) -> list[Effect]:
        state = self.state
        updates = [
            [edge, u.num_examples, u.digest, state.adapter(u.size_class)[0]]
            for edge, u in sorted(state.accepted.items())
        ]
        arguments = {"round": state.round, "master": state.master, "view": state.view, "moments": state.moments}
        smaller = [held.view for held in state.with_own_view]
        return self._start("aggregate", {**arguments, "smaller": smaller, "updates": updates})

    def _extend(self, now: float) -> list[Effect]:
        """Below quorum at the deadline: number and accepted updates stay, replacements are invited.

        Edges that were not asked come first, then those that had answered without an update. Who is still
        at work stays awaited and needs no second invitation.
        """
        state = self.state
        if not self.eligible - set(state.accepted):
            return self._wait(
                f"round {state.round} has {len(state.accepted)} of {self.quorum} updates at its deadline and no edge "
                "is connected that could replace the rest"
            )
        candidates = [*sorted(self.eligible - set(state.cohort)), *sorted(self.eligible.intersection(state.answered))]
        wanted = max(1, state.invited - len(state.accepted))
        return [Append(self._extension(candidates[:wanted], now))]

    def _extension(self, edges: list[EdgeId], now: float) -> ev.CohortExtended:
        return ev.CohortExtended(
            round=self.state.round, invited=tuple(edges), deadline_at=now + self.rules.deadline_seconds
        )

    def _owed_idle(self, now: float) -> list[Effect]:
        state, rules = self.state, self.rules
        is_last = state.round >= rules.count
        is_judged = is_last or (rules.eval_every > 0 and state.round % rules.eval_every == 0)
        if rules.has_eval and is_judged and state.evaluated_round < state.round:
            arguments = {"master": state.master, "emulator_view": state.emulator_view, "round": state.round}
            return self._start("evaluate", {**arguments, "manifest": state.manifest})
        if is_last:
            return [Append(ev.RunEnded(rounds=state.round))]
        upcoming = state.round + 1
        if (
            rules.reprune_every
            and state.round
            and state.round % rules.reprune_every == 0
            and state.repruned_for < upcoming
        ):
            return self._start("reprune", {"round": upcoming, "master": state.master})
        alike = {"master": state.master, "emulator_view": state.emulator_view}
        every = rules.realign_every
        if isinstance(every, int):
            is_due = every > 0 and upcoming % every == 0 and state.realigned_for < upcoming
        elif upcoming - state.realigned_for < AUTO_ROUNDS:
            is_due = False
        elif not state.probes or state.probes[-1]["round"] != upcoming:
            return self._start("probe", alike)
        else:
            found, fresh = state.probes[-1], state.first_probe
            is_due = found["kl"] > KL_GROWTH * state.aligned_kl or found["cosine"] < COSINE_LEFT * fresh["cosine"]
        if is_due:
            smaller = [held.emulator_view for held in state.smaller]
            return self._start("realign", {"version": state.alignment + 1, **alike, "smaller": smaller})
        if len(self.eligible) < rules.min_edges:
            edges = "1 edge" if rules.min_edges == 1 else f"{rules.min_edges} edges"
            here = "1 is here" if len(self.eligible) == 1 else f"{len(self.eligible)} are here"
            return self._wait(f"round {upcoming} needs {edges}, {here}")
        self._waiting = ""
        return [
            Append(
                ev.RoundOpened(
                    round=upcoming,
                    cohort=choose_cohort(self.eligible, rules.cohort, rules.seed, upcoming),
                    view=state.view,
                    alignment=state.alignment,
                    deadline_at=now + rules.deadline_seconds,
                )
            )
        ]

    def _wait(self, why: str) -> list[Effect]:
        """Say it once, not at every event."""
        if why == self._waiting:
            return []
        self._waiting = why
        return [ev.Waiting(why)]


def trained_factor(rule: str, round_number: int) -> Factor:
    """What edges train and send: B alone (FFA-LoRA, arXiv 2403.12313), B and A by turns (RoLoRA, 2502.01755), or both.

    Where all edges share one factor, the mean of the other gives the mean of the products, and half travels.
    """
    if rule == "rolora":
        return "B" if round_number % 2 else "A"
    return "B" if rule == "ffa" else "both"


def choose_cohort(eligible: set[EdgeId], size: int, seed: int, round_number: int) -> tuple[EdgeId, ...]:
    """min(size, eligible) edges, sampled by (seed, round), ascending."""
    chance = random.Random(f"{seed}/{round_number}")
    ordered = sorted(eligible)
    return tuple(sorted(chance.sample(ordered, min(size, len(ordered)))))
