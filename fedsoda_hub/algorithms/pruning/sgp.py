"""Similarity group pruning: measure the angular distance between the outputs of every two layers, and choose groups.

FedSODA (arXiv 2508.12727) eq. 5 and Algorithm 1; the metric is Gromov et al. (arXiv 2403.17887) on layer outputs. The
choice is exact, by dynamic programming. The plan of what was chosen is `layer_plan.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.source import LayerSource
from fedsoda_edge.model.streaming import stream
from fedsoda_edge.protocol.manifest import Group


def angular_distances(last_tokens: Tensor) -> list[list[float]]:
    """Compute all d(l, l+m) = mean over samples of arccos(cos(x_l, x_(l+m))) / pi, products in float64 (paper, eq. 5).

    Args:
        last_tokens: (L, N, C), the output of each layer at the last token of each sample.

    Returns:
        distances[l][m-1] for 0 <= l < l+m < L, in units of pi (0..1).
    """
    unit = last_tokens.double()
    unit = unit / unit.norm(dim=-1, keepdim=True)
    rows = []
    for lower in range(len(unit)):
        cosines = torch.einsum("nc,mnc->mn", unit[lower], unit[lower + 1 :]).clamp(-1.0, 1.0)
        rows.append((cosines.arccos() / torch.pi).mean(dim=1).tolist())
    return rows


def measure(
    source: LayerSource,
    blocks: Sequence[Tensor],
    num_emulator_layers: int,
    *,
    compute_dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[list[float]]:
    """Measure all distances in one streamed pass over the public blocks; every (n, p) is chosen from its result.

    Hidden states are rounded to the checkpoint's dtype from layer to layer: docs/methods.md (m3-distance).

    Args:
        blocks: (T_i,) ids each.
        num_emulator_layers: the layers below the adapter.

    Returns:
        distances as in `angular_distances`, over these layers.
    """
    last: list[Tensor] = []

    def keep_last(_: int, hidden: list[Tensor]) -> None:
        last.append(torch.stack([sample[-1] for sample in hidden]))

    stream(
        source,
        range(num_emulator_layers),
        blocks,
        compute_dtype=compute_dtype,
        store_dtype=source.dtype,
        device=device,
        visit=keep_last,
        progress=progress,
    )
    return angular_distances(torch.stack(last))


def choose_groups(
    distances: Sequence[Sequence[float]],
    num_layers: int,
    adapter_layers: int,
    n: int,
    p: int,
    beside: Sequence[Group] = (),
) -> tuple[Group, ...]:
    """Choose the p non-overlapping groups with the least sum of d(out(t), out(t+n)); ties go to deeper layers.

    A group keeps layer t and removes t+1..t+n, all below the adapter; the next group starts at t+n+1 or
    later: Algorithm 1 of the paper with its loop bound corrected, docs/methods.md (m3-groups). O(p * L_E).

    Args:
        distances: distances[l][m-1] = d between the outputs of layers l and l+m, in units of pi.
        n, p: layers that a group removes, and the number of groups.
        beside: groups of n that are removed in any case; the p are chosen around them, so that removals are nested.

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
            f"layers_per_group = {n} and groups = {p} need {p * (n + 1)} layers below the adapter, but "
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


def _nearest(emulator: int, n: int, p: int, count: int = 3) -> list[tuple[int, int]]:
    """List the feasible (n, p) nearest to what is wanted; of equally near ones, those first that remove most layers."""
    fits = [(a, b) for a in range(1, emulator) for b in range(1, emulator // (a + 1) + 1)]
    return sorted(fits, key=lambda ab: (abs(ab[0] - n) + abs(ab[1] - p), -ab[0] * ab[1], ab))[:count]
