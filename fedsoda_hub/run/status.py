"""Report the status of a run, as `status`, /v1/status and the event of a run's end show it.

What only a running hub knows is `serving/monitoring.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from fedsoda_edge.protocol.messages import EdgeId
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


class RunStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The status of a run as far as the ledger alone knows it."""

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
    bytes: BytesPerRound
    traffic: list[Travelled]


class LiveStatus(RunStatus, frozen=True, kw_only=True):
    """A run's status with what its hub knows too. url None: no hub runs. due_seconds None: no round is open."""

    url: str | None
    edges: list[KnownEdge]
    due_seconds: float | None


def run_status(name: str, rounds: int, rows: Sequence[RoundTraffic], state: LedgerState) -> RunStatus:
    """Report what the ledger knows of a run.

    Args:
        name, rounds: the run's name and its [rounds] count.
        rows: the ledger's traffic.
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
        bytes=BytesPerRound(
            up_per_edge_round=sum(row.up for row in rows) / pairs,
            down_per_edge_round=sum(row.down for row in rows) / pairs,
        ),
        traffic=[Travelled(edge=row.edge, round=row.round, up=row.up, down=row.down) for row in rows],
    )


def live_status(
    status: RunStatus, edges: list[KnownEdge], *, url: str | None = None, due_seconds: float | None = None
) -> LiveStatus:
    """Add what a hub knows to a run's status; without url and due_seconds, that none runs."""
    return LiveStatus(**msgspec.structs.asdict(status), edges=edges, url=url, due_seconds=due_seconds)
