"""Average coded LoRA deltas, weighted by the number of training examples.

FedAvg (McMahan et al. 2017, arXiv 1602.05629, Algorithm 1), A and B apart, so the result is not the mean of
the products B @ A (arXiv 2410.09432). Which updates belong to a round is the ledger's business.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsoda_edge.model.delta import decode
from fedsoda_edge.protocol.manifest import TensorSpec


@dataclass(frozen=True)
class CodedUpdate:
    """read() gives the coded bytes; they are read once for the whole pass."""

    edge: str
    num_examples: int
    read: Callable[[], bytes]


def capped_weights(num_examples: Sequence[int], max_weight: float) -> list[float]:
    """Shares that sum to 1; no count goes in as more than max_weight times the round's median.

    num_examples is what an edge says of itself (federation.md, Aggregation).
    """
    cap = max_weight * statistics.median(num_examples)
    counts = [min(float(count), cap) for count in num_examples]
    return [count / sum(counts) for count in counts]


def weighted_mean(
    updates: Sequence[CodedUpdate], layout: Sequence[TensorSpec], codec: str, max_weight: float
) -> dict[str, Tensor]:
    """sum_k share_k * decode(u_k) in fp32, in ascending edge id, one update in memory at a time.

    Raises:
        ValueError: there is no update.
    """
    if not updates:
        raise ValueError("there is no update to average")
    ordered = sorted(updates, key=lambda update: update.edge)
    shares = capped_weights([update.num_examples for update in ordered], max_weight)
    total = {spec.name: torch.zeros(spec.shape) for spec in layout}
    for update, share in zip(ordered, shares, strict=True):
        for name, value in decode(update.read(), layout, codec).items():
            total[name].add_(value, alpha=share)
    return total
