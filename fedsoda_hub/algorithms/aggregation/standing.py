"""Measure where each edge's update lies beside what the round made of all: its length, and its cosine to that.

It is measured of what is averaged, as `gram.py` says: an owner sees what the rule saw. Nothing is decided by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsoda_edge.model.delta import decode
from fedsoda_hub.algorithms.aggregation.weighted_mean import CodedUpdate, weighed


@dataclass(frozen=True)
class ToMean:
    """One update beside the round's result. norm: its length. cosine: None where it or the result is 0."""

    norm: float
    cosine: float | None


def to_mean(updates: Sequence[CodedUpdate], codec: str, mean: Mapping[str, Tensor]) -> dict[str, ToMean]:
    """Measure the decoded deltas beside the round's mean, over the tensors that each edge holds, by edge.

    One update is in memory at a time.

    Args:
        mean: as `robust.merge` returns it; with the codec "nf4-weight" it holds weights, and so do the updates.
    """
    found = {}
    for update in sorted(updates, key=lambda one: one.edge):
        square = dot = of_mean = 0.0
        for name, value in decode(update.read(), update.layout, codec).items():
            before = update.view[name] if codec == "nf4-weight" else torch.zeros(())
            own, merged = ((tensor - before).double().flatten() for tensor in (value, mean[name]))
            square, dot, of_mean = (
                square + float(own @ own),
                dot + float(own @ merged),
                of_mean + float(merged @ merged),
            )
        found[update.edge] = _standing(square, dot, of_mean)
    return found


def in_products(
    updates: Sequence[CodedUpdate], max_weight: float, counts: Mapping[str, float], inner: Tensor
) -> dict[str, ToMean]:
    """Measure what each update adds to B @ A beside what all add, by edge.

    Args:
        counts: as in `robust.Kept`. inner: as `gram.of_products` returns it.
    """
    ordered = weighed(updates, max_weight)
    shares = torch.tensor([weight for _, weight in ordered], dtype=torch.float64)
    shares = shares / shares.sum() * torch.tensor([counts[update.edge] for update, _ in ordered], dtype=torch.float64)
    dots, whole = inner @ shares, float(shares @ inner @ shares)
    return {
        update.edge: _standing(float(inner[at, at]), float(dots[at]), whole) for at, (update, _) in enumerate(ordered)
    }


def _standing(square: float, dot: float, of_mean: float) -> ToMean:
    if square <= 0 or of_mean <= 0:
        return ToMean(math.sqrt(max(0.0, square)), None)
    return ToMean(math.sqrt(square), max(-1.0, min(1.0, dot / math.sqrt(square) / math.sqrt(of_mean))))
