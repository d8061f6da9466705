"""Decide how training fits a device: the quickest plan that has room, the next one that needs less, and the sentences.

Pure. Reading what is free is left to `facts.py`, counting what training takes to `protocol/needs.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedsoda_edge.errors import DeviceTooSmall, DiskFull, UsageProblem
from fedsoda_edge.protocol.messages import DeviceFacts
from fedsoda_edge.protocol.needs import PROCESS_BYTES, SHORTEST, MemoryPlan, Part, SampleSizes, Shape, plans
from fedsoda_edge.units import human_bytes

EASY_SHARE = 0.9  # a plan that takes more of what is free is used only if none takes less: other programs grow too


@dataclass(frozen=True)
class Limits:
    """The bytes that training may take. None: all that are free."""

    max_ram: int | None = None
    max_vram: int | None = None


def check_device_name(wanted: str) -> None:
    """Refuse a name that no device has.

    Raises:
        UsageProblem: `wanted` is not "auto", "cpu", "cuda" or "cuda:N".
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", wanted):
        raise UsageProblem(f"device={wanted!r} is not known; choose auto, cpu, cuda or cuda:N")


def check_disk(needed: int, facts: DeviceFacts, held: int = 0) -> None:
    """Refuse a disk without room for what is still to be fetched.

    Args:
        needed: bytes that are still to come.
        held: bytes that are here already.

    Raises:
        DiskFull: fewer bytes are free than needed; says both numbers.
    """
    if facts.disk_bytes < needed:
        beyond = f" beyond the {human_bytes(held)} that are here" if held else ""
        raise DiskFull(
            f"this device has {human_bytes(facts.disk_bytes)} of disk free, the bundle needs {human_bytes(needed)}{beyond}; "
            f"free {human_bytes(needed - facts.disk_bytes)}, or move FEDSODA_HOME with all that is in it to another disk "
            "(an empty one is another device, which needs a token of its own)"
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
    """Choose the quickest plan to train this sub-LLM that has room.

    Args:
        wanted: "auto", "cpu", "cuda" or "cuda:N"; auto takes a GPU that has room, otherwise the CPU.
        process_bytes: bytes that a worker holds before it has read anything.

    Raises:
        DeviceTooSmall: even the plan that needs least has no room on a device that may be used; says both numbers.
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
    """Write, for people, where training runs, how much it takes of what is free, and in which way."""
    on_gpu = plan.device.startswith("cuda")
    free = facts.vram_bytes if on_gpu else facts.ram_bytes
    where = f"on the GPU {facts.accelerator}" if on_gpu else "on the CPU"
    ways = ["adapter and head as they are stored" if plan.packed else "adapter and head dense"]
    if plan.micro_batch == plan.batch_size:
        ways.append(f"{plan.batch_size} samples at once")
    else:
        ways.append(f"{plan.micro_batch} of {plan.batch_size} samples at once")
    if plan.recompute:
        ways.append("activations computed twice")
    return f"training {where} takes {human_bytes(plan.peak)} of {human_bytes(free)} free: {', '.join(ways)}"


def table(plan: MemoryPlan) -> list[Part]:
    """List what the plan's memory consists of."""
    form = "as stored" if plan.packed else "dense"
    context = "CUDA context" if plan.device.startswith("cuda") else "the process, with its libraries"
    sizes = {
        context: plan.process,
        f"adapter weights, {form}": plan.weights,
        f"head, {form}": plan.head,
        "LoRA and optimiser": plan.lora,
        f"activations of {plan.micro_batch} samples": plan.activations,
        "logits of a chunk": plan.logits,
        "or, instead of these five, the sweep": plan.sweep,
        "peak": plan.peak,
    }
    return [Part(name, size) for name, size in sizes.items()]


def same_way(plan: MemoryPlan, shape: Shape, samples: SampleSizes, process_bytes: int) -> MemoryPlan | None:
    """Find the plan that trains as an earlier one, with what it needs now; None where the hub asks for other batches now.

    Each worker process has another size, and rows may have been added meanwhile.
    """
    wanted = _way(plan)
    return next((way for way in plans(shape, plan.device, samples, process_bytes) if _way(way) == wanted), None)


def leaner(plan: MemoryPlan, shape: Shape, samples: SampleSizes, process_bytes: int) -> MemoryPlan | None:
    """Find the next slower plan, which needs less; None after the last."""
    ways = list(plans(shape, plan.device, samples, process_bytes))
    place = [_way(way) for way in ways].index(_way(plan))
    return next((way for way in ways[place + 1 :] if way.peak < ways[place].peak), None)


def _way(plan: MemoryPlan) -> tuple[bool, bool, int, int]:
    """Return what distinguishes two plans of one device."""
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
        return "this device shows no NVIDIA GPU; install its driver, or train with device='cpu'"
    if most is not None and most == room:
        limit = "max_vram" if on_gpu else "max_ram"
        return f"{limit} allows {human_bytes(most)}, {least}; allow more, or {smaller}"
    if on_gpu:
        return (
            f"the GPU {facts.accelerator} has {human_bytes(free)} free, {least}; close programs that use it, or train "
            "with device='cpu'"
        )
    return f"this device has {human_bytes(free)} of memory free, {least}; close other programs, or {smaller}"
