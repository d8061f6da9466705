"""Show what a join does: a live line on a terminal, plain lines when piped, JSON lines when asked."""

from __future__ import annotations

import json
import sys
import threading
from types import TracebackType
from typing import Any

from fedsoda_edge.doctor import Check
from fedsoda_edge.ports.console import human_bytes, note, settings_line


class Display:
    """Everything but JSON goes to stderr."""

    def __init__(self, jsonl: bool) -> None:
        self._jsonl = jsonl
        self._lock = threading.Lock()
        self._live = sys.stderr.isatty() and not jsonl
        self._progress: Any = None
        self._bar: Any = None
        self._bar_name = ""

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._end_bar()

    def say(self, event: dict[str, Any]) -> None:
        """One event of the SDK, from any thread."""
        with self._lock:
            if self._jsonl:
                print(json.dumps(event, allow_nan=False), flush=True)
                return
            bar = self._bar_of(event)
            if bar is not None:
                if self._live:
                    self._show_bar(*bar)
                elif bar[2] == bar[1] and event["event"] != "training":
                    note(f"{bar[0]}: done")
                return
            text = _sentence(event)
            if text:
                self._end_bar()
                note(text)

    def _bar_of(self, event: dict[str, Any]) -> tuple[str, int, int, str] | None:
        """(name, total, done, note) of an event that is progress."""
        match event["event"]:
            case "download":
                return (
                    "downloading",
                    event["total"],
                    event["done"],
                    f"{human_bytes(event['done'])} of {human_bytes(event['total'])}",
                )
            case "sweep":
                return "sweeping the data", event["total"], event["done"], f"layer {event['done']} of {event['total']}"
            case "training":
                loss = "nan" if event["loss"] is None else f"{event['loss']:.3f}"
                note = (
                    f"step {event['step']} of {event['steps']}, loss {loss}, {event['tokens_per_second']:.0f} tokens/s"
                )
                return f"round {event['round']}", event["steps"], event["step"], note
        return None

    def _show_bar(self, name: str, total: int, done: int, note: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        if self._bar_name != name:
            self._end_bar()
            self._progress = Progress(
                TextColumn("{task.description:<20}"),
                BarColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._progress.start()
            self._bar = self._progress.add_task(name, total=total, note=note)
            self._bar_name = name
        self._progress.update(self._bar, completed=done, note=note)

    def _end_bar(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress, self._bar_name = None, ""


def _sentence(event: dict[str, Any]) -> str:
    match event["event"]:
        case "settings":
            return settings_line(event["values"])
        case "joined":
            return f"joined run {event['run']} as {event['edge']} ({event['rounds']} rounds)"
        case "device":
            return (
                f"training on {event['device']}: memory {human_bytes(event['ram_needed'])} needed, {human_bytes(event['ram_free'])} free; "
                f"disk {human_bytes(event['disk_needed'])} needed, {human_bytes(event['disk_free'])} free"
            )
        case "data":
            skipped = f", {event['num_skipped']} skipped (completion cut away)" if event["num_skipped"] else ""
            return f"{event['num_examples']} samples{skipped}; waiting for a round"
        case "offer":
            return f"round {event['round']}: due in {event['due_seconds'] / 60:.0f} min"
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
        case "farewell":
            return f"done: {event['reason']} after {event['rounds']} rounds"
        case "notice":
            return str(event["message"])
    return ""


def show_check(check: Check) -> None:
    """A line of `doctor`."""
    note(
        f"{'PASS' if check.passed else 'FAIL'}  {check.name:<14} {check.detail}"
        + (f"; {check.fix}" if check.fix else "")
    )


def show_data(found: dict[str, Any], max_length: int) -> None:
    """`data check` for people."""
    note(f"{found['rows']} rows; columns: " + ", ".join(f"{name} ({kind})" for name, kind in found["columns"].items()))
    for number, sample in enumerate(found["samples"], start=1):
        note(f"--- sample {number}\n{sample['prompt']} >>> {sample['completion']}")
    if found["samples"]:
        note("---")
    if found["duplicates"]:
        note(f"{found['duplicates']} rows are copies of earlier ones")
    lengths = found["lengths"]
    if lengths is None:
        note("no lengths: name a model's directory with --tokenizer, or join a run first")
        return
    note(
        f"ids a sample: {lengths['min']} to {lengths['max']}, median {lengths['median']}, 90 % have at most {lengths['p90']}"
    )
    most = max(bar["rows"] for bar in lengths["histogram"])
    for bar in lengths["histogram"]:
        note(f"{bar['up_to']:>8} {'#' * round(40 * bar['rows'] / most):<40} {bar['rows']}")
    note(
        f"at max_length {max_length}: {found['truncated']} samples are cut, {found['skipped']} are skipped since "
        "nothing of their completion is left"
    )
