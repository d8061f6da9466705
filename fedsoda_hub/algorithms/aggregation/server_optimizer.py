"""Step with the hub's own optimizer: the mean of the edges' deltas is its gradient, reversed.

FedAvgM (Hsu et al. 2019, arXiv 1909.06335), FedAdam and FedYogi (Reddi et al. 2021, arXiv 2003.00295, Algorithm 2).
The mean is `weighted_mean.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsoda_hub.settings.tables import Aggregation


def step(
    weights: Mapping[str, Tensor], mean: Mapping[str, Tensor], moments: Mapping[str, Tensor], settings: Aggregation
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute (weights, moments) after a round; tensors that `mean` lacks keep their values.

    Args:
        mean: the mean delta, Algorithm 2's Delta_t.
        moments: those of the last round, `{name}#m` and `{name}#v`; a missing m counts as 0, a missing v as tau^2.

    Returns:
        weights with the names and shapes of the input, moments with those of every tensor that ever stepped.
    """
    stepped, after = dict(weights), dict(moments)
    rate, beta1, beta2, tau = settings.step_size, settings.beta1, settings.beta2, settings.tau
    for name, delta in mean.items():
        m = moments.get(f"{name}#m", torch.zeros_like(delta))
        if settings.optimizer == "fedavgm":
            m = beta1 * m + delta
            stepped[name] = weights[name] + rate * m
        else:
            m = beta1 * m + (1 - beta1) * delta
            v = moments.get(f"{name}#v", torch.full_like(delta, tau**2))
            square = delta.square()
            if settings.optimizer == "fedadam":
                v = beta2 * v + (1 - beta2) * square
            else:
                v = v - (1 - beta2) * square * (v - square).sign()
            stepped[name] = weights[name] + rate * m / (v.sqrt() + tau)
            after[f"{name}#v"] = v
        after[f"{name}#m"] = m
    return stepped, after
