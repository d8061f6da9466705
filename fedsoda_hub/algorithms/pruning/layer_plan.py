"""Make layer plans: which layers are kept, which are removed, which train. Pure Python.

Choosing them is `sgp.py`'s, `representatives.py`'s and `uniform.py`'s; building the model is `model/sub_llm.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.manifest import Group, LayerPlan, check_plan


def check_adapter(num_layers: int, adapter_layers: int) -> None:
    """Raise UsageProblem unless something lies below an adapter of the last `adapter_layers` layers."""
    if adapter_layers >= num_layers:
        raise UsageProblem(
            f"[method] adapter_layers = {adapter_layers}, but the model has {num_layers} layers and one at least lies "
            f"below the adapter; write at most {num_layers - 1}"
        )


def make_plan(
    num_layers: int,
    adapter_layers: int,
    groups: Sequence[Group],
    distances: Sequence[Sequence[float]] = (),
) -> LayerPlan:
    """Make the plan for chosen groups below an adapter of the last layers, and check it."""
    return plan_around(num_layers, range(num_layers - adapter_layers, num_layers), groups, distances)


def drop_layers(num_layers: int, adapter: Sequence[int], kept_emulator: Sequence[int]) -> LayerPlan:
    """Make the plan of a sub-LLM that was chosen without distances: removed layers join the group of the kept one below.

    Args:
        adapter, kept_emulator: full-LLM layers; layer 0 is in one of them.
    """
    kept = sorted({*adapter, *kept_emulator})
    groups = [
        Group(start=start, removed=tuple(range(start + 1, end)), distance=0.0)
        for start, end in pairwise([*kept, num_layers])
        if end > start + 1
    ]
    return plan_around(num_layers, adapter, groups)


def plan_around(
    num_layers: int, adapter: Sequence[int], groups: Sequence[Group], distances: Sequence[Sequence[float]] = ()
) -> LayerPlan:
    """Make the plan for an adapter of any layers and the groups between them, and check it."""
    removed = {layer for group in groups for layer in group.removed}
    kept = tuple(layer for layer in range(num_layers) if layer not in removed)
    plan = LayerPlan(
        num_layers=num_layers,
        adapter=tuple(adapter),
        kept=kept,
        groups=tuple(groups),
        mapping=tuple((group.start, kept.index(group.start)) for group in groups if group.start in kept),
        distances=tuple(tuple(row) for row in distances),
    )
    check_plan(plan)
    return plan
