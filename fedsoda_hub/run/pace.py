"""Estimate how long the stage of a job still takes, from how far it was at which time. Pure: the caller brings the clock."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from fedsoda_hub.run.status import RunningJob

MARKS = 50  # that an estimate looks back: stages slow down and speed up, as a machine does other work beside


class _Mark(NamedTuple):
    at: float
    done: int


class Pace:
    """The pace of the stage that was heard of last. All times are monotonic seconds."""

    def __init__(self) -> None:
        self._job = self._stage = ""
        self._total = 0
        self._began = 0.0
        self._marks: deque[_Mark] = deque(maxlen=MARKS)

    def note(self, job: str, stage: str, done: int, total: int, now: float) -> None:
        """Note that a stage is so far.

        Args:
            total: 0: the stage counts nothing.
        """
        is_same = (job, stage, total) == (self._job, self._stage, self._total)
        if is_same and self._marks and done >= self._marks[-1].done:
            if done > self._marks[-1].done:
                self._marks.append(_Mark(now, done))
            return
        # Work is told when it is done, so a stage begins when the one before it told its last.
        self._began = self._marks[-1].at if job == self._job and self._marks else now
        if job != self._job or done == 0:
            self._began = now
        self._job, self._stage, self._total = job, stage, total
        self._marks.clear()
        if done == 1:  # a stage that begins with more continues an earlier one, of which the time is not known
            self._marks.append(_Mark(self._began, 0))
        self._marks.append(_Mark(now, done))

    def working(self, job: str, now: float) -> RunningJob:
        """Return how far the job is."""
        if job != self._job:
            return RunningJob(job=job)
        last = self._marks[-1]
        return RunningJob(
            job=job,
            stage=self._stage,
            done=last.done if self._total else None,
            total=self._total or None,
            seconds=max(0.0, now - self._began),
            seconds_left=self._seconds_left(now) if self._total else None,
        )

    def _seconds_left(self, now: float) -> float | None:
        first, last = self._marks[0], self._marks[-1]
        if last.done >= self._total:
            return 0.0
        if last.done == first.done or last.at <= first.at:
            return None
        a_piece = (last.at - first.at) / (last.done - first.done)
        # One that takes longer than those before it counts as if it ended now.
        a_piece = max(a_piece, (now - first.at) / (last.done - first.done + 1))
        return max(0.0, a_piece * (self._total - last.done) - (now - last.at))
