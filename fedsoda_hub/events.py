"""Define what a hub says to people while it works, one tagged struct an event: what `--jsonl` prints, a line each.

Tags and keys are promises to those who parse them (tests/schemas/fedsoda-hub.json). Showing events is `cli/display.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, assert_never

import msgspec
from msgspec import Meta, structs

from fedsoda_edge.protocol.messages import Digest, EdgeId
from fedsoda_edge.protocol.ranges import Count, Positive
from fedsoda_edge.units import finite
from fedsoda_hub.federation import jobs
from fedsoda_hub.federation import records as rec
from fedsoda_hub.federation.state import LedgerState
from fedsoda_hub.run.status import LiveStatus

Share = Annotated[float, Meta(ge=0, le=1)]
Cosine = Annotated[float, Meta(ge=-1, le=1)]


class HubEvent(msgspec.Struct, frozen=True, tag_field="event", kw_only=True, forbid_unknown_fields=True):
    """The root of all events of a hub."""


HubSay = Callable[[HubEvent], None]


def line_of(event: HubEvent) -> str:
    """Encode the event as `--jsonl` prints it; a number that is not finite is null."""
    return json.dumps(finite(msgspec.to_builtins(event, str_keys=True)), allow_nan=False)


def as_json(event: HubEvent) -> dict[str, object]:
    """Return the event as whoever parses its line sees it."""
    values: dict[str, object] = json.loads(line_of(event))
    return values


# --- the hub and its edges -------------------------------------------------------------------------------------------


class SettingInForce(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The value of a key in force. source: the file's name, or "default"."""

    value: str | int | float | bool | list[Any] | None
    source: Annotated[str, Meta(min_length=1)]


class SettingsInForce(HubEvent, frozen=True, tag="settings"):
    """The settings in force, by the keys that people write in RUN.toml."""

    values: Annotated[dict[str, SettingInForce], Meta(min_length=1)]


class Listening(HubEvent, frozen=True, tag="listening"):
    """The hub serves: edges may join from now on.

    public_url: the address for edges; None: only the owner of the proxy knows it. is_guess: nobody wrote it. pin: of the
    hub's TLS key, as `fedsoda-edge --pin` takes it; None: an authority vouches for it, or nothing is encrypted here.
    is_behind_proxy: plain HTTP beyond the hub's machine, so that a proxy must encrypt it.
    """

    url: Annotated[str, Meta(pattern="^https?://")]
    run: str
    public_url: Annotated[str, Meta(pattern="^https?://")] | None = None
    is_guess: bool = False
    pin: Annotated[str, Meta(pattern="^sha256/")] | None = None
    is_behind_proxy: bool = False


class EdgeConnected(HubEvent, frozen=True, tag="edge_connected"):
    """An edge connected. software: what its Hello says that it runs."""

    edge: EdgeId
    software: str


class EdgeDisconnected(HubEvent, frozen=True, tag="edge_gone"):
    """An edge's connection ended; the edge may come back."""

    edge: EdgeId


class EdgeLeft(HubEvent, frozen=True, tag="edge_left"):
    """An edge left the run for good, for the reason in its own words."""

    edge: EdgeId
    reason: str


class EdgeProgress(HubEvent, frozen=True, tag="edge_progress"):
    """The progress of an edge's local round, as the edge reports it. loss: nats a completion id."""

    edge: EdgeId
    round: int
    step: int
    steps: int
    loss: float | None
    tokens_per_second: float | None


class Declined(HubEvent, frozen=True, tag="declined"):
    """An edge will send no update this round, for the reason in its own words."""

    edge: EdgeId
    round: int
    reason: str


class Waiting(HubEvent, frozen=True, tag="waiting"):
    """The hub can do nothing now, and why."""

    why: str


class OutOfDisk(HubEvent, frozen=True, tag="disk_full"):
    """Something could not be written for lack of space; the hub tries again."""

    message: str


class ComputeFailed(HubEvent, frozen=True, tag="compute_failed"):
    """The process that owns torch ended during a job. details: its traceback or last words."""

    job: str
    message: str
    details: str


class StoppedBySignal(HubEvent, frozen=True, tag="stopped"):
    """A signal ends the hub."""

    signal: str


# --- progress of a job -----------------------------------------------------------------------------------------------


class StageProgress(HubEvent, frozen=True, tag="progress", omit_defaults=True):
    """The progress of a stage of a job.

    kl: public KL, nats, of the alignment's last step. detail: what a comparison works on now.
    """

    job: str
    stage: str
    done: Count
    total: Count
    kl: float | None = None
    detail: str | None = None


class DiskProgress(HubEvent, frozen=True, tag="progress"):
    """The bytes that the cached targets of the teacher need, and how many are free."""

    job: str
    stage: str
    needed_bytes: Count
    free_bytes: Count


class BorderMapProgress(HubEvent, frozen=True, tag="progress"):
    """The relative squared error of border states on held-out prompts: without a map, with one of full rank, with this."""

    job: str
    stage: str
    error_before: float
    error_whole: float
    error: float


class LeftOutProgress(HubEvent, frozen=True, tag="progress"):
    """The reason why a stage is left out. stage: "no border map", "not healed" or "no krum"."""

    job: str
    stage: str
    why: str


class ShapeProgress(HubEvent, frozen=True, tag="progress"):
    """One shape of the sub-LLM that `groups = "auto"` looked at: public KL, nats, and cosine of adapter gradients."""

    job: str
    stage: str
    layers_per_group: int
    groups: int
    kl: float
    cosine: Cosine


class HealedShapeProgress(HubEvent, frozen=True, tag="progress"):
    """One shape of the sub-LLM that was healed for a look: what is left of the border's squared length, as a share."""

    job: str
    stage: str
    layers_per_group: int
    groups: int
    error: float


ProgressEvent = StageProgress | DiskProgress | BorderMapProgress | LeftOutProgress | ShapeProgress | HealedShapeProgress


def event_of_progress(job: str, progress: jobs.JobProgress) -> ProgressEvent:
    """Make the event of a job's progress.

    Args:
        job: the job's name, as people read it.
    """
    match progress:
        case jobs.Stage(stage=stage, done=done, total=total, kl=kl):
            return StageProgress(job=job, stage=stage, done=done, total=total, kl=kl)
        case jobs.DiskNeeded(stage=stage, needed_bytes=needed, free_bytes=free):
            return DiskProgress(job=job, stage=stage, needed_bytes=needed, free_bytes=free)
        case jobs.BorderMapFitted():
            return BorderMapProgress(job=job, **structs.asdict(progress))
        case jobs.LeftOut(stage=stage, why=why):
            return LeftOutProgress(job=job, stage=stage, why=why)
        case jobs.ShapeMeasured():
            return ShapeProgress(job=job, **structs.asdict(progress))
        case jobs.ShapeHealed():
            return HealedShapeProgress(job=job, **structs.asdict(progress))
        case _:
            assert_never(progress)


# --- what became a fact: a record of the ledger, and [rounds] count --------------------------------------------------


class Fact(HubEvent, frozen=True):
    """The root of events that are records of the ledger. rounds: [rounds] count."""

    rounds: Positive


class RunPrepared(Fact, frozen=True, tag="prepared"):
    """The run is prepared: digests of what it starts from. master None: the adapter's view is all of it."""

    manifest: Digest
    adapter_view: Digest
    emulator_view: Digest
    public_kl: dict[str, float]
    smaller: tuple[rec.PreparedClass, ...]
    master: Digest | None


class RoundOpened(Fact, frozen=True, tag="round_opened"):
    """A round opened. deadline_at: seconds since 1970."""

    round: Positive
    cohort: Annotated[tuple[EdgeId, ...], Meta(min_length=1)]
    view: Digest
    alignment: Count
    deadline_at: float


class CohortExtended(Fact, frozen=True, tag="cohort_extended"):
    """Edges were invited to the open round besides. deadline_at: seconds since 1970."""

    round: Positive
    invited: Annotated[tuple[EdgeId, ...], Meta(min_length=1)]
    deadline_at: float


class UpdateAccepted(Fact, frozen=True, tag="update_accepted"):
    """An update was accepted. loss: nats a completion id."""

    round: Positive
    edge: EdgeId
    digest: Digest
    num_examples: Annotated[int, Meta(ge=1, le=2**31)]
    loss: float
    size_class: Annotated[int, Meta(ge=0, le=3)]


class EdgeAnswered(Fact, frozen=True, tag="edge_answered"):
    """An invited edge will send no update this round."""

    round: Positive
    edge: EdgeId
    how: Literal["refused", "declined", "paused", "left"]


class DeadlinePassed(Fact, frozen=True, tag="deadline_passed"):
    """The open round's deadline passed."""

    round: Positive


class RoundClosed(Fact, frozen=True, tag="round_closed"):
    """A round closed.

    loss: nats, the mean over the round's examples. bytes_up, bytes_down: those of all edges since the run began.
    standings: where updates lay beside what the round made of all.
    """

    round: Positive
    master: Digest
    view: Digest
    delta: Digest
    moments: Digest | None
    cross_term: Annotated[float, Meta(ge=0)] | None
    smaller: tuple[rec.ClosedClass, ...]
    standings: tuple[jobs.Standing, ...]
    loss: float
    updates: Positive
    bytes_up: Count
    bytes_down: Count


class Realigned(Fact, frozen=True, tag="realigned"):
    """The emulator LoRA was aligned again. kl_before, kl_after: public KL, nats."""

    round: Positive
    version: Positive
    view: Digest
    delta: Digest
    kl_before: float
    kl_after: float
    smaller: tuple[rec.RealignedClass, ...]


class Repruned(Fact, frozen=True, tag="repruned"):
    """Other layers were drawn for each size class."""

    round: Annotated[int, Meta(ge=2)]
    master: Digest
    manifest: Digest
    view: Digest
    smaller: tuple[rec.ReprunedClass, ...]


class Probed(Fact, frozen=True, tag="probed"):
    """The drift was measured: public KL, nats, and cosine of adapter gradients."""

    round: Positive
    kl: float
    cosine: Cosine


class Evaluated(Fact, frozen=True, tag="evaluated"):
    """The run was judged after a round."""

    round: Positive
    result: jobs.EvaluateResult


class RunPaused(Fact, frozen=True, tag="run_paused"):
    """The owner paused the run: no round opens until it is resumed."""


class RunResumed(Fact, frozen=True, tag="run_resumed"):
    """The owner ended the pause."""


class RulesChanged(Fact, frozen=True, tag="rules_changed"):
    """The owner changed keys of [rounds]. deadline_at: the open round's from now on, seconds since 1970; None: it stays."""

    values: Annotated[dict[Literal["count", "quorum", "deadline_seconds"], float], Meta(min_length=1)]
    deadline_at: float | None


class RunEnded(Fact, frozen=True, tag="run_ended"):
    """The run is over, and its status at the end."""

    summary: LiveStatus


def event_of_record(
    record: rec.AnyRecord,
    rounds: int,
    state: LedgerState,
    travelled: tuple[int, int],
    summary: LiveStatus | None,
) -> Fact | None:
    """Make the event of a record that `state` has folded in; None: the record is not said to people.

    Args:
        rounds: [rounds] count.
        travelled: the bytes up and down of all edges since the run began.
        summary: the run's status; only where it ended.
    """
    values = structs.asdict(record)
    match record:
        case rec.RunStarted() | rec.SettingsChanged():
            return None
        case rec.RunPaused():
            return RunPaused(rounds=rounds)
        case rec.RunResumed():
            return RunResumed(rounds=rounds)
        case rec.RulesChanged():
            values = {key: value for key, value in values.items() if key != "instead_of"}
            return RulesChanged(rounds=rounds, **values)
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
            bytes_up, bytes_down = travelled
            return RoundClosed(
                rounds=rounds,
                loss=state.losses[-1],
                updates=len(state.accepted),
                bytes_up=bytes_up,
                bytes_down=bytes_down,
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
            assert summary is not None, "whoever says the end asks for the status first"
            return RunEnded(rounds=record.rounds, summary=summary)
        case _:
            assert_never(record)


# --- a comparison ----------------------------------------------------------------------------------------------------


class CellDone(HubEvent, frozen=True, tag="cell"):
    """A federated run of a comparison is over and judged. accuracy: that of the plug-in."""

    cell: str
    accuracy: Share
    seconds: Annotated[float, Meta(gt=0)]


# --- reading them back -----------------------------------------------------------------------------------------------


def kinds() -> list[type[HubEvent]]:
    """List the structs of all events; those of progress share a tag."""
    found = [*HubEvent.__subclasses__(), *Fact.__subclasses__()]
    return [kind for kind in found if kind is not Fact]


def read(line: str | bytes) -> HubEvent | None:
    """Decode one line that a hub of this release printed; None: it is the terminal line.

    Raises:
        ValueError: a hub of this release does not print this line.
    """
    values = json.loads(line)
    if "terminal" in values:
        return None
    for kind in kinds():
        if kind.__struct_config__.tag == values.get("event"):
            try:
                return msgspec.convert(values, kind, str_keys=True)
            except msgspec.ValidationError:
                continue
    raise ValueError(f"a hub of this release does not print {line!r}; read it with the release that wrote it")
