"""Decide when a join pauses: the owner's requests and sensors' readings in, a pause with its reason out. No clock.

Reading battery and GPUs is left to `sensors.py`; how requests come, and what a pause does, to the room `join`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedsoda_edge.errors import UsageProblem

BUSY_PERCENT = 20  # of a GPU; above it other processes keep the GPU busy
BUSY_SECONDS = 30.0  # for which a GPU is busy before a join pauses
CALM_SECONDS = 60.0  # for which a pause's reason is gone before the pause ends, so that pauses do not come and go
_NOT_BEFORE = {"gpu-busy": BUSY_SECONDS}


@dataclass(frozen=True)
class PauseRules:
    """The rules that pause a join without a request.

    hours: (from, to) of the local day; when `to` is the smaller, the hours continue after midnight.
    """

    battery: bool = False
    gpu_busy: bool = False
    hours: tuple[int, int] | None = None


@dataclass(frozen=True)
class Readings:
    """The readings of the sensors; None where there is nothing to read.

    hour: the hour of the local day, 0 to 23. others_percent: the share of the busiest GPU that other processes use.
    """

    hour: int = 0
    on_battery: bool | None = None
    others_percent: int | None = None


@dataclass(frozen=True)
class Pause:
    """A pause.

    by: "owner" or the rule's name. until: monotonic seconds; None: until resume, or until the rule's reason is gone.
    """

    by: str
    reason: str
    until: float | None = None


def parse_pause_rules(text: str) -> PauseRules:
    """Read rules as people write them, such as "battery,hours=22-6".

    Raises:
        UsageProblem: a rule is not known; names the choices.
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
                f"pause_on={word!r} is not known; choose battery, gpu-busy or hours=FROM-TO (0 to 24, as in hours=9-17 or "
                "hours=22-6)"
            )
    return PauseRules(battery, gpu_busy, hours)


class PauseDecider:
    """The decider whether to pause. The owner's requests override the rules.

    A resume also overrides the rules that pause at that moment, each until its reason was gone once. Times are monotonic
    seconds.
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
        """Take the owner's request to pause, for some seconds or (None) until resume."""
        self._owner = Pause("owner", "by its owner", None if seconds is None else now + seconds)

    def resume(self) -> None:
        """Take the owner's request to resume."""
        self._owner = None
        self._overruled |= self._pausing.keys()
        self._pausing.clear()

    def finish(self) -> None:
        """Take the owner's request to finish: from now on nothing pauses, so that the round in hand can end."""
        self._is_finishing = True

    def decide(self, now: float, readings: Readings) -> Pause | None:
        """Return the pause that is to be on now; None where none is. To be asked every few seconds."""
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
