"""What the join of a home does right now, as one small file that `fedsoda-edge status` reads.

Folded from the same events that a display shows. Times in it are wall clock, for people.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedsoda_edge.ports import Clock
from fedsoda_edge.units import human_bytes, human_seconds

WRITE_SECONDS = 1.0  # at most so often, but for a change of state

_WORK = {  # what the events say that it works at
    "joined": "joining",
    "download": "downloading",
    "data": "waiting for a round",
    "sweep": "sweeping the data through the sub-emulator",
    "swept": "waiting for a round",
    "training": "training",
    "trained": "sending the update",
    "retrying": "waiting to send the update again",
    "accepted": "waiting for a round",
    "refused": "waiting for a round",
    "farewell": "the run is over",
}
_BESIDE = ("sweep", "swept")  # done while the download runs, which lasts longer; all but a farewell may outlive the run


class Status:
    """The fold. `memory` gives the worker's bytes, None where there is no worker."""

    def __init__(self, path: Path, hub: str, clock: Clock, memory: Callable[[], int | None]) -> None:
        self._path, self._clock, self._memory = path, clock, memory
        self._written = -WRITE_SECONDS
        self._work = "connecting"  # goes on after a lost connection or a pause
        self._is_downloading = self._has_ended = False
        self.values: dict[str, Any] = {
            "state": self._work,
            "pid": os.getpid(),
            "hub": hub,
            "run": None,
            "edge": None,
            "round": None,
            "rounds": None,
            "step": None,
            "steps": None,
            "loss": None,
            "due_at": None,
            "worker_bytes": None,
            "paused": None,
            "paused_until": None,
            "last_error": None,
            "updated_at": None,
        }

    def note(self, event: dict[str, Any]) -> None:
        """Take one event of the join in."""
        if self._has_ended:
            return  # of a worker that is still being stopped
        values, kind = self.values, event["event"]
        before = values["state"]
        if kind == "download":
            self._is_downloading = event["done"] < event["total"]
        is_beside = self._work == _WORK["farewell"] or (kind in _BESIDE and self._is_downloading)
        if kind in _WORK and not is_beside:
            self._work = _WORK[kind]
            values["state"] = self._work
        if kind in ("reconnecting", "paused"):
            values["state"] = kind
        elif kind in ("reconnected", "resumed"):
            values["state"] = self._work
        if kind == "paused":
            values["paused"] = event["reason"]
            self._until(event["seconds"])
        elif kind in ("resumed", "farewell"):
            values |= {"paused": None, "paused_until": None}
        elif values["paused"] is not None:
            values["state"] = "paused"  # whatever comes or goes meanwhile
        values |= {name: event[name] for name in ("run", "edge", "round", "rounds", "loss") if name in event}
        if kind == "training":
            values |= {"step": event["step"], "steps": event["steps"]}
        elif kind == "offer":
            values |= {"due_at": self._clock.wall() + event["due_seconds"], "step": None, "steps": None}
        elif kind in ("accepted", "refused", "farewell"):
            values |= {"due_at": None, "step": None, "steps": None}
        if kind in ("reconnecting", "retrying", "refused"):
            values["last_error"] = event.get("message") or event.get("reason")
        elif kind in ("reconnected", "accepted"):
            values["last_error"] = None
        now = self._clock.monotonic()
        if values["state"] != before or kind == "paused" or now - self._written >= WRITE_SECONDS:
            self._written = now
            self._write()

    def still_paused(self, seconds: float) -> None:
        """So much of the pause is left: the wall clock may have been set since."""
        self._until(seconds)
        self._write()

    def _until(self, seconds: float | None) -> None:
        self.values["paused_until"] = None if seconds is None else self._clock.wall() + seconds

    def end(self, error: BaseException | None) -> None:
        """The last word: why the join ended, where it was no run's end."""
        self._has_ended = True
        if error is not None:
            self.values |= {"state": "stopped", "last_error": str(error) or type(error).__name__}
        elif self.values["state"] != _WORK["farewell"]:
            self.values["state"] = "stopped"
        self.values |= {"paused": None, "paused_until": None}
        self._write()

    def _write(self) -> None:
        self.values |= {"worker_bytes": self._memory(), "updated_at": self._clock.wall()}
        part = self._path.with_suffix(".part")
        with contextlib.suppress(OSError):  # a full disk must not stop a round; the next write may succeed
            part.write_text(json.dumps(self.values), encoding="utf-8")
            os.replace(part, self._path)


def read_status(path: Path) -> dict[str, Any] | None:
    """What the last join wrote; None before the first."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def pause_sentence(reason: str, seconds: float | None) -> str:
    """ "paused by its owner, for another 42 min", "paused: on battery"."""
    said = f"paused {reason}" if reason.startswith("by ") else f"paused: {reason}"
    return said if seconds is None else f"{said}, for another {human_seconds(seconds)}"


def sentences(found: dict[str, Any], *, is_running: bool, now: float) -> list[str]:
    """The status for people: state, hub, round, step, due time, memory, last error with its fix."""
    state = found["state"] if is_running or found["state"] in ("stopped", "the run is over") else "ended without a word"
    if is_running and found.get("paused"):  # a home may hold the status of an older release
        state = pause_sentence(found["paused"], found["paused_until"] and max(0.0, found["paused_until"] - now))
    lines = [f"{state}" + (f" (pid {found['pid']})" if is_running else "")]
    if found["run"]:
        lines.append(f"run {found['run']} as {found['edge']} at {found['hub']}")
    else:
        lines.append(f"hub {found['hub']}")
    if found["round"]:
        line = f"round {found['round']} of {found['rounds']}"
        if found["steps"]:
            line += f", step {found['step']} of {found['steps']}"
        if found["loss"] is not None:
            line += f", loss {found['loss']:.3f}"
        if found["due_at"] and is_running:
            line += f", due in {human_seconds(max(0.0, found['due_at'] - now))}"
        lines.append(line)
    if found["worker_bytes"] and is_running:
        lines.append(f"worker holds {human_bytes(found['worker_bytes'])} of memory")
    if found["last_error"]:
        lines.append(f"last error: {found['last_error']}")
    return lines
