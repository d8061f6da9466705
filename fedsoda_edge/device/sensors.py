"""Read battery and GPUs for the rules that pause a join. When they are a reason to pause is decided in `pause_rules.py`."""

from __future__ import annotations

from typing import Any

from fedsoda_edge.device.pause_rules import PauseRules, Readings

SENSE_SECONDS = 5.0  # between two readings


class Sensors:
    """Battery and GPUs, as far as the rules ask for them."""

    def __init__(self, rules: PauseRules) -> None:
        self._rules = rules

    def missing(self) -> list[str]:
        """Name what a rule asks for and this device does not have; such a rule never pauses."""
        found = []
        if self._rules.battery and _on_battery() is None:
            found.append("--pause-on battery: no battery is seen here, so it never pauses")
        if self._rules.gpu_busy and _others_percent(None) is None:
            found.append("--pause-on gpu-busy: no NVIDIA driver (NVML) is seen here, so it never pauses")
        return found

    def read(self, hour: int, worker_on_gpu: int | None) -> Readings:
        """Read what the rules ask for.

        Args:
            hour: of the local day.
            worker_on_gpu: pid of our worker if it trains on a GPU.
        """
        return Readings(
            hour,
            _on_battery() if self._rules.battery else None,
            _others_percent(worker_on_gpu) if self._rules.gpu_busy else None,
        )


def _on_battery() -> bool | None:
    """Tell whether the device runs on its battery; None where there is no battery."""
    import psutil

    try:
        battery = psutil.sensors_battery()
    except (AttributeError, OSError, RuntimeError):  # AttributeError: psutil reads no battery on this system
        return None
    return None if battery is None or battery.power_plugged is None else not battery.power_plugged


def _others_percent(ours: int | None) -> int | None:
    """Read what other processes use of the busiest GPU, in percent; None where it cannot be told from ours.

    A container may show NVML other pids than our own: then our use would look like another's, and there is no reading.
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
