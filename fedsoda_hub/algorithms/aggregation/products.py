"""The products B @ A of a round's edges, module by module: what averaging A and B apart loses of their mean.

A dense product is never formed: two stacks of factors stand for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsoda_edge.model.delta import decode, moved
from fedsoda_hub.algorithms.aggregation.weighted_mean import CodedUpdate, weighed


@dataclass(frozen=True)
class Pair:
    """One edge's LoRA of one module after its training: its share among those that hold it, b (out, rank), a (rank, in)."""

    share: float
    b: Tensor
    a: Tensor


def pairs_by_module(updates: Sequence[CodedUpdate], codec: str, max_weight: float) -> Iterator[tuple[str, list[Pair]]]:
    """Each module's name and its pairs in ascending edge id, fp64: W_k = view_k + decode(u_k).

    One module of all edges is in memory at a time, and one update. A factor that an update does not hold is its view's.
    """
    ordered = weighed(updates, max_weight)
    for module in sorted({name.rpartition(".lora_")[0] for update in updates for name in update.view}):
        names = f"{module}.lora_A", f"{module}.lora_B"
        holders = [(update, weight) for update, weight in ordered if names[0] in update.view]
        whole = sum(weight for _, weight in holders)
        pairs = []
        for update, weight in holders:
            before = {name: update.view[name] for name in names}
            after = moved(before, decode(update.read(), update.layout, codec, only=names), codec)
            a, b = (after[name].double() for name in names)
            pairs.append(Pair(weight / whole, b, a))
        yield module, pairs


def stacked(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """(out, sum of ranks) and (sum of ranks, in): left @ right = sum_k share_k B_k A_k (FLoRA, arXiv 2409.05976)."""
    left = torch.cat([pair.share * pair.b for pair in pairs], dim=1)
    return left, torch.cat([pair.a for pair in pairs], dim=0)


def cross_term(modules: Iterable[tuple[str, Sequence[Pair]]]) -> float:
    """||M_res||_F / ||M||_F over all modules: M = sum_k p_k B_k A_k, M_res = M - Bbar Abar.

    M_res = sum_k p_k (B_k - Bbar)(A_k - Abar), so it is 0 exactly where all edges have the same A, or the same B. Where
    M is 0 there is nothing to lose, and so is the ratio.
    """
    lost = whole = 0.0
    for _, pairs in modules:
        lost += _square(*stacked(_spread(pairs)))
        whole += _square(*stacked(pairs))
    return math.sqrt(lost / whole) if whole else 0.0


def _spread(pairs: Sequence[Pair]) -> list[Pair]:
    """B_k - Bbar and A_k - Abar. Less the first edge's before, so that equal factors leave zeros and no rounding."""
    first = pairs[0]
    moves = [Pair(pair.share, pair.b - first.b, pair.a - first.a) for pair in pairs]
    mean_b = torch.stack([pair.share * pair.b for pair in moves]).sum(dim=0)
    mean_a = torch.stack([pair.share * pair.a for pair in moves]).sum(dim=0)
    return [Pair(pair.share, pair.b - mean_b, pair.a - mean_a) for pair in moves]


def _square(left: Tensor, right: Tensor) -> float:
    """||left @ right||_F^2 by the two Gram matrices of the rank."""
    return max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))
