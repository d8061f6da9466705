"""All that a hub tells people while it works, one tagged struct each: what `--jsonl` prints, a line each.

Names and keys are kept for whoever reads them (tests/schemas/fedsoda-hub.json). How people see them is `cli/display.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, assert_never

import msgspec
from msgspec import Meta, structs

from fedsoda_edge.protocol.messages import Digest, EdgeId
from fedsoda_hub.federation import jobs
from fedsoda_hub.federation import records as rec
from fedsoda_hub.federation.state import LedgerState
from fedsoda_hub.run.ledger import RoundTraffic
from fedsoda_hub.run.status import LiveStatus

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Cosine = Annotated[float, Meta(ge=-1, le=1)]


class HubEvent(msgspec.Struct, frozen=True, tag_field="event", kw_only=True, forbid_unknown_fields=True):
    """The root of all that is told."""


HubSay = Callable[[HubEvent], None]


def line_of(event: HubEvent) -> str:
    """Return the event as `--jsonl` prints it.

    Raises:
        ValueError: a number in it is not finite.
    """
    return json.dumps(msgspec.to_builtins(event, str_keys=True), allow_nan=False)


def as_json(event: HubEvent) -> dict[str, Any]:
    """Return the event as whoever parses its line sees it."""
    values: dict[str, Any] = json.loads(line_of(event))
    return values


# --- the hub and its edges -------------------------------------------------------------------------------------------


class SettingInForce(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key's value. source: the file's name, or default."""

    value: str | float | bool | list[Any] | None
    source: Annotated[str, Meta(min_length=1)]


class SettingsInForce(HubEvent, frozen=True, tag="settings"):
    """The settings in force, by the keys that people write in RUN.toml."""

    values: Annotated[dict[str, SettingInForce], Meta(min_length=1)]


class Listening(HubEvent, frozen=True, tag="listening"):
    """Edges may join from now on."""

    url: Annotated[str, Meta(pattern="^http://")]
    run: str


class EdgeConnected(HubEvent, frozen=True, tag="edge_connected"):
    edge: EdgeId
    software: str


class EdgeGone(HubEvent, frozen=True, tag="edge_gone"):
    """The connection ended; the edge may come back."""

    edge: EdgeId


class EdgeLeft(HubEvent, frozen=True, tag="edge_left"):
    """The edge left for good."""

    edge: EdgeId
    reason: str


class EdgeProgress(HubEvent, frozen=True, tag="edge_progress"):
    """Where an edge's local round is, in its own numbers."""

    edge: EdgeId
    round: int
    step: int
    steps: int
    loss: float | None
    tokens_per_second: float | None


class Declined(HubEvent, frozen=True, tag="declined"):
    """An edge will send no update this round, in its own words."""

    edge: EdgeId
    round: int
    reason: str


class Waiting(HubEvent, frozen=True, tag="waiting"):
    """Nothing can be done now, and why."""

    why: str


class OutOfDisk(HubEvent, frozen=True, tag="disk_full"):
    message: str


class ComputeFailed(HubEvent, frozen=True, tag="compute_failed"):
    """The process with torch ended in the middle of a job; details: its traceback or last words."""

    job: str
    message: str
    details: str


class StoppedBySignal(HubEvent, frozen=True, tag="stopped"):
    """A signal ends the hub."""

    signal: str


# --- progress of a job -----------------------------------------------------------------------------------------------


class StageProgress(HubEvent, frozen=True, tag="progress", omit_defaults=True):
    """How far a stage of a job is. kl: public KL, nats, of the alignment's last step; detail: what is compared now."""

    job: str
    stage: str
    done: Count
    total: Count
    kl: float | None = None
    detail: str | None = None


class DiskProgress(HubEvent, frozen=True, tag="progress"):
    """Bytes that the cached targets of the teacher need, and how many are free."""

    job: str
    stage: str
    needed_bytes: Count
    free_bytes: Count


class BorderMapProgress(HubEvent, frozen=True, tag="progress"):
    """Relative squared error of border states on prompts left out: without a map, with one of whole width, with this."""

    job: str
    stage: str
    error_before: float
    error_whole: float
    error: float


class NoBorderMapProgress(HubEvent, frozen=True, tag="progress"):
    """Why no border map is fitted."""

    job: str
    stage: str
    why: str


class ShapeProgress(HubEvent, frozen=True, tag="progress"):
    """One shape of the sub-LLM that `groups = "auto"` looked at."""

    job: str
    stage: str
    layers_per_group: int
    groups: int
    kl: float
    cosine: Cosine


ProgressEvent = StageProgress | DiskProgress | BorderMapProgress | NoBorderMapProgress | ShapeProgress


def event_of_progress(job: str, progress: jobs.JobProgress) -> ProgressEvent:
    """Return the event that tells how far a job is."""
    match progress:
        case jobs.Stage(stage=stage, done=done, total=total, kl=kl):
            return StageProgress(job=job, stage=stage, done=done, total=total, kl=kl)
        case jobs.DiskNeeded(stage=stage, needed_bytes=needed, free_bytes=free):
            return DiskProgress(job=job, stage=stage, needed_bytes=needed, free_bytes=free)
        case jobs.BorderMapFitted():
            return BorderMapProgress(job=job, **structs.asdict(progress))
        case jobs.NoBorderMap(stage=stage, why=why):
            return NoBorderMapProgress(job=job, stage=stage, why=why)
        case jobs.ShapeMeasured():
            return ShapeProgress(job=job, **structs.asdict(progress))
        case _:
            assert_never(progress)


# --- what became a fact: a record of the ledger, and [rounds] count --------------------------------------------------


class Fact(HubEvent, frozen=True):
    """The root of what was written down. rounds: how many the run has."""

    rounds: Positive


class RunPrepared(Fact, frozen=True, tag="prepared"):
    """Digests of what the run starts from. master None: the adapter's view is all of it."""

    manifest: Digest
    adapter_view: Digest
    emulator_view: Digest
    public_kl: dict[str, float]
    smaller: tuple[rec.PreparedClass, ...]
    master: Digest | None


class RoundOpened(Fact, frozen=True, tag="round_opened"):
    round: Positive
    cohort: Annotated[tuple[EdgeId, ...], Meta(min_length=1)]
    view: Digest
    alignment: Count
    deadline_at: float


class CohortExtended(Fact, frozen=True, tag="cohort_extended"):
    round: Positive
    invited: Annotated[tuple[EdgeId, ...], Meta(min_length=1)]
    deadline_at: float


class UpdateAccepted(Fact, frozen=True, tag="update_accepted"):
    round: Positive
    edge: EdgeId
    digest: Digest
    num_examples: Annotated[int, Meta(ge=1, le=2**31)]
    loss: float
    size_class: Annotated[int, Meta(ge=0, le=3)]


class EdgeAnswered(Fact, frozen=True, tag="edge_answered"):
    round: Positive
    edge: EdgeId
    how: Literal["refused", "declined", "paused", "left"]


class DeadlinePassed(Fact, frozen=True, tag="deadline_passed"):
    round: Positive


class RoundClosed(Fact, frozen=True, tag="round_closed"):
    """loss: mean over the round's examples. bytes_up, bytes_down: of all edges since the run began."""

    round: Positive
    master: Digest
    view: Digest
    delta: Digest
    moments: Digest | None
    cross_term: Annotated[float, Meta(ge=0)] | None
    smaller: tuple[rec.ClosedClass, ...]
    loss: float
    updates: Positive
    bytes_up: Count
    bytes_down: Count


class Realigned(Fact, frozen=True, tag="realigned"):
    round: Positive
    version: Positive
    view: Digest
    delta: Digest
    kl_before: float
    kl_after: float
    smaller: tuple[rec.RealignedClass, ...]


class Repruned(Fact, frozen=True, tag="repruned"):
    round: Annotated[int, Meta(ge=2)]
    master: Digest
    manifest: Digest
    view: Digest
    smaller: tuple[rec.ReprunedClass, ...]


class Probed(Fact, frozen=True, tag="probed"):
    round: Positive
    kl: float
    cosine: Cosine


class Evaluated(Fact, frozen=True, tag="evaluated"):
    round: Positive
    result: rec.Figures


class RunEnded(Fact, frozen=True, tag="run_ended"):
    summary: LiveStatus


def event_of_record(
    record: rec.AnyRecord,
    rounds: int,
    state: LedgerState,
    traffic: Callable[[], list[RoundTraffic]],
    summary: Callable[[], LiveStatus],
) -> Fact | None:
    """Return the event of a record that `state` has folded in; None where people are told nothing.

    Args:
        rounds: [rounds] count. traffic, summary: ask for what travelled and how the run stands.
    """
    values = structs.asdict(record)
    match record:
        case rec.RunStarted() | rec.SettingsChanged():
            return None
        case rec.RunPrepared():
            return RunPrepared(rounds=rounds, **values)
        case rec.RoundOpened():
            return RoundOpened(rounds=rounds, **values)
        case rec.CohortExtended():
            return CohortExtended(rounds=rounds, **values)
        case rec.UpdateAccepted():
            return UpdateAccepted(rounds=rounds, **values)
        case rec.EdgeAnswered():
            return EdgeAnswered(rounds=rounds, **values)
        case rec.DeadlinePassed():
            return DeadlinePassed(rounds=rounds, **values)
        case rec.RoundClosed():
            sizes = traffic()
            return RoundClosed(
                rounds=rounds,
                loss=state.losses[-1],
                updates=len(state.accepted),
                bytes_up=sum(row.up for row in sizes),
                bytes_down=sum(row.down for row in sizes),
                **values,
            )
        case rec.Realigned():
            return Realigned(rounds=rounds, **values)
        case rec.Repruned():
            return Repruned(rounds=rounds, **values)
        case rec.Probed():
            return Probed(rounds=rounds, **values)
        case rec.Evaluated():
            return Evaluated(rounds=rounds, **values)
        case rec.RunEnded():
            return RunEnded(rounds=record.rounds, summary=summary())
        case _:
            assert_never(record)


# --- a comparison ----------------------------------------------------------------------------------------------------


class CellDone(HubEvent, frozen=True, tag="cell"):
    """A run of a comparison is over and judged."""

    cell: str
    accuracy: Share
    seconds: Annotated[float, Meta(gt=0)]


# --- reading them back -----------------------------------------------------------------------------------------------


def kinds() -> list[type[HubEvent]]:
    """Return every struct that can be told; those of progress share a tag."""
    found = [*HubEvent.__subclasses__(), *Fact.__subclasses__()]
    return [kind for kind in found if kind is not Fact]


def read(line: str | bytes) -> HubEvent | None:
    """Return the event of one line that a hub of this release printed; None for the terminal one.

    Raises:
        ValueError: no hub of this release prints this.
    """
    values = json.loads(line)
    if "terminal" in values:
        return None
    for kind in kinds():
        if kind.__struct_config__.tag == values.get("event"):
            try:
                return msgspec.convert(values, kind, strict=False)
            except msgspec.ValidationError:
                continue
    raise ValueError(f"no event of a hub: {line!r}")
