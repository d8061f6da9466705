"""What may be said between an edge and a hub. Field names carry the unit.

A message is one of the tagged structs below; `codec` turns it into bytes. Sizes and order of messages
are `session`'s. Nothing here knows sockets, tensors, clock or disk.
"""

from __future__ import annotations

from typing import Annotated, Literal, NewType

import msgspec
from msgspec import Meta

PROTOCOL_VERSION = 1

EdgeId = NewType("EdgeId", str)
Digest = NewType("Digest", str)  # sha256, 64 lower-case hex digits
Factor = Literal["both", "A", "B"]  # of a LoRA product B @ A


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=False, tag_field="type", kw_only=True):
    """The root of all messages. Unknown fields are ignored, so that a newer side may say more."""


# --- values inside messages -------------------------------------------------------------------------


class DeviceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the device has free, measured in the agent. vram_bytes 0: no usable GPU."""

    ram_bytes: int
    vram_bytes: int
    disk_bytes: int
    threads: int
    accelerator: str


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """The run's data template: `{name}` are columns."""

    prompt: str
    completion: str


class BlobRef(msgspec.Struct, frozen=True, kw_only=True):
    digest: Digest
    bytes: int


class LocalSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How one local round trains: the table [local] of RUN.toml as it travels in an offer."""

    epochs: Annotated[int, Meta(ge=1, description="passes over an edge's samples in a round")] = 1
    max_steps: Annotated[int, Meta(ge=0, description="steps of a round at most; 0: all of its epochs")] = 0
    batch_size: Annotated[int, Meta(ge=1, description="samples of a step")] = 8
    learning_rate: Annotated[float, Meta(ge=0, description="AdamW's learning rate")] = 1e-4
    weight_decay: Annotated[float, Meta(ge=0, description="AdamW's weight decay")] = 0.01
    max_grad_norm: Annotated[float, Meta(gt=0, description="norm that gradients are clipped to")] = 1.0
    proximal_mu: Annotated[float, Meta(ge=0, description="weight of FedProx's pull to the round's view; 0: none")] = (
        0.01
    )
    max_length: Annotated[int, Meta(ge=2, description="tokens of a sample at most; a longer one is cut at its end")] = (
        512
    )


class ViewRef(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A view (federation.md): its digest as fp32 safetensors, and the two ways to reach it.

    delta: the coded step from the previous view; None when there is none (first view).
    snapshot: the whole view, fp32; None when the view is the bundle's own initial LoRA.
    moved: the factor that `delta` holds; the other one is as it was in the previous view.
    """

    digest: Digest
    delta: BlobRef | None
    snapshot: BlobRef | None
    moved: Factor = "both"


class SizeClass(msgspec.Struct, frozen=True, kw_only=True):
    """A sub-LLM of the run. emulator: of the alignment in force; None: an older hub."""

    manifest: BlobRef
    emulator: ViewRef | None


# --- edge to hub ------------------------------------------------------------------------------------


class Hello(Message, frozen=True, tag="hello"):
    """First message. device_id is made once in FEDSODA_HOME; one token is bound to one device."""

    protocol: int
    software: str
    device_id: str
    device: DeviceFacts


class Ready(Message, frozen=True, tag="ready", omit_defaults=True):
    """The bundle is verified and the data is read: this edge may be invited.

    size_class: which sub-LLM it took: 0 the Welcome's own, 1 the first of `smaller`, ...
    """

    num_examples: int
    size_class: int = 0


class BlobRequest(Message, frozen=True, tag="blob_request"):
    """Ask for a blob of the run (delta, snapshot, alignment) from `offset` on."""

    digest: Digest
    offset: int = 0


class UpdateStart(Message, frozen=True, tag="update_start"):
    """Announce an update: `bytes` of coded delta follow in UpdateChunks. loss None: it was not finite."""

    round: int
    base: Digest
    alignment: int
    digest: Digest
    bytes: int
    codec: str
    num_examples: int
    loss: float | None


class UpdateChunk(Message, frozen=True, tag="update_chunk"):
    """A piece of the announced update; the bytes travel behind the header (codec)."""

    digest: Digest
    offset: int


class Decline(Message, frozen=True, tag="decline"):
    """This edge will not answer the round with an update."""

    round: int
    reason: str


class Progress(Message, frozen=True, tag="progress"):
    """Volatile: where the local round is. Never enters the ledger."""

    round: int
    step: int
    steps: int
    loss: float | None = None
    tokens_per_second: float | None = None


class Paused(Message, frozen=True, tag="paused"):
    reason: str


class Resumed(Message, frozen=True, tag="resumed"):
    pass


class Leave(Message, frozen=True, tag="leave"):
    """The edge goes for good (Ctrl+C, --max-rounds, `leave`)."""

    reason: str


# --- hub to edge ------------------------------------------------------------------------------------


class Welcome(Message, frozen=True, tag="welcome", omit_defaults=True):
    """Answer to Hello. `manifest` is fetched by HTTP as a blob.

    batch_size: samples of a step, which an edge's memory is planned with.
    emulator: of the alignment in force, so that an edge can sweep before its first offer; None: an older hub.
    smaller: sub-LLMs to take instead, from larger to smaller, where the device has no room for `manifest`'s.
    """

    protocol: int
    run_id: str
    run_name: str
    edge: EdgeId
    manifest: BlobRef
    rounds: int
    rounds_done: int
    template: Template | None
    max_length: int
    codec: str
    seed: int
    stall_seconds: float
    batch_size: int = 8
    emulator: ViewRef | None = None
    smaller: tuple[SizeClass, ...] = ()


class RoundOffer(Message, frozen=True, tag="round_offer", omit_defaults=True):
    """Train from view `view` and send back the delta before `due_seconds` from now.

    trains: the factor that is trained and sent; the other one stays the view's.
    has_feedback: whether what coding left over of the last update still means something.
    manifest: of the sub-LLM that is in force for this edge's size class; None: the one that it had first.
    """

    round: int
    rounds: int
    view: ViewRef
    alignment: int
    emulator: ViewRef
    local: LocalSettings
    due_seconds: float
    trains: Factor = "both"
    has_feedback: bool = True
    manifest: BlobRef | None = None


class BlobChunk(Message, frozen=True, tag="blob_chunk"):
    """A piece of a requested blob; the bytes travel behind the header (codec)."""

    digest: Digest
    offset: int
    total: int


class Receipt(Message, frozen=True, tag="receipt"):
    """The update is durable. Sending it again returns the same receipt."""

    round: int
    digest: Digest


class Refusal(Message, frozen=True, tag="refusal"):
    """What was refused and why. retry: the same thing may be sent again later (disk full)."""

    reason: str
    round: int | None = None
    retry: bool = False
    fatal: bool = False


class RoundClosed(Message, frozen=True, tag="round_closed"):
    round: int
    num_updates: int


class Farewell(Message, frozen=True, tag="farewell"):
    """The run is over."""

    rounds: int
    reason: str


EdgeMessage = Hello | Ready | BlobRequest | UpdateStart | UpdateChunk | Decline | Progress | Paused | Resumed | Leave
HubMessage = Welcome | RoundOffer | BlobChunk | Receipt | Refusal | RoundClosed | Farewell
AnyMessage = EdgeMessage | HubMessage
