"""A join pauses for the device's owner: requests and sensors are watched, the worker ends, the hub is told.

When to pause is decided in `device/pause_rules.py`, requests come through `control.py`, and what is done again
afterwards is the join's own matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fedsoda_edge.device.pause_rules import Pause, PauseDecider, PauseRules, Readings
from fedsoda_edge.device.sensors import SENSE_SECONDS, Sensors
from fedsoda_edge.join import control
from fedsoda_edge.ports import Clock, TorchPort

END_SECONDS = 5.0  # a worker whose stdin closed may take; then it is killed
REFRESH_SECONDS = 30.0  # so often `status` learns how long a pause still is


T = TypeVar("T")


class Join(Protocol):
    """What stands aside."""

    worker: TorchPort
    in_hand: int | None

    @property
    def pid_on_gpu(self) -> int | None: ...
    def say(self, event: dict[str, Any]) -> None: ...
    def still_paused(self, seconds: float) -> None: ...

    async def tell(self) -> None:
        """Let the hub know, where it is connected."""
        ...


async def end(worker: TorchPort) -> None:
    """Let the worker end by itself; one that is in the middle of its imports, or stopped, is killed."""
    try:
        async with asyncio.timeout(END_SECONDS):
            await worker.close()
    except TimeoutError:
        import psutil

        with contextlib.suppress(psutil.Error):
            psutil.Process(worker.pid).kill()
        await worker.close()


class Aside:
    """The pauses of one join. `finishing` is set when its owner wants no round after the one in hand."""

    def __init__(self, join: Join, requests: Path, rules: PauseRules, clock: Clock) -> None:
        self._join = join
        self._requests = requests
        self._rules = rules
        self._clock = clock
        self._sensors = Sensors(rules)
        self._readings = Readings()
        self._sensed = self._refreshed = float("-inf")
        self._decider = PauseDecider(rules)
        self.pause: Pause | None = None
        self.finishing = asyncio.Event()
        self._running = asyncio.Event()  # not paused
        self._running.set()
        self._work: set[asyncio.Task[Any]] = set()
        self.watcher: asyncio.Task[None] | None = None

    def missing(self) -> list[str]:
        """What a rule asks for and this device does not have."""
        return self._sensors.missing()

    async def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do the work while there is no pause; what one breaks off is begun again after it."""
        while True:
            await self._running.wait()
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

    def watch(self, failed: Callable[[BaseException], None]) -> None:
        """Look twice a second from now on."""
        self.watcher = asyncio.create_task(self._watch(failed))

    async def _watch(self, failed: Callable[[BaseException], None]) -> None:
        try:
            while True:
                await asyncio.sleep(control.LOOK_SECONDS)
                await self.look()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            failed(error)

    async def look(self) -> None:
        """Do what the owner requests and what the rules ask for."""
        now, freed, before = self._clock.monotonic(), 0, self.pause
        taken = control.requests(self._requests)
        for request in taken:
            if request.do == "pause":
                self._decider.pause(now, request.seconds)
            elif request.do == "resume":
                self._decider.resume()
            elif request.do == "finish":
                self._decider.finish()
                self.finishing.set()
        if self._rules != PauseRules() and now - self._sensed >= SENSE_SECONDS:
            self._sensed = now
            hour = time.localtime(self._clock.wall()).tm_hour
            self._readings = await asyncio.to_thread(self._sensors.read, hour, self._join.pid_on_gpu)
        wanted = self._decider.decide(now, self._readings)
        if wanted is None and before is not None:
            await self._end()
        elif wanted is not None and (before is None or (before.by, before.until) != (wanted.by, wanted.until)):
            freed = await self._begin(wanted, now)
        elif wanted is not None and wanted.until is not None and now - self._refreshed >= REFRESH_SECONDS:
            self._refreshed = now
            self._join.still_paused(wanted.until - now)
        pause = self.pause
        for request in taken:
            control.answer(
                request,
                control.Answer(
                    state="paused" if pause else "finishing" if self.finishing.is_set() else "running",
                    was_paused=before is not None,
                    reason=pause.reason if pause else None,
                    seconds=pause.until - now if pause and pause.until is not None else None,
                    freed_bytes=freed,
                    round=self._join.in_hand,
                ),
            )

    async def _begin(self, pause: Pause, now: float) -> int:
        """End the worker, which keeps all on the disk, and tell the hub; the bytes that are free again."""
        self.pause, self._refreshed = pause, now
        self._running.clear()
        if self._work:
            for task in self._work:
                task.cancel()
            await asyncio.wait(self._work)
        worker = self._join.worker
        freed = worker.rss_bytes or 0
        await end(worker)
        seconds = None if pause.until is None else pause.until - now
        self._join.say({"event": "paused", "reason": pause.reason, "seconds": seconds})
        await self._join.tell()
        return freed

    async def _end(self) -> None:
        self.pause = None
        await self._join.tell()
        self._join.say({"event": "resumed"})
        self._running.set()
