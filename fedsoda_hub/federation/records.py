"""The ledger's records: what was decided, complete. Their bytes are kept for good, so that old ledgers replay.

A record names the largest sub-LLM's values first and the others' in `smaller`; `state.py` has one tuple of all. What a
record means there is `state.py`'s, when one is written is `rounds.py`'s.
"""

from __future__ import annotations

from typing import Any

import msgspec

from fedsoda_edge.protocol.messages import Digest, EdgeId

Keys = dict[str, Any]  # of RUN.toml, as people write them, with their values
Figures = dict[str, Any]  # accuracy, loss and auc by model, and num_examples, as `jobs.EvaluateResult` has them


class Record(msgspec.Struct, frozen=True, tag_field="record", kw_only=True, forbid_unknown_fields=True):
    """The root of all records. Replay folds them in order; it never samples, reads a clock or trains."""


class RunStarted(Record, frozen=True, tag="run_started"):
    """run_id is made once; fixed are the settings that must equal on resume."""

    run_id: str
    fixed: Keys


class SettingsChanged(Record, frozen=True, tag="settings_changed"):
    """Keys that may change between starts (count, quorum, deadline), as they are now."""

    values: Keys


class PreparedClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of the smaller sub-LLMs. adapter_view: None where its LoRA has the layout of the largest's, whose view it shares."""

    manifest: Digest
    emulator_view: Digest
    public_kl: dict[str, float]
    adapter_view: Digest | None = None


class RunPrepared(Record, frozen=True, tag="prepared"):
    """What the run starts from: the largest sub-LLM's; smaller: by size class, from class 1 on.

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
    result: Figures


class RunEnded(Record, frozen=True, tag="run_ended"):
    rounds: int


AnyRecord = (
    RunStarted
    | SettingsChanged
    | RunPrepared
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
