"""Pause a join for the device's owner: read requests and sensors, break work off, and begin it again afterwards.

When to pause is left to `device/pause_rules.py`, how requests come to `control.py`; what else a pause does, to the worker
and to the hub, to the agent, who looks here twice a second.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedsoda_edge.device.pause_rules import Pause, PauseDecider, PauseRules, Readings
from fedsoda_edge.device.sensors import SENSE_SECONDS, Sensors
from fedsoda_edge.join import control
from fedsoda_edge.ports import Clock

REFRESH_SECONDS = 30.0  # between two reports of how long a pause still lasts

T = TypeVar("T")


@dataclass(frozen=True)
class PauseBegins:
    """The begin of a pause, or a new reason or end of the one that is on. seconds: how long it will be; None: not known."""

    reason: str
    seconds: float | None


@dataclass(frozen=True)
class PauseLasts:
    """The pause that is on, once every REFRESH_SECONDS. seconds: how long it still lasts."""

    seconds: float


@dataclass(frozen=True)
class PauseEnds:
    """The end of the pause; work continues once `let_work` is called."""


@dataclass(frozen=True)
class NoChange:
    """No news since the last look."""


@dataclass(frozen=True)
class Look:
    """The result of one look. at: monotonic seconds. requests: to be answered once they are done."""

    at: float
    change: PauseBegins | PauseLasts | PauseEnds | NoChange
    requests: Sequence[control.Request]
    was_paused: bool


class Pauses:
    """The pauses of one join, and the work that they break off.

    Args:
        requests: the directory of the files of `control.py`.
    """

    def __init__(self, requests: Path, rules: PauseRules, clock: Clock) -> None:
        self.is_finishing = False  # the owner has asked for no round after the one in hand
        self._requests = requests
        self._rules = rules
        self._clock = clock
        self._sensors = Sensors(rules)
        self._readings = Readings()
        self._sensed_at = self._refreshed_at = float("-inf")
        self._decider = PauseDecider(rules)
        self._pause: Pause | None = None
        self._may_work = asyncio.Event()
        self._may_work.set()
        self._work: set[asyncio.Task[Any]] = set()

    @property
    def is_paused(self) -> bool:
        """Whether a pause is on."""
        return self._pause is not None

    def missing(self) -> list[str]:
        """List, as sentences, what a rule asks for and this device does not have."""
        return self._sensors.missing()

    async def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do the work while no pause is on; begin it again after each pause that breaks it off."""
        while True:
            await self._may_work.wait()
            task = asyncio.create_task(work())
            self._work.add(task)
            try:
                return await task
            except asyncio.CancelledError:
                this = asyncio.current_task()
                if this is None or this.cancelling():
                    raise  # not by a pause
            finally:
                self._work.discard(task)

    async def look(self, worker_on_gpu: int | None) -> Look:
        """Read requests and sensors; break work off when a pause begins.

        Args:
            worker_on_gpu: the worker's pid where it computes on a GPU; None: it does not.
        """
        now, before = self._clock.monotonic(), self._pause
        found = control.requests(self._requests)
        for request in found:
            self._take(request, now)
        if self._rules != PauseRules() and now - self._sensed_at >= SENSE_SECONDS:
            self._sensed_at = now
            hour = time.localtime(self._clock.wall()).tm_hour
            self._readings = await asyncio.to_thread(self._sensors.read, hour, worker_on_gpu)
        self._pause = self._decider.decide(now, self._readings)
        return Look(now, await self._change(before, now), found, before is not None)

    def _take(self, request: control.Request, now: float) -> None:
        match request.do:
            case "pause":
                self._decider.pause(now, request.seconds)
            case "resume":
                self._decider.resume()
            case "finish":
                self._decider.finish()
                self.is_finishing = True

    async def _change(self, before: Pause | None, now: float) -> PauseBegins | PauseLasts | PauseEnds | NoChange:
        pause = self._pause
        if pause is None:
            return NoChange() if before is None else PauseEnds()
        seconds = None if pause.until is None else pause.until - now
        if before is None or (before.by, before.until) != (pause.by, pause.until):
            self._refreshed_at = now
            await self._break_off()
            return PauseBegins(pause.reason, seconds)
        if seconds is not None and now - self._refreshed_at >= REFRESH_SECONDS:
            self._refreshed_at = now
            return PauseLasts(seconds)
        return NoChange()

    async def _break_off(self) -> None:
        self._may_work.clear()
        if self._work:
            for task in self._work:
                task.cancel()
            await asyncio.wait(self._work)

    def let_work(self) -> None:
        """Let the work that a pause broke off begin again."""
        if self._pause is None:
            self._may_work.set()

    def answer(self, look: Look, freed_bytes: int, in_hand: int | None) -> None:
        """Answer the requests of a look.

        Args:
            freed_bytes: memory of the worker that the pause ended.
            in_hand: the round that is trained or handed in; None: none is.
        """
        pause = self._pause
        said = control.RequestAnswer(
            state="paused" if pause else "finishing" if self.is_finishing else "running",
            was_paused=look.was_paused,
            reason=pause.reason if pause else None,
            seconds=pause.until - look.at if pause and pause.until is not None else None,
            freed_bytes=freed_bytes,
            round=in_hand,
        )
        for request in look.requests:
            control.answer(request, said)
