"""Show what a join does: a live line on a terminal, plain lines when piped, JSON lines when asked."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from fedsoda_edge.data.inspection import Inspection
from fedsoda_edge.join.doctor import Check
from fedsoda_edge.join.status import pause_sentence
from fedsoda_edge.ports.console import ProgressLine, note, settings_line
from fedsoda_edge.units import counted, human_bytes, human_seconds

# Events that are said beside the work of the bar, which continues.
_BESIDE = ("notice", "reconnecting", "reconnected", "retrying")


class Display:
    """What a join says while it runs. Everything but JSON goes to stderr."""

    def __init__(self, jsonl: bool) -> None:
        self._jsonl = jsonl
        self._lock = threading.Lock()
        self._line = ProgressLine(is_live=sys.stderr.isatty() and not jsonl)
        self._download: dict[str, Any] | None = None  # while it runs
        self._swept = ""  # beside it

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._line.end()

    def say(self, event: dict[str, Any]) -> None:
        """Show one event of the SDK; called from any thread."""
        with self._lock:
            if self._jsonl:
                print(json.dumps(event, allow_nan=False), flush=True)
                return
            match event["event"]:
                case "download":
                    self._download = event
                    self._show_download()
                    if event["done"] >= event["total"]:
                        self._download = None
                        if not self._swept:
                            self._line.show("starting the training process", 0, None)
                case "sweep":
                    detail = f"layer {event['done']} of {event['total']}"
                    self._swept = f"swept {detail}"
                    if self._download is not None:
                        self._show_download()
                    else:
                        self._line.show("sweeping the data", event["done"], event["total"], detail)
                case "training":
                    loss = "nan" if event["loss"] is None else f"{event['loss']:.3f}"
                    detail = f"step {event['step']} of {event['steps']}, loss {loss}, "
                    detail += f"{event['tokens_per_second']:.0f} tokens/s"
                    self._line.show(f"round {event['round']}", event["step"], event["steps"], detail)
                case kind:
                    text = _sentence(event)
                    if (text and kind not in _BESIDE) or (kind == "swept" and self._download is None):
                        self._line.end()
                    if text:
                        self._line.say(text)
                    if kind == "device":
                        self._line.show("starting the training process", 0, None)

    def _show_download(self) -> None:
        """Show one bar for both: what is swept during the download stands beside it."""
        assert self._download is not None
        self._line.show("downloading", self._download["done"], self._download["total"], self._swept, is_bytes=True)


def _sentence(event: dict[str, Any]) -> str:
    match event["event"]:
        case "settings":
            return settings_line(event["values"])
        case "joined":
            return f"joined run {event['run']} as {event['edge']} ({counted(event['rounds'], 'round')})"
        case "device":
            return (
                f"training on {event['device']}; disk {human_bytes(event['disk_needed'])} needed, "
                f"{human_bytes(event['disk_free'])} free"
            )
        case "memory":
            return str(event["message"])
        case "data":
            skipped = f", {event['num_skipped']} skipped (completion cut away)" if event["num_skipped"] else ""
            return f"{counted(event['num_examples'], 'sample')}{skipped}; waiting for a round"
        case "swept" if event["num_kept"] < event["num_examples"]:
            return (
                f"the disk keeps the border states of {event['num_kept']} of {event['num_examples']} samples "
                f"({human_bytes(event['kept_bytes'])}); the rest is computed again in each round; a larger --max-disk or more free space avoids that"
            )
        case "offer":
            return f"round {event['round']}: due in {human_seconds(event['due_seconds'])}"
        case "trained":
            loss = "not a number" if event["loss"] is None else f"{event['loss']:.3f}"
            return (
                f"round {event['round']}: trained {event['num_steps']} steps in {event['seconds']:.1f} s, loss {loss}"
            )
        case "accepted":
            return f"round {event['round']}: the hub has the update ({event['bytes']} bytes)"
        case "refused":
            return f"round {event['round']}: the hub refused the update: {event['reason']}"
        case "retrying":
            return f"round {event['round']}: the hub cannot take the update now ({event['reason']}); trying again"
        case "reconnecting":
            return f"connection lost: {event['message']}; retrying until it is back"
        case "reconnected":
            return "reconnected"
        case "paused":
            return pause_sentence(event["reason"], event["seconds"])
        case "resumed":
            return "resumed after the pause"
        case "farewell":
            return f"done: {event['reason']} after {counted(event['rounds'], 'round')}"
        case "notice":
            return str(event["message"])
    return ""


def show_check(check: Check) -> None:
    """Show a line of `doctor`."""
    note(
        f"{'PASS' if check.passed else 'FAIL'}  {check.name:<14} {check.detail}"
        + (f"; {check.fix}" if check.fix else "")
    )
    _show_parts(check.parts)


def show_memory(memory: dict[str, Any]) -> None:
    """Show how training fits, as a sentence and a table."""
    note(memory["message"])
    _show_parts(memory["parts"])


def _show_parts(parts: Iterable[dict[str, Any]]) -> None:
    for part in parts:
        note(f"    {part['part']:<36} {human_bytes(part['bytes']):>9}")


def show_data(found: Inspection, max_length: int) -> None:
    """Show `data check` to people."""
    note(f"{found.rows} rows; columns: " + ", ".join(f"{name} ({kind})" for name, kind in found.columns.items()))
    for number, sample in enumerate(found.samples, start=1):
        note(f"--- sample {number}\n{sample.prompt} >>> {sample.completion}")
    if found.samples:
        note("---")
    if found.duplicates:
        note(f"{found.duplicates} rows are copies of earlier ones")
    lengths = found.lengths
    if lengths is None:
        note("no lengths: name a model's directory with --tokenizer, or join a run first")
        return
    note(f"ids a sample: {lengths.min} to {lengths.max}, median {lengths.median}, 90 % have at most {lengths.p90}")
    most = max(bar.rows for bar in lengths.histogram)
    for bar in lengths.histogram:
        note(f"{bar.up_to:>8} {'#' * round(40 * bar.rows / most):<40} {bar.rows}")
    note(
        f"at max_length {max_length}: {found.truncated} samples are cut, {found.skipped} are skipped since "
        "nothing of their completion is left"
    )
