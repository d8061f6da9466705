"""Decide how training fits a device: the quickest way that has room, the next one that needs less, and the sentences.

Pure: what is free comes in as DeviceFacts (`facts.py` reads them), what training takes from `protocol/needs.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedsoda_edge.errors import DeviceTooSmall, UsageProblem
from fedsoda_edge.protocol.messages import DeviceFacts
from fedsoda_edge.protocol.needs import PROCESS_BYTES, SHORTEST, MemoryPlan, Part, SampleSizes, Shape, plans
from fedsoda_edge.units import human_bytes

EASY_SHARE = 0.9  # of what is free may be taken lightly: other programs grow too


@dataclass(frozen=True)
class Limits:
    """Bytes that training may take. None: everything that is free."""

    max_ram: int | None = None
    max_vram: int | None = None


def check_device_name(wanted: str) -> None:
    """Refuse a device that no one has.

    Raises:
        UsageProblem: `wanted` is none of "auto", "cpu", "cuda" and "cuda:N".
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", wanted):
        raise UsageProblem(f"--device {wanted!r} is none of auto, cpu, cuda, cuda:N")


def check_disk(needed: int, facts: DeviceFacts) -> None:
    """Refuse a disk without room for what is still to be fetched.

    Raises:
        DeviceTooSmall: says how many bytes are free and how many are needed.
    """
    if facts.disk_bytes < needed:
        raise DeviceTooSmall(
            f"this device has {human_bytes(facts.disk_bytes)} of disk free, the bundle needs {human_bytes(needed)}; "
            "free space or point FEDSODA_HOME to another disk"
        )


def fit(
    wanted: str,
    shape: Shape,
    samples: SampleSizes,
    facts: DeviceFacts,
    limits: Limits = Limits(),
    *,
    process_bytes: int = PROCESS_BYTES,
) -> MemoryPlan:
    """Choose the quickest way to train this sub-LLM that has room.

    Args:
        wanted: "auto", "cpu" or "cuda[:n]"; auto takes a GPU that has room, else the CPU.
        process_bytes: what a worker holds before it has read anything.

    Raises:
        DeviceTooSmall: not even the way that needs least has room on the devices that may be used; says both numbers.
    """
    devices = {"auto": ["cuda", "cpu"] if facts.accelerator else ["cpu"]}.get(wanted, [wanted])
    refusals = []
    for device in devices:
        room = room_for(device, facts, limits)
        ways = list(plans(shape, device, samples, process_bytes))
        easy = next((plan for plan in ways if plan.peak <= EASY_SHARE * room), None)
        least = min(ways, key=lambda plan: plan.peak)
        if easy is not None or least.peak <= room:
            return easy or least
        refusals.append(_refusal(device, least.peak, samples, facts, limits))
    raise DeviceTooSmall(refusals[-1])


def plan_sentence(plan: MemoryPlan, facts: DeviceFacts) -> str:
    """Tell people where training runs, what it takes of what is free, and how."""
    on_gpu = plan.device.startswith("cuda")
    free = facts.vram_bytes if on_gpu else facts.ram_bytes
    where = f"on the GPU {facts.accelerator}" if on_gpu else "on the CPU"
    ways = ["adapter and head as they are stored" if plan.packed else "adapter and head dense"]
    if plan.micro_batch == plan.batch_size:
        ways.append(f"{plan.batch_size} samples at once")
    else:
        ways.append(f"{plan.micro_batch} of {plan.batch_size} samples at once")
    if plan.recompute:
        ways.append("activations made twice")
    return f"training {where} takes {human_bytes(plan.peak)} of {human_bytes(free)} free: {', '.join(ways)}"


def table(plan: MemoryPlan) -> list[Part]:
    """List the plan's parts in words."""
    form = "as stored" if plan.packed else "dense"
    context = "CUDA context" if plan.device.startswith("cuda") else "the process, with its libraries"
    sizes = {
        context: plan.process,
        f"adapter weights, {form}": plan.weights,
        f"head, {form}": plan.head,
        "LoRA and optimiser": plan.lora,
        f"activations of {plan.micro_batch} samples": plan.activations,
        "logits of a chunk": plan.logits,
        "or instead of these five, the sweep": plan.sweep,
        "peak": plan.peak,
    }
    return [Part(name, size) for name, size in sizes.items()]


def same_way(plan: MemoryPlan, shape: Shape, samples: SampleSizes, process_bytes: int) -> MemoryPlan | None:
    """Find the way of a plan made before, with what it needs now; None where the hub asks for other batches now.

    Each worker process is of another size, and rows may have been added.
    """
    wanted = _way(plan)
    return next((way for way in plans(shape, plan.device, samples, process_bytes) if _way(way) == wanted), None)


def leaner(plan: MemoryPlan, shape: Shape, samples: SampleSizes, process_bytes: int) -> MemoryPlan | None:
    """Find the next slower way to train, which needs less; None after the last."""
    ways = list(plans(shape, plan.device, samples, process_bytes))
    place = [_way(way) for way in ways].index(_way(plan))
    return next((way for way in ways[place + 1 :] if way.peak < ways[place].peak), None)


def _way(plan: MemoryPlan) -> tuple[bool, bool, int, int]:
    """Return what tells two plans of one device apart."""
    return plan.packed, plan.recompute, plan.micro_batch, plan.batch_size


def room_for(device: str, facts: DeviceFacts, limits: Limits) -> int:
    """Count the bytes that training may take on this device."""
    on_gpu = device.startswith("cuda")
    free, most = (facts.vram_bytes, limits.max_vram) if on_gpu else (facts.ram_bytes, limits.max_ram)
    return free if most is None else min(free, most)


def _refusal(device: str, needed: int, samples: SampleSizes, facts: DeviceFacts, limits: Limits) -> str:
    on_gpu = device.startswith("cuda")
    free, most = (facts.vram_bytes, limits.max_vram) if on_gpu else (facts.ram_bytes, limits.max_ram)
    room = room_for(device, facts, limits)
    row = "" if samples == SHORTEST else f" for a row of {samples.ids} ids"
    least = f"the sub-LLM needs at least {human_bytes(needed)}{row}, {human_bytes(needed - room)} more"
    smaller = "ask the hub's owner for a smaller sub-LLM"
    if on_gpu and not facts.accelerator:
        return "no NVIDIA GPU is seen here; install its driver, or --device cpu"
    if most is not None and most == room:
        option = "--max-vram" if on_gpu else "--max-ram"
        return f"{option} allows {human_bytes(most)}, {least}; allow more, or {smaller}"
    if on_gpu:
        return f"the GPU {facts.accelerator} has {human_bytes(free)} free, {least}; close what uses it, or --device cpu"
    return f"this device has {human_bytes(free)} of memory free, {least}; close other programs, or {smaller}"
