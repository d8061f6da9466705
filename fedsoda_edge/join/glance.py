"""Show the owner of a device at a glance what its join does and what left the device: a headline and rows of facts.

It holds no text of the data: the status, sizes and counts, and what the receipts list. Drawing it is `cli/watch.py`'s and
`cli/status_page.py`'s.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

import msgspec

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.join.home import Home
from fedsoda_edge.join.receipts import Departure, ReceiptLog, departures
from fedsoda_edge.join.status import RUN_IS_OVER, JoinStatus, read_status, state_of
from fedsoda_edge.units import counted, human_bytes, human_seconds, one_line

MEASURE_SECONDS = 10.0  # between two looks at disk and memory
RECEIPT_SECONDS = 3.0  # between two readings of the receipts, if they changed
Tone = Literal["busy", "waiting", "paused", "over", "trouble"]
_WAITS = ("connecting", "joining", "waiting for a round", "waiting to send the update again")


class GlanceRow(msgspec.Struct, frozen=True, kw_only=True):
    """One row: what it is about, and what there is to know."""

    about: str
    said: str


class Glance(msgspec.Struct, frozen=True, kw_only=True):
    """All that is shown at one moment.

    headline: what the join does. progress: of the local round, 0 to 1; None: none is on its way. running: whether a join
    runs here.
    """

    headline: str
    tone: Tone
    running: bool
    progress: float | None
    facts: tuple[GlanceRow, ...]


class Sent(msgspec.Struct, frozen=True, kw_only=True):
    """The sum of what left. last_at: of the last update, as the receipts write times; None: none left."""

    updates: int = 0
    update_bytes: int = 0
    verified: int = 0
    unsigned: int = 0
    refused: int = 0
    unanswered: int = 0
    forged: int = 0
    others: int = 0
    last_at: str | None = None


def sum_of(found: Sequence[Departure]) -> Sent:
    """Sum up what left. An update that was sent again after no answer counts once, with its last answer."""
    updates: dict[tuple[str | None, int | None, str | None], Departure] = {}
    others = 0
    for one in found:
        if one.what == "update":
            updates[one.run_id, one.round, one.digest] = one
        elif one.what == "counted":
            others += sum(msgspec.json.decode(one.said, type=dict[str, int]).values())
        else:
            others += 1
    answers = [one.answer for one in updates.values()]
    return Sent(
        updates=len(updates),
        update_bytes=sum(one.bytes for one in found if one.what == "update"),
        verified=answers.count("verified"),
        unsigned=answers.count("unsigned"),
        refused=answers.count("refused"),
        unanswered=answers.count("none"),
        forged=answers.count("forged"),
        others=others,
        last_at=max((one.at for one in updates.values()), default=None),
    )


class Looking:
    """The looks at one home, each cheap: what changes slowly, or takes long to read, is kept for some seconds.

    Args:
        now, wall: monotonic seconds, and seconds since 1970.
    """

    def __init__(
        self, home: Home, now: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self._home, self._now, self._wall = home, now, wall
        self._receipts = ReceiptLog(home.receipts)
        self._sent, self._sent_at = Sent(), -RECEIPT_SECONDS
        self._sent_of: tuple[int, int] | None = None
        self._unread = False
        self._measured: tuple[str, str] = ("", "")
        self._measured_at = -MEASURE_SECONDS

    def look(self) -> Glance:
        """Look now."""
        is_running = self._home.is_in_use()
        found = read_status(self._home.status)
        sent = self._sent_now()
        memory, disk = self._measured_now()
        if found is None:
            headline = "a join is starting" if is_running else "no join has run here yet"
            facts = [("disk", disk), *_of_sent(sent)]
            return _glance(headline, "busy" if is_running else "over", is_running, None, facts)
        headline = state_of(found, is_running=is_running, now=self._wall())
        facts = [*_of_join(found, is_running=is_running, now=self._wall())]
        if is_running:
            held = f"worker {human_bytes(found.worker_bytes)}, " if found.worker_bytes else ""
            facts.append(("memory", held + memory))
        facts += [("disk", disk), *_of_sent(sent)]
        if self._unread:
            facts.append(("trouble", "the receipts cannot be read by this user"))
        if found.last_error:
            facts.append(("trouble", found.last_error))
        is_working = is_running and found.paused is None and found.steps
        progress = min(1.0, (found.step or 0) / found.steps) if is_working and found.steps else None
        return _glance(headline, _tone(found, is_running=is_running), is_running, progress, facts)

    def _sent_now(self) -> Sent:
        if self._now() - self._sent_at >= RECEIPT_SECONDS:
            self._sent_at = self._now()
            with contextlib.suppress(FileNotFoundError):
                seen = os.stat(self._receipts.path)
                if self._sent_of != (seen.st_size, seen.st_mtime_ns):
                    self._sent_of = (seen.st_size, seen.st_mtime_ns)
                    try:
                        self._sent, self._unread = sum_of(departures(self._receipts.lines()[0])), False
                    except UsageProblem:
                        self._unread = True
        return self._sent

    def _measured_now(self) -> tuple[str, str]:
        import psutil

        if self._now() - self._measured_at >= MEASURE_SECONDS:
            self._measured_at = self._now()
            directory = self._home.directory
            held = sum(_size(directory / name) for name in ("store", "runs"))
            free = _free(directory)
            disk = f"this home {human_bytes(held)}" + (f", {human_bytes(free)} free" if free is not None else "")
            self._measured = f"{human_bytes(psutil.virtual_memory().available)} free", disk
        return self._measured


def _glance(
    headline: str, tone: Tone, is_running: bool, progress: float | None, facts: Sequence[tuple[str, str]]
) -> Glance:
    rows = tuple(GlanceRow(about=about, said=one_line(said)) for about, said in facts)
    return Glance(headline=one_line(headline), tone=tone, running=is_running, progress=progress, facts=rows)


def _tone(found: JoinStatus, *, is_running: bool) -> Tone:
    if found.state == RUN_IS_OVER:
        return "over"
    if not is_running:
        return "trouble" if found.last_error or found.state != "stopped" else "over"
    if found.paused is not None:
        return "paused"
    if found.state == "reconnecting":
        return "trouble"
    return "waiting" if found.state in _WAITS else "busy"


def _of_join(found: JoinStatus, *, is_running: bool, now: float) -> list[tuple[str, str]]:
    facts = []
    if found.run:
        facts.append(("run", f"{found.run}, as {found.edge}"))
    facts.append(("hub", found.hub))
    if found.round:
        said = f"{found.round} of {found.rounds}"
        if found.steps and is_running:
            said += f", step {found.step} of {found.steps}"
        facts.append(("round", said + (f", loss {found.loss:.3f}" if found.loss is not None else "")))
    if found.due_at and is_running:
        facts.append(("until", f"{_clock(found.due_at)}, in {human_seconds(max(0.0, found.due_at - now))}"))
    if found.paused_until and is_running:
        facts.append(("resumes", _clock(found.paused_until)))
    return facts


def _of_sent(sent: Sent) -> list[tuple[str, str]]:
    """List what the rounds of this device earned, and what left it."""
    if not sent.updates and not sent.others:
        return [("sent", "nothing has left this device")]
    got = sent.verified + sent.unsigned
    signed = "" if not sent.unsigned else f", {sent.verified} of them signed" if sent.verified else ", not signed"
    earned = [f"{counted(got, 'round')} with the hub's receipt{signed}" if got else "no receipt yet"]
    earned += [f"{sent.refused} refused"] if sent.refused else []
    earned += [f"{sent.unanswered} without an answer"] if sent.unanswered else []
    earned += [f"{sent.forged} NOT SIGNED BY THIS HUB"] if sent.forged else []
    updates = (
        f"{counted(sent.updates, 'update')}, {human_bytes(sent.update_bytes)}" if sent.updates else "no update yet"
    )
    left = f"{updates}; {counted(sent.others, 'small message')}"
    at = "" if sent.last_at is None else f", last at {_clock(datetime.fromisoformat(sent.last_at).timestamp())}"
    return [("earned", ", ".join(earned)), ("sent", f"{left}; no text{at}")]


def _clock(at: float) -> str:
    """Write a time of today as 14:03, and another with its day."""
    moment = datetime.fromtimestamp(at)
    return f"{moment:%H:%M}" if moment.date() == datetime.now().date() else f"{moment:%Y-%m-%d %H:%M}"


def _size(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):  # a join may delete it meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total


def _free(directory: Path) -> int | None:
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return None
