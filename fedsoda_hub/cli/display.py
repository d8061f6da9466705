"""Show what a hub does: a live line on a terminal, plain lines when piped, JSON lines when asked.

What there is to show is `events.py`'s.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType

from fedsoda_edge.ports.console import PULSE, ProgressLine, is_terminal, line_out
from fedsoda_edge.ports.given_options import settings_lines
from fedsoda_edge.ports.log_lines import LINES, Level
from fedsoda_edge.units import counted, human_bytes, human_seconds
from fedsoda_hub import events
from fedsoda_hub.federation.state import LedgerState
from fedsoda_hub.report.history import kl_sentence
from fedsoda_hub.settings.keys import SettingValue


class HubDisplay:
    """The hub's display; everything but JSON goes to stderr.

    Args:
        is_detailed: whether settings with default values are shown too. defaults: of the settings, by key.
    """

    def __init__(
        self, jsonl: bool, *, is_detailed: bool = False, defaults: Mapping[str, SettingValue] | None = None
    ) -> None:
        self._jsonl = jsonl
        self._defaults = defaults or {}
        self._is_detailed = is_detailed
        self._line = ProgressLine(is_live=is_terminal() and not jsonl)
        self._round = _OpenRound()
        self._edges: set[str] = set()  # connected
        self._is_preparing = False  # as far as it was when the hub began to serve

    def __enter__(self) -> HubDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.end()

    def say(self, event: events.HubEvent) -> None:
        """Show one event of the hub or of a job."""
        if isinstance(event, events.RunPrepared) or (isinstance(event, events.Listening) and not self._is_preparing):
            PULSE.work("")  # from now on it waits for edges
        if self._jsonl:
            line_out(events.line_of(event))
            if text := self._text(event):
                LINES.beside_events(text, _level(event), _tag(event))
            return
        if isinstance(event, events.StageProgress):
            counts = f"{event.done} of {event.total}" if event.total else ""
            detail = event.detail if event.detail is not None else counts
            self._line.show(event.stage, event.done, event.total or None, detail)
            return
        self._fold(event)
        text = self._text(event)
        if text and self._round.number == 0:
            self._line.end()
        if text:
            self._line.say(text, _level(event), _tag(event))
        if self._round.number:
            done, total = self._round.steps
            self._line.show(
                f"round {self._round.number}",
                done,
                total,
                self._round.detail(len(self._edges), time.time()),
                is_awaited=True,
            )

    def tell(self, text: str) -> None:
        """Show a line to people alone."""
        if not self._jsonl:
            self._line.say(text)

    def begins(self, state: LedgerState, rounds: int) -> None:
        """Show what happens next, when a hub begins to serve."""
        self._is_preparing = state.phase == "preparing"
        PULSE.work("preparing the run" if self._is_preparing else "opening the run")
        if not self._jsonl:
            self._line.say(next_step(state, rounds))

    def _text(self, event: events.HubEvent) -> str:
        return self._settings(event) if isinstance(event, events.SettingsInForce) else _sentence(event)

    def _settings(self, event: events.SettingsInForce) -> str:
        values = {
            name: (one.value, "default" if name in self._defaults and one.value == self._defaults[name] else one.source)
            for name, one in event.values.items()
        }
        return settings_lines(values, is_detailed=self._is_detailed, others="fedsoda-hub config")

    def _fold(self, event: events.HubEvent) -> None:
        now = self._round
        match event:
            case events.EdgeConnected():
                self._edges.add(event.edge)
            case events.EdgeDisconnected():
                self._edges.discard(event.edge)
            case events.RoundOpened():
                self._round = _OpenRound(event.round, dict.fromkeys(event.cohort, (0, 0)), event.deadline_at)
            case events.CohortExtended():
                now.local |= dict.fromkeys(event.invited, (0, 0))
                now.due_at = event.deadline_at
                now.answered -= set(event.invited)
            case events.RulesChanged() if event.deadline_at is not None:
                now.due_at = event.deadline_at
            case events.EdgeProgress() if event.edge in now.local:
                now.local[event.edge] = event.step, event.steps
            case events.UpdateAccepted() | events.EdgeAnswered():
                now.answered.add(event.edge)
            case events.RoundClosed() | events.RunEnded() | events.StoppedBySignal():
                self._round = _OpenRound()


@dataclass
class _OpenRound:
    """The open round as the live line shows it. local: by invited edge, local steps done and in all."""

    number: int = 0
    local: dict[str, tuple[int, int]] = field(default_factory=dict)
    due_at: float = 0.0
    answered: set[str] = field(default_factory=set)

    @property
    def steps(self) -> tuple[int, int | None]:
        """The local steps done and in all, as if all invited edges had as many as the longest; None: none has begun."""
        most = max((steps for _, steps in self.local.values()), default=0)
        done = sum(most if edge in self.answered else step for edge, (step, _) in self.local.items())
        # One step more: the bar is full only when the round closes, since the last upload and the merge take time.
        return (done, most * len(self.local) + 1) if most else (0, None)

    def detail(self, num_connected: int, now: float) -> str:
        """Say how many edges answered, how many are connected and when the round is due."""
        return (
            f"{len(self.answered)} of {len(self.local)} answered, {counted(num_connected, 'edge')} connected, "
            f"due in {human_seconds(max(0.0, self.due_at - now))}"
        )


def _level(event: events.HubEvent) -> Level:
    match event:
        case events.OutOfDisk() | events.ComputeFailed():
            return "error"
        case events.EdgeAnswered() | events.LeftOutProgress():
            return "warning"
    return "info"


def _tag(event: events.HubEvent) -> str:
    return str(event.__struct_config__.tag)


def next_step(state: LedgerState, rounds: int) -> str:
    """Say what a hub does first with a run in this state.

    Args:
        rounds: [rounds] count.
    """
    match state.phase:
        case "preparing":
            return "next: prepare the bundle from the full model, which takes a while; edges that join meanwhile wait"
        case "idle":
            return f"next: round {state.round + 1} of {rounds}, as soon as enough edges are connected"
        case "collecting":
            updates = f"which has {len(state.accepted)} of {counted(len(state.cohort), 'update')}"
            return f"next: continue round {state.round} of {rounds}, {updates}"
        case "ended":
            return f"next: nothing, the run is over after {counted(state.round, 'round')}; edges that join learn that"


def _where(event: events.Listening) -> str:
    """Say where edges reach the hub, how they know it, and what is not encrypted."""
    lines = [f"serving {event.run} at {event.url}"]
    if event.is_behind_proxy:
        lines.append(
            '[tls] mode = "off": this port speaks plain HTTP, and whoever reaches it reads tokens and updates; let only a '
            "proxy that speaks TLS reach it"
        )
    if event.public_url is not None and event.public_url != event.url:
        guess = " (a guess; [listen] public_url says it)" if event.is_guess else ""
        lines.append(f"edges reach it at {event.public_url}{guess}")
    if event.pin is not None:
        lines.append(f"its TLS key, for fedsoda-edge --pin: {event.pin}")
    return "\n".join(lines)


def _sentence(event: events.HubEvent) -> str:
    match event:
        case events.Listening():
            return _where(event)
        case events.DiskProgress():
            needed, free = human_bytes(event.needed_bytes), human_bytes(event.free_bytes)
            return f"{event.stage}: needs {needed} of disk, {free} are free"
        case events.BorderMapProgress():
            return (
                f"{event.stage}: on held-out prompts, border states differ from the full emulator's by "
                f"{event.error_before:.1%} without it, by {event.error:.1%} with it"
            )
        case events.ShapeProgress():
            return (
                f"choosing groups: with {event.groups} x {event.layers_per_group} layers removed, public KL is "
                f"{event.kl:.3f} and the cosine of the adapter's gradients {event.cosine:.3f}"
            )
        case events.HealedShapeProgress():
            removed = f"{event.groups} x {event.layers_per_group} layers removed" if event.groups else "all layers kept"
            return f"{event.stage}: with {removed} and healed, border states differ by {event.error:.1%}"
        case events.LeftOutProgress(stage="no border map"):
            return f"no texts like the task's: {event.why}"
        case events.LeftOutProgress():
            return f"{event.stage}: {event.why}"
        case events.RunPrepared():
            return f"prepared: {kl_sentence(event.public_kl)}"
        case events.EdgeConnected():
            return f"{event.edge} connected"
        case events.EdgeDisconnected():
            return f"{event.edge} disconnected"
        case events.EdgeLeft():
            return f"{event.edge} left: {event.reason}"
        case events.RoundOpened():
            return f"round {event.round} of {event.rounds}: {', '.join(event.cohort)}"
        case events.CohortExtended():
            return f"round {event.round}: {', '.join(event.invited)} invited too"
        case events.UpdateAccepted():
            examples = counted(event.num_examples, "example")
            return f"round {event.round}: {event.edge}, {examples}, loss {event.loss:.3f}"
        case events.EdgeAnswered():
            return f"round {event.round}: no update from {event.edge} ({event.how})"
        case events.RoundClosed():
            sizes = f"{human_bytes(event.bytes_up)} up, {human_bytes(event.bytes_down)} down so far"
            updates = counted(event.updates, "update")
            return f"round {event.round} closed: {updates}, loss {event.loss:.3f}; {sizes}"
        case events.Probed():
            return f"before round {event.round}: public KL {event.kl:.3f}, cosine of gradients {event.cosine:.3f}"
        case events.Repruned():
            return f"drew other layers for every sub-LLM before round {event.round}"
        case events.Realigned():
            return f"realigned before round {event.round}: public KL {event.kl_before:.3f} to {event.kl_after:.3f}"
        case events.Evaluated():
            return "accuracy: " + ", ".join(f"{k} {v:.1%}" for k, v in event.result.accuracy.items())
        case events.CellDone():
            return f"{event.cell}: {event.accuracy:.1%} in {human_seconds(event.seconds)}"
        case events.Waiting():
            return f"waiting: {event.why}"
        case events.OutOfDisk() | events.ComputeFailed():
            return event.message
        case events.RunPaused():
            return "paused by its owner: no round opens until it is resumed"
        case events.RunResumed():
            return "resumed by its owner"
        case events.RulesChanged():
            return "changed by its owner: " + ", ".join(f"{key} is {value:g}" for key, value in event.values.items())
        case events.RunEnded():
            return f"the run is over after {counted(event.rounds, 'round')}"
        case events.StoppedBySignal():
            return f"stopping on {event.signal}"
    return ""
