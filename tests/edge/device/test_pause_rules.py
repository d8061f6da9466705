"""When a device is its owner's alone: wishes and readings in, a pause with its reason out."""

from __future__ import annotations

import pytest

from fedsoda_edge.device.pause_rules import Neighbour, Pause, Readings, Rules, Sensors, parse_rules
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.units import parse_seconds

NOTHING = Readings()
BATTERY = Readings(on_battery=True)
PLUGGED = Readings(on_battery=False)


def said(neighbour: Neighbour, now: float, readings: Readings = NOTHING) -> str | None:
    pause = neighbour.look(now, readings)
    return None if pause is None else pause.reason


# -- what may be asked for ------------------------------------------------------------------------------


def test_rules_are_a_list_with_commas() -> None:
    assert parse_rules("") == Rules()
    assert parse_rules("battery, gpu-busy,hours=22-6") == Rules(battery=True, gpu_busy=True, hours=(22, 6))
    assert parse_rules("hours=9-24") == Rules(hours=(9, 24))


@pytest.mark.parametrize("wrong", ["batery", "hours", "hours=9", "hours=9-25", "hours=24-3", "hours=9-9", "hours=0-24"])
def test_another_rule_is_refused_with_the_choices(wrong: str) -> None:
    with pytest.raises(UsageProblem) as refused:
        parse_rules(f"battery,{wrong}")
    assert str(refused.value) == (
        f"--pause-on {wrong!r} is none of battery, gpu-busy, hours=FROM-TO (0 to 24, as hours=9-17 or hours=22-6)"
    )


def test_times_have_a_unit() -> None:
    assert [parse_seconds(text) for text in ("90s", "30m", "1h", "1.5 H")] == [90, 1800, 3600, 5400]
    for wrong in ("90", "1d", "-1h", "0s", "", "h"):
        with pytest.raises(UsageProblem, match="is no time; write it as 90s, 30m or 1h"):
            parse_seconds(wrong)


# -- the owner ------------------------------------------------------------------------------------------


def test_a_pause_lasts_until_its_time_or_until_resume() -> None:
    neighbour = Neighbour(Rules())
    assert said(neighbour, 0.0) is None
    neighbour.pause(10.0, 60.0)
    assert neighbour.look(10.0, NOTHING) == Pause("owner", "by its owner", 70.0)
    assert said(neighbour, 69.9) == "by its owner"
    assert said(neighbour, 70.0) is None
    neighbour.pause(80.0, None)
    assert said(neighbour, 1e9) == "by its owner"
    neighbour.resume()
    assert said(neighbour, 1e9) is None


def test_a_second_pause_replaces_the_first() -> None:
    neighbour = Neighbour(Rules())
    neighbour.pause(0.0, 3600.0)
    neighbour.pause(1.0, 10.0)
    assert said(neighbour, 11.0) is None


def test_the_owner_goes_before_the_rules_and_the_rule_stays() -> None:
    neighbour = Neighbour(Rules(battery=True))
    assert said(neighbour, 0.0, BATTERY) == "on battery"
    neighbour.pause(1.0, 10.0)
    assert said(neighbour, 1.0, BATTERY) == "by its owner"
    assert said(neighbour, 11.0, BATTERY) == "on battery"


def test_resume_overrules_what_pauses_just_then_until_it_was_calm() -> None:
    neighbour = Neighbour(Rules(battery=True))
    assert said(neighbour, 0.0, BATTERY) == "on battery"
    neighbour.resume()
    assert said(neighbour, 1.0, BATTERY) is None
    assert said(neighbour, 1000.0, BATTERY) is None
    assert said(neighbour, 1001.0, PLUGGED) is None
    assert said(neighbour, 1002.0, BATTERY) is None  # too short to be calm
    assert said(neighbour, 1003.0, PLUGGED) is None
    assert said(neighbour, 1063.0, PLUGGED) is None
    assert said(neighbour, 1064.0, BATTERY) == "on battery"


def test_nothing_pauses_who_is_finishing() -> None:
    neighbour = Neighbour(Rules(battery=True))
    neighbour.pause(0.0, None)
    neighbour.finish()
    assert said(neighbour, 1.0, BATTERY) is None


# -- the rules ------------------------------------------------------------------------------------------


def test_battery_pauses_at_once_and_ends_after_a_minute_of_calm() -> None:
    neighbour = Neighbour(Rules(battery=True))
    assert said(neighbour, 0.0, BATTERY) == "on battery"
    assert said(neighbour, 10.0, PLUGGED) == "on battery"
    assert said(neighbour, 40.0, BATTERY) == "on battery"  # calm begins anew
    assert said(neighbour, 50.0, PLUGGED) == "on battery"
    assert said(neighbour, 109.9, PLUGGED) == "on battery"
    assert said(neighbour, 110.0, PLUGGED) is None


def test_hours_may_go_over_midnight() -> None:
    def pausing(hours: tuple[int, int]) -> list[int]:
        return [hour for hour in range(24) if Neighbour(Rules(hours=hours)).look(0.0, Readings(hour=hour))]

    assert pausing((9, 17)) == list(range(9, 17))
    assert pausing((22, 6)) == [0, 1, 2, 3, 4, 5, 22, 23]
    assert pausing((20, 24)) == [20, 21, 22, 23]
    assert said(Neighbour(Rules(hours=(9, 17))), 0.0, Readings(hour=9)) == "9-17 h"


def test_a_busy_gpu_pauses_after_half_a_minute_of_it_and_says_how_busy() -> None:
    neighbour = Neighbour(Rules(gpu_busy=True))
    assert said(neighbour, 0.0, Readings(others_percent=83)) is None
    assert said(neighbour, 20.0, Readings(others_percent=20)) is None  # not above: from the beginning
    assert said(neighbour, 25.0, Readings(others_percent=83)) is None
    assert said(neighbour, 54.9, Readings(others_percent=70)) is None
    assert said(neighbour, 55.0, Readings(others_percent=83)) == "the GPU is busy (another process uses 83 %)"
    assert said(neighbour, 56.0, Readings(others_percent=0)) is not None
    assert said(neighbour, 116.0, Readings(others_percent=None)) is None


def test_a_rule_that_was_not_asked_for_never_pauses() -> None:
    everything = Readings(hour=12, on_battery=True, others_percent=100)
    assert said(Neighbour(Rules()), 0.0, everything) is None
    assert said(Neighbour(Rules(hours=(0, 6))), 0.0, everything) is None


# -- the sensors ----------------------------------------------------------------------------------------


def test_a_device_without_battery_or_nvml_says_so_and_never_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil
    import pynvml

    def no_driver() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(psutil, "sensors_battery", lambda: None, raising=False)
    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    rules = Rules(battery=True, gpu_busy=True)
    assert [sentence.partition(":")[0] for sentence in Sensors(rules).missing()] == [
        "--pause-on battery",
        "--pause-on gpu-busy",
    ]
    assert Sensors(Rules()).missing() == []
    readings = Sensors(rules).read(12, None)
    assert readings == Readings(hour=12)
    assert said(Neighbour(rules), 1000.0, readings) is None


def test_a_battery_that_is_not_plugged_in_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    class Battery:
        power_plugged = False

    monkeypatch.setattr(psutil, "sensors_battery", Battery, raising=False)
    assert Sensors(Rules(battery=True)).read(0, None).on_battery is True
    assert Sensors(Rules(battery=True)).missing() == []
