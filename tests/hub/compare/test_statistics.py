"""An ordering is claimed where the paired interval excludes 0, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest

from fedsoda_hub.compare.results import Difference, Spread
from fedsoda_hub.compare.statistics import AnswersBySeed, difference, first_at, mean_and_spread


def told(one: np.ndarray, other: np.ndarray) -> Difference:
    """Of right answers; the losses are these too."""
    return difference(AnswersBySeed(one, one), AnswersBySeed(other, other))


def test_a_clear_difference_is_shown_and_its_interval_is_that_of_the_formula() -> None:
    """Of one seed with n questions, of which a share q differs and always in one direction: q +- 1.96 sqrt(q (1-q) / n)."""
    other = np.zeros((1, 400))
    one = np.zeros((1, 400))
    one[:, :40] = 1
    found = told(one, other)
    assert found.points == pytest.approx(10)
    half = 196 * np.sqrt(0.1 * 0.9 / 400)
    assert found.interval_95 == pytest.approx((10 - half, 10 + half), abs=0.5)
    assert found.is_shown
    assert found.loss.nats == pytest.approx(0.1)
    assert found.loss.interval_95 == pytest.approx((0.1 - half / 100, 0.1 + half / 100), abs=5e-3)
    assert found.loss.is_shown


def test_pairing_is_by_question() -> None:
    """Both are right on half of the questions: on the same ones nothing differs, on others much may."""
    half = np.array([[1.0, 0.0] * 200])
    assert told(half, half).interval_95 == (0, 0)
    assert not told(half, half).is_shown
    low, high = told(half, 1 - half).interval_95
    assert low < -5
    assert high > 5


def test_seeds_that_disagree_show_nothing() -> None:
    """Ten points up with one seed and ten down with another; questions alone would say otherwise of each."""
    gap = np.zeros((2, 400))
    gap[0, :40], gap[1, :40] = 1, -1
    assert told(gap[:1], np.zeros((1, 400))).is_shown
    assert not told(gap, np.zeros((2, 400))).is_shown


def test_a_level_is_reached_at_the_first_round_with_that_accuracy() -> None:
    curve = [(1, 0.5), (2, 0.7), (3, 0.6), (4, 0.8)]
    assert [first_at(level, curve) for level in (0.5, 0.6, 0.75, 0.9)] == [1, 2, 4, None]


def test_a_single_seed_has_no_spread() -> None:
    assert mean_and_spread([0.5]) == Spread(mean=0.5, spread=None, per_seed=[0.5])
    assert mean_and_spread([0.5, 0.7]).spread == pytest.approx(0.1 * 2**0.5)
