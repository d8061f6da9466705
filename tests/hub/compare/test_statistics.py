"""Intervals and p-values are those of the t distributions that they lie between; a claim needs five seeds and Holm."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import t, ttest_rel

from fedsoda_hub.compare.statistics import (
    Array,
    CrossedMean,
    Measure,
    Scale,
    first_at,
    gap_closed,
    holm,
    interval,
    paired_differences,
    placements,
)


def drawn(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def by_hand(values: Array) -> tuple[float, float]:
    """(variance by seeds, variance by questions) of the mean, from the mean squares of the two-way table, one by one."""
    seeds, questions = values.shape
    mean = values.mean()
    of_seed = [values[s].mean() for s in range(seeds)]
    of_question = [values[:, q].mean() for q in range(questions)]
    between_seeds = questions * sum((one - mean) ** 2 for one in of_seed) / (seeds - 1)
    between_questions = seeds * sum((one - mean) ** 2 for one in of_question) / (questions - 1)
    rest = sum(
        (values[s, q] - of_seed[s] - of_question[q] + mean) ** 2 for s in range(seeds) for q in range(questions)
    ) / ((seeds - 1) * (questions - 1))
    return between_seeds / (seeds * questions), max(between_questions - rest, 0) / (seeds * questions)


@pytest.mark.parametrize("shape", [(2, 40), (5, 13), (4, 4)])
def test_the_variance_is_that_of_the_mean_squares_by_hand(shape: tuple[int, int]) -> None:
    values = drawn(*shape) + 2 * drawn(shape[0], 1, seed=1) + drawn(1, shape[1], seed=2)
    found = CrossedMean.of(values)
    assert (float(found.of_seeds), float(found.of_questions)) == pytest.approx(by_hand(values))
    assert CrossedMean.of(values[None]).half_width() == pytest.approx(found.half_width())  # of many at once


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_where_questions_do_not_vary_it_is_the_t_test_of_the_seeds_means(seeds: int) -> None:
    one, other = (np.repeat(drawn(seeds, 1, seed=number) + number, 50, axis=1) for number in (2, 1))
    expected = ttest_rel(one[:, 0], other[:, 0])
    found = CrossedMean.of(one - other)
    assert found.p_value() == pytest.approx(expected.pvalue)
    assert found.ends() == pytest.approx(tuple(expected.confidence_interval()))


def test_where_seeds_do_not_vary_it_is_the_t_test_of_the_questions() -> None:
    one, other = (np.repeat(drawn(1, 60, seed=number) + number / 4, 5, axis=0) for number in (2, 1))
    expected = ttest_rel(one[0], other[0])
    found = CrossedMean.of(one - other)
    assert found.p_value() == pytest.approx(expected.pvalue)
    assert found.ends() == pytest.approx(tuple(expected.confidence_interval()))


def test_between_the_two_the_critical_value_is_between_theirs() -> None:
    values = drawn(5, 40) + drawn(5, 1, seed=1) / 3 + drawn(1, 40, seed=2)
    found = CrossedMean.of(values)
    critical = float(found.half_width() / math.sqrt(found.of_seeds + found.of_questions))
    assert t.isf(0.025, 39) < critical < t.isf(0.025, 4)


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
def test_the_p_value_is_the_level_at_which_the_interval_ends_at_0(shift: float) -> None:
    found = CrossedMean.of(drawn(3, 50) + drawn(3, 1, seed=1) / 4 + drawn(1, 50, seed=2) + shift)
    p = found.p_value()
    assert found.half_width(p) == pytest.approx(abs(found.mean))
    low, high = found.ends()
    assert (p < 0.05) == bool(low > 0 or high < 0)


def test_what_never_differs_is_0_and_what_always_does_is_certain() -> None:
    nothing = CrossedMean.of(np.zeros((5, 40)))
    assert nothing.p_value() == 1
    assert [float(end) for end in nothing.ends()] == [0, 0]
    assert CrossedMean.of(np.ones((5, 40))).p_value() < 1e-100


def test_pairing_is_by_question() -> None:
    """Both are right on half of the questions: on the same ones nothing differs, on others much may."""
    half = np.array([[1.0, 0.0] * 200] * 5)
    [(mean, same), (_, others)] = paired_differences([(half, half), (half, 1 - half)])
    assert (mean, same.interval_95, same.p) == (0, (0, 0), 1)
    assert others.interval_95 is not None
    assert others.interval_95[0] < -0.05
    assert others.interval_95[1] > 0.05


def test_a_claim_needs_five_seeds() -> None:
    gap = 1 + drawn(5, 100) / 10
    for seeds in (2, 3, 4, 5):
        [(mean, found)] = paired_differences([(gap[:seeds], np.zeros((seeds, 100)))])
        assert mean == pytest.approx(1, abs=0.05)
        assert found.p is not None
        assert found.p < 0.01
        assert found.is_shown == (seeds == 5)


def test_of_one_seed_nothing_is_known_about_others() -> None:
    one = drawn(1, 400) + 5
    assert interval(one) is None
    [(mean, found)] = paired_differences([(one, np.zeros((1, 400)))])
    assert mean == pytest.approx(5, abs=0.2)
    assert (found.interval_95, found.p, found.p_holm, found.is_shown) == (None, None, None, False)
    assert gap_closed(one, 0 * one, one, is_share=True) is None


def test_seeds_that_disagree_show_nothing() -> None:
    """Ten points up with some seeds and ten down with others; questions alone would say otherwise of each."""
    gap = np.zeros((6, 400))
    gap[::2, :40], gap[1::2, :40] = 1, -1
    [(_, found)] = paired_differences([(gap, np.zeros((6, 400)))])
    assert not found.is_shown


def test_holm_is_that_of_a_hand_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_pair_that_is_clear_alone_may_not_be_shown_among_many() -> None:
    gap = 0.03 + drawn(5, 100, seed=3) / 4
    nothing = np.zeros((5, 100))
    alone = paired_differences([(gap, nothing)])[0][1]
    among = paired_differences([(gap, nothing), *((drawn(5, 100, seed=seed), nothing) for seed in range(10, 30))])[0][1]
    assert alone.is_shown
    assert among.p == alone.p == alone.p_holm
    assert alone.p is not None
    assert among.p_holm == pytest.approx(21 * alone.p)
    assert not among.is_shown


# --- scales ------------------------------------------------------------------------------------------------


def test_an_interval_of_a_share_lies_between_0_and_1_and_one_of_a_loss_above_0() -> None:
    right = (drawn(2, 50) + drawn(2, 1, seed=1) > -1.5).astype(float)
    found = CrossedMean.of(right)
    mean, half = float(found.mean), float(found.half_width())
    assert mean + half > 1
    low, high = found.ends(Scale.LOGIT)
    assert 0 < low < mean < high < 1
    logits = [math.log(share / (1 - share)) for share in (low, mean, high)]
    assert logits[2] - logits[1] == pytest.approx(half / (mean * (1 - mean))) == pytest.approx(logits[1] - logits[0])
    low, high = found.ends(Scale.LOG)
    assert math.log(high / mean) == pytest.approx(half / mean) == pytest.approx(math.log(mean / low))
    assert [float(end) for end in CrossedMean.of(np.ones((3, 20))).ends(Scale.LOGIT)] == [1, 1]
    assert [float(end) for end in CrossedMean.of(np.zeros((3, 20))).ends(Scale.LOG)] == [0, 0]
    assert [measure for measure in Measure if measure.scale is Scale.LOGIT] == [Measure.ACCURACY, Measure.AUC]


# --- AUC ---------------------------------------------------------------------------------------------------


def test_the_mean_of_placements_is_the_auc_and_their_variance_is_delongs() -> None:
    """By counting pairs: DeLong, DeLong and Clarke-Pearson 1988."""
    margins = np.round(drawn(2, 30) + (np.arange(30) < 12), 1)  # some are equal
    positive = np.arange(30) < 12
    found = placements(margins, positive)
    for seed in range(2):
        high, low = margins[seed, positive], margins[seed, ~positive]
        wins = np.array([[(p > n) + 0.5 * (p == n) for n in low] for p in high])
        assert found[seed].mean() == pytest.approx(wins.mean())
        variance = wins.mean(axis=1).var(ddof=1) / len(high) + wins.mean(axis=0).var(ddof=1) / len(low)
        assert found[seed].var(ddof=1) / 30 == pytest.approx(variance)


def test_the_auc_of_a_perfect_and_of_a_blind_model() -> None:
    positive = np.arange(10) % 2 == 0
    assert placements(np.where(positive, 1.0, 0.0)[None], positive).tolist() == [[1.0] * 10]
    assert placements(np.zeros((1, 10)), positive).tolist() == [[0.5] * 10]
    assert placements(np.arange(3.0)[None], np.array([False, False, True])).mean() == 1  # one of a class


# --- the gap from untouched to central -----------------------------------------------------------------------


def fieller(gone: Array, way: Array) -> tuple[float, float]:
    """Fieller 1954 by the roots of its quadratic, of paired figures by seed."""
    seeds = len(gone)
    square = t.isf(0.025, seeds - 1) ** 2 / seeds
    table = np.cov(gone, way, ddof=1)
    a = way.mean() ** 2 - square * table[1, 1]
    b = gone.mean() * way.mean() - square * table[0, 1]
    c = gone.mean() ** 2 - square * table[0, 0]
    root = math.sqrt(b * b - a * c)
    return (b - root) / a, (b + root) / a


@pytest.mark.parametrize("sign", [1, -1])
def test_the_share_of_a_gap_is_fiellers_where_questions_do_not_vary(sign: int) -> None:
    gone, way = 0.5 + drawn(5, seed=1) / 20, 1 + drawn(5, seed=2) / 5
    untouched, one, central = (np.repeat(sign * of[:, None], 20, axis=1) for of in (0 * gone, gone, way))
    found = gap_closed(one, untouched, central, is_share=sign > 0)
    assert found is not None
    share, ends = found
    assert share == pytest.approx(gone.mean() / way.mean())
    assert ends == pytest.approx(fieller(gone, way), abs=1e-9)


def test_a_gap_that_is_not_there_has_no_share() -> None:
    one, noise = np.zeros((5, 40)), drawn(5, 40) + drawn(5, 1, seed=1)
    assert gap_closed(one, one, noise, is_share=True) is None
    assert gap_closed(one, one, one - 1, is_share=True) is None  # central is worse
    for gone, sign in ((0, -1), (1, 1)):  # no spread at all: the interval is the share
        found = gap_closed(one + sign * gone, one, one + sign, is_share=sign > 0)
        assert found is not None
        assert [found[0], *found[1]] == pytest.approx([gone] * 3)


# --- curves ------------------------------------------------------------------------------------------------


def test_a_level_is_reached_at_the_first_round_with_that_accuracy() -> None:
    curve = [(1, 0.5), (2, 0.7), (3, 0.6), (4, 0.8)]
    assert [first_at(level, curve) for level in (0.5, 0.6, 0.75, 0.9)] == [1, 2, 4, None]


def test_all_pairs_of_equal_models_are_equal() -> None:
    models = [drawn(5, 30)] * 3
    assert all(found.p_holm == 1 for _, found in paired_differences(list(itertools.combinations(models, 2))))
