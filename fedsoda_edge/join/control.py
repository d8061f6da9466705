"""How `pause`, `resume` and `finish` reach the running join of a home: small files, no signals, no sockets.

A wish is one file, written whole; the join reads about twice a second, does it, and answers in another file. What a
wish does is `neighbour.py`'s and `aside.py`'s.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsoda_edge.ports.disk import write_durably

LOOK_SECONDS = 0.5
ANSWER_SECONDS = 10.0  # a command waits for its answer


@dataclass(frozen=True)
class Wish:
    """do: pause, resume or finish. seconds: of a pause, None: until resume."""

    path: Path
    do: str
    seconds: float | None


def ask(directory: Path, do: str, seconds: float | None = None) -> Path:
    """Leave a wish; the path to ask `answer_to` with."""
    path = directory / f"{time.time_ns():020d}-{secrets.token_hex(4)}.wish"
    write_durably(path, json.dumps({"do": do, "seconds": seconds}).encode())
    return path


def answer_to(wish: Path) -> dict[str, Any] | None:
    """What the join did of it, once; None while it has not."""
    path = wish.with_suffix(".answer")
    try:
        answer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    path.unlink(missing_ok=True)
    return answer


def wishes(directory: Path) -> list[Wish]:
    """Those without an answer, oldest first. What is no wish is taken away."""
    found = []
    for path in sorted(directory.glob("*.wish")):
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            seconds = said["seconds"]
            found.append(Wish(path, str(said["do"]), None if seconds is None else float(seconds)))
        except (OSError, ValueError, KeyError, TypeError):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    return found


def answer(wish: Wish, values: dict[str, Any]) -> None:
    """Say what was done. On a full disk it is done all the same."""
    with contextlib.suppress(OSError):
        part = wish.path.with_suffix(".part")
        part.write_text(json.dumps(values, allow_nan=False), encoding="utf-8")
        part.replace(wish.path.with_suffix(".answer"))
    with contextlib.suppress(OSError):
        wish.path.unlink()


def forget(directory: Path) -> None:
    """Wishes are for the join that runs, not for the next. Answers of the one before go too."""
    for path in directory.glob("*"):
        with contextlib.suppress(OSError):
            path.unlink()
