"""Fold the ledger's records into what is known of a run. Replay never samples, reads a clock or trains.

What the run still owes is `rounds.py`'s.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec.structs import replace

from fedsoda_edge.protocol.messages import Digest, EdgeId
from fedsoda_hub.federation import records as rec
from fedsoda_hub.federation.best import Judged
from fedsoda_hub.federation.jobs import EvaluateResult

Phase = Literal["preparing", "idle", "collecting", "ended"]  # idle: between two rounds


class Collected(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An accepted update. loss: nats a completion id, the mean over its examples."""

    round: int
    digest: Digest
    num_examples: int
    loss: float
    size_class: int = 0


class HeldView(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A view of LoRA that edges hold. delta: the coded step to it; None: the bundle begins with it."""

    digest: Digest
    delta: Digest | None = None


class ServedSubLLM(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A sub-LLM of the run. shares_adapter: its adapter LoRA has the layout of the largest's, whose view it shares."""

    manifest: Digest
    public_kl: dict[str, float]
    adapter: HeldView
    emulator: HeldView
    shares_adapter: bool = False


class Realignment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Public KL of the largest sub-LLM, nats, before and after its realignment for the training of `round`."""

    round: int
    kl_before: float
    kl_after: float


class LastStanding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last of an edge's updates beside what its round made of all: `jobs.Standing`."""

    round: int
    norm: float
    cosine: float | None
    kept: float | None


class MeasuredDrift(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The result of a probe before the training of `round`: KL of the largest sub-LLM, nats, and cosine of gradients."""

    round: int
    kl: float
    cosine: float


class ClosedFigures(msgspec.Struct, forbid_unknown_fields=True):
    """The figures of closed rounds that nothing is decided by. cross_terms: by round. standings: the last of each edge."""

    cross_terms: dict[int, float] = {}
    standings: dict[EdgeId, LastStanding] = {}


class Changed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A value that the owner gave a key of [rounds] while a hub served the run, and what RUN.toml said of it then."""

    value: float
    instead_of: float


class Steering(msgspec.Struct, forbid_unknown_fields=True):
    """The requests of the owner while a hub served the run. changed: by key of [rounds]."""

    is_paused: bool = False
    changed: dict[str, Changed] = {}


class LedgerState(msgspec.Struct, forbid_unknown_fields=True):
    """All that the records say. sub_llms: by size class, the largest first.

    Unknown fields are an error, so that a snapshot of another form is never half read: then replay begins at the first
    record.
    """

    run_id: str = ""
    fixed: rec.Keys = {}
    phase: Phase = "preparing"
    sub_llms: tuple[ServedSubLLM, ...] = ()  # none before the run is prepared
    round: int = 0  # the last opened; never reused, so a stale timer cannot hit a later one
    cohort: list[EdgeId] = []
    invited: int = 0  # how many the quorum counts
    deadline_at: float = 0.0
    deadline_passed: bool = False
    answered: dict[EdgeId, str] = {}
    accepted: dict[EdgeId, Collected] = {}
    receipts: dict[EdgeId, Collected] = {}  # the last of each edge, for receipts that got lost
    master: Digest = Digest("")
    moments: Digest | None = None  # of the hub's optimiser
    alignment: int = 0
    repruned_for: int = 0
    judged: list[Judged] = []  # each evaluated round; what models answered is of the last alone
    losses: list[float] = []  # weighted mean of each closed round
    measured: ClosedFigures = msgspec.field(default_factory=ClosedFigures)
    realignments: list[Realignment] = []
    probes: list[MeasuredDrift] = []
    steering: Steering = msgspec.field(default_factory=Steering)

    @property
    def largest(self) -> ServedSubLLM:
        """The largest sub-LLM, of size class 0; only of a run that is prepared."""
        return self.sub_llms[0]

    @property
    def public_kl(self) -> dict[str, float]:
        """Public KL of the largest sub-LLM, nats, by stage of its preparation; empty before that."""
        return self.sub_llms[0].public_kl if self.sub_llms else {}

    @property
    def evaluation(self) -> EvaluateResult | None:
        """The last evaluation's figures; None before the first."""
        return self.judged[-1].result if self.judged else None

    @property
    def evaluated_round(self) -> int:
        """The round after which the run was last judged; 0: it was never judged."""
        return self.judged[-1].round if self.judged else 0

    @property
    def realigned_for(self) -> int:
        """The round before whose training the emulators were last realigned; 0: they are as prepared."""
        return self.realignments[-1].round if self.realignments else 0

    @property
    def aligned_kl(self) -> float:
        """The public KL after the last alignment, nats, which a probe is compared with."""
        return self.realignments[-1].kl_after if self.realignments else self.public_kl["aligned"]

    @property
    def first_probe(self) -> MeasuredDrift:
        """The first probe since the last alignment; only after one was made."""
        return next(probe for probe in self.probes if probe.round > self.realigned_for)

    @property
    def with_own_view(self) -> tuple[ServedSubLLM, ...]:
        """The sub-LLMs with an adapter view of their own: the largest, and those whose adapter has another layout."""
        return tuple(one for one in self.sub_llms if not one.shares_adapter)

    @property
    def views(self) -> set[Digest]:
        """The digests of all views in force and of the coded steps to them, of adapters and emulators."""
        held = (view for one in self.sub_llms for view in (one.adapter, one.emulator))
        return {digest for view in held for digest in (view.digest, view.delta) if digest is not None}

    def apply(self, record: rec.AnyRecord) -> None:
        """Fold one record in."""
        match record:
            case rec.RunStarted():
                self.run_id, self.fixed = record.run_id, record.fixed
            case rec.SettingsChanged():
                self.steering.changed = {
                    key: one for key, one in self.steering.changed.items() if record.values.get(key) == one.instead_of
                }
                count = record.values.get("count")
                is_larger = isinstance(count, int) and count > self.round and "count" not in self.steering.changed
                if self.phase == "ended" and is_larger:
                    self.phase = "idle"  # a larger count continues where the run ended; nothing else leaves an end
            case rec.RunPaused() | rec.RunResumed():
                self.steering.is_paused = isinstance(record, rec.RunPaused)
            case rec.RulesChanged():
                given = {key: Changed(value, record.instead_of[key]) for key, value in record.values.items()}
                self.steering.changed |= given
                if record.deadline_at is not None:
                    self.deadline_at = record.deadline_at
            case rec.RunPrepared():
                self.master = record.master or record.adapter_view
                self.sub_llms = _prepared(record)
                self.phase = "idle"
            case rec.RoundOpened():
                self.round, self.cohort = record.round, list(record.cohort)
                self.invited, self.deadline_at = len(record.cohort), record.deadline_at
                self.deadline_passed, self.answered, self.accepted = False, {}, {}
                self.phase = "collecting"
            case rec.CohortExtended():
                new = [edge for edge in record.invited if self.answered.pop(edge, None) is None]
                if new:
                    known = set(self.cohort)
                    self.cohort += [edge for edge in new if edge not in known]
                self.deadline_at, self.deadline_passed = record.deadline_at, False
            case rec.UpdateAccepted():
                update = Collected(record.round, record.digest, record.num_examples, record.loss, record.size_class)
                self.accepted[record.edge] = self.receipts[record.edge] = update
                self.answered.pop(record.edge, None)
            case rec.EdgeAnswered():
                self.answered[record.edge] = record.how
            case rec.DeadlinePassed():
                self.deadline_passed = True
            case rec.RoundClosed():
                total = sum(update.num_examples for update in self.accepted.values())
                mean = sum(update.loss * update.num_examples for update in self.accepted.values()) / total
                self.losses.append(mean)
                self.master, self.moments = record.master, record.moments
                closed: list[rec.RoundClosed | rec.ClosedClass] = [record, *record.smaller]
                self._hold_adapters([HeldView(step.view, step.delta) for step in closed])
                if record.cross_term is not None:
                    self.measured.cross_terms[record.round] = record.cross_term
                self.measured.standings |= {
                    found.edge: LastStanding(record.round, found.norm, found.cosine, found.kept)
                    for found in record.standings
                }
                self.phase = "idle"
            case rec.Realigned():
                self.alignment = record.version
                aligned: list[rec.Realigned | rec.RealignedClass] = [record, *record.smaller]
                self.sub_llms = tuple(
                    replace(one, emulator=HeldView(made.view, made.delta))
                    for one, made in zip(self.sub_llms, aligned, strict=True)
                )
                self.realignments.append(Realignment(record.round, record.kl_before, record.kl_after))
            case rec.Repruned():
                self.repruned_for, self.master = record.round, record.master
                drawn: list[rec.Repruned | rec.ReprunedClass] = [record, *record.smaller]
                self.sub_llms = tuple(
                    replace(one, manifest=new.manifest, adapter=HeldView(new.view), shares_adapter=False)
                    for one, new in zip(self.sub_llms, drawn, strict=True)
                )
            case rec.Probed():
                self.probes.append(MeasuredDrift(record.round, record.kl, record.cosine))
            case rec.Evaluated():
                self.judged = [*map(_without_answers, self.judged), self._judged(record)]
            case rec.RunEnded():
                self.phase = "ended"

    def _judged(self, record: rec.Evaluated) -> Judged:
        largest = self.largest
        return Judged(record.round, self.master, largest.emulator.digest, largest.manifest, record.result)

    def _hold_adapters(self, views: list[HeldView]) -> None:
        """Give each sub-LLM with an adapter view of its own the new one, and each other sub-LLM the largest's."""
        new = dict(zip((at for at, one in enumerate(self.sub_llms) if not one.shares_adapter), views, strict=True))
        self.sub_llms = tuple(replace(one, adapter=new.get(at, new[0])) for at, one in enumerate(self.sub_llms))


def _without_answers(one: Judged) -> Judged:
    return replace(one, result=replace(one.result, shares={}, right_shares={}))


def _prepared(record: rec.RunPrepared) -> tuple[ServedSubLLM, ...]:
    made: list[rec.RunPrepared | rec.PreparedClass] = [record, *record.smaller]
    return tuple(
        ServedSubLLM(
            manifest=one.manifest,
            public_kl=one.public_kl,
            adapter=HeldView(one.adapter_view or record.adapter_view),
            emulator=HeldView(one.emulator_view),
            shares_adapter=one.adapter_view is None,
        )
        for one in made
    )
