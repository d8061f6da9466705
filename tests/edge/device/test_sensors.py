"""What a device can sense for the rules that pause a join, and what it says where there is nothing to sense."""

from __future__ import annotations

import pytest

from fedsoda_edge.device.pause_rules import PauseDecider, PauseRules, Readings
from fedsoda_edge.device.sensors import Sensors, vram_bytes


def test_a_device_without_battery_or_nvml_says_so_and_never_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil
    import pynvml

    def no_driver() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(psutil, "sensors_battery", lambda: None, raising=False)
    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    rules = PauseRules(battery=True, gpu_busy=True)
    assert [sentence.partition(":")[0] for sentence in Sensors(rules).missing()] == [
        "pause_on='battery' never pauses here",
        "pause_on='gpu-busy' never pauses here",
    ]
    assert Sensors(PauseRules()).missing() == []
    readings = Sensors(rules).read(12, None)
    assert readings == Readings(hour=12)
    assert PauseDecider(rules).decide(1000.0, readings) is None


def test_a_battery_that_is_not_plugged_in_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    class Battery:
        power_plugged = False

    monkeypatch.setattr(psutil, "sensors_battery", Battery, raising=False)
    assert Sensors(PauseRules(battery=True)).read(0, None).on_battery is True
    assert Sensors(PauseRules(battery=True)).missing() == []


def test_the_gpu_memory_of_a_process_is_summed_over_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows shows no sizes of processes, a container other pids: then nothing is known."""
    from types import SimpleNamespace

    import pynvml

    held: dict[int, list[tuple[int, int | None]]] = {0: [(7, 100), (8, 5)], 1: [(7, 20), (9, None)]}
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(
        pynvml,
        "nvmlDeviceGetComputeRunningProcesses",
        lambda index: [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in held[index]],
    )
    assert [vram_bytes(pid) for pid in (7, 8, 9, 1)] == [120, 5, None, None]

    def broken() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", broken)
    assert vram_bytes(7) is None
