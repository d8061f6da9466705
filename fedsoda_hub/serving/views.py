"""Define what the page of a hub's owner gets as JSON, and make it of the run's status and the tally of its ledger. Pure.

Who may see it is `page.py`'s, when it is made again is `feed.py`'s. Texts of edges stay texts: the page never makes HTML of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from fedsoda_edge.protocol.messages import DeviceFacts, EdgeId
from fedsoda_edge.units import counted, human_bytes
from fedsoda_hub.federation import jobs
from fedsoda_hub.federation.jobs import EvaluateResult
from fedsoda_hub.federation.schedule import Rules
from fedsoda_hub.federation.state import LedgerState, MeasuredDrift, Realignment
from fedsoda_hub.run.edges import KnownEdge
from fedsoda_hub.run.sentence import sentence_of
from fedsoda_hub.run.status import BestRound, LiveStatus
from fedsoda_hub.serving.tally import Tally

MODELS = {"full": "Full model, untouched", "sub_llm": "Sub-LLM", "plug_in": "Plug-in"}
Z = 1.959964  # of a 95 % interval


class RoundsView(msgspec.Struct, frozen=True):
    """The closed rounds as columns. seconds: from opening to closing. up, down: bytes of all edges."""

    number: list[int]
    loss: list[float | None]
    updates: list[int]
    seconds: list[float]
    up: list[int]
    down: list[int]


class JudgedView(msgspec.Struct, frozen=True):
    """The evaluations as columns: accuracies by model, as shares."""

    round: list[int]
    accuracy: dict[str, list[float | None]]


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """A model's last figures. low, high: the 95 % interval of its accuracy (Wilson), whose only chance is that of the rows."""

    name: str
    accuracy: float
    low: float
    high: float
    loss: float | None
    auc: float | None


class RuleView(msgspec.Struct, frozen=True):
    """The rules in force of [rounds]."""

    count: int
    quorum: float
    deadline_seconds: float
    min_edges: int


class RunView(msgspec.Struct, frozen=True, kw_only=True):
    """The run as the page shows it. Times are seconds since 1970; now: the hub's clock, by which the page counts down.

    sentence: what it does. next: what happens then. due_at: None: no round is open. best: None: the run keeps the last round, or judged none.
    """

    run: str
    run_id: str
    phase: str
    is_paused: bool
    sentence: str
    next: str
    now: float
    due_at: float | None
    began_at: float | None
    round: int
    rounds_closed: int
    invited: int
    accepted: int
    rules: RuleView
    edges_known: int
    edges_connected: int
    closed: RoundsView
    judged: JudgedView
    models: list[ModelView]
    judged_rows: int
    best: BestRound | None
    public_kl: dict[str, float]
    realignments: list[Realignment]
    probes: list[MeasuredDrift]
    bytes_up: int
    bytes_down: int


class EdgeRow(msgspec.Struct, frozen=True, array_like=True):
    """An edge as a row of the page, an array on the wire: 2,000 of them travel at once.

    done, invited: rounds with an update of it, rounds that it was asked for. norm, cosine, kept: of its last update.
    last_seen: seconds since 1970; None: it is connected, or never was.
    """

    edge: str
    state: str
    kind: str
    fingerprint: str | None
    device: str
    size_class: int | None
    step: int | None
    steps: int | None
    done: int
    invited: int
    up: int
    down: int
    norm: float | None
    cosine: float | None
    kept: float | None
    last_seen: float | None
    is_connected: bool


def interval_of(share: float, count: int) -> tuple[float, float]:
    """Compute the 95 % interval of a share of `count` rows (Wilson 1927)."""
    if count <= 0:
        return 0.0, 1.0
    spread = Z * Z / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / count / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def next_of(rules: Rules, state: LedgerState, job: jobs.Job | None) -> str:
    """Say what happens after what the run does now."""
    after = state.round + 1
    is_last = state.round >= rules.count
    judged = "the run is judged and ends" if rules.has_eval else "the run ends"
    match state.phase:
        case "preparing":
            return f"Then edges fetch the sub-LLM, and round 1 opens when {counted(rules.min_edges, 'edge')} can train."
        case "ended":
            return "Nothing follows: export the adapter, or raise the number of rounds in RUN.toml and start the hub again."
        case "collecting" if is_last:
            return f"Then {judged}."
        case "collecting" if state.steering.is_paused:
            return f"Then the run stands still until you resume it; round {after} is the next."
        case "collecting":
            return f"Then round {after} of {rules.count} opens."
        case _ if is_last:
            return "Then the run ends."
        case _ if state.steering.is_paused:
            return f"Round {after} opens when you resume the run."
        case _ if job is not None:
            return f"Then round {after} of {rules.count} opens."
        case _:
            return f"Round {after} of {rules.count} opens when {counted(rules.min_edges, 'edge')} can train."


def run_view(
    status: LiveStatus,
    state: LedgerState,
    rules: Rules,
    job: jobs.Job | None,
    tally: Tally,
    by_round: Mapping[int, tuple[int, int]],
    travelled: tuple[int, int],
    now: float,
) -> RunView:
    """Make the page's view of the run.

    Args:
        by_round: bytes up and down of each round. travelled: those of the run. now: seconds since 1970.
    """
    closed = tally.closed
    figures = state.evaluation
    nothing = (0, 0)
    names = [name for name in MODELS if figures is not None and name in figures.accuracy]
    return RunView(
        run=status.run,
        run_id=status.run_id,
        phase=status.phase,
        is_paused=state.steering.is_paused,
        sentence=sentence_of(status),
        next=next_of(rules, state, job),
        now=now,
        due_at=None if status.due_seconds is None else now + status.due_seconds,
        began_at=tally.began_at,
        round=state.round,
        rounds_closed=len(state.losses),
        invited=len(state.cohort) if state.phase == "collecting" else 0,
        accepted=len(state.accepted) if state.phase == "collecting" else 0,
        rules=RuleView(rules.count, rules.quorum, rules.deadline_seconds, rules.min_edges),
        edges_known=sum(not one.revoked for one in status.edges),
        edges_connected=sum(one.connected for one in status.edges),
        closed=RoundsView(
            number=[one.number for one in closed],
            loss=[finite(one.loss) for one in closed],
            updates=[one.updates for one in closed],
            seconds=[round((one.closed_at or one.opened_at) - one.opened_at, 1) for one in closed],
            up=[by_round.get(one.number, nothing)[0] for one in closed],
            down=[by_round.get(one.number, nothing)[1] for one in closed],
        ),
        judged=JudgedView(
            round=[number for number, _ in tally.judged],
            accuracy={name: [result.accuracy.get(name) for _, result in tally.judged] for name in names},
        ),
        models=[] if figures is None else [_model(name, figures) for name in names],
        judged_rows=0 if figures is None else figures.num_examples,
        best=status.best,
        public_kl=state.public_kl,
        realignments=state.realignments,
        probes=state.probes,
        bytes_up=travelled[0],
        bytes_down=travelled[1],
    )


def _model(name: str, figures: EvaluateResult) -> ModelView:
    low, high = interval_of(figures.accuracy[name], figures.num_examples)
    return ModelView(
        name=name,
        accuracy=figures.accuracy[name],
        low=low,
        high=high,
        loss=finite(figures.loss.get(name)),
        auc=finite(figures.auc.get(name)),
    )


def finite(value: float | None) -> float | None:
    """Return a number that JSON has; None for one that it has not."""
    return value if value is not None and math.isfinite(value) else None


def edge_rows(
    edges: Sequence[KnownEdge],
    state: LedgerState,
    tally: Tally,
    by_edge: Mapping[str, tuple[int, int]],
    devices: Mapping[EdgeId, DeviceFacts],
    now: float,
) -> list[EdgeRow]:
    """Make a row of each edge.

    Args:
        by_edge: bytes up and down of each edge. devices: the facts of those that are connected. now: seconds since 1970.
    """
    cohort = set(state.cohort) if state.phase == "collecting" else set()
    rows = []
    for one in edges:
        up, down = by_edge.get(one.edge, (0, 0))
        standing = one.standing
        is_at_work = one.step is not None and one.edge in cohort and one.edge not in state.accepted
        facts = devices.get(one.edge)
        rows.append(
            EdgeRow(
                edge=one.edge,
                state=state_of(one, state, one.edge in cohort, now),
                kind=one.kind,
                fingerprint=one.fingerprint,
                device="" if facts is None else device_of(facts),
                size_class=one.size_class,
                step=one.step if is_at_work else None,
                steps=one.steps if is_at_work else None,
                done=tally.given[one.edge],
                invited=tally.invited[one.edge],
                up=up,
                down=down,
                norm=None if standing is None else finite(standing.norm),
                cosine=None if standing is None else finite(standing.cosine),
                kept=None if standing is None else finite(standing.kept),
                last_seen=None if one.connected else one.last_seen,  # or each row would change with the clock
                is_connected=one.connected,
            )
        )
    return rows


def state_of(one: KnownEdge, state: LedgerState, is_invited: bool, now: float) -> str:
    """Say in a word or two what an edge does."""
    if one.revoked:
        return "revoked"
    if not one.connected:
        if one.used:
            return "away"
        if one.expires is not None and one.expires <= now:
            return "link expired"
        return "not joined yet"
    if is_invited:
        if one.edge in state.accepted:
            return "update in"
        if one.edge in state.answered:
            return state.answered[one.edge]
        if one.eligible:
            return "training" if one.step is not None else "starting"
    return "ready" if one.eligible else "getting ready"


def device_of(facts: DeviceFacts) -> str:
    """Describe a device in a few words."""
    if facts.accelerator:
        return f"{facts.accelerator}, {human_bytes(facts.vram_bytes)}"
    return f"{counted(facts.threads, 'thread')}, {human_bytes(facts.ram_bytes)} free"
