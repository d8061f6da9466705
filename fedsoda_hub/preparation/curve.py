"""Measure how near to the full LLM sub-LLMs of several sizes would stay, against the bytes that leave the hub.

From all layers kept to half of them removed. One pass over the full LLM measures what healing would leave of every group
(`algorithms/pruning/healed.py`), by which each size gets its groups; a second one heals all sizes (`shapes.py`). Which
point is recommended: docs/methods.md (m3-curve).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.algorithms.methods.interface import FullLLM
from fedsoda_hub.algorithms.pruning.layer_plan import make_plan
from fedsoda_hub.algorithms.pruning.sgp import choose_groups
from fedsoda_hub.preparation.full_llm import StreamedLLM
from fedsoda_hub.preparation.measured import MeasuredLLM
from fedsoda_hub.preparation.shapes import healed_errors
from fedsoda_hub.preparation.teacher import TeacherCache

SIZES = 5  # of sub-LLMs, beside the whole LLM
LARGEST_GROUP = 4  # layers that a group removes, as in the paper
GOOD_ERROR = 0.10  # of the border; docs/methods.md (m3-curve)


class CurvePoint(msgspec.Struct, frozen=True, kw_only=True):
    """One size of the sub-LLM. error: mean |h' - h|^2 / |h|^2 at the border on held-out texts, healed and stored."""

    removed_layers: int
    layers_per_group: int
    groups: int
    kept_before_groups: tuple[int, ...]
    error: float
    bundle_bytes: int
    is_recommended: bool


def measure_curve(llm: StreamedLLM) -> tuple[CurvePoint, ...]:
    """Measure the curve of a run's full LLM, from the whole LLM on; each point with the best shape of its size."""
    plans = sizes(MeasuredLLM(llm, TeacherCache(llm)), llm.settings.method.adapter_layers)
    errors = healed_errors(llm, plans)
    budget = llm.settings.method.bundle_bytes
    sizes_in_bytes = [llm.bundle_bytes(plan) for plan in plans]
    best = recommended(errors, sizes_in_bytes, budget)
    return tuple(
        CurvePoint(
            removed_layers=plan.num_layers - len(plan.kept),
            layers_per_group=len(plan.groups[0].removed) if plan.groups else 0,
            groups=len(plan.groups),
            kept_before_groups=plan.retained,
            error=error,
            bundle_bytes=size,
            is_recommended=place == best,
        )
        for place, (plan, error, size) in enumerate(zip(plans, errors, sizes_in_bytes, strict=True))
    )


def sizes(full_llm: FullLLM, adapter_layers: int) -> list[LayerPlan]:
    """Choose for about SIZES numbers of removed layers, evenly spread up to half of all, the groups that cost least."""
    num_layers = full_llm.num_layers
    emulator = num_layers - adapter_layers
    shapes = {
        (n, p)
        for n in range(1, LARGEST_GROUP + 1)
        for p in range(1, emulator // (n + 1) + 1)
        if n * p <= num_layers // 2
    }
    if not shapes:
        return [make_plan(num_layers, adapter_layers, ())]
    distances = full_llm.healed_distances(emulator, max(n for n, _ in shapes))
    best: dict[int, LayerPlan] = {}
    for n, p in sorted(shapes):
        plan = make_plan(
            num_layers, adapter_layers, choose_groups(distances, num_layers, adapter_layers, n, p), distances
        )
        if n * p not in best or cost(plan) < cost(best[n * p]):
            best[n * p] = plan
    wanted = [max(best) * step / SIZES for step in range(1, SIZES + 1)]
    chosen = {min(best, key=lambda count: (abs(count - number), count)) for number in wanted}
    return [make_plan(num_layers, adapter_layers, ()), *(best[count] for count in sorted(chosen))]


def cost(plan: LayerPlan) -> float:
    """Sum up the distances of a plan's groups."""
    return sum(group.distance for group in plan.groups)


def recommended(errors: Sequence[float], sizes_in_bytes: Sequence[int], budget: int) -> int | None:
    """Choose a point: the smallest with an error of at most GOOD_ERROR, or else that of the least error.

    Args:
        budget: bytes that the bundle may have; 0: any.

    Returns:
        its place; None: all are larger than the budget.
    """
    fits = [place for place, size in enumerate(sizes_in_bytes) if size <= budget or not budget]
    good = [place for place in fits if errors[place] <= GOOD_ERROR]
    if good:
        return min(good, key=lambda place: sizes_in_bytes[place])
    return min(fits, key=lambda place: errors[place], default=None)
