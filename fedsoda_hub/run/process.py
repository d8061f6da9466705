"""Write down what the process of a run is doing and how it ended, so that others know when it cannot be asked any more.

The file is as long from the first write on as it will ever be, and written in place: a full disk does not keep an end from
being noted. What an end means for the run is the ledger's matter.
"""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

import msgspec

from fedsoda_edge.ports import Clock
from fedsoda_edge.ports.processes import started_at
from fedsoda_hub.run.status import TERMINAL, HubProcess, HubState, RunningJob

LENGTH = 8192  # bytes of the file
MOST_REASON = 2000  # characters
SAME_SECONDS = 2.0  # by which two readings of the start of one process may differ


class Noted(msgspec.Struct, frozen=True, kw_only=True):
    """The content of the file. work: how far a preparation without a hub is. host: the machine's name."""

    hub: HubProcess
    work: RunningJob | None = None
    host: str = ""


class ProcessNote:
    """The note of this process, which serves or prepares the run in a directory that it has locked.

    A terminal state is the last: whatever is noted later changes nothing.
    """

    def __init__(self, path: Path, clock: Clock, state: HubState) -> None:
        self._path, self._clock = path, clock
        self.now = HubProcess(
            state=state,
            pid=os.getpid(),
            directory=str(path.parent.absolute()),
            started_at=started_at(os.getpid()) or clock.wall(),
        )

    def begin(self) -> None:
        """Note that this process works on the run from now on, in place of the one before."""
        self._write()

    def become(self, state: HubState) -> None:
        """Note another state of the running process."""
        assert state not in TERMINAL, "an end has a reason"
        if self.now.state not in TERMINAL and state != self.now.state:
            self.now = msgspec.structs.replace(self.now, state=state)
            self._write()

    def working(self, work: RunningJob) -> None:
        """Note how far a preparation is that no hub can be asked about."""
        if self.now.state not in TERMINAL:
            self._write(work)

    def end(self, state: HubState, status: int, reason: str | None = None, code: str | None = None) -> None:
        """Note how the process ends.

        Args:
            status: its exit status. code: the class of the error of `reason`.
        """
        assert state in TERMINAL, "only an end is final"
        if self.now.state in TERMINAL:
            return
        self.now = msgspec.structs.replace(
            self.now,
            state=state,
            status=status,
            reason=None if reason is None else reason[:MOST_REASON],
            code=code,
            ended_at=self._clock.wall(),
        )
        self._write()

    def _write(self, work: RunningJob | None = None) -> None:
        data = msgspec.json.encode(Noted(hub=self.now, work=work, host=platform.node()))
        with contextlib.suppress(OSError):  # what is noted for people must not stop a run
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(descriptor, data.ljust(LENGTH), 0)
            finally:
                os.close(descriptor)


def read_note(path: Path) -> Noted | None:
    """Read what the last process of a run noted; one that is gone without having noted its end was killed.

    None: there was none, or the note cannot be read.
    """
    try:
        noted = msgspec.json.decode(path.read_bytes(), type=Noted)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    hub = noted.hub
    if hub.state in TERMINAL or noted.host != platform.node() or _is_running(hub):
        return noted
    return msgspec.structs.replace(noted, hub=msgspec.structs.replace(hub, state="killed"), work=None)


def _is_running(hub: HubProcess) -> bool:
    found = started_at(hub.pid)
    return found is not None and abs(found - (hub.started_at or 0.0)) <= SAME_SECONDS
