"""Write what the join of a home does now to one small file, from its events; read it for `fedsoda-edge status`.

Times in it are wall clock, for people. Which events there are is left to the join's parts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from fedsoda_edge import events as ev
from fedsoda_edge.errors import DataProblem, FedSODAError
from fedsoda_edge.ports import Clock
from fedsoda_edge.ports.defects import sentence_of
from fedsoda_edge.ports.ends import status_of
from fedsoda_edge.units import human_bytes, human_seconds

WRITE_SECONDS = 1.0  # at least between two writes, except when the state changes

RUN_IS_OVER = "the run is over"
WAITS_FOR_HUB = "waiting for the hub"
WORK: dict[type[ev.JoinEvent], str] = {  # what a join does from this event on
    ev.HubPreparing: WAITS_FOR_HUB,
    ev.Joined: "joining",
    ev.Downloading: "downloading",
    ev.DataRead: "waiting for a round",
    ev.Sweeping: "sweeping the data through the sub-emulator",
    ev.SweepDone: "waiting for a round",
    ev.Training: "training",
    ev.RoundTrained: "sending the update",
    ev.Retrying: "waiting to send the update again",
    ev.Accepted: "waiting for a round",
    ev.Refused: "waiting for a round",
    ev.RunFinished: RUN_IS_OVER,
}


WAITING = frozenset(  # what a join does while it waits for others
    {WAITS_FOR_HUB, WORK[ev.DataRead], WORK[ev.Retrying]}
)


class JoinStatus(msgspec.Struct, kw_only=True):
    """The content of the file.

    why: why this edge does not work; None: it does. loss: the last step's, in nats. due_at, paused_until, updated_at:
    seconds since 1970. paused: the reason; None: no pause is on. exit_status, code: of the join's end, and the class of its
    error; None: it has not ended, or with none. A field that an older release did not write is None.
    """

    state: str = "connecting"
    why: str | None = None
    pid: int = 0
    hub: str = ""
    run: str | None = None
    edge: str | None = None
    round: int | None = None
    rounds: int | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    due_at: float | None = None
    worker_bytes: int | None = None
    paused: str | None = None
    paused_until: float | None = None
    last_error: str | None = None
    exit_status: int | None = None
    code: str | None = None
    updated_at: float | None = None


class Status:
    """The writer of the file, from the events of one join.

    Args:
        memory: returns the bytes that the worker holds; None while no worker runs.
    """

    def __init__(self, path: Path, hub: str, clock: Clock, memory: Callable[[], int | None]) -> None:
        self._path, self._clock, self._memory = path, clock, memory
        self._written_at = -WRITE_SECONDS
        self._is_downloading = self._has_ended = False
        self.now = JoinStatus(pid=os.getpid(), hub=hub)
        self._work = self.now.state  # kept while the connection is lost or a pause is on
        self._why: str | None = None  # nothing is worked on, as far as connection and pauses let it

    def note(self, event: ev.AnyEvent) -> None:
        """Note one event of the join."""
        if self._has_ended:
            return  # a worker that is still being stopped said it
        before = self.now.state
        self._note_state(event)
        self._note_values(event)
        self._note_why(event)
        is_due = self._clock.monotonic() - self._written_at >= WRITE_SECONDS
        if self.now.state != before or isinstance(event, ev.JoinPaused) or is_due:
            self._written_at = self._clock.monotonic()
            self.write()

    def _note_state(self, event: ev.AnyEvent) -> None:
        now = self.now
        if isinstance(event, ev.Downloading):
            self._is_downloading = event.done < event.total
        # A sweep runs beside the download, which lasts longer; every event but the last may come after the run's end.
        is_beside = isinstance(event, ev.Sweeping | ev.SweepDone) and self._is_downloading
        if type(event) in WORK and not is_beside and self._work != RUN_IS_OVER:
            self._work = now.state = WORK[type(event)]
        match event:
            case ev.Reconnecting():
                now.state = "reconnecting"
            case ev.Reconnected():
                now.state = self._work
            case ev.JoinPaused(reason=reason, seconds=seconds):
                now.state, now.paused = "paused", reason
                self._until(seconds)
            case ev.JoinResumed() | ev.RunFinished():
                now.state, now.paused, now.paused_until = self._work, None, None
        if now.paused is not None:
            now.state = "paused"  # whatever else happens meanwhile

    def _note_why(self, event: ev.AnyEvent) -> None:
        """Note why this edge does not work, in one sentence."""
        now = self.now
        match event:
            case ev.HubPreparing():
                self._why = f"the hub is {event.message}"
            case ev.DataRead():
                self._why = "the hub has not invited this edge to a round yet"
            case ev.Accepted():
                self._why = f"the hub waits for the updates of other edges to round {event.round}"
            case ev.Refused():
                self._why = f"the hub refused the update of round {event.round}, and has not opened the next round"
            case ev.RoundOver():
                self._why = f"round {event.round} is closed, and the hub has not invited this edge to the next one"
            case ev.Retrying():
                self._why = f"the hub cannot take the update now: {event.reason}"
            case _ if type(event) in WORK:
                self._why = None
        if now.paused is not None:
            now.why = pause_sentence(now.paused, None)
        elif now.state == "reconnecting":
            now.why = f"the hub is away: {now.last_error}"
        elif now.state in WAITING:
            now.why = self._why
        else:
            now.why = None

    def _note_values(self, event: ev.AnyEvent) -> None:
        now = self.now
        for name in ("run", "edge", "round", "rounds", "loss"):
            if name in event.__struct_fields__:
                setattr(now, name, getattr(event, name))
        match event:
            case ev.Training():
                now.step, now.steps = event.step, event.steps
            case ev.RoundOffered():
                now.due_at, now.step, now.steps = self._clock.wall() + event.due_seconds, None, None
            case ev.Accepted() | ev.Refused() | ev.RunFinished():
                now.due_at = now.step = now.steps = None
        match event:
            case ev.Reconnecting(message=problem) | ev.Retrying(reason=problem) | ev.Refused(reason=problem):
                now.last_error = problem
            case ev.Reconnected() | ev.Accepted():
                now.last_error = None

    def still_paused(self, seconds: float) -> None:
        """Note how long the pause still lasts: the wall clock may have been set meanwhile."""
        self._until(seconds)
        self.write()

    def _until(self, seconds: float | None) -> None:
        self.now.paused_until = None if seconds is None else self._clock.wall() + seconds

    def end(self, error: BaseException | None) -> None:
        """Note that the join ended, and why if its run had not. Later events are ignored."""
        if self._has_ended:
            return  # an end is final, whatever fails while the join is taken down
        self._has_ended = True
        self.now.exit_status = 0 if error is None else status_of(error)
        if error is not None:
            self.now.state, self.now.last_error, self.now.code = "stopped", _unquoted(error), type(error).__name__
        elif self.now.state != RUN_IS_OVER:
            self.now.state = "stopped"
        self.now.why = None
        self.now.paused = self.now.paused_until = None
        self.write()

    def write(self) -> None:
        """Write the present state to the file."""
        self.now.worker_bytes, self.now.updated_at = self._memory(), self._clock.wall()
        part = self._path.with_suffix(".part")
        with contextlib.suppress(OSError):  # a full disk must not stop a round; the next write may succeed
            part.write_bytes(msgspec.json.encode(self.now))
            os.replace(part, self._path)


def _unquoted(error: BaseException) -> str:
    """Write why a join ended without what a row holds: the file stays, and others may read it."""
    if isinstance(error, DataProblem):
        return "the data cannot be used; fedsoda-edge data check shows the row and what is wrong with it"
    if isinstance(error, FedSODAError):
        return str(error)
    return type(error).__name__ if not isinstance(error, Exception) else sentence_of(error)


def read_status(path: Path) -> JoinStatus | None:
    """Read what the last join wrote; None where no join has run."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=JoinStatus)
    except (OSError, msgspec.MsgspecError):
        return None


def pause_sentence(reason: str, seconds: float | None) -> str:
    """Write "paused by its owner, for another 42 min" or "paused: on battery"."""
    said = f"paused {reason}" if reason.startswith("by ") else f"paused: {reason}"
    return said if seconds is None else f"{said}, for another {human_seconds(seconds)}"


def state_of(found: JoinStatus, *, is_running: bool, now: float) -> str:
    """Say what a join does, or that it ended."""
    if not is_running and found.state not in ("stopped", RUN_IS_OVER):
        return "ended unexpectedly: it was killed, or the machine ended it for lack of memory"
    if is_running and found.paused:
        return pause_sentence(found.paused, found.paused_until and max(0.0, found.paused_until - now))
    return f"{found.state}: {found.why}" if is_running and found.why else found.state


def sentences(found: JoinStatus, *, is_running: bool, now: float) -> list[str]:
    """Write a status for people, a line each: state, hub, round, step, due time, memory, last error with its remedy."""
    state = state_of(found, is_running=is_running, now=now)
    lines = [f"{state}" + (f" (pid {found.pid})" if is_running else "")]
    if found.run:
        lines.append(f"run {found.run}" + (f" as {found.edge}" if found.edge else "") + f" at {found.hub}")
    else:
        lines.append(f"hub {found.hub}")
    if found.round:
        line = f"round {found.round} of {found.rounds}"
        if found.steps:
            line += f", step {found.step} of {found.steps}"
        if found.loss is not None:
            line += f", loss {found.loss:.3f}"
        if found.due_at and is_running:
            line += f", due in {human_seconds(max(0.0, found.due_at - now))}"
        lines.append(line)
    if found.worker_bytes and is_running:
        lines.append(f"worker holds {human_bytes(found.worker_bytes)} of memory")
    if found.last_error and found.last_error not in lines[0]:
        lines.append(f"last error: {found.last_error}")
    return lines
