"""How `pause`, `resume` and `finish` reach the running join of a home: small files, no signals, no sockets.

A request is one file, written whole; the join reads about twice a second, does it, and answers in another file. What a
request does is `pause.py`'s.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import msgspec

from fedsoda_edge.ports.disk import write_durably

LOOK_SECONDS = 0.5
ANSWER_SECONDS = 10.0  # a command waits for its answer
_SUFFIX = ".wish"  # as older releases call a request: a command may be of another release than the join

What = Literal["pause", "resume", "finish"]


@dataclass(frozen=True)
class Request:
    """What the owner of the device asks of the join. seconds: how long a pause is to be; None: until resume."""

    path: Path
    do: What
    seconds: float | None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the join did of a request.

    state: as it is since; noted: the join is still starting. seconds: of the pause, where that is known. freed_bytes: of
    memory, by the worker that ended. round: the one in hand.
    """

    state: Literal["paused", "running", "finishing", "noted"]
    was_paused: bool = False
    reason: str | None = None
    seconds: float | None = None
    freed_bytes: int = 0
    round: int | None = None


def ask(directory: Path, do: What, seconds: float | None = None) -> Path:
    """Leave a request; return the path to ask `answer_to` with."""
    path = directory / f"{time.time_ns():020d}-{secrets.token_hex(4)}{_SUFFIX}"
    write_durably(path, json.dumps({"do": do, "seconds": seconds}).encode())
    return path


def answer_to(request: Path) -> Answer | None:
    """Return what the join did of it, once; None while it has not."""
    path = request.with_suffix(".answer")
    try:
        answer = msgspec.json.decode(path.read_bytes(), type=Answer)
    except (OSError, msgspec.MsgspecError):
        return None
    path.unlink(missing_ok=True)
    return answer


def requests(directory: Path) -> list[Request]:
    """Return the requests without an answer, oldest first. A file that is not a request is deleted."""
    found = []
    for path in sorted(directory.glob(f"*{_SUFFIX}")):
        try:
            asked = json.loads(path.read_text(encoding="utf-8"))
            do, seconds = asked["do"], asked["seconds"]
            if do not in get_args(What):
                raise ValueError(do)
            found.append(Request(path, do, None if seconds is None else float(seconds)))
        except (OSError, ValueError, KeyError, TypeError):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    return found


def answer(request: Request, said: Answer) -> None:
    """Say what was done. On a full disk it is done all the same."""
    with contextlib.suppress(OSError):
        part = request.path.with_suffix(".part")
        part.write_bytes(msgspec.json.encode(said))
        part.replace(request.path.with_suffix(".answer"))
    with contextlib.suppress(OSError):
        request.path.unlink()


def forget(directory: Path) -> None:
    """Delete requests and answers of the join before: they are not for the next one."""
    for path in directory.glob("*"):
        with contextlib.suppress(OSError):
            path.unlink()
