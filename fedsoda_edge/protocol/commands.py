"""What the agent may ask of its worker, and what the worker answers: Check, Open, Sweep, Train, Advance, Examine.

Paths cross as text and tensors as files; ids, text and hidden states never cross. How calls travel is `ports/child.py`'s.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from fedsoda_edge.protocol.calls import Call, NoProgress
from fedsoda_edge.protocol.messages import Digest, Factor, LocalSettings
from fedsoda_edge.protocol.needs import MemoryPlan

View = Literal["adapter", "emulator"]  # which of the two LoRA views that an edge holds


class Rows(msgspec.Struct, frozen=True, kw_only=True):
    """Private rows: a file or directory, {template name: column}, and the run's two templates as text."""

    path: str
    columns: dict[str, str]
    prompt: str
    completion: str


class BorderCache(msgspec.Struct, frozen=True, kw_only=True):
    """Where and how border states are kept on disk. key: 32 bytes as hex; max_bytes None: what is free on the disk."""

    directory: str
    key: str
    dtype: str
    max_bytes: int | None


# --- answers ---------------------------------------------------------------------------------------------------------


class Checked(msgspec.Struct, frozen=True):
    rows: int


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    """process_bytes: memory of the worker before it has read anything. longest_ids, longest_labels: of one sample."""

    num_examples: int
    num_skipped: int
    threads: int
    process_bytes: int
    has_cuda: bool
    longest_ids: int
    longest_labels: int


class Swept(msgspec.Struct, frozen=True, kw_only=True):
    """num_kept: samples whose states are on disk, in kept_bytes; num_damaged: records that had to be computed again."""

    num_kept: int
    kept_bytes: int
    num_damaged: int


class SweepProgress(msgspec.Struct, frozen=True):
    """Steps of the sweep that are done, of all."""

    done: int
    total: int


class Trained(msgspec.Struct, frozen=True, kw_only=True):
    """One local round. loss: mean over completion ids, nats; None: not finite, and the update holds zeros."""

    num_examples: int
    num_steps: int
    num_tokens: int
    micro_batch: int
    seconds: float
    loss: float | None
    num_damaged: int


class TrainingStep(msgspec.Struct, frozen=True, kw_only=True):
    """An optimiser step that was taken. loss: of the step, nats; None: not finite."""

    step: int
    steps: int
    loss: float | None
    tokens_per_second: float


class Advanced(msgspec.Struct, frozen=True):
    """The digest of the new view, which tells whether it is the hub's."""

    digest: Digest


class Examined(msgspec.Struct, frozen=True, kw_only=True):
    """What torch sees on this machine. accelerator: "" where there is none; nf4_problem: "" where NF4 works."""

    torch: str
    threads: int
    device: str
    accelerator: str
    nf4_problem: str


# --- calls -----------------------------------------------------------------------------------------------------------


class Check(Call[Checked, NoProgress], frozen=True, tag="check"):
    """Read every row of data whose format the agent does not read."""

    rows: Rows


class Open(Call[Opened, NoProgress], frozen=True, tag="open"):
    """Read bundle and data, as soon as the tokenizer is there. store: directory of files by digest.

    max_length: ids of a sample at most.
    """

    store: str
    manifest: Digest
    rows: Rows
    max_length: int


class Sweep(Call[Swept, SweepProgress], frozen=True, tag="sweep"):
    """Compute the border states of all samples with this emulator LoRA, and train by this memory plan from now on.

    emulator: file of the emulator LoRA's view; None: the bundle's own. room: bytes that the worker may take.
    """

    emulator: str | None
    cache: BorderCache
    memory: MemoryPlan
    room: int


class Train(Call[Trained, TrainingStep], frozen=True, tag="train"):
    """Train one local round; leave the coded delta at `update` and the new error feedback at `new_residual`.

    view: file of the adapter LoRA that the round starts from; None: the bundle's own. residual: file of the error
    feedback to add; None: none. checkpoint: directory of the round's checkpoints.
    """

    view: str | None
    settings: LocalSettings
    seed: int
    round: int
    edge: str
    codec: str
    trains: Factor
    residual: str | None
    update: str
    new_residual: str
    checkpoint: str


class Advance(Call[Advanced, NoProgress], frozen=True, tag="advance"):
    """Write v + decode(delta) to `out`. view: file of v; None: the bundle's own. moved: the factor that the delta has."""

    which: View
    view: str | None
    delta: str
    moved: Factor
    codec: str
    out: str


class Examine(Call[Examined, NoProgress], frozen=True, tag="examine"):
    """Look at torch, the accelerator and NF4 on this machine."""


Command = Check | Open | Sweep | Train | Advance | Examine
