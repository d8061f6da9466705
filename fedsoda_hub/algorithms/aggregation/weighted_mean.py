"""Average coded LoRA deltas, weighted by the number of training examples.

FedAvg (McMahan et al. 2017, arXiv 1602.05629, Algorithm 1), A and B apart, so the result is not the mean of
the products B @ A (arXiv 2410.09432). Edges may keep different layers: each tensor is averaged over the edges that hold
it (FedRA, arXiv 2311.11227). Which updates belong to a round is the round machine's to say.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsoda_edge.model.delta import decode
from fedsoda_edge.protocol.manifest import TensorSpec


@dataclass(frozen=True)
class CodedUpdate:
    """An update as it arrived.

    read: returns the coded bytes, once for each pass. view: the LoRA that the edge started from. layout: the tensors in
    the bytes; a factor of the view that is not among them did not train.
    """

    edge: str
    num_examples: int
    read: Callable[[], bytes]
    view: Mapping[str, Tensor]
    layout: Sequence[TensorSpec]


def weighed(updates: Sequence[CodedUpdate], max_weight: float) -> list[tuple[CodedUpdate, float]]:
    """Order updates by edge id, each with its weight: num_examples, at most max_weight times the round's median.

    The cap is there because num_examples is the edge's own claim (docs/methods.md (m10-fedavg)).
    """
    cap = max_weight * statistics.median([update.num_examples for update in updates])
    ordered = sorted(updates, key=lambda update: update.edge)
    return [(update, min(float(update.num_examples), cap)) for update in ordered]


def weighted_mean(
    updates: Sequence[CodedUpdate], codec: str, max_weight: float, counts: Mapping[str, float] | None = None
) -> dict[str, Tensor]:
    """Average each tensor over the updates that hold it: sum_k (weight_k / sum weight) * count_k * decode(u_k).

    One update is in memory at a time.

    Args:
        counts: how many times its weight each edge's update counts (`robust.kept`); None: once. An update that counts 0
            times is not read.

    Returns:
        fp32 CPU tensors. A tensor that no update holds is missing: what nobody trained keeps its value.

    Raises:
        ValueError: `updates` is empty.
    """
    if not updates:
        raise ValueError("there are no updates to average")
    weights: dict[str, list[float]] = defaultdict(list)
    ordered = weighed(updates, max_weight)
    for update, weight in ordered:
        for spec in update.layout:
            weights[spec.name].append(weight)
    wholes = {name: sum(of_holders) for name, of_holders in weights.items()}
    total: dict[str, Tensor] = {}
    for update, weight in ordered:
        count = 1.0 if counts is None else counts[update.edge]
        for spec in update.layout:
            total.setdefault(spec.name, torch.zeros(spec.shape))
        if count:
            for name, value in decode(update.read(), update.layout, codec).items():
                total[name].add_(value, alpha=weight / wholes[name] * count)
    return total
