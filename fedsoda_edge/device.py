"""What this device has free, and whether a bundle fits: the sentence that says so, before anything is fetched."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import msgspec
import psutil

from fedsoda_edge.errors import DeviceTooSmall, UsageProblem
from fedsoda_edge.ports.console import human_bytes
from fedsoda_edge.protocol.manifest import EdgeNeeds
from fedsoda_edge.protocol.messages import DeviceFacts


def read_device(home: Path) -> DeviceFacts:
    """Free RAM and disk through psutil, free VRAM through NVML: no CUDA context is made in the agent."""
    name, vram = _free_vram()
    existing = home
    while not existing.exists():
        existing = existing.parent
    return DeviceFacts(
        ram_bytes=psutil.virtual_memory().available,
        vram_bytes=vram,
        disk_bytes=shutil.disk_usage(existing).free,
        threads=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        accelerator=name,
    )


def _free_vram() -> tuple[str, int]:
    """(name, free bytes) of the NVIDIA GPU with most free memory; ("", 0) where there is none."""
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


def choose_device_within(
    wanted: str,
    needs: EdgeNeeds,
    facts: DeviceFacts,
    held_bytes: int = 0,
    *,
    max_ram: int | None = None,
    max_vram: int | None = None,
) -> str:
    """`choose_device` where the owner allows at most so many bytes of RAM and VRAM; None: all that is free.

    Raises:
        DeviceTooSmall: says which limit keeps it from training, with both numbers.
    """
    limits = (("--max-ram", max_ram, needs.ram_bytes), ("--max-vram", max_vram, needs.vram_bytes))
    allowed = msgspec.structs.replace(
        facts,
        ram_bytes=facts.ram_bytes if max_ram is None else min(facts.ram_bytes, max_ram),
        vram_bytes=facts.vram_bytes if max_vram is None else min(facts.vram_bytes, max_vram),
    )
    try:
        return choose_device(wanted, needs, allowed, held_bytes)
    except DeviceTooSmall:
        choose_device(wanted, needs, facts, held_bytes)  # says so itself where the device is too small
        told = " and ".join(
            f"{name} allows {human_bytes(most)}, the sub-LLM needs {human_bytes(needed)}"
            for name, most, needed in limits
            if most is not None and most < needed
        )
        raise DeviceTooSmall(f"{told}; allow more, or ask the hub's owner for a smaller sub-LLM") from None


def choose_device(wanted: str, needs: EdgeNeeds, facts: DeviceFacts, held_bytes: int = 0) -> str:
    """ "cpu" or "cuda[:n]": where this bundle can be trained.

    Args:
        wanted: "auto", "cpu" or "cuda[:n]"; auto takes a GPU that has room, else the CPU.
        held_bytes: bytes of the bundle that are on the disk already.

    Raises:
        DeviceTooSmall: nothing it may use has room; says both numbers.
        UsageProblem: `wanted` is none of these.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", wanted):
        raise UsageProblem(f"--device {wanted!r} is none of auto, cpu, cuda, cuda:N")
    disk = max(0, needs.disk_bytes - held_bytes)
    if facts.disk_bytes < disk:
        raise DeviceTooSmall(
            f"this device has {human_bytes(facts.disk_bytes)} of disk free, the bundle needs {human_bytes(disk)}; "
            "free space or point FEDSODA_HOME to another disk"
        )
    has_vram = facts.vram_bytes >= needs.vram_bytes
    if wanted.startswith("cuda") and not has_vram:
        raise DeviceTooSmall(
            f"the GPU {facts.accelerator or '(none found)'} has {human_bytes(facts.vram_bytes)} free, the sub-LLM needs "
            f"{human_bytes(needs.vram_bytes)}; close what uses it, or --device cpu"
        )
    if wanted != "cpu" and has_vram:
        return "cuda" if wanted == "auto" else wanted
    if facts.ram_bytes < needs.ram_bytes:
        raise DeviceTooSmall(
            f"this device has {human_bytes(facts.ram_bytes)} of memory free, the sub-LLM needs {human_bytes(needs.ram_bytes)}; "
            "close other programs, or ask the hub's owner for a smaller sub-LLM"
        )
    return "cpu"
