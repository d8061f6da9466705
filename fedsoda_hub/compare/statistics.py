"""What may be said of two accuracies: paired bootstrap intervals, and when a curve reaches a level. Plain arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
Right = NDArray[np.float64]  # (seeds, questions), 1 where answered rightly


def difference(one: Right, other: Right) -> dict[str, Any]:
    """Accuracy of one minus the other in points, with its paired 95 % interval: percentile bootstrap over seeds and
    questions (Efron and Tibshirani 1993, chapter 13).

    One seed cannot be drawn otherwise: the interval is then over the questions alone.
    """
    gap = one - other
    seeds, questions = gap.shape
    chance = np.random.default_rng(0)
    drawn = [
        gap[chance.integers(seeds, size=seeds)].mean(axis=0)[chance.integers(questions, size=questions)].mean()
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"points": 100 * float(gap.mean()), "interval_95": [100 * float(low), 100 * float(high)]}


def is_shown(found: dict[str, Any]) -> bool:
    """Whether the interval excludes 0."""
    low, high = found["interval_95"]
    return bool(low > 0 or high < 0)


def mean_and_spread(values: Sequence[float]) -> dict[str, Any]:
    """spread: the sample's standard deviation over seeds; None of a single one."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "spread": spread, "per_seed": list(values)}


def first_at(level: float, curve: Sequence[tuple[int, float]]) -> int | None:
    """The first round of (round, accuracy) at which the level is reached; None where it never is."""
    return next((number for number, accuracy in curve if accuracy >= level - 1e-12), None)
