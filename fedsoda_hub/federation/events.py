"""Define what the round machine hears and what it answers: events in, effects out.

Facts that outlive the process are in `records.py`; everything here is volatile. The rules are in `rounds.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fedsoda_edge.protocol.messages import Digest, EdgeId, Factor, HubMessage
from fedsoda_hub.federation.jobs import Job, JobResult
from fedsoda_hub.federation.records import AnyRecord
from fedsoda_hub.federation.refusals import RefusalKind

# --- events: what happened ------------------------------------------------------------------------------


@dataclass(frozen=True)
class EdgeReady:
    """The edge holds the bundle of its size class and may be invited. It says so after every connect."""

    edge: EdgeId
    size_class: int = 0


@dataclass(frozen=True)
class EdgeResumed:
    """A pause of the edge is over: it may be invited again."""

    edge: EdgeId


@dataclass(frozen=True)
class EdgeGone:
    """The connection ended; the edge may come back."""

    edge: EdgeId


@dataclass(frozen=True)
class EdgeAway:
    """The edge said that it pauses or leaves, so it will not answer."""

    edge: EdgeId
    how: Literal["paused", "left"]


@dataclass(frozen=True)
class EdgeDeclined:
    """The edge declined to send an update of this round."""

    edge: EdgeId
    round: int
    reason: str


@dataclass(frozen=True)
class UploadStarted:
    """The edge announced an update of this round."""

    edge: EdgeId
    round: int


@dataclass(frozen=True)
class UploadStalled:
    """The announced update will not arrive."""

    edge: EdgeId


@dataclass(frozen=True)
class UpdateArrived:
    """The edge's upload is complete and its blob durable.

    problem: what the structural check found; None: nothing. size_class: that of the layout it was checked against.
    """

    edge: EdgeId
    round: int
    base: Digest
    alignment: int
    digest: Digest
    num_examples: int
    loss: float | None
    problem: str | None = None
    size_class: int = 0


@dataclass(frozen=True)
class DeadlineReached:
    """The timer of SetDeadline(round, at) fired. A timer of an earlier round or deadline is ignored."""

    round: int
    at: float


@dataclass(frozen=True)
class JobDone:
    """Torch work that the machine asked for is done. The result has the type that the job names."""

    job: Job
    result: JobResult


@dataclass(frozen=True)
class PauseAsked:
    """The owner asks that no round opens from now on."""


@dataclass(frozen=True)
class ResumeAsked:
    """The owner asks that rounds open again."""


@dataclass(frozen=True)
class FinishAsked:
    """The owner asks that the run ends after the open round, or at once between two."""


@dataclass(frozen=True)
class ChangeAsked:
    """The owner asks for other [rounds] settings from now on. None: that key stays. at: now, seconds since 1970."""

    at: float
    count: int | None = None
    quorum: float | None = None
    deadline_seconds: float | None = None


OwnerAsked = PauseAsked | ResumeAsked | FinishAsked | ChangeAsked
RoundEvent = (
    EdgeReady
    | EdgeResumed
    | EdgeGone
    | EdgeAway
    | EdgeDeclined
    | UploadStarted
    | UploadStalled
    | UpdateArrived
    | DeadlineReached
    | JobDone
    | OwnerAsked
)


# --- effects: what to do --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Append:
    """The effect to write the record durably, then `apply` it. Effects after it are performed only if that worked."""

    record: AnyRecord


@dataclass(frozen=True)
class Send:
    """The effect to send this message to the edge, if it is connected. refused: of a refusal, its kind."""

    edge: EdgeId
    message: HubMessage
    refused: RefusalKind | None = field(default=None, compare=False)  # for who counts; the message says what it is


@dataclass(frozen=True)
class SendOffer:
    """The effect to send the edge the open round's offer; sizes of blobs and seconds left are filled in outside.

    trains: the factor that this round's updates hold. moved: the factor that the step to the round's view holds, by the
    name that it has on the wire.
    """

    edge: EdgeId
    size_class: int
    trains: Factor
    moved: Factor


@dataclass(frozen=True)
class SetDeadline:
    """The effect to report DeadlineReached at this time, and to cancel the timer before."""

    round: int
    at: float


@dataclass(frozen=True)
class StartJob:
    """The effect to start torch work; its result comes back as JobDone. The same job gives the same blobs."""

    job: Job


@dataclass(frozen=True)
class Wait:
    """The effect to tell people why nothing can be done now."""

    why: str


@dataclass(frozen=True)
class Ignore:
    """The answer to an event that changes nothing, and why."""

    because: str


@dataclass(frozen=True)
class Finish:
    """The effect to end the run: it is over, and every connected edge has got its Farewell."""


Effect = Append | Send | SendOffer | SetDeadline | StartJob | Wait | Ignore | Finish
