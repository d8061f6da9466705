"""How `pause`, `resume` and `finish` reach the running join of a home: small files, no signals, no sockets.

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
    """A request's file."""

    do: Action
    seconds: float | None


class RequestAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What the join did.

    state: "noted" where it is still starting and could not answer yet.
    reason, seconds: of the pause it is in now; seconds None: until resume. freed_bytes: by ending the worker.
    round: the one in hand.
    """

    state: Literal["running", "paused", "finishing", "noted"]
    was_paused: bool = False
    reason: str | None = None
    seconds: float | None = None
    freed_bytes: int = 0
    round: int | None = None


@dataclass(frozen=True)
class Request:
    """What the owner asks of the join. seconds: of a pause; None: until resume."""

    path: Path
    do: Action
    seconds: float | None


def ask(directory: Path, do: Action, seconds: float | None = None) -> Path:
    """Leave a request for the running join; returns the path to ask `answer_to` with."""
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
    """Say what was done. Where the disk is full, nobody hears it; it is done all the same."""
    with contextlib.suppress(OSError):
        part = request.path.with_suffix(".part")
        part.write_bytes(msgspec.json.encode(done))
        part.replace(request.path.with_suffix(".answer"))
    with contextlib.suppress(OSError):
        request.path.unlink()


def forget(directory: Path) -> None:
    """Delete what is left of the join before: requests are for the join that runs, not for the next."""
    for path in directory.glob("*"):
        with contextlib.suppress(OSError):
            path.unlink()
