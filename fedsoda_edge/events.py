"""All that a join tells people, one struct each: what `--jsonl` prints, what the SDK's `on_event` gets as a dict.

Names, keys, types and ranges are promises to those who parse them (tests/schemas/fedsoda-edge.json). Nothing here says
anything; how it is shown is `cli/display.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Generic, Literal, TypeVar

import msgspec
from msgspec import Meta, structs

from fedsoda_edge.protocol.needs import MemoryPlan, Part

T = TypeVar("T")

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]
Words = Annotated[str, Meta(min_length=1)]
Device = Annotated[str, Meta(pattern=r"^(cpu|cuda(:[0-9]+)?)$")]
Source = Annotated[str, Meta(pattern=r"^(option|argument|default|config\.toml|FEDSODA_[A-Z_]+)$")]


class Event(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="event"):
    """The root of all events."""


# --- values inside events --------------------------------------------------------------------------------------------


class Setting(msgspec.Struct, Generic[T], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The value of an option, and whether a person, the environment or a file gave it."""

    value: T
    source: Source


class JoinSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options of `fedsoda-edge join` as they are in force, by their names on the command line."""

    url: Setting[str]
    data: Setting[str]
    token_file: Setting[str | None]
    device: Setting[str]
    column: Setting[str | None]
    max_rounds: Setting[Count]
    threads: Setting[Count]
    max_disk: Setting[str | None]
    cache: Setting[Literal["bf16", "int8"]]
    cache_key: Setting[Literal["keep", "forget"]]
    pause_on: Setting[str | None]
    max_ram: Setting[str | None]
    max_vram: Setting[str | None]
    unattended: Setting[bool]


class MemoryReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A way to train as a sentence, as a `MemoryPlan`'s fields and as a table."""

    message: Words
    device: Device
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


class RoundResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A round whose update the hub answered. loss: mean over completion ids, nats; None: it was not finite."""

    round: Positive
    loss: float | None
    accepted: bool


class Traffic(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes of the conversation with the hub; files of the bundle are not in it."""

    up: Count
    down: Count


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a join did so far. run, edge: None before the hub's first answer."""

    run: str | None
    edge: str | None
    rounds: list[RoundResult]
    num_examples: Count
    bytes: Traffic
    agent_peak_rss_bytes: Positive
    worker_peak_rss_bytes: Count


# --- getting ready ---------------------------------------------------------------------------------------------------


class Settings(Event, frozen=True, tag="settings"):
    """The command line as it was understood. Said by the command, before the join."""

    values: JoinSettings


class Joined(Event, frozen=True, tag="joined"):
    """The hub knows this edge. rounds: of the run."""

    run: str
    edge: str
    rounds: Positive


class DeviceFits(Event, frozen=True, tag="device"):
    """The sub-LLM that this device takes: the run's largest (size_class 0) or a smaller one. Sizes in bytes."""

    device: Device
    ram_needed: Count
    ram_free: Count
    disk_needed: Count
    disk_free: Count
    size_class: Count


class Downloading(Event, frozen=True, tag="download"):
    """Bytes of the bundle that are here, of all."""

    done: Count
    total: Count


class Memory(Event, MemoryReport, frozen=True, tag="memory"):
    """The way to train from now on."""


class DataRead(Event, frozen=True, tag="data"):
    """The data as samples. num_skipped: rows of whose completion nothing is left. threads: of the worker."""

    rows: Positive
    num_examples: Positive
    num_skipped: Count
    threads: Positive


class Sweeping(Event, frozen=True, kw_only=True, tag="sweep"):
    """Steps of the sweep through the sub-emulator that are done, of all."""

    stage: Literal["sweep"] = "sweep"
    done: Positive
    total: Positive


class Swept(Event, frozen=True, tag="swept"):
    """Border states of num_kept of num_examples samples are on the disk. num_damaged: records computed again."""

    num_examples: Positive
    num_kept: Count
    kept_bytes: Count
    num_damaged: Count


# --- rounds ----------------------------------------------------------------------------------------------------------


class Offered(Event, frozen=True, tag="offer"):
    """The hub invites this edge to a round, which is due in due_seconds."""

    round: Positive
    due_seconds: Seconds


class Training(Event, frozen=True, kw_only=True, tag="training"):
    """Steps of the round that are done, of all. loss: of the step, nats; None: not finite."""

    round: Positive
    stage: Literal["train"] = "train"
    step: Positive
    steps: Positive
    loss: float | None
    tokens_per_second: Seconds


class Trained(Event, frozen=True, tag="trained"):
    """A round was trained. loss: mean over completion ids, nats; None: not finite, and the update holds zeros."""

    round: Positive
    edge: str
    num_examples: Positive
    num_steps: Positive
    num_tokens: Positive
    micro_batch: Positive
    seconds: Seconds
    loss: float | None


class Accepted(Event, frozen=True, tag="accepted"):
    """The hub has the update. bytes: of the coded delta."""

    round: Positive
    num_examples: Positive
    loss: float
    bytes: Positive


class Refused(Event, frozen=True, tag="refused"):
    """The hub does not take the update, and why."""

    round: Positive
    reason: str
    num_examples: Positive
    loss: float | None
    bytes: Positive


class Retrying(Event, frozen=True, tag="retrying"):
    """The hub cannot take the update now; it is sent again soon."""

    round: Positive
    reason: str


class RoundClosed(Event, frozen=True, tag="round_closed"):
    """A round is over. updates: how many the hub averaged."""

    round: Positive
    updates: Positive


# --- what may happen at any time -------------------------------------------------------------------------------------


class Notice(Event, frozen=True, tag="notice"):
    """A sentence for people."""

    message: str


class Reconnecting(Event, frozen=True, tag="reconnecting"):
    """The hub cannot be reached, and what failed; the join tries until it can."""

    message: str


class Reconnected(Event, frozen=True, tag="reconnected"):
    """The hub knows this edge again."""


class Paused(Event, frozen=True, tag="paused"):
    """The device is its owner's alone. seconds: how long, where that is known."""

    reason: Words
    seconds: Annotated[float, Meta(gt=0)] | None


class Resumed(Event, frozen=True, tag="resumed"):
    """A pause ended."""


class Farewell(Event, frozen=True, tag="farewell"):
    """The run is over. rounds: how many were closed."""

    rounds: Count
    reason: str


AnyEvent = (
    Settings
    | Joined
    | DeviceFits
    | Downloading
    | Memory
    | DataRead
    | Sweeping
    | Swept
    | Offered
    | Training
    | Trained
    | Accepted
    | Refused
    | Retrying
    | RoundClosed
    | Notice
    | Reconnecting
    | Reconnected
    | Paused
    | Resumed
    | Farewell
)

Say = Callable[[AnyEvent], None]


class JoinEnded(Report, frozen=True, kw_only=True, tag_field="event", tag="end"):
    """The last line of a join that ended well: its report, in the envelope of every terminal line."""

    schema: Literal[1] = 1
    terminal: Literal[True] = True
    status: Literal["ok"] = "ok"


class _Terminal(msgspec.Struct):
    """What tells terminal lines apart."""

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
    """Return the event as `--jsonl` prints it.

    Raises:
        ValueError: a number in it is not finite.
    """
    return json.dumps(as_json(event), allow_nan=False)


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
