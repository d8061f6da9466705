"""Read battery and GPUs for the rules that pause a join. When a reading is a reason is left to `pause_rules.py`."""

from __future__ import annotations

from typing import Any

from fedsoda_edge.device.pause_rules import PauseRules, Readings

SENSE_SECONDS = 5.0  # between two readings


class Sensors:
    """The battery and the GPUs, as far as the rules ask for them."""

    def __init__(self, rules: PauseRules) -> None:
        self._rules = rules

    def missing(self) -> list[str]:
        """List, as sentences, what a rule asks for and this device does not have; such a rule never pauses."""
        found = []
        if self._rules.battery and _on_battery() is None:
            found.append("pause_on='battery' never pauses here: this device shows no battery")
        if self._rules.gpu_busy and _others_percent(None) is None:
            found.append("pause_on='gpu-busy' never pauses here: this device shows no NVIDIA driver (NVML)")
        return found

    def read(self, hour: int, worker_on_gpu: int | None) -> Readings:
        """Read what the rules ask for.

        Args:
            hour: the hour of the local day.
            worker_on_gpu: the pid of our worker if it trains on a GPU; None: it does not.
        """
        return Readings(
            hour,
            _on_battery() if self._rules.battery else None,
            _others_percent(worker_on_gpu) if self._rules.gpu_busy else None,
        )


def vram_bytes(pid: int) -> int | None:
    """Read how many bytes of all GPUs a process holds; None where no driver (NVML) shows it.

    In a container NVML may show other pids than our own.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        held = [
            process.usedGpuMemory
            for index in range(pynvml.nvmlDeviceGetCount())
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(index))
            if process.pid == pid
        ]
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    known = [int(size) for size in held if size is not None]
    return sum(known) if known else None


def _on_battery() -> bool | None:
    """Tell whether the device runs on its battery; None where there is no battery."""
    import psutil

    try:
        battery = psutil.sensors_battery()
    except (AttributeError, OSError, RuntimeError):  # AttributeError: psutil reads no battery on this system
        return None
    return None if battery is None or battery.power_plugged is None else not battery.power_plugged


def _others_percent(ours: int | None) -> int | None:
    """Read how many percent of the busiest GPU other processes use; None where their use and ours cannot be separated.

    In a container NVML may show other pids than our own: then our use would look like that of others.
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
