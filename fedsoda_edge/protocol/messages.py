"""Define what an edge and a hub may say to each other. Field names carry the unit.

A message is one of the tagged structs below. Turning it into bytes is left to `codec.py`, sizes and order of messages
to `session.py`. Nothing here knows sockets, tensors, clock or disk.
"""

from __future__ import annotations

from typing import Annotated, Literal, NewType

import msgspec
from msgspec import UNSET, Meta, UnsetType

PROTOCOL_VERSION = 1

EdgeId = NewType("EdgeId", str)
Digest = NewType("Digest", str)  # sha256, 64 lower-case hex digits
Factor = Literal["both", "A", "B"]  # of a LoRA product B @ A
Steps = Annotated[int, Meta(ge=0, le=2**31)]  # a hub shows them: a larger number is nobody's count
# Python's whole numbers have no end: one of 4,000 digits would reach sums, floats and JSON of others.
Whole = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Natural = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Few = Annotated[int, Meta(ge=1, le=2**31)]
FileBytes = Annotated[int, Meta(ge=1, le=2**40)]
Span = Annotated[float, Meta(ge=0, le=1e10)]
Name = Annotated[str, Meta(max_length=200)]
DeviceId = Annotated[str, Meta(pattern=r"\A[ -~]{1,64}\Z")]
Sha256 = Annotated[Digest, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=False, tag_field="type", kw_only=True):
    """The root of all messages. Unknown fields are ignored, so that a newer side may say more."""


# --- values inside messages -------------------------------------------------------------------------


class DeviceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The free resources of a device, measured in the agent.

    vram_bytes: 0 where there is no usable GPU. accelerator: the GPU's name; "" where there is none.
    """

    ram_bytes: Natural
    vram_bytes: Natural
    disk_bytes: Natural
    threads: Natural
    accelerator: Name


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """The run's data template; `{name}` stands for a column."""

    prompt: str
    completion: str


class BlobRef(msgspec.Struct, frozen=True, kw_only=True):
    """The digest of a blob, and its size."""

    digest: Sha256
    bytes: FileBytes


class LocalSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of local rounds: the table [local] of RUN.toml as it travels in an offer."""

    epochs: Annotated[int, Meta(ge=1, le=2**31, description="passes over an edge's samples in a round")] = 1
    max_steps: Annotated[int, Meta(ge=0, le=2**31, description="steps of a round at most; 0: all of its epochs")] = 0
    batch_size: Annotated[int, Meta(ge=1, le=2**31, description="samples of a step")] = 8
    learning_rate: Annotated[float, Meta(ge=0, description="AdamW's learning rate")] = 1e-4
    weight_decay: Annotated[float, Meta(ge=0, description="AdamW's weight decay")] = 0.01
    max_grad_norm: Annotated[float, Meta(gt=0, description="norm that gradients are clipped to")] = 1.0
    proximal_mu: Annotated[float, Meta(ge=0, description="weight of FedProx's pull to the round's view; 0: none")] = (
        0.01
    )
    max_length: Annotated[
        int, Meta(ge=2, le=2**31, description="tokens of a sample at most; a longer one is cut at its end")
    ] = 512


class ViewRef(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A view, docs/protocol.md (p4-views): its digest as fp32 safetensors, and the two ways to reach it.

    delta: the coded step from the previous view; None for the first view.
    snapshot: the whole view, fp32; None where the view is the bundle's own initial LoRA.
    moved: the factor that `delta` holds; the other one is as it was in the previous view.
    """

    digest: Sha256
    delta: BlobRef | None
    snapshot: BlobRef | None
    moved: Factor = "both"


class Signed(msgspec.Struct, frozen=True, kw_only=True):
    """A statement of the hub, `statements.py`, as the JSON text that was signed.

    key: the signer's public key. signature: over the text. Both are base64url.
    """

    text: str
    key: str
    signature: str


class SizeClass(msgspec.Struct, frozen=True, kw_only=True):
    """A sub-LLM of the run. emulator: the view of the current alignment; None: the hub is an older release."""

    manifest: BlobRef
    emulator: ViewRef | None


# --- edge to hub ------------------------------------------------------------------------------------


class Hello(Message, frozen=True, tag="hello", omit_defaults=True):
    """The first message of a connection, with which an edge greets the hub.

    protocol, newest: the versions that the edge speaks, from `protocol` on (`versions.py`). newest: 0: that one alone.
    device_id: made once in FEDSODA_HOME; a token is bound to one device.
    place: a digest of machine and directory, which tells a copy of that FEDSODA_HOME from the device that reconnects; ""
        where it is not known.
    waits: whether this edge knows Preparing; to one of an older release a hub that prepares its run says nothing before the
        Welcome.
    """

    protocol: Whole
    software: Name
    device_id: DeviceId
    device: DeviceFacts
    place: Name = ""
    waits: bool = False
    newest: Whole = 0


class Ready(Message, frozen=True, tag="ready", omit_defaults=True):
    """The report that bundle and data are read: this edge may be invited.

    size_class: which sub-LLM it took: 0 for the Welcome's own, 1 for the first of `smaller`, ...
    """

    num_examples: Natural
    size_class: Whole = 0


class BlobRequest(Message, frozen=True, tag="blob_request"):
    """The request for a blob of the run (delta, snapshot, alignment) from `offset` on."""

    digest: Sha256
    offset: Whole = 0


class UpdateStart(Message, frozen=True, tag="update_start"):
    """The announcement of an update, whose coded delta of `bytes` bytes follows in UpdateChunks.

    base: digest of the view from which the delta starts. alignment: number of the alignment with which the edge trained.
    loss: None where it was not finite.
    """

    round: Whole
    base: Sha256
    alignment: Whole
    digest: Sha256
    bytes: Whole
    codec: str
    num_examples: Whole
    loss: float | None


class UpdateChunk(Message, frozen=True, tag="update_chunk"):
    """A piece of the announced update; its bytes travel behind the header (codec.py)."""

    digest: Sha256
    offset: Whole


class Decline(Message, frozen=True, tag="decline"):
    """The refusal to answer the round with an update."""

    round: Whole
    reason: str


class Progress(Message, frozen=True, tag="progress"):
    """The state of the local round; volatile, so it never enters the ledger."""

    round: Whole
    step: Steps
    steps: Steps
    loss: float | None = None
    tokens_per_second: float | None = None


class Paused(Message, frozen=True, tag="paused"):
    """The report that this edge pauses, with the reason."""

    reason: str


class Resumed(Message, frozen=True, tag="resumed"):
    """The report that this edge's pause is over."""


class Leave(Message, frozen=True, tag="leave"):
    """The report that this edge leaves and does not come back by itself (Ctrl+C, --max-rounds, `leave`)."""

    reason: str


# --- hub to edge ------------------------------------------------------------------------------------


class Preparing(Message, frozen=True, tag="preparing", omit_defaults=True):
    """The answer to Hello while the run is prepared, said again when that gets on; the Welcome follows on this connection.

    stage: what is done now; "": the first stage has not begun. done, total: of the stage; total 0: it counts nothing.
    seconds: since the stage began. seconds_left: until it ends, an estimate; None: not known yet.
    """

    protocol: Whole
    run_id: str
    run_name: str
    stage: Name = ""
    done: Natural = 0
    total: Natural = 0
    seconds: Span = 0.0
    seconds_left: Span | None = None


class Welcome(Message, frozen=True, tag="welcome", omit_defaults=True):
    """The answer to Hello, with what an edge needs to prepare.

    manifest: the manifest of the largest sub-LLM, which is fetched by HTTP.
    batch_size: samples of a step, with which an edge plans its memory.
    emulator: the view of the current alignment, so that an edge can sweep before its first offer; None: the hub is an
        older release.
    smaller: sub-LLMs to take instead, from larger to smaller, where the device has no room for that of `manifest`.
    signed: the BundleStatement of all these manifests; None: the hub is an older release.
    """

    protocol: Whole
    run_id: str
    run_name: str
    edge: EdgeId
    manifest: BlobRef
    rounds: Natural
    rounds_done: Natural
    template: Template | None
    max_length: Few
    codec: str
    seed: Whole
    stall_seconds: Span
    batch_size: Few = 8
    emulator: ViewRef | None = None
    smaller: tuple[SizeClass, ...] = ()
    signed: Signed | None = None


class RoundOffer(Message, frozen=True, tag="round_offer", omit_defaults=True):
    """The request for an update: to train from `view` and send back the delta within `due_seconds`.

    alignment, emulator: the current alignment's number and the emulator's view.
    trains: the factor that is trained and sent; the other one stays as in the view.
    has_feedback: whether what coding left over from the last update still counts.
    manifest: the current sub-LLM of this edge's size class; None: the one that it had first.
    signed: the BundleStatement that names `manifest`; None where there is none, or the hub is an older release.
    """

    round: Natural
    rounds: Natural
    view: ViewRef
    alignment: Natural
    emulator: ViewRef
    local: LocalSettings
    due_seconds: Span
    trains: Factor = "both"
    has_feedback: bool = True
    manifest: BlobRef | None = None
    signed: Signed | None = None


class BlobChunk(Message, frozen=True, tag="blob_chunk"):
    """A piece of a requested blob; its bytes travel behind the header (codec.py)."""

    digest: Sha256
    offset: Whole
    total: Whole


class Receipt(Message, frozen=True, tag="receipt", omit_defaults=True):
    """The confirmation that the update is durable. Sending it again returns a receipt of the same update.

    signed: its ReceiptStatement; None: the hub is an older release.
    """

    round: Whole
    digest: Sha256
    signed: Signed | None = None


class Refusal(Message, frozen=True, tag="refusal"):
    """The refusal of what an edge sent, with the reason.

    retry: whether it may be sent again later (the disk is full). fatal: whether the hub ends the conversation.
    speaks: the oldest and the newest protocol of the hub, where it speaks none of the edge's; a hub of an older release
        only says so in words.
    """

    reason: str
    round: Whole | None = None
    retry: bool = False
    fatal: bool = False
    speaks: tuple[Whole, Whole] | UnsetType = UNSET


class RoundClosed(Message, frozen=True, tag="round_closed"):
    """The report that a round takes no more updates. num_updates: how many the hub averaged in it."""

    round: Whole
    num_updates: Natural


class Farewell(Message, frozen=True, tag="farewell"):
    """The report that the run is over, with the reason."""

    rounds: Natural
    reason: str


EdgeMessage = Hello | Ready | BlobRequest | UpdateStart | UpdateChunk | Decline | Progress | Paused | Resumed | Leave
HubMessage = Preparing | Welcome | RoundOffer | BlobChunk | Receipt | Refusal | RoundClosed | Farewell
AnyMessage = EdgeMessage | HubMessage
