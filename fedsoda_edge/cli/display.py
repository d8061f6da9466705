"""Show what a join does: a live line on a terminal, plain lines in a log, JSON lines with --jsonl.

What happens, and when, is left to the events of the join.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from types import TracebackType

import msgspec

from fedsoda_edge import events as ev
from fedsoda_edge.cli.options import as_options
from fedsoda_edge.data.inspection import Inspection, Piece
from fedsoda_edge.join.doctor import DoctorStep
from fedsoda_edge.join.status import pause_sentence
from fedsoda_edge.ports.console import PULSE, ProgressLine, is_terminal, line_out, note
from fedsoda_edge.ports.given_options import settings_lines
from fedsoda_edge.ports.log_lines import LINES, Level
from fedsoda_edge.protocol.needs import Part
from fedsoda_edge.units import counted, human_bytes, human_seconds

TEXT, PIECES = 400, 40  # characters of a text, and ids of a sample, that `data check` shows

# Events that leave the bar as it is, since its work continues.
_BESIDE = ev.Notice | ev.Reconnecting | ev.Reconnected | ev.Retrying

# Events that tell of trouble.
_WARNED = ev.Reconnecting | ev.Retrying | ev.Refused

# Events after which a join waits for others, unless another event says what it does.
_IS_WAITED_AFTER = ev.DataRead | ev.JoinPaused | ev.Reconnecting | ev.RunFinished


class JoinDisplay:
    """The display of one join. All but JSON goes to stderr.

    Args:
        jsonl: whether to print events as JSON lines on stdout instead. is_detailed: whether to show settings that are
            at their defaults too.
    """

    def __init__(self, jsonl: bool, *, is_detailed: bool = False) -> None:
        self._jsonl = jsonl
        self._is_detailed = is_detailed
        self._lock = threading.Lock()
        self._line = ProgressLine(is_live=is_terminal() and not jsonl)
        self._download: ev.Downloading | None = None  # while it runs
        self._swept = ""  # how far the sweep beside it is
        self._is_waiting = False  # for a hub that prepares its run

    def __enter__(self) -> JoinDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._line.end()

    def say(self, event: ev.AnyEvent) -> None:
        """Show one event, from any thread."""
        with self._lock:
            if isinstance(event, _IS_WAITED_AFTER):
                PULSE.work("")
            if self._jsonl:
                line_out(ev.line_of(event))
                text = self._beginning(event) if isinstance(event, ev.SettingsGiven) else sentence(event)
                if text:
                    LINES.beside_events(text, _level(event), _tag(event))
            else:
                self._show(event)

    def _show(self, event: ev.AnyEvent) -> None:
        match event:
            case ev.HubPreparing():
                if not self._is_waiting:
                    self._is_waiting = True
                    PULSE.work("")
                    self._line.say(sentence(event))
                self._line.show(f"waiting for the hub of {event.run}", 0, None, event.message, is_awaited=True)
            case ev.Downloading(done=done, total=total):
                self._download = event
                self._show_download(event)
                if done >= total:
                    self._download = None
                    if not self._swept:
                        self._line.show("starting the training process", 0, None)
            case ev.Sweeping(done=done, total=total):
                detail = f"layer {done} of {total}"
                self._swept = f"swept {detail}"
                if self._download is not None:
                    self._show_download(self._download)
                else:
                    self._line.show("sweeping the data", done, total, detail)
            case ev.Training():
                loss = "nan" if event.loss is None else f"{event.loss:.3f}"
                detail = f"step {event.step} of {event.steps}, loss {loss}, {event.tokens_per_second:.0f} tokens/s"
                self._line.show(f"round {event.round}", event.step, event.steps, detail)
            case ev.SettingsGiven():
                self._line.say(self._beginning(event), event=_tag(event))
            case _:
                self._is_waiting = False
                text = sentence(event)
                is_swept = isinstance(event, ev.SweepDone) and self._download is None
                if (text and not isinstance(event, _BESIDE)) or is_swept:
                    self._line.end()
                if text:
                    self._line.say(text, _level(event), _tag(event))
                if isinstance(event, ev.DeviceFits):
                    self._line.show("starting the training process", 0, None)

    def _beginning(self, event: ev.SettingsGiven) -> str:
        return _beginning(event.values, self._is_detailed)

    def _show_download(self, event: ev.Downloading) -> None:
        """Draw one bar for download and sweep: how far the sweep is stands beside it."""
        self._line.show("downloading", event.done, event.total, self._swept, is_bytes=True)


def _level(event: ev.AnyEvent) -> Level:
    return "warning" if isinstance(event, _WARNED) else "info"


def _tag(event: ev.AnyEvent) -> str:
    return str(event.__struct_config__.tag)


def _beginning(settings: ev.JoinSettings, is_detailed: bool) -> str:
    """List the settings that were given, and say what happens next."""
    values = {name: (one.value, one.source) for name, one in msgspec.structs.asdict(settings).items()}
    lines = settings_lines(values, is_detailed=is_detailed, others="fedsoda-edge config")
    hub = settings.url.value or "the hub of the join link"
    return f"{lines}\nnext: connect to {hub}, check which sub-LLM fits this device, and fetch it"


def sentence(event: ev.AnyEvent) -> str:
    """Write an event as a sentence for people; "" where a bar shows it, or nothing does."""
    match event:
        case ev.HubPreparing():
            return f"waiting for the hub of {event.run}, which is {event.message}"
        case ev.Joined():
            return f"joined run {event.run} as {event.edge} ({counted(event.rounds, 'round')})"
        case ev.DeviceFits():
            needed, free = human_bytes(event.disk_needed), human_bytes(event.disk_free)
            return f"training on {event.device}; disk {needed} needed, {free} free"
        case ev.Memory() | ev.Notice():
            return as_options(event.message)
        case ev.DataRead():
            skipped = f", {event.num_skipped} skipped (data check says why)" if event.num_skipped else ""
            return f"{counted(event.num_examples, 'sample')}{skipped}; waiting for a round"
        case ev.SweepDone() if event.num_kept < event.num_examples:
            return (
                f"the disk keeps the border states of {event.num_kept} of {event.num_examples} samples "
                f"({human_bytes(event.kept_bytes)}) and the rest is computed again in each round; free space, or allow "
                "more with --max-disk, to avoid that"
            )
        case ev.RoundOffered():
            return f"round {event.round}: due in {human_seconds(event.due_seconds)}"
        case ev.RoundTrained():
            loss = "not a number" if event.loss is None else f"{event.loss:.3f}"
            return f"round {event.round}: trained {event.num_steps} steps in {event.seconds:.1f} s, loss {loss}"
        case ev.Accepted():
            return f"round {event.round}: the hub has the update ({event.bytes} bytes); waiting for the other edges"
        case ev.Refused():
            return f"round {event.round}: the hub refused the update: {event.reason}"
        case ev.Retrying():
            return f"round {event.round}: the hub cannot take the update now ({event.reason}); trying again"
        case ev.Reconnecting():
            return f"no connection: {event.message}; trying again"
        case ev.Reconnected():
            return "reconnected"
        case ev.JoinPaused():
            return pause_sentence(event.reason, event.seconds)
        case ev.JoinResumed():
            return "resumed after the pause"
        case ev.RunFinished():
            return f"done: {event.reason} after {counted(event.rounds, 'round')}"
        case ev.SettingsGiven() | ev.SweepDone() | ev.RoundOver() | ev.Downloading() | ev.Sweeping() | ev.Training():
            return ""


def show_check(check: DoctorStep) -> None:
    """Show a step of `doctor` as a line, with its table of memory if it has one."""
    note(
        f"{'PASS' if check.passed else 'FAIL'}  {check.name:<14} {check.detail}"
        + (f"; {check.fix}" if check.fix else "")
    )
    _show_parts(check.parts)


def show_memory(memory: ev.MemoryReport) -> None:
    """Show how training fits, as a sentence and a table."""
    note(memory.message)
    _show_parts(memory.parts)


def _show_parts(parts: Iterable[Part]) -> None:
    for part in parts:
        note(f"    {part.part:<36} {human_bytes(part.bytes):>9}")


def show_data(found: Inspection, max_length: int) -> None:
    """Show the result of `data check`."""
    note(f"{counted(found.rows, 'row')} of {found.format}: {found.taken} taken, {found.skipped} skipped")
    for why in found.skipped_for:
        note(f"  skipped {why.rows}, first in line {why.first_line}: {why.why}")
    note("columns: " + ", ".join(f"{name} ({kind})" for name, kind in found.columns.items()))
    for number, sample in enumerate(found.samples, start=1):
        # A space that is put between is shown, since it is learned with the completion.
        joined = sample.joined.replace(" ", "\N{OPEN BOX}")
        text = f"{_short(sample.prompt, at_end=True)} >>> {joined}{_short(sample.completion)}"
        note(f"--- sample {number} (line {sample.line})\n{text}")
        if sample.supervised:
            note(f"learned: {_pieces(sample.supervised)}")
    if found.samples:
        note("---")
    if found.duplicates:
        note(f"{counted(found.duplicates, 'copy', 'copies')} of earlier rows")
    _show_labels(found)
    for lost in found.lost:
        note(f"note: {lost.why} ({counted(lost.rows, 'row')}, first in line {lost.first_line})")
    lengths = found.lengths
    if lengths is None:
        note("no lengths without a tokenizer: name a model's directory with --tokenizer, or join a run first")
        return
    note(f"ids a sample: {lengths.min} to {lengths.max}, median {lengths.median}, 90 % have at most {lengths.p90}")
    most = max(bar.rows for bar in lengths.histogram)
    for bar in lengths.histogram:
        span = str(bar.up_to) if bar.at_least == bar.up_to else f"{bar.at_least} to {bar.up_to}"
        note(f"{span:>16} {'#' * max(1, round(40 * bar.rows / most)):<40} {bar.rows}")
    skipped = sum(why.rows for why in found.skipped_for if why.reason == "cut")
    cut = f"{counted(found.truncated or 0, 'sample')} cut" + (
        f" by {found.cut_ids} ids in all" if found.cut_ids else ""
    )
    note(f"at max_length {max_length}: {cut}, {skipped} skipped since nothing of the completion is left")


def _show_labels(found: Inspection) -> None:
    if found.labels and len(found.labels) < found.taken:
        note("completions: " + ", ".join(f"{_short(one.label)!r} {one.rows}" for one in found.labels))
    elif found.num_labels is not None and found.num_labels < found.taken:
        note(f"completions: {found.num_labels} different ones")
    for group in found.alike:
        spelt = ", ".join(f"{_short(one.label)!r} ({one.rows})" for one in group)
        note(
            f"these completions differ by white space or case alone: {spelt}; a model learns each, so write one of them"
        )


def _pieces(pieces: Sequence[Piece]) -> str:
    """List ids with their pieces; of many the first and the last, of which one is the end token."""
    texts = [f"{one.piece!r} {one.id}" for one in pieces]
    return ", ".join(texts if len(texts) <= PIECES else [*texts[: PIECES - 6], "...", *texts[-5:]])


def _short(text: str, *, at_end: bool = False) -> str:
    """Cut a long text for a terminal."""
    if len(text) <= TEXT:
        return text
    return f"... {text[-TEXT:]}" if at_end else f"{text[:TEXT]} ..."
