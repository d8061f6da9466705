"""Read what this device has free now: memory, disk, GPU. What fits is left to `fit.py`, limits to `ports/machine.py`."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil

from fedsoda_edge.ports.machine import room
from fedsoda_edge.protocol.messages import DeviceFacts


def read_device(home: Path) -> DeviceFacts:
    """Read what is free: RAM as the control groups leave it, VRAM through NVML, so that the agent makes no CUDA context.

    Args:
        home: the FEDSODA_HOME where bundle and border states are kept; it need not exist yet.
    """
    name, vram = _free_vram()
    existing = home
    while not existing.exists():
        existing = existing.parent
    limits = room()
    return DeviceFacts(
        ram_bytes=limits.ram_bytes,
        vram_bytes=vram,
        disk_bytes=shutil.disk_usage(existing).free,
        threads=min(limits.cpus, psutil.cpu_count(logical=False) or limits.cpus),
        accelerator=name,
    )


def _free_vram() -> tuple[str, int]:
    """Find the NVIDIA GPU with the most free memory: (name, free bytes); ("", 0) without one."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return "", 0
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            name = pynvml.nvmlDeviceGetName(handle)
            found.append((int(pynvml.nvmlDeviceGetMemoryInfo(handle).free), str(name)))
        free, name = max(found, default=(0, ""))
        return name, free
    except pynvml.NVMLError:
        return "", 0
    finally:
        pynvml.nvmlShutdown()
