"""Define the torch work that the round machine asks for: each job with its result. The same job gives the same blobs.

Sub-LLMs are tuples by size class, the largest first. Starting a job is `serving/torch_jobs.py`'s, doing it `compute.py`'s.
"""

from __future__ import annotations

import msgspec

from fedsoda_edge.protocol.calls import Call
from fedsoda_edge.protocol.messages import Digest, EdgeId, Factor

MAX_STANDINGS = 100  # of a round, which its record holds

# --- progress --------------------------------------------------------------------------------------------------------


class Stage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="stage"):
    """The progress of a stage of a job: done of total. kl: public KL, nats, of the alignment's last step."""

    stage: str
    done: int
    total: int
    kl: float | None = None


class DiskNeeded(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="disk_needed"):
    """The bytes that the cached targets of the teacher need, and how many are free."""

    stage: str
    needed_bytes: int
    free_bytes: int


class BorderMapFitted(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="border_map_fitted"):
    """The relative squared error of border states on held-out prompts: without a map, with one of full rank, with this."""

    stage: str
    error_before: float
    error_whole: float
    error: float


class LeftOut(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="left_out"):
    """The reason why a stage is left out. stage: "no border map", "not healed" or "no krum"."""

    stage: str
    why: str


class ShapeMeasured(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="shape_measured"):
    """One shape of the sub-LLM that `groups = "auto"` looked at: public KL, nats, and cosine of adapter gradients."""

    stage: str
    layers_per_group: int
    groups: int
    kl: float
    cosine: float


class ShapeHealed(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="shape_healed"):
    """One shape of the sub-LLM that was healed for a look: what is left of the border's squared length, as a share."""

    stage: str
    layers_per_group: int
    groups: int
    error: float


JobProgress = Stage | DiskNeeded | BorderMapFitted | LeftOut | ShapeMeasured | ShapeHealed


# --- results ---------------------------------------------------------------------------------------------------------


class PreparedSubLLM(msgspec.Struct, frozen=True, kw_only=True):
    """A sub-LLM as preparation leaves it: manifest, first views of adapter and emulator LoRA, public KL in nats."""

    manifest: Digest
    adapter_view: Digest
    emulator_view: Digest
    public_kl: dict[str, float]


class PrepareResult(msgspec.Struct, frozen=True, kw_only=True):
    """The prepared sub-LLMs. master: w, the LoRA of all layers that any of them trains."""

    sub_llms: tuple[PreparedSubLLM, ...]
    master: Digest


class ViewStep(msgspec.Struct, frozen=True, kw_only=True):
    """A new view v and the coded step that leads to it from the one before."""

    view: Digest
    delta: Digest


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """One edge's update beside what the round made of all updates, so that an owner sees who spoils.

    norm: its length. cosine: to the round's result; None: one of the two is 0. kept: the share of it that [aggregation]
    robust did not clip or cut; None: the rule has no such share. All are rounded.
    """

    edge: EdgeId
    norm: float
    cosine: float | None
    kept: float | None


class AggregateResult(msgspec.Struct, frozen=True, kw_only=True):
    """The master after a round, and the steps to it.

    steps: one for each view of the job. cross_term: ||M_res|| / ||M||, what averaging A and B apart loses of the mean
    product; None: the factors have different ranks and cannot be averaged. standings: of the updates, at most
    MAX_STANDINGS, those that are farthest from the result.
    """

    master: Digest
    steps: tuple[ViewStep, ...]
    moments: Digest | None
    cross_term: float | None
    standings: tuple[Standing, ...] = ()


class ProbeResult(msgspec.Struct, frozen=True, kw_only=True):
    """The drift that a probe found: KL(full LLM || sub-LLM), nats, and the cosine of the adapter LoRA's two gradients."""

    kl: float
    cosine: float


class RealignedSubLLM(msgspec.Struct, frozen=True, kw_only=True):
    """A new view of the emulator LoRA, the coded step to it, and public KL, nats, before and after."""

    view: Digest
    delta: Digest
    kl_before: float
    kl_after: float


class RealignResult(msgspec.Struct, frozen=True):
    """The sub-LLMs after an alignment, the largest first."""

    sub_llms: tuple[RealignedSubLLM, ...]


class RepruneSubLLM(msgspec.Struct, frozen=True, kw_only=True):
    """The manifest of the layers that were drawn, and the first view of their LoRA."""

    manifest: Digest
    view: Digest


class RepruneResult(msgspec.Struct, frozen=True, kw_only=True):
    """The sub-LLMs with other layers. master: w, with the LoRA of layers that no sub-LLM had before."""

    master: Digest
    sub_llms: tuple[RepruneSubLLM, ...]


class EvaluateResult(msgspec.Struct, frozen=True, kw_only=True):
    """The figures by model (full, sub_llm, plug_in): accuracy, mean completion loss in nats, AUC, mean rank, shares.

    None: not finite, or there are not two choices, or not more. shares: how often a model chose each answer, right_shares:
    how often each is right; empty without choices. Ledgers keep it as it is; the oldest have no AUC, rank and shares.
    """

    accuracy: dict[str, float]
    loss: dict[str, float | None]
    auc: dict[str, float | None] = {}
    mean_rank: dict[str, float | None] = {}
    shares: dict[str, dict[str, float]] = {}
    right_shares: dict[str, float] = {}
    num_examples: int


# --- jobs ------------------------------------------------------------------------------------------------------------


class Prepare(Call[PrepareResult, JobProgress], frozen=True, tag="prepare"):
    """The job to prune, quantize and align; what is done already is found again."""


class AcceptedUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """A coded update as a blob, and the view that it starts from."""

    edge: EdgeId
    num_examples: int
    digest: Digest
    view: Digest


class Aggregate(Call[AggregateResult, JobProgress], frozen=True, tag="aggregate"):
    """The job that closes a round: merge the decoded updates into the next master; for each view v += decode(Q(w - v)).

    trains: the factor that this round's updates hold. views: the adapter views in force, the largest sub-LLM's first.
    """

    trains: Factor
    master: Digest
    moments: Digest | None
    views: tuple[Digest, ...]
    updates: tuple[AcceptedUpdate, ...]


class Probe(Call[ProbeResult, JobProgress], frozen=True, tag="probe"):
    """The job to measure how far the largest sub-LLM has drifted from the full LLM."""

    master: Digest
    emulator_view: Digest


class Realign(Call[RealignResult, JobProgress], frozen=True, tag="realign"):
    """The job to align every sub-LLM with the current adapter LoRA. version: that of the new alignment."""

    version: int
    master: Digest
    emulator_views: tuple[Digest, ...]


class Reprune(Call[RepruneResult, JobProgress], frozen=True, tag="reprune"):
    """The job to draw other layers for each sub-LLM, for the training of `round`."""

    round: int
    master: Digest


class Evaluate(Call[EvaluateResult, JobProgress], frozen=True, tag="evaluate"):
    """The job to judge full LLM, sub-LLM and plug-in on the run's evaluation data after `round`."""

    round: int
    master: Digest
    emulator_view: Digest
    manifest: Digest


Job = Prepare | Aggregate | Probe | Realign | Reprune | Evaluate
JobResult = PrepareResult | AggregateResult | ProbeResult | RealignResult | RepruneResult | EvaluateResult


def name_of(job: Job) -> str:
    """Return the job's name as people read it: prepare, aggregate, ..."""
    return str(type(job).__struct_config__.tag)
