"""Define what the agent may ask of its worker, and what it answers: Check, Open, Sweep, Train, Advance, Examine,
LoadTokenizer.

Paths cross as text and tensors as files; ids, text and hidden states never cross. How calls travel is left to
`ports/child.py`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from fedsoda_edge.protocol.calls import Call, NoProgress
from fedsoda_edge.protocol.messages import Digest, Factor, LocalSettings
from fedsoda_edge.protocol.needs import Dtype, MemoryPlan

View = Literal["adapter", "emulator"]  # which of the two LoRA views that an edge holds


class Rows(msgspec.Struct, frozen=True, kw_only=True):
    """Private rows: a file or directory, {template name: column}, and the run's two templates as text."""

    path: str
    columns: dict[str, str]
    prompt: str
    completion: str


class BorderCache(msgspec.Struct, frozen=True, kw_only=True):
    """The place and the form of border states on disk.

    key: 32 bytes as hex. dtype: "bf16" or "int8". max_bytes: the most that they may take; None: what is free.
    """

    directory: str
    key: str
    dtype: str
    max_bytes: int | None


# --- answers ---------------------------------------------------------------------------------------------------------


class Confinement(msgspec.Struct, frozen=True, kw_only=True):
    """The network and the paths that the worker's process gave up before it read anything.

    network: by which means it has none; "": it has that of its user. files: by which means it reads and writes its own
    paths alone; "": it reads and writes what its user may. missing: why it has one of them still, a clause each.
    """

    network: str = ""
    files: str = ""
    missing: tuple[str, ...] = ()


class Checked(msgspec.Struct, frozen=True):
    """The number of rows, all of which can be used."""

    rows: int


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    """The samples of the data.

    num_skipped: rows that are no sample. threads: CPU threads of torch. process_bytes: memory of the worker before it has
    read anything. has_cuda: whether torch can use a GPU. longest_ids, longest_labels: the most ids and completion ids that
    a sample has. confinement: None: it has no process of its own.
    """

    num_examples: int
    num_skipped: int
    threads: int
    process_bytes: int
    has_cuda: bool
    longest_ids: int
    longest_labels: int
    confinement: Confinement | None = None


class Swept(msgspec.Struct, frozen=True, kw_only=True):
    """The border states of all samples.

    num_kept: samples whose states are on disk, in kept_bytes. num_damaged: records that had to be computed again.
    """

    num_kept: int
    kept_bytes: int
    num_damaged: int


class SweepProgress(msgspec.Struct, frozen=True):
    """Steps of the sweep that are done, of all its steps (total)."""

    done: int
    total: int


class Trained(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a local round.

    num_examples: distinct samples trained on. num_tokens: ids of all samples of all steps. micro_batch: samples that
    went through at once in the end. loss: mean over completion ids, in nats; None: not finite, and the update holds
    zeros. num_damaged: records of the border cache that had to be computed again.
    """

    num_examples: int
    num_steps: int
    num_tokens: int
    micro_batch: int
    seconds: float
    loss: float | None
    num_damaged: int


class TrainingStep(msgspec.Struct, frozen=True, kw_only=True):
    """An optimiser step that was taken. loss: the step's, in nats; None: it was not finite."""

    step: int
    steps: int
    loss: float | None
    tokens_per_second: float


class Advanced(msgspec.Struct, frozen=True):
    """The new view. digest: equal to the one that the hub announced, if the two views are the same."""

    digest: Digest


class Examined(msgspec.Struct, frozen=True, kw_only=True):
    """The state of torch on this machine.

    dtype: the one in which training computes on the device. accelerator: "" where there is none. nf4_problem: "" where NF4
    works. confinement: None: the worker has no process of its own.
    """

    torch: str
    threads: int
    device: str
    dtype: Dtype
    accelerator: str
    nf4_problem: str
    confinement: Confinement | None = None


class LoadedTokenizer(msgspec.Struct, frozen=True, kw_only=True):
    """A model's tokenizer. files: the path of each by its name. eos: as in the model's config. vocab_size: None: unknown."""

    files: dict[str, str]
    eos: int | list[int] | None
    vocab_size: int | None


# --- calls -----------------------------------------------------------------------------------------------------------


class Check(Call[Checked, NoProgress], frozen=True, tag="check"):
    """The call to read every row of data whose format the agent does not read."""

    rows: Rows


class Open(Call[Opened, NoProgress], frozen=True, tag="open"):
    """The call to read bundle and data, as soon as the tokenizer is there.

    store: the directory of files by digest. manifest: the bundle's. max_length: ids of a sample at most.
    """

    store: str
    manifest: Digest
    rows: Rows
    max_length: int


class Sweep(Call[Swept, SweepProgress], frozen=True, tag="sweep"):
    """The call to compute the border states of all samples, and to train by this memory plan from now on.

    emulator: the file of the emulator's view; None: the bundle's own. room: bytes that the worker may take.
    """

    emulator: str | None
    cache: BorderCache
    memory: MemoryPlan
    room: int


class Train(Call[Trained, TrainingStep], frozen=True, tag="train"):
    """The call to train one local round, and to write the coded delta to `update`, the new error feedback to `new_residual`.

    view: the file of the adapter LoRA from which the round starts; None: the bundle's own. residual: the file of the
    error feedback to add; None: there is none. checkpoint: the directory of the round's checkpoints.
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
    """The call to write v + decode(delta) to `out`.

    which: whether v is the adapter's or the emulator's view. view: the file of v; None: the bundle's own. moved: the
    factor that the delta holds.
    """

    which: View
    view: str | None
    delta: str
    moved: Factor
    codec: str
    out: str


class Examine(Call[Examined, NoProgress], frozen=True, tag="examine"):
    """The call to look at torch, the accelerator and NF4 on this machine."""


class LoadTokenizer(Call[LoadedTokenizer, NoProgress], frozen=True, tag="load_tokenizer"):
    """The call to load the tokenizer of a model's directory as Transformers does, and to write it down in `to`."""

    directory: str
    to: str


Command = Check | Open | Sweep | Train | Advance | Examine | LoadTokenizer
