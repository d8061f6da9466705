"""Define the ledger's records: all that was decided. Their form never changes, so that old ledgers replay.

A record names the largest sub-LLM's values first and the others' in `smaller`; `state.py` has one tuple of all. What a
record means is `state.py`'s, when one is written is `rounds.py`'s.
"""

from __future__ import annotations

import msgspec

from fedsoda_edge.protocol.messages import Digest, EdgeId
from fedsoda_hub.federation.jobs import EvaluateResult, Standing

Keys = dict[str, object]  # of RUN.toml, as people write them, with their values


class Record(msgspec.Struct, frozen=True, tag_field="record", kw_only=True, forbid_unknown_fields=True):
    """The root of all records. Replay folds them in order; it never samples, reads a clock or trains."""


class RunStarted(Record, frozen=True, tag="run_started"):
    """The run began, or has other settings before it is prepared; the last record of these counts.

    run_id: drawn once. fixed: the settings that must be equal once the run is prepared.
    """

    run_id: str
    fixed: Keys


class SettingsChanged(Record, frozen=True, tag="settings_changed"):
    """The keys that may change between starts (count, quorum, deadline), with their values from now on."""

    values: Keys


class RunPaused(Record, frozen=True, tag="run_paused"):
    """The owner paused the run: the open round continues to its end, and no other opens."""


class RunResumed(Record, frozen=True, tag="run_resumed"):
    """The owner ended the pause."""


class RulesChanged(Record, frozen=True, tag="rules_changed"):
    """The owner changed keys of [rounds] while a hub serves the run: count, quorum, deadline_seconds.

    instead_of: what RUN.toml says of the same keys; once it says something else, that counts. deadline_at: the open round's
    from now on, seconds since 1970; None: it stays.
    """

    values: dict[str, float]
    instead_of: dict[str, float]
    deadline_at: float | None = None


class PreparedClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of the smaller sub-LLMs. adapter_view None: its LoRA has the layout of the largest's, whose view it shares."""

    manifest: Digest
    emulator_view: Digest
    public_kl: dict[str, float]
    adapter_view: Digest | None = None


class RunPrepared(Record, frozen=True, tag="prepared"):
    """The run is prepared: what it starts from, for the largest sub-LLM. smaller: by size class, from class 1 on.

    master: w, the LoRA of all layers that any of them trains; None: the largest's first view is all of it.
    """

    manifest: Digest
    adapter_view: Digest
    emulator_view: Digest
    public_kl: dict[str, float]
    smaller: tuple[PreparedClass, ...] = ()
    master: Digest | None = None


class RoundOpened(Record, frozen=True, tag="round_opened"):
    """A round opened. view: that of the largest sub-LLM's adapter. deadline_at: seconds since 1970."""

    round: int
    cohort: tuple[EdgeId, ...]
    view: Digest
    alignment: int
    deadline_at: float


class CohortExtended(Record, frozen=True, tag="cohort_extended"):
    """Edges were invited besides: below quorum at the deadline, which is set again, or back from a pause before it."""

    round: int
    invited: tuple[EdgeId, ...]
    deadline_at: float


class UpdateAccepted(Record, frozen=True, tag="update_accepted"):
    """An update was accepted. size_class: whose view it starts from, and whose layout it has."""

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
    """The open round's deadline passed."""

    round: int


class ClosedClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The new view of a smaller sub-LLM and the coded step to it."""

    view: Digest
    delta: Digest


class RoundClosed(Record, frozen=True, tag="round_closed"):
    """A round closed: digests of w, of the largest sub-LLM's view v and of the coded step to it.

    smaller: the same for the size classes that have a view of their own, in order. moments: those of the hub's optimizer;
    None: it has none. cross_term: ||M_res|| / ||M||, what averaging A and B apart loses of the mean product
    (docs/methods.md (m10-cross-term)); None: it was not measured. standings: where updates lay beside the result; of the
    oldest ledgers empty.
    """

    round: int
    master: Digest
    view: Digest
    delta: Digest
    moments: Digest | None = None
    cross_term: float | None = None
    smaller: tuple[ClosedClass, ...] = ()
    standings: tuple[Standing, ...] = ()


class ReprunedClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The manifest and the first view of a smaller sub-LLM with other layers."""

    manifest: Digest
    view: Digest


class Repruned(Record, frozen=True, tag="repruned"):
    """Other layers were drawn for each size class, before the training of `round`. smaller: from class 1 on.

    A view is cut from w and is the LoRA that the bundle of its manifest begins with. master: w, with the LoRA of layers
    that no sub-LLM had before.
    """

    round: int
    master: Digest
    manifest: Digest
    view: Digest
    smaller: tuple[ReprunedClass, ...] = ()


class RealignedClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The new emulator view of a smaller sub-LLM, the coded step to it, and public KL, nats."""

    view: Digest
    delta: Digest
    kl_before: float
    kl_after: float


class Realigned(Record, frozen=True, tag="realigned"):
    """The emulator LoRA has a new version, before the training of `round`. smaller: by size class, from class 1 on.

    All classes are realigned at once, so that a version means the same to every edge. kl_before, kl_after: public KL,
    nats.
    """

    round: int
    version: int
    view: Digest
    delta: Digest
    kl_before: float
    kl_after: float
    smaller: tuple[RealignedClass, ...] = ()


class Probed(Record, frozen=True, tag="probed"):
    """The drift was measured, before the training of `round`, with the current adapter LoRA.

    kl: KL(full LLM || sub-LLM) on held-out public blocks, nats. cosine: that of the adapter LoRA's gradients in both.
    """

    round: int
    kl: float
    cosine: float


class Evaluated(Record, frozen=True, tag="evaluated"):
    """The run was judged after `round`."""

    round: int
    result: EvaluateResult


class RunEnded(Record, frozen=True, tag="run_ended"):
    """The run is over. rounds: how many were closed."""

    rounds: int


AnyRecord = (
    RunStarted
    | SettingsChanged
    | RunPaused
    | RunResumed
    | RulesChanged
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
