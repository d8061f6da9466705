"""Decide when a join pauses: the owner's requests and sensors' readings in, a pause with its reason out. No clock.

Battery and GPUs are read in `sensors.py`. How requests come and what a pause does to a join is the join's matter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedsoda_edge.errors import UsageProblem

BUSY_PERCENT = 20  # of a GPU, by other processes
BUSY_SECONDS = 30.0  # a GPU is busy for that long before it is a reason
CALM_SECONDS = 60.0  # a pause ends when its reason is gone for that long, so that it does not flap
_NOT_BEFORE = {"gpu-busy": BUSY_SECONDS}


@dataclass(frozen=True)
class PauseRules:
    """What pauses a join without a request.

    hours: (from, to) of the local day; to may lie before from, which goes over midnight.
    """

    battery: bool = False
    gpu_busy: bool = False
    hours: tuple[int, int] | None = None


@dataclass(frozen=True)
class Readings:
    """What the sensors read; None where there is nothing to read.

    hour: of the local day, 0 to 23. others_percent: what other processes use of the busiest GPU.
    """

    hour: int = 0
    on_battery: bool | None = None
    others_percent: int | None = None


@dataclass(frozen=True)
class Pause:
    """A pause. by: "owner" or the rule's name. until: monotonic seconds; None: until resume, or until the rule is calm."""

    by: str
    reason: str
    until: float | None = None


def parse_pause_rules(text: str) -> PauseRules:
    """Read rules as people write them, such as "battery,hours=22-6".

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
    return PauseRules(battery, gpu_busy, hours)


class PauseDecider:
    """Whether to pause now. The owner's requests go before the rules.

    A resume also overrules the rules that pause at that moment, each until it was calm once. Times are monotonic seconds.
    """

    def __init__(self, rules: PauseRules) -> None:
        self._rules = rules
        self._owner: Pause | None = None
        self._is_finishing = False
        self._since: dict[str, float] = {}  # rule: when its condition began
        self._calm: dict[str, float] = {}  # rule: when its condition ended
        self._pausing: dict[str, str] = {}  # rule: reason
        self._overruled: set[str] = set()

    def pause(self, now: float, seconds: float | None) -> None:
        """Take the owner's request to pause; seconds None: until resume."""
        self._owner = Pause("owner", "by its owner", None if seconds is None else now + seconds)

    def resume(self) -> None:
        """Take the owner's request to resume."""
        self._owner = None
        self._overruled |= self._pausing.keys()
        self._pausing.clear()

    def finish(self) -> None:
        """Take the owner's request to finish: from now on nothing pauses, so that the round in hand ends."""
        self._is_finishing = True

    def decide(self, now: float, readings: Readings) -> Pause | None:
        """Return the pause to be in now, if any. To be asked every few seconds."""
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
