"""Compute what may be claimed of two accuracies: paired bootstrap intervals, and when a curve reaches a level.

It works on plain arrays; what is compared with what is `summary.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsoda_hub.compare.results import Difference, LossDifference, Spread

DRAWS = 2000  # of the bootstrap
Array = NDArray[np.float64]  # (seeds, questions)


@dataclass(frozen=True)
class AnswersBySeed:
    """The answers of a model by seed and question. right: 1 or 0. losses: as in `evaluator.Answers`."""

    right: Array
    losses: Array


def difference(one: AnswersBySeed, other: AnswersBySeed) -> Difference:
    """Subtract the answers of the other from those of the one.

    Returns:
        accuracy in points and loss in nats a completion id, each with its paired 95 % interval.
    """
    points, nats = _interval(100 * (one.right - other.right)), _interval(one.losses - other.losses)
    return Difference(
        points=points.mean,
        interval_95=(points.low, points.high),
        is_shown=points.excludes_0,
        loss=LossDifference(nats=nats.mean, interval_95=(nats.low, nats.high), is_shown=nats.excludes_0),
    )


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_0(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


def _interval(gap: Array) -> Interval:
    """Compute the 95 % interval of the mean by the percentile bootstrap over seeds and questions.

    Efron and Tibshirani 1993, chapter 13. With one seed the interval is over the questions alone.
    """
    seeds, questions = gap.shape
    chance = np.random.default_rng(0)
    drawn = [
        gap[chance.integers(seeds, size=seeds)].mean(axis=0)[chance.integers(questions, size=questions)].mean()
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(gap.mean()), float(low), float(high))


def mean_and_spread(values: Sequence[float]) -> Spread:
    """Compute the mean and the sample standard deviation over seeds, which is None for a single seed."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(mean=float(np.mean(values)), spread=spread, per_seed=list(values))


def first_at(level: float, curve: Sequence[tuple[int, float]]) -> int | None:
    """Find the first round of a curve of (round, accuracy) at which the level is reached; None: it never is."""
    return next((number for number, accuracy in curve if accuracy >= level - 1e-12), None)
