"""When a join pauses: requests and readings in, a pause with its reason out."""

from __future__ import annotations

import pytest

from fedsoda_edge.device.pause_rules import Pause, PauseDecider, PauseRules, Readings, parse_pause_rules
from fedsoda_edge.errors import UsageProblem

NOTHING = Readings()
BATTERY = Readings(on_battery=True)
PLUGGED = Readings(on_battery=False)


def said(decider: PauseDecider, now: float, readings: Readings = NOTHING) -> str | None:
    pause = decider.decide(now, readings)
    return None if pause is None else pause.reason


# -- what may be asked for ------------------------------------------------------------------------------


def test_rules_are_a_list_with_commas() -> None:
    assert parse_pause_rules("") == PauseRules()
    assert parse_pause_rules("battery, gpu-busy,hours=22-6") == PauseRules(battery=True, gpu_busy=True, hours=(22, 6))
    assert parse_pause_rules("hours=9-24") == PauseRules(hours=(9, 24))


@pytest.mark.parametrize("wrong", ["batery", "hours", "hours=9", "hours=9-25", "hours=24-3", "hours=9-9", "hours=0-24"])
def test_another_rule_is_refused_with_the_choices(wrong: str) -> None:
    with pytest.raises(UsageProblem) as refused:
        parse_pause_rules(f"battery,{wrong}")
    assert str(refused.value) == (
        f"pause_on={wrong!r} is not known; choose battery, gpu-busy or hours=FROM-TO "
        "(0 to 24, as in hours=9-17 or hours=22-6)"
    )


# -- the owner ------------------------------------------------------------------------------------------


def test_a_pause_lasts_until_its_time_or_until_resume() -> None:
    decider = PauseDecider(PauseRules())
    assert said(decider, 0.0) is None
    decider.pause(10.0, 60.0)
    assert decider.decide(10.0, NOTHING) == Pause("owner", "by its owner", 70.0)
    assert said(decider, 69.9) == "by its owner"
    assert said(decider, 70.0) is None
    decider.pause(80.0, None)
    assert said(decider, 1e9) == "by its owner"
    decider.resume()
    assert said(decider, 1e9) is None


def test_a_second_pause_replaces_the_first() -> None:
    decider = PauseDecider(PauseRules())
    decider.pause(0.0, 3600.0)
    decider.pause(1.0, 10.0)
    assert said(decider, 11.0) is None


def test_the_owner_goes_before_the_rules_and_the_rule_stays() -> None:
    decider = PauseDecider(PauseRules(battery=True))
    assert said(decider, 0.0, BATTERY) == "on battery"
    decider.pause(1.0, 10.0)
    assert said(decider, 1.0, BATTERY) == "by its owner"
    assert said(decider, 11.0, BATTERY) == "on battery"


def test_resume_overrules_what_pauses_just_then_until_it_was_calm() -> None:
    decider = PauseDecider(PauseRules(battery=True))
    assert said(decider, 0.0, BATTERY) == "on battery"
    decider.resume()
    assert said(decider, 1.0, BATTERY) is None
    assert said(decider, 1000.0, BATTERY) is None
    assert said(decider, 1001.0, PLUGGED) is None
    assert said(decider, 1002.0, BATTERY) is None  # too short to be calm
    assert said(decider, 1003.0, PLUGGED) is None
    assert said(decider, 1063.0, PLUGGED) is None
    assert said(decider, 1064.0, BATTERY) == "on battery"


def test_nothing_pauses_who_is_finishing() -> None:
    decider = PauseDecider(PauseRules(battery=True))
    decider.pause(0.0, None)
    decider.finish()
    assert said(decider, 1.0, BATTERY) is None


# -- the rules ------------------------------------------------------------------------------------------


def test_battery_pauses_at_once_and_ends_after_a_minute_of_calm() -> None:
    decider = PauseDecider(PauseRules(battery=True))
    assert said(decider, 0.0, BATTERY) == "on battery"
    assert said(decider, 10.0, PLUGGED) == "on battery"
    assert said(decider, 40.0, BATTERY) == "on battery"  # calm begins again
    assert said(decider, 50.0, PLUGGED) == "on battery"
    assert said(decider, 109.9, PLUGGED) == "on battery"
    assert said(decider, 110.0, PLUGGED) is None


def test_hours_may_go_over_midnight() -> None:
    def pausing(hours: tuple[int, int]) -> list[int]:
        return [hour for hour in range(24) if PauseDecider(PauseRules(hours=hours)).decide(0.0, Readings(hour=hour))]

    assert pausing((9, 17)) == list(range(9, 17))
    assert pausing((22, 6)) == [0, 1, 2, 3, 4, 5, 22, 23]
    assert pausing((20, 24)) == [20, 21, 22, 23]
    assert said(PauseDecider(PauseRules(hours=(9, 17))), 0.0, Readings(hour=9)) == "9-17 h"


def test_a_busy_gpu_pauses_after_half_a_minute_of_it_and_says_how_busy() -> None:
    decider = PauseDecider(PauseRules(gpu_busy=True))
    assert said(decider, 0.0, Readings(others_percent=83)) is None
    assert said(decider, 20.0, Readings(others_percent=20)) is None  # not above: from the beginning
    assert said(decider, 25.0, Readings(others_percent=83)) is None
    assert said(decider, 54.9, Readings(others_percent=70)) is None
    assert said(decider, 55.0, Readings(others_percent=83)) == "the GPU is busy (another process uses 83 %)"
    assert said(decider, 56.0, Readings(others_percent=0)) is not None
    assert said(decider, 116.0, Readings(others_percent=None)) is None


def test_a_rule_that_was_not_asked_for_never_pauses() -> None:
    everything = Readings(hour=12, on_battery=True, others_percent=100)
    assert said(PauseDecider(PauseRules()), 0.0, everything) is None
    assert said(PauseDecider(PauseRules(hours=(0, 6))), 0.0, everything) is None
