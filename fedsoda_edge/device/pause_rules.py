"""Decide when a device is its owner's alone: wishes and readings in, a pause with its reason out. No clock.

`Sensors` reads battery and GPUs, thinly. What a pause does to a join is `aside.py`'s, how wishes come `control.py`'s.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fedsoda_edge.errors import UsageProblem

BUSY_PERCENT = 20  # of a GPU, by other processes
BUSY_SECONDS = 30.0  # so long before it is a reason
CALM_SECONDS = 60.0  # so long no reason before training goes on, so that it does not flap
SENSE_SECONDS = 5.0
_NOT_BEFORE = {"gpu-busy": BUSY_SECONDS}


@dataclass(frozen=True)
class Rules:
    """What pauses by itself. hours: (from, to) of the local day, to may lie before from: over midnight."""

    battery: bool = False
    gpu_busy: bool = False
    hours: tuple[int, int] | None = None


@dataclass(frozen=True)
class Readings:
    """What the sensors say; None where there is nothing to read. others_percent: of the busiest GPU, without ours."""

    hour: int = 0
    on_battery: bool | None = None
    others_percent: int | None = None


@dataclass(frozen=True)
class Pause:
    """by: "owner" or the rule. until: monotonic seconds, None: nobody knows."""

    by: str
    reason: str
    until: float | None = None


def parse_rules(text: str) -> Rules:
    """ "battery,hours=22-6" -> Rules.

    Raises:
        UsageProblem: names the choices.
    """
    battery = gpu_busy = False
    hours = None
    for word in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"hours=(\d{1,2})-(\d{1,2})", word)
        if word == "battery":
            battery = True
        elif word == "gpu-busy":
            gpu_busy = True
        elif match and int(match[1]) < 24 and int(match[2]) <= 24 and int(match[1]) != int(match[2]) % 24:
            hours = (int(match[1]), int(match[2]))
        else:
            raise UsageProblem(
                f"--pause-on {word!r} is none of battery, gpu-busy, hours=FROM-TO (0 to 24, as hours=9-17 or hours=22-6)"
            )
    return Rules(battery, gpu_busy, hours)


class Neighbour:
    """The owner goes before the rules, and who resumes overrules what pauses just then, until that was calm once."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._owner: Pause | None = None
        self._is_finishing = False
        self._since: dict[str, float] = {}  # a rule's condition holds since
        self._calm: dict[str, float] = {}  # it does not since
        self._pausing: dict[str, str] = {}  # rule: reason
        self._overruled: set[str] = set()

    def pause(self, now: float, seconds: float | None) -> None:
        self._owner = Pause("owner", "by its owner", None if seconds is None else now + seconds)

    def resume(self) -> None:
        self._owner = None
        self._overruled |= self._pausing.keys()
        self._pausing.clear()

    def finish(self) -> None:
        """Nothing pauses any more: the round in hand is to end."""
        self._is_finishing = True

    def look(self, now: float, readings: Readings) -> Pause | None:
        """Whether to pause now. To be asked every few seconds, with what the sensors say."""
        self._judge(now, self._reasons(readings))
        if self._owner is not None and self._owner.until is not None and now >= self._owner.until:
            self._owner = None
        if self._is_finishing:
            return None
        return self._owner or next((Pause(rule, reason) for rule, reason in self._pausing.items()), None)

    def _reasons(self, readings: Readings) -> dict[str, str]:
        rules, found = self._rules, dict[str, str]()
        if rules.hours is not None and _is_within(readings.hour, rules.hours):
            found["hours"] = f"{rules.hours[0]}-{rules.hours[1]} h"
        if rules.battery and readings.on_battery:
            found["battery"] = "on battery"
        if rules.gpu_busy and (readings.others_percent or 0) > BUSY_PERCENT:
            found["gpu-busy"] = f"the GPU is busy (another process uses {readings.others_percent} %)"
        return found

    def _judge(self, now: float, reasons: dict[str, str]) -> None:
        for rule, reason in reasons.items():
            self._calm.pop(rule, None)
            since = self._since.setdefault(rule, now)
            if now - since >= _NOT_BEFORE.get(rule, 0.0) and rule not in self._overruled:
                self._pausing[rule] = reason
        for rule in ("hours", "battery", "gpu-busy"):
            if rule not in reasons:
                self._since.pop(rule, None)
                if now - self._calm.setdefault(rule, now) >= CALM_SECONDS:
                    self._pausing.pop(rule, None)
                    self._overruled.discard(rule)


def _is_within(hour: int, hours: tuple[int, int]) -> bool:
    begin, end = hours
    return begin <= hour < end if begin < end else hour >= begin or hour < end


# --- what there is to read ---------------------------------------------------------------------------------


class Sensors:
    """Battery and GPUs, as far as the rules ask for them."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules

    def missing(self) -> list[str]:
        """What a rule asks for and this device does not have; such a rule never pauses."""
        found = []
        if self._rules.battery and _on_battery() is None:
            found.append("--pause-on battery: no battery is seen here, so it never pauses")
        if self._rules.gpu_busy and _others_percent(None) is None:
            found.append("--pause-on gpu-busy: no NVIDIA driver (NVML) is seen here, so it never pauses")
        return found

    def read(self, hour: int, worker_on_gpu: int | None) -> Readings:
        """worker_on_gpu: pid of our worker if it trains on a GPU."""
        return Readings(
            hour,
            _on_battery() if self._rules.battery else None,
            _others_percent(worker_on_gpu) if self._rules.gpu_busy else None,
        )


def _on_battery() -> bool | None:
    import psutil

    try:
        battery = psutil.sensors_battery()
    except (AttributeError, OSError, RuntimeError):  # AttributeError: a system that psutil knows no batteries of
        return None
    return None if battery is None or battery.power_plugged is None else not battery.power_plugged


def _others_percent(ours: int | None) -> int | None:
    """Use of the busiest GPU by other processes; None where nobody can tell it from ours.

    A container may show NVML other pids than our own: then our use would look like a stranger's, and nothing is told.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        found: list[int] = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            if ours is None:
                found.append(int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu))
            elif ours in {process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}:
                latest: dict[int, Any] = {}
                for sample in pynvml.nvmlDeviceGetProcessUtilization(handle, 0):
                    if sample.timeStamp >= latest.get(sample.pid, sample).timeStamp:
                        latest[sample.pid] = sample
                found.append(min(100, sum(int(sample.smUtil) for pid, sample in latest.items() if pid != ours)))
        return max(found, default=None)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
