"""Compute what may be claimed of models that answered the same questions over several seeds (docs/methods.md (m12-claims)).

It works on plain arrays, values by seed and question; what is compared with what is `summary.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit
from scipy.stats import rankdata

from fedsoda_hub.compare.results import Paired

LEVEL = 0.05  # of a claim, and what an interval leaves out
LEAST_SEEDS = 5  # for a claim
SEEDS_POWER = 1.25  # of the seeds' share of the variance; Cochran and Cox's is 1
LEAST_P = 1e-300
MAX_LOG = 50.0  # of a factor, which JSON must hold
MAX_SHARE = 1e9  # of a gap; where an interval reaches it there is none

Array = NDArray[np.float64]
Ends = tuple[float, float]  # of a 95 % interval


class Scale(Enum):
    """The scale on which an interval is as wide to both sides."""

    PLAIN = "plain"
    LOGIT = "logit"  # of a mean between 0 and 1
    LOG = "log"  # of one above 0


class Measure(Enum):
    """A measure of answers: the mean of a value that each question has for each seed."""

    ACCURACY = "accuracy"
    AUC = "auc"
    MEAN_RANK = "mean_rank"
    LOSS = "loss"

    @property
    def is_share(self) -> bool:
        """Whether a figure lies between 0 and 1 and more is better; of the others less is better."""
        return self in (Measure.ACCURACY, Measure.AUC)

    @property
    def scale(self) -> Scale:
        """The scale of a figure's interval; figures near their bound are drawn from skewed distributions."""
        return Scale.LOGIT if self.is_share else Scale.LOG


@dataclass(frozen=True)
class CrossedMean:
    """A mean over seeds and questions, both of which are drawn from populations, with the two parts of its variance.

    mean, of_seeds, of_questions: (...). of_seeds: the variance of the seeds' means over the number of seeds; it holds what
    single answers add too. of_questions: what the questions add that all seeds share.
    """

    mean: Array
    of_seeds: Array
    of_questions: Array
    seeds: int
    questions: int

    @classmethod
    def of(cls, values: Array) -> CrossedMean:
        """Take the two-way analysis of variance without replication of values (..., seeds, questions), two of each or more."""
        seeds, questions = values.shape[-2:]
        mean = values.mean(axis=(-2, -1), keepdims=True)
        by_seed = values.mean(axis=-1, keepdims=True) - mean
        by_question = values.mean(axis=-2, keepdims=True) - mean
        rest = values - mean - by_seed - by_question
        of_all_questions = (by_question**2).sum(axis=(-2, -1)) / ((questions - 1) * questions)
        of_rest = (rest**2).sum(axis=(-2, -1)) / ((seeds - 1) * (questions - 1) * seeds * questions)
        return cls(
            mean=mean[..., 0, 0],
            of_seeds=(by_seed**2).sum(axis=(-2, -1)) / ((seeds - 1) * seeds),
            of_questions=np.maximum(of_all_questions - of_rest, 0),  # of_seeds has the rest in it already
            seeds=seeds,
            questions=questions,
        )

    def half_width(self, level: float = LEVEL) -> Array:
        """Compute half the width of the interval that leaves the populations' mean out with the probability `level`.

        Its critical value lies between those of t with seeds - 1 and with questions - 1 degrees of freedom, by the seeds'
        share of the variance (Cochran and Cox, Experimental Designs, 1957).
        """
        variance = self.of_seeds + self.of_questions
        share = np.divide(self.of_seeds, variance, out=np.zeros_like(variance), where=variance > 0) ** SEEDS_POWER
        of_seeds, of_questions = (-stdtrit(number - 1, level / 2) for number in (self.seeds, self.questions))
        return (share * of_seeds + (1 - share) * of_questions) * np.sqrt(variance)

    def ends(self, scale: Scale = Scale.PLAIN) -> tuple[Array, Array]:
        """Compute the ends of the 95 % interval, on another scale by the delta method.

        Where a mean is 0 or 1 the scale is the plain one.
        """
        mean, half = self.mean, self.half_width()
        low, high = mean - half, mean + half
        if scale is Scale.PLAIN:
            return low, high
        with np.errstate(divide="ignore", invalid="ignore"):
            if scale is Scale.LOG:
                factor = np.exp(np.minimum(half / mean, MAX_LOG))
                is_inside, ends = mean > 0, (mean / factor, mean * factor)
            else:
                logit, of_logit = np.log(mean / (1 - mean)), half / (mean * (1 - mean))
                is_inside, ends = (mean > 0) & (mean < 1), (_logistic(logit - of_logit), _logistic(logit + of_logit))
        return np.where(is_inside, ends[0], low), np.where(is_inside, ends[1], high)

    def p_value(self) -> float:
        """Find the level at which the interval of a single mean ends at 0; not below LEAST_P."""
        size = abs(float(self.mean))
        if size == 0:
            return 1.0
        low, high = math.log(LEAST_P), 0.0
        for _ in range(60):
            middle = (low + high) / 2
            is_outside = size > float(self.half_width(math.exp(middle)))
            low, high = (low, middle) if is_outside else (middle, high)
        return math.exp(high)


def interval(values: Array, scale: Scale = Scale.PLAIN) -> Ends | None:
    """Compute the 95 % interval of the mean of values (seeds, questions); None: with one seed there is none."""
    if len(values) < 2:
        return None
    low, high = CrossedMean.of(values).ends(scale)
    return float(low), float(high)


def _logistic(x: Array) -> Array:
    return (1 + np.tanh(x / 2)) / 2


# --- differences -------------------------------------------------------------------------------------------


def paired_differences(pairs: Sequence[tuple[Array, Array]]) -> list[tuple[float, Paired]]:
    """Subtract the second from the first of each pair of values (seeds, questions); all pairs are one table.

    Returns:
        the mean of each difference, and what it shows.
    """
    gaps = [one - other for one, other in pairs]
    seeds = min(map(len, gaps), default=0)
    if seeds < 2:
        nothing = Paired(interval_95=None, p=None, p_holm=None, is_shown=False)
        return [(float(gap.mean()), nothing) for gap in gaps]
    each = [CrossedMean.of(gap).p_value() for gap in gaps]
    return [
        (
            float(gap.mean()),
            Paired(interval_95=interval(gap), p=p, p_holm=adjusted, is_shown=seeds >= LEAST_SEEDS and adjusted < LEVEL),
        )
        for gap, p, adjusted in zip(gaps, each, holm(each), strict=True)
    ]


def holm(values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number, so that one below LEVEL is a claim that holds beside all others.

    Holm 1979: the k-th smallest of m is multiplied by m - k + 1, and none lies below a smaller one's.
    """
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, at in enumerate(sorted(range(len(values)), key=lambda at: values[at])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[at]))
        adjusted[at] = largest
    return adjusted


# --- figures -----------------------------------------------------------------------------------------------


def placements(margins: Array, positive: NDArray[np.bool_]) -> Array:
    """Give each question a value whose mean over the questions is the AUC, and whose variance is the AUC's.

    The value is the AUC, and how much more often the question lies on the right side of those of the other class than
    its class does, ties counted half, times what makes the variance of the mean that of DeLong et al. 1988.

    Args:
        margins: (..., questions), larger for what looks positive. positive: (questions,), with both classes.

    Returns:
        (..., questions).
    """
    number, ranks = len(positive), rankdata(margins, axis=-1)
    found = np.empty(margins.shape)
    for one, is_higher in ((positive, True), (~positive, False)):
        of_class = int(one.sum())
        below = (ranks[..., one] - rankdata(margins[..., one], axis=-1)) / (number - of_class)
        right = below if is_higher else 1 - below
        auc = right.mean(axis=-1, keepdims=True)
        weight = math.sqrt((number - 1) * number / (max(of_class - 1, 1) * of_class))
        found[..., one] = auc + weight * (right - auc)
    return found


def gap_closed(one: Array, untouched: Array, central: Array, *, is_share: bool) -> tuple[float, Ends] | None:
    """Compute the share of the way from untouched to central that a model has gone, with its 95 % interval.

    Fieller 1954: a share is in the interval where the model less that share of the way is not shown to differ from
    untouched.

    Args:
        one, untouched, central: (seeds, questions).
        is_share: more is better; otherwise less is.

    Returns:
        None where central is not better than untouched by more than its interval.
    """
    way, gone = central - untouched, one - untouched
    ends = interval(way)
    if ends is None or not (ends[0] > 0 if is_share else ends[1] < 0):
        return None
    share = float(gone.mean() / way.mean())
    low, high = (_end(gone, way, share, direction) for direction in (-1, 1))
    return None if low is None or high is None else (share, (low, high))


def _end(gone: Array, way: Array, share: float, direction: int) -> float | None:
    """Search where the interval of the share ends, from the share on in one direction."""

    def is_outside(step: float) -> bool:
        found = CrossedMean.of(gone - (share + direction * step) * way)
        return abs(float(found.mean)) > float(found.half_width())

    inside, outside = 0.0, 1e-3
    while not is_outside(outside):
        inside, outside = outside, 2 * outside
        if outside > MAX_SHARE:
            return None
    for _ in range(40):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if is_outside(middle) else (middle, outside)
    return share + direction * outside


def first_at(level: float, curve: Sequence[tuple[int, float]]) -> int | None:
    """Find the first round of a curve of (round, accuracy) at which the level is reached; None: it never is."""
    return next((number for number, accuracy in curve if accuracy >= level - 1e-12), None)
