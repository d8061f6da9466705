"""Note in a run's directory how far a preparation is that no hub can be asked about, and how it ended."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsoda_hub.events import HubEvent
    from fedsoda_hub.run.directory import RunDirectory

NOTE_SECONDS = 2.0  # at least between two notes of one stage


@contextlib.contextmanager
def noting(directory: RunDirectory) -> Iterator[Callable[[HubEvent], None]]:
    """Note that this process, which has locked the run, prepares it. Yields what takes the preparation's events."""
    from fedsoda_edge.ports import SystemClock
    from fedsoda_edge.ports.console import Terminated
    from fedsoda_edge.ports.ends import status_of
    from fedsoda_hub.events import StageProgress
    from fedsoda_hub.run.pace import Pace
    from fedsoda_hub.run.process import ProcessNote

    clock, pace = SystemClock(), Pace()
    note = ProcessNote(directory.process, clock, "preparing")
    noted_at = clock.monotonic() - NOTE_SECONDS
    stage = ""

    def take(event: HubEvent) -> None:
        nonlocal noted_at, stage
        if not isinstance(event, StageProgress):
            return
        now = clock.monotonic()
        pace.note(event.job, event.stage, event.done, event.total, now)
        if now - noted_at >= NOTE_SECONDS or event.stage != stage:
            noted_at, stage = now, event.stage
            note.working(pace.working(event.job, now))

    note.begin()
    try:
        yield take
    except KeyboardInterrupt:
        note.end("stopped", 130, "Ctrl+C")
        raise
    except Terminated as stopped:
        note.end("stopped", 0, stopped.name)
        raise
    except BaseException as error:
        note.end("failed", status_of(error), str(error) or type(error).__name__, type(error).__name__)
        raise
    note.end("over", 0)
