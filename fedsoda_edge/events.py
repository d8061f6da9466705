"""Define all events of a join, one struct each: what `--jsonl` prints and the SDK's `on_event` gets as a dict.

The tags ("offer", "trained", ...), keys, types and ranges are promises to programs that read them
(tests/schemas/fedsoda-edge.json); class names are not. When an event happens is decided in `join`, how it is shown in
`cli/display.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Generic, Literal, TypeVar

import msgspec
from msgspec import Meta, structs

from fedsoda_edge.protocol.needs import Dtype, MemoryPlan, Part
from fedsoda_edge.protocol.ranges import Count, Positive, Seconds, Words
from fedsoda_edge.units import finite

T = TypeVar("T")

DeviceName = Annotated[str, Meta(pattern=r"^(cpu|cuda(:[0-9]+)?)$")]
Source = Annotated[str, Meta(pattern=r"^(option|argument|default|config\.toml|FEDSODA_[A-Z_]+)$")]


class JoinEvent(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="event"):
    """The root of all events."""


# --- values inside events --------------------------------------------------------------------------------------------


class GivenSetting(msgspec.Struct, Generic[T], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The value of an option, and where it comes from: the command line, a variable, config.toml or the default."""

    value: T
    source: Source


class JoinSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options of `fedsoda-edge join`, in the order in which `cli/commands.py` declares them."""

    url: GivenSetting[str | None]
    data: GivenSetting[str]
    link_file: GivenSetting[str | None]
    token_file: GivenSetting[str | None]
    pin: GivenSetting[str | None]
    insecure_http: GivenSetting[bool]
    column: GivenSetting[str | None]
    device: GivenSetting[str]
    unattended: GivenSetting[bool]
    max_disk: GivenSetting[str | None]
    cache: GivenSetting[Literal["bf16", "int8"]]
    cache_key: GivenSetting[Literal["keep", "forget"]]
    max_rounds: GivenSetting[Count]
    threads: GivenSetting[Count]
    max_ram: GivenSetting[str | None]
    max_vram: GivenSetting[str | None]
    pause_on: GivenSetting[str | None]


class MemoryReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A memory plan as a sentence, as its fields (`needs.MemoryPlan`) and as a table."""

    message: Words
    device: DeviceName
    dtype: Dtype
    packed: bool
    recompute: bool
    frugal: bool
    micro_batch: Positive
    batch_size: Positive
    slice_bytes: Positive
    process: Count
    weights: Count
    head: Count
    lora: Count
    activations: Count
    logits: Count
    sweep: Count
    parts: Annotated[list[Part], Meta(min_length=1)]


class RoundOutcome(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A round whose update the hub answered. loss: mean over completion ids, in nats; None: it was not finite."""

    round: Positive
    loss: float | None
    accepted: bool


class ConversationBytes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes of the conversation with the hub, to it and from it; files of the bundle are not counted."""

    up: Count
    down: Count


class JoinReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a join so far. run, edge: None before the hub's first answer."""

    run: str | None
    edge: str | None
    rounds: list[RoundOutcome]
    num_examples: Count
    bytes: ConversationBytes
    agent_peak_rss_bytes: Positive
    worker_peak_rss_bytes: Count


# --- getting ready ---------------------------------------------------------------------------------------------------


class SettingsGiven(JoinEvent, frozen=True, tag="settings"):
    """The command line as it was understood. The command says it, before the join begins."""

    values: JoinSettings


class HubPreparing(JoinEvent, frozen=True, tag="preparing"):
    """The hub prepares its run, and this edge waits for that. message: how far it is; total 0: its stage counts nothing.

    seconds_left: until the stage ends, an estimate of the hub; None: not known yet.
    """

    run: str
    message: Words
    done: Count
    total: Count
    seconds_left: Seconds | None


class Joined(JoinEvent, frozen=True, tag="joined"):
    """The hub knows this edge. rounds: how many the run has."""

    run: str
    edge: str
    rounds: Positive


class DeviceFits(JoinEvent, frozen=True, tag="device"):
    """The sub-LLM that this device takes: the run's largest (size_class 0) or a smaller one. Sizes in bytes."""

    device: DeviceName
    ram_needed: Count
    ram_free: Count
    disk_needed: Count
    disk_free: Count
    size_class: Count


class Downloading(JoinEvent, frozen=True, tag="download"):
    """Bytes of the bundle that are here (done), of all its bytes (total)."""

    done: Count
    total: Count


class Memory(JoinEvent, MemoryReport, frozen=True, tag="memory"):
    """The memory plan by which this device trains from now on."""


class DataRead(JoinEvent, frozen=True, tag="data"):
    """The data, read as samples. num_skipped: rows that are no sample. threads: how many the worker uses."""

    rows: Positive
    num_examples: Positive
    num_skipped: Count
    threads: Positive


class Sweeping(JoinEvent, frozen=True, kw_only=True, tag="sweep"):
    """Steps of the sweep through the sub-emulator that are done, of all its steps (total)."""

    stage: Literal["sweep"] = "sweep"
    done: Positive
    total: Positive


class SweepDone(JoinEvent, frozen=True, tag="swept"):
    """Border states of num_kept of num_examples samples are on disk. num_damaged: records that were computed again."""

    num_examples: Positive
    num_kept: Count
    kept_bytes: Count
    num_damaged: Count


# --- rounds ----------------------------------------------------------------------------------------------------------


class RoundOffered(JoinEvent, frozen=True, tag="offer"):
    """The hub invites this edge to a round, which is due in due_seconds."""

    round: Positive
    due_seconds: Seconds


class Training(JoinEvent, frozen=True, kw_only=True, tag="training"):
    """Steps of the round that are done, of all its steps. loss: the step's, in nats; None: it was not finite."""

    round: Positive
    stage: Literal["train"] = "train"
    step: Positive
    steps: Positive
    loss: float | None
    tokens_per_second: Seconds


class RoundTrained(JoinEvent, frozen=True, tag="trained"):
    """A round was trained. loss: mean over completion ids, in nats; None: not finite, and the update holds zeros."""

    round: Positive
    edge: str
    num_examples: Positive
    num_steps: Positive
    num_tokens: Positive
    micro_batch: Positive
    seconds: Seconds
    loss: float | None


class Accepted(JoinEvent, frozen=True, tag="accepted"):
    """The hub has the update. bytes: the size of the coded delta."""

    round: Positive
    num_examples: Positive
    loss: float
    bytes: Positive


class Refused(JoinEvent, frozen=True, tag="refused"):
    """The hub refuses the update, with its reason. bytes: the size of the coded delta."""

    round: Positive
    reason: str
    num_examples: Positive
    loss: float | None
    bytes: Positive


class Retrying(JoinEvent, frozen=True, tag="retrying"):
    """The hub cannot take the update now, with its reason; it is sent again soon."""

    round: Positive
    reason: str


class RoundOver(JoinEvent, frozen=True, tag="round_closed"):
    """A round is over. updates: how many the hub averaged in it."""

    round: Positive
    updates: Positive


# --- what may happen at any time -------------------------------------------------------------------------------------


class Notice(JoinEvent, frozen=True, tag="notice"):
    """A sentence for people."""

    message: str


class Reconnecting(JoinEvent, frozen=True, tag="reconnecting"):
    """The hub cannot be reached, and what failed. The join tries until it is reached."""

    message: str


class Reconnected(JoinEvent, frozen=True, tag="reconnected"):
    """The hub knows this edge again."""


class JoinPaused(JoinEvent, frozen=True, tag="paused"):
    """The join pauses, with the reason. seconds: how long the pause will be; None: not known."""

    reason: Words
    seconds: Annotated[float, Meta(gt=0)] | None


class JoinResumed(JoinEvent, frozen=True, tag="resumed"):
    """The pause is over."""


class RunFinished(JoinEvent, frozen=True, tag="farewell"):
    """The run is over, with the reason. rounds: how many were closed."""

    rounds: Count
    reason: str


AnyEvent = (
    SettingsGiven
    | HubPreparing
    | Joined
    | DeviceFits
    | Downloading
    | Memory
    | DataRead
    | Sweeping
    | SweepDone
    | RoundOffered
    | Training
    | RoundTrained
    | Accepted
    | Refused
    | Retrying
    | RoundOver
    | Notice
    | Reconnecting
    | Reconnected
    | JoinPaused
    | JoinResumed
    | RunFinished
)

EventSink = Callable[[AnyEvent], None]


class JoinEnded(JoinReport, frozen=True, kw_only=True, tag_field="event", tag="end"):
    """The last line of a join that ended well: its report, in the envelope of every terminal line."""

    schema: Literal[1] = 1
    terminal: Literal[True] = True
    status: Literal["ok"] = "ok"


class _Terminal(msgspec.Struct):
    """The fields that tell terminal lines apart."""

    terminal: bool = False
    status: str = ""
    stopped: str | None = None


_event = msgspec.json.Decoder[AnyEvent](AnyEvent)
_ended = msgspec.json.Decoder(JoinEnded)
_terminal = msgspec.json.Decoder(_Terminal)


def as_json(event: AnyEvent | JoinEnded) -> dict[str, object]:
    """Return the event as a dict of JSON values: {"event": its name, its keys}."""
    found: dict[str, object] = msgspec.to_builtins(event)
    return found


def line_of(event: AnyEvent | JoinEnded) -> str:
    """Return the event as `--jsonl` prints it; a number that is not finite is null."""
    return json.dumps(finite(as_json(event)), allow_nan=False)


def read(line: str | bytes) -> AnyEvent | JoinEnded | None:
    """Return the event of one line that a join of this release printed; None for the last one where it failed.

    Raises:
        msgspec.ValidationError: no join of this release prints this.
    """
    found = _terminal.decode(line)
    if not found.terminal:
        return _event.decode(line)
    return _ended.decode(line) if found.status == "ok" and found.stopped is None else None


def memory_report(message: str, plan: MemoryPlan, parts: list[Part]) -> MemoryReport:
    """Return a plan as `plan --json` has it; `message` and `parts` say the same for people."""
    return MemoryReport(message=message, parts=parts, **structs.asdict(plan))


def memory(message: str, plan: MemoryPlan, parts: list[Part]) -> Memory:
    """Return a plan as an event."""
    return Memory(message=message, parts=parts, **structs.asdict(plan))
