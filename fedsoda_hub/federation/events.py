"""What the round machine is told, what it answers, and what is written down: events, effects, records.

Records are facts of the ledger; everything else is volatile. The rules are in `rounds.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from fedsoda_edge.protocol.messages import Digest, EdgeId, Message

# --- records: facts that outlive the process ------------------------------------------------------------


class Record(msgspec.Struct, frozen=True, tag_field="record", kw_only=True, forbid_unknown_fields=True):
    """The root of all records. Replay folds them in order; it never samples, reads a clock or trains."""


class RunStarted(Record, frozen=True, tag="run_started"):
    """run_id is made once; fixed are the settings that must equal on resume."""

    run_id: str
    fixed: dict[str, Any]


class SettingsChanged(Record, frozen=True, tag="settings_changed"):
    """Keys that may change between starts (count, quorum, deadline), as they are now."""

    values: dict[str, Any]


class PreparedClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of the smaller sub-LLMs. adapter_view: None where its LoRA has the layout of the largest's, whose view it shares."""

    manifest: Digest
    emulator_view: Digest
    public_kl: dict[str, float]
    adapter_view: Digest | None = None


class Prepared(Record, frozen=True, tag="prepared"):
    """Of the largest sub-LLM; smaller: by size class, from class 1 on.

    master: w, the LoRA of all layers that any of them trains; None: the largest's first view is all of it.
    """

    manifest: Digest
    adapter_view: Digest
    emulator_view: Digest
    public_kl: dict[str, float]
    smaller: tuple[PreparedClass, ...] = ()
    master: Digest | None = None


class RoundOpened(Record, frozen=True, tag="round_opened"):
    round: int
    cohort: tuple[EdgeId, ...]
    view: Digest
    alignment: int
    deadline_at: float


class CohortExtended(Record, frozen=True, tag="cohort_extended"):
    """`invited` are asked (again): below quorum at the deadline, which moves on, or back from a pause before it."""

    round: int
    invited: tuple[EdgeId, ...]
    deadline_at: float


class UpdateAccepted(Record, frozen=True, tag="update_accepted"):
    """size_class: whose view it starts from, and whose layout it has."""

    round: int
    edge: EdgeId
    digest: Digest
    num_examples: int
    loss: float
    size_class: int = 0


class EdgeAnswered(Record, frozen=True, tag="edge_answered"):
    """An invited edge will send no update this round: refused, declined, paused or left."""

    round: int
    edge: EdgeId
    how: str


class DeadlinePassed(Record, frozen=True, tag="deadline_passed"):
    round: int


class ClosedClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    view: Digest
    delta: Digest


class RoundClosed(Record, frozen=True, tag="round_closed"):
    """w, v of the largest sub-LLM and the coded step between views, as digests; smaller: of the classes that have a view of
    their own, in order.

    moments: of the hub's optimiser, where it has any. cross_term: ||M_res|| / ||M||, what averaging A and B apart loses
    of the mean product (algorithms/products.py); None: closed by a hub that did not measure it.
    """

    round: int
    master: Digest
    view: Digest
    delta: Digest
    moments: Digest | None = None
    cross_term: float | None = None
    smaller: tuple[ClosedClass, ...] = ()


class ReprunedClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    manifest: Digest
    view: Digest


class Repruned(Record, frozen=True, tag="repruned"):
    """Before local training of `round`: other layers for each size class; smaller: from class 1 on.

    A view is cut from w and is the LoRA that the bundle of its manifest begins with. master: w, with the LoRA of layers
    that nobody had yet.
    """

    round: int
    master: Digest
    manifest: Digest
    view: Digest
    smaller: tuple[ReprunedClass, ...] = ()


class RealignedClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    view: Digest
    delta: Digest
    kl_before: float
    kl_after: float


class Realigned(Record, frozen=True, tag="realigned"):
    """Before local training of `round`: a new version of the emulator LoRA; smaller: by size class, from class 1 on.

    All classes are realigned at once, so that a version means the same to every edge.
    """

    round: int
    version: int
    view: Digest
    delta: Digest
    kl_before: float
    kl_after: float
    smaller: tuple[RealignedClass, ...] = ()


class Probed(Record, frozen=True, tag="probed"):
    """Before local training of `round`, where drift decides: KL(full LLM || sub-LLM) on held-out public blocks, and the
    cosine of the adapter LoRA's gradients in both; with the current adapter LoRA."""

    round: int
    kl: float
    cosine: float


class Evaluated(Record, frozen=True, tag="evaluated"):
    round: int
    result: dict[str, Any]


class RunEnded(Record, frozen=True, tag="run_ended"):
    rounds: int


AnyRecord = (
    RunStarted
    | SettingsChanged
    | Prepared
    | RoundOpened
    | CohortExtended
    | UpdateAccepted
    | EdgeAnswered
    | DeadlinePassed
    | RoundClosed
    | Realigned
    | Repruned
    | Probed
    | Evaluated
    | RunEnded
)


# --- events: what happened ------------------------------------------------------------------------------


@dataclass(frozen=True)
class EdgeReady:
    """The edge holds the bundle and may be invited. Also after `Resumed` and after every reconnect."""

    edge: EdgeId


@dataclass(frozen=True)
class EdgeGone:
    """The connection ended; the edge may come back."""

    edge: EdgeId


@dataclass(frozen=True)
class EdgeAway:
    """The edge said that it will not answer: how is paused or left."""

    edge: EdgeId
    how: str


@dataclass(frozen=True)
class Declined:
    edge: EdgeId
    round: int
    reason: str


@dataclass(frozen=True)
class UploadStarted:
    edge: EdgeId
    round: int


@dataclass(frozen=True)
class UploadStalled:
    edge: EdgeId


@dataclass(frozen=True)
class UpdateArrived:
    """A whole upload whose blob is durable. problem: what the structural check found, if anything; size_class: the edge's."""

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
    """The timer of SetDeadline(round, at) fired; one that the round has outlived is ignored."""

    round: int
    at: float


@dataclass(frozen=True)
class ComputeDone:
    job: str
    result: dict[str, Any]


Event = (
    EdgeReady
    | EdgeGone
    | EdgeAway
    | Declined
    | UploadStarted
    | UploadStalled
    | UpdateArrived
    | DeadlineReached
    | ComputeDone
)


# --- effects: what to do --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Append:
    """Write the record durably, then `apply` it. Effects after it happen only if that worked."""

    record: AnyRecord


@dataclass(frozen=True)
class Send:
    edge: EdgeId
    message: Message


@dataclass(frozen=True)
class Offer:
    """Send the edge the open round's offer; sizes of blobs and seconds left are filled in outside."""

    edge: EdgeId


@dataclass(frozen=True)
class SetDeadline:
    round: int
    at: float


@dataclass(frozen=True)
class Compute:
    """Start torch work; its result comes back as ComputeDone. The same arguments give the same blobs."""

    job: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Waiting:
    """Nothing can go on, and why: for people."""

    why: str


@dataclass(frozen=True)
class Ignored:
    because: str


@dataclass(frozen=True)
class Finish:
    """The run is over and every connected edge was told."""


Effect = Append | Send | Offer | SetDeadline | Compute | Waiting | Ignored | Finish
