"""Choose which groups of layers go: the exact dynamic programme over layer distances (method.md 1.3).

Pure Python. Measuring the distances is the hub's `algorithms/sgp.py`; building the model is `sub_llm.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.manifest import Group, LayerPlan, check_plan


def choose_groups(
    distances: Sequence[Sequence[float]],
    num_layers: int,
    adapter_layers: int,
    n: int,
    p: int,
    beside: Sequence[Group] = (),
) -> tuple[Group, ...]:
    """The p non-overlapping groups with the least sum of d(out(t), out(t+n)); ties go to deeper layers.

    A group keeps layer t and removes t+1..t+n, all below the adapter; the next group starts at t+n+1 or
    later (paper, Algorithm 1, with the loop bound mended: method.md 1.3). O(p * L_E).

    Args:
        distances: distances[l][m-1] = d between the outputs of layers l and l+m, in units of pi.
        beside: groups of n that go in any case; the p are chosen around them, so that the removals are nested.

    Raises:
        UsageProblem: p groups of n+1 layers do not fit; names the nearest (n, p) that do.
    """
    taken = {layer for group in beside for layer in (group.start, *group.removed)}
    emulator = num_layers - adapter_layers
    if n == 0 or p == 0:
        return ()
    if p * (n + 1) > emulator:
        near = ", ".join(f"({a}, {b})" for a, b in _nearest(emulator, n, p))
        raise UsageProblem(
            f"layers_per_group = {n} and groups = {p} need {p * (n + 1)} layers below the adapter, "
            f"the model has {emulator} ({num_layers} less {adapter_layers}); nearest that fit: {near}"
        )
    starts = emulator - n  # t in [0, L_E - n - 1]
    # best[j][l]: least cost of j groups that all start at l or later.
    best = [[0.0] * (emulator + 1)] + [[math.inf] * (emulator + 1) for _ in range(p)]
    for j in range(1, p + 1):
        for t in range(starts - 1, -1, -1):
            take = distances[t][n - 1] + best[j - 1][min(t + n + 1, emulator)]
            best[j][t] = best[j][t + 1] if taken & {*range(t, t + n + 1)} else min(best[j][t + 1], take)
    if best[p][0] == math.inf:
        raise UsageProblem(
            f"{p} groups of {n} removed layers do not fit beside those that start at {[g.start for g in beside]}; "
            "write fewer in [method] classes"
        )
    groups = []
    t, j = 0, p
    while j:
        if best[j][t + 1] <= best[j][t]:  # a tie: the larger start is as good
            t += 1
            continue
        groups.append(Group(start=t, removed=tuple(range(t + 1, t + n + 1)), distance=distances[t][n - 1]))
        t, j = t + n + 1, j - 1
    return tuple(groups)


def make_plan(
    num_layers: int,
    adapter_layers: int,
    groups: Sequence[Group],
    distances: Sequence[Sequence[float]] = (),
) -> LayerPlan:
    """The plan for chosen groups below an adapter of the last layers, checked."""
    return plan_around(num_layers, range(num_layers - adapter_layers, num_layers), groups, distances)


def drop_layers(num_layers: int, adapter: Sequence[int], kept_emulator: Sequence[int]) -> LayerPlan:
    """The plan of a sub-LLM that was chosen without distances: what is removed goes to the kept layer below it.

    Args:
        adapter, kept_emulator: layer 0 is in one of them.
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
    """The plan for an adapter of any layers and the groups between them, checked."""
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


def _nearest(emulator: int, n: int, p: int, count: int = 3) -> list[tuple[int, int]]:
    """Feasible (n, p) nearest to the wanted one: as many layers removed as can be, then closest in shape."""
    fits = [(a, b) for a in range(1, emulator) for b in range(1, emulator // (a + 1) + 1)]
    return sorted(fits, key=lambda ab: (abs(ab[0] - n) + abs(ab[1] - p), -ab[0] * ab[1], ab))[:count]
