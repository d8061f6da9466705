"""Bring `pause`, `resume` and `finish` to the running join of a home: by small files, no signals, no sockets.

A request is one file, written whole; the join looks about twice a second, does it, and answers in another file. What a
request does is decided in `device/pause_rules.py` and done in `pause.py`.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from fedsoda_edge.ports.disk import write_durably

LOOK_SECONDS = 0.5
ANSWER_SECONDS = 10.0  # a command waits for its answer

Action = Literal["pause", "resume", "finish"]


class _Asked(msgspec.Struct, frozen=True):
    """The content of a request's file."""

    do: Action
    seconds: float | None


class RequestAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The join's answer to a request.

    state: what the join does now; "noted": it is still starting and has not answered yet. reason, seconds: why it
    pauses, and for how long; seconds None: until resume. freed_bytes: memory of the worker that ended. round: the one
    in hand.
    """

    state: Literal["running", "paused", "finishing", "noted"]
    was_paused: bool = False
    reason: str | None = None
    seconds: float | None = None
    freed_bytes: int = 0
    round: int | None = None


@dataclass(frozen=True)
class Request:
    """A request of the owner. seconds: how long to pause; None: until resume."""

    path: Path
    do: Action
    seconds: float | None


def ask(directory: Path, do: Action, seconds: float | None = None) -> Path:
    """Leave a request for the running join; return its path, with which `answer_to` finds the answer."""
    path = directory / f"{time.time_ns():020d}-{secrets.token_hex(4)}.request"
    write_durably(path, msgspec.json.encode(_Asked(do, seconds)))
    return path


def answer_to(request: Path) -> RequestAnswer | None:
    """Take the join's answer, once; None while there is none."""
    path = request.with_suffix(".answer")
    try:
        found = msgspec.json.decode(path.read_bytes(), type=RequestAnswer)
    except (OSError, msgspec.MsgspecError):
        return None
    path.unlink(missing_ok=True)
    return found


def requests(directory: Path) -> list[Request]:
    """List the requests without an answer, oldest first. A file that cannot be read as one is deleted."""
    found = []
    for path in sorted(directory.glob("*.request")):
        try:
            asked = msgspec.json.decode(path.read_bytes(), type=_Asked)
            found.append(Request(path, asked.do, asked.seconds))
        except (OSError, msgspec.MsgspecError):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    return found


def answer(request: Request, done: RequestAnswer) -> None:
    """Answer a request. On a full disk there is no answer, though the request was done."""
    with contextlib.suppress(OSError):
        part = request.path.with_suffix(".part")
        part.write_bytes(msgspec.json.encode(done))
        part.replace(request.path.with_suffix(".answer"))
    with contextlib.suppress(OSError):
        request.path.unlink()


def forget(directory: Path) -> None:
    """Delete what an earlier join left: requests are for the join that runs, not for the next."""
    for path in directory.glob("*"):
        with contextlib.suppress(OSError):
            path.unlink()
