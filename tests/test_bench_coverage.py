"""Intervals of simulated comparisons hold as often as they say; those of the percentile bootstrap do not."""

from __future__ import annotations

import bench_coverage as bench
import numpy as np
import pytest

from fedsoda_hub.compare.statistics import Measure


def simulated(asked: bench.Asked, seed_sd: float, number: int, intervals: bench.Intervals) -> list[bench.Row]:
    models = bench.Model(0.7, seed_sd), bench.Model(0.66, seed_sd)
    return list(bench.rows(asked, models, number, intervals))


@pytest.mark.parametrize("seed_sd", [0.0, 0.25])
@pytest.mark.parametrize("seeds", [2, 5])
@pytest.mark.parametrize("measure", bench.MEASURES)
def test_95_percent_intervals_hold_in_93_to_97_of_100(measure: Measure, seeds: int, seed_sd: float) -> None:
    for row in simulated(bench.Asked(measure, seeds, 60), seed_sd, 600, bench.crossed):
        assert row.holds, row
        assert row.error < 0.01


@pytest.mark.parametrize("measure", bench.MEASURES)
def test_the_percentile_bootstrap_of_two_seeds_holds_far_too_seldom(measure: Measure) -> None:
    for row in simulated(bench.Asked(measure, 2, 400), 0.25, 100, bench.bootstrapped):
        assert not row.holds
        assert row.coverage < 0.85


@pytest.mark.parametrize("measure", bench.MEASURES)
def test_the_truth_is_what_many_seeds_and_questions_come_to(measure: Measure) -> None:
    model = bench.Model(0.8, 0.5)
    [values] = bench.answered(bench.Asked(measure, 300, 400), [model], 4, np.random.default_rng(0))
    assert values.mean() == pytest.approx(model.truth(measure), abs=0.03)


def test_equal_models_are_seldom_shown_to_differ() -> None:
    assert bench.false_claims(30) <= 0.1


def test_the_interval_of_a_closed_gap_holds_its_share() -> None:
    held, defined = bench.gaps_held(40)
    assert held >= 0.85
    assert defined == 1
