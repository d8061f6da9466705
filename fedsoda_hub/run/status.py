"""Report the status of a run, as `status`, /v1/status and the event of a run's end show it.

What only a running hub knows is `serving/monitoring.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from fedsoda_edge.protocol.messages import EdgeId
from fedsoda_hub.federation.best import Metric, best_of, figure_of
from fedsoda_hub.federation.jobs import EvaluateResult
from fedsoda_hub.federation.state import LedgerState, MeasuredDrift, Phase, Realignment
from fedsoda_hub.run.edges import KnownEdge
from fedsoda_hub.run.ledger import RoundTraffic


class BytesPerRound(msgspec.Struct, frozen=True, kw_only=True):
    """The mean bytes of an edge in a round."""

    up_per_edge_round: float
    down_per_edge_round: float


class Travelled(msgspec.Struct, frozen=True, kw_only=True):
    """The bytes of one edge in one round, as reports write them."""

    edge: str
    round: int
    up: int
    down: int


class JudgedRound(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one evaluated round, by model (full, sub_llm, plug_in), as `jobs.EvaluateResult` has them."""

    round: int
    accuracy: dict[str, float]
    loss: dict[str, float | None]
    auc: dict[str, float | None]
    mean_rank: dict[str, float | None]


class BestRound(msgspec.Struct, frozen=True, kw_only=True):
    """The best evaluated round of a run that keeps it, and the figure of its plug-in by the run's metric."""

    round: int
    metric: str
    value: float


class RunStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The status of a run as far as the ledger alone knows it.

    evaluations: each evaluated round, ascending. best: None: the run keeps the last round, or none was evaluated yet.
    """

    run: str
    run_id: str
    phase: Phase
    round: int
    rounds: int
    rounds_closed: int
    cohort: list[EdgeId]
    accepted: list[EdgeId]
    answered: dict[EdgeId, str]
    losses: list[float]
    cross_terms: dict[int, float]
    public_kl: dict[str, float]
    realignments: list[Realignment]
    probes: list[MeasuredDrift]
    evaluation: EvaluateResult | None
    evaluations: list[JudgedRound] = []
    best: BestRound | None = None
    bytes: BytesPerRound
    traffic: list[Travelled]


class RunningJob(msgspec.Struct, frozen=True, kw_only=True):
    """The job that is computed now.

    job: its name: prepare, aggregate, realign, reprune, probe, evaluate. stage: None: it has not said one yet. done, total:
    None: the stage counts nothing. seconds: since the stage began. seconds_left: until the stage ends, an estimate; None: not
    known yet.
    """

    job: str
    stage: str | None = None
    done: int | None = None
    total: int | None = None
    seconds: float = 0.0
    seconds_left: float | None = None


HubState = Literal["preparing", "serving", "over", "stopped", "failed", "killed"]
TERMINAL: frozenset[HubState] = frozenset({"over", "stopped", "failed", "killed"})  # what no process leaves again


class HubProcess(msgspec.Struct, frozen=True, kw_only=True):
    """The process that serves or prepares a run, or the last one that did.

    state: over: the run was over. stopped: by a signal. failed: by the error of `reason`. killed: without a word, so by
    SIGKILL, for lack of memory or with the machine. code: the class of the error of `reason`. status: the exit status; None:
    it runs, or was killed. started_at, ended_at: seconds since 1970; None: not known, or it runs.
    """

    state: HubState
    pid: int
    directory: str = ""
    reason: str | None = None
    code: str | None = None
    status: int | None = None
    started_at: float | None = None
    ended_at: float | None = None


class LiveStatus(RunStatus, frozen=True, kw_only=True):
    """A run's status with what its hub knows too.

    url: None: no hub serves. due_seconds: None: no round is open. work: None: nothing is computed. waiting: why the run
    waits; None: it does not. hub: None: none has ever run.
    """

    url: str | None
    edges: list[KnownEdge]
    due_seconds: float | None
    work: RunningJob | None = None
    waiting: str | None = None
    hub: HubProcess | None = None


def run_status(
    name: str, rounds: int, rows: Sequence[RoundTraffic], state: LedgerState, best_by: Metric | None = None
) -> RunStatus:
    """Report what the ledger knows of a run.

    Args:
        name, rounds: the run's name and its [rounds] count.
        rows: the ledger's traffic.
        best_by: [task] metric of a run that keeps the best round; None: of one that keeps the last.
    """
    pairs = len({(row.edge, row.round) for row in rows}) or 1
    return RunStatus(
        run=name,
        run_id=state.run_id,
        phase=state.phase,
        round=state.round,
        rounds=rounds,
        rounds_closed=len(state.losses),
        cohort=state.cohort,
        accepted=sorted(state.accepted),
        answered=state.answered,
        losses=state.losses,
        cross_terms=state.measured.cross_terms,
        public_kl=state.public_kl,
        realignments=state.realignments,
        probes=state.probes,
        evaluation=state.evaluation,
        evaluations=[
            JudgedRound(
                round=one.round,
                accuracy=one.result.accuracy,
                loss=one.result.loss,
                auc=one.result.auc,
                mean_rank=one.result.mean_rank,
            )
            for one in state.judged
        ],
        best=best_round(state, best_by),
        bytes=BytesPerRound(
            up_per_edge_round=sum(row.up for row in rows) / pairs,
            down_per_edge_round=sum(row.down for row in rows) / pairs,
        ),
        traffic=[Travelled(edge=row.edge, round=row.round, up=row.up, down=row.down) for row in rows],
    )


def best_round(state: LedgerState, metric: Metric | None) -> BestRound | None:
    """Name the best evaluated round; None: the run keeps the last, or no round has the figure."""
    best = None if metric is None else best_of(state.judged, metric)
    if best is None or metric is None or (value := figure_of(best.result, metric)) is None:
        return None
    return BestRound(round=best.round, metric=metric, value=value)


def live_status(
    status: RunStatus,
    edges: list[KnownEdge],
    *,
    url: str | None = None,
    due_seconds: float | None = None,
    work: RunningJob | None = None,
    waiting: str | None = None,
    hub: HubProcess | None = None,
) -> LiveStatus:
    """Add what a hub knows to a run's status; without url, that none serves it."""
    return LiveStatus(
        **msgspec.structs.asdict(status),
        edges=edges,
        url=url,
        due_seconds=due_seconds,
        work=work,
        waiting=waiting,
        hub=hub,
    )
