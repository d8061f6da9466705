"""Simulate comparisons whose truth is known, and count how often the intervals of `fedsoda-hub compare` hold it.

Models answer by a normal score: what a seed adds, what a question adds for all models and for each one, and what every
single answer adds. Accuracy, AUC and loss come from it, and so do their means over all seeds and questions that could be
drawn. Claimed: 93 to 97 % of the 95 % intervals hold, of single models and of paired differences, for each number of seeds
and questions, with and without variance between seeds; Holm's p-values make a false claim in at most 5 % of tables of equal
models; 93 to 97 % of the intervals of a closed gap hold. `--planted-defect` takes the percentile bootstrap over seeds and
questions instead, and the script exits with 1, as for any claim that does not hold by more than three standard errors.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.special import ndtr, ndtri

from fedsoda_hub.compare.statistics import (
    Array,
    CrossedMean,
    Measure,
    Scale,
    gap_closed,
    paired_differences,
    placements,
)

SEEDS, QUESTIONS = (2, 3, 5, 10), (100, 400, 872)
SEED_SDS = (0.0, 0.05, 0.25)  # of the whole score's: 0, 2 and 10 points of accuracy between seeds at 50 %
FIGURES = (0.5, 0.7, 0.9)  # accuracy or AUC of the first model
WORSE = 0.04  # the second model's, less
QUESTION_SD, OWN_QUESTION_SD = 2.0, 0.7  # for all models alike, and for each; that of a single answer is 1
SCORE_SD = math.sqrt(QUESTION_SD**2 + OWN_QUESTION_SD**2 + 1)  # of one seed
MEASURES = (Measure.ACCURACY, Measure.AUC, Measure.LOSS)
HELD = (0.93, 0.97)
CHUNK = 200  # comparisons at once
DRAWS = 400  # of the bootstrap

# (values (comparisons, seeds, questions), scale) -> low and high ends
Intervals = Callable[[Array, Scale], tuple[Array, Array]]


@dataclass(frozen=True)
class Model:
    """A simulated model. figure: its accuracy or AUC with the mean seed. seed_sd: between seeds, of the whole score's."""

    figure: float
    seed_sd: float

    def truth(self, measure: Measure) -> float:
        """Compute the mean over all seeds and questions that could be drawn."""
        whole = math.sqrt(1 + self.seed_sd**2)
        if measure is not Measure.LOSS:
            return float(ndtr(ndtri(self.figure) / whole))
        places, weights = np.polynomial.hermite_e.hermegauss(80)
        scores = SCORE_SD * (ndtri(self.figure) + whole * places)
        return float(weights @ np.logaddexp(0, -scores) / weights.sum())


@dataclass(frozen=True)
class Asked:
    """What models are asked, and how often."""

    measure: Measure
    seeds: int
    questions: int


@dataclass(frozen=True)
class Row:
    """How often intervals hold. error: the standard error of a coverage of 95 %."""

    measure: str
    of: str
    seeds: int
    questions: int
    seed_sd: float
    figure: float
    coverage: float
    error: float

    @property
    def holds(self) -> bool:
        """Whether the coverage is as claimed, or not by more than three standard errors."""
        return HELD[0] - 3 * self.error <= self.coverage <= HELD[1] + 3 * self.error


# --- simulated models --------------------------------------------------------------------------------------


def answered(asked: Asked, models: Sequence[Model], number: int, chance: np.random.Generator) -> list[Array]:
    """Draw the values of models that answer the same questions: each (number, seeds, questions)."""
    seeds, questions = asked.seeds, asked.questions
    shared = QUESTION_SD * chance.standard_normal((number, 1, questions))
    positive = np.arange(questions) % 2 == 0
    found = []
    for model in models:
        score = shared + OWN_QUESTION_SD * chance.standard_normal((number, 1, questions))
        score = score + chance.standard_normal((number, seeds, questions))
        of_seed = SCORE_SD * (ndtri(model.figure) + model.seed_sd * chance.standard_normal((number, seeds, 1)))
        match asked.measure:
            case Measure.ACCURACY:
                found.append((score + of_seed > 0).astype(np.float64))
            case Measure.LOSS:
                found.append(np.logaddexp(0, -(score + of_seed)))
            case _:  # a seed tells the two classes apart, better or worse
                found.append(placements(score + np.where(positive, of_seed, -of_seed) / math.sqrt(2), positive))
    return found


# --- intervals ---------------------------------------------------------------------------------------------


def crossed(values: Array, scale: Scale) -> tuple[Array, Array]:
    """Compute the intervals of `fedsoda-hub compare`."""
    return CrossedMean.of(values).ends(scale)


def bootstrapped(values: Array, _: Scale) -> tuple[Array, Array]:
    """Compute the planted defect: the percentile bootstrap over seeds and questions."""
    _, seeds, questions = values.shape
    chance = np.random.default_rng(0)
    of_seeds = chance.multinomial(seeds, np.full(seeds, 1 / seeds), size=DRAWS) / seeds
    of_questions = chance.multinomial(questions, np.full(questions, 1 / questions), size=DRAWS) / questions
    drawn = np.array([(of_seeds @ one * of_questions).sum(axis=1) for one in values])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=1)
    return low, high


def rows(asked: Asked, models: tuple[Model, Model], number: int, intervals: Intervals) -> Iterator[Row]:
    """Simulate comparisons, and count for the first model and for its difference to the second."""
    chance = np.random.default_rng(0)
    true_one, true_other = (model.truth(asked.measure) for model in models)
    held = {"a model": 0, "a difference": 0}
    for at in range(0, number, CHUNK):
        one, other = answered(asked, models, min(CHUNK, number - at), chance)
        for of, values, true, scale in (
            ("a model", one, true_one, asked.measure.scale),
            ("a difference", one - other, true_one - true_other, Scale.PLAIN),
        ):
            low, high = intervals(values, scale)
            held[of] += int(((low <= true) & (true <= high)).sum())
    error = math.sqrt(0.95 * 0.05 / number)
    for of, count in held.items():
        yield Row(
            measure=asked.measure.value,
            of=of,
            seeds=asked.seeds,
            questions=asked.questions,
            seed_sd=models[0].seed_sd,
            figure=models[0].figure,
            coverage=count / number,
            error=error,
        )


# --- tables ------------------------------------------------------------------------------------------------


def false_claims(number: int) -> float:
    """Compare six equal models over five seeds; return the share of tables in which a difference is shown."""
    chance, asked = np.random.default_rng(1), Asked(Measure.ACCURACY, 5, 200)
    false = 0
    for _ in range(number):
        models = [values[0] for values in answered(asked, [Model(0.7, 0.05)] * 6, 1, chance)]
        found = paired_differences(list(itertools.combinations(models, 2)))
        false += any(shown.is_shown for _, shown in found)
    return false / number


def gaps_held(number: int) -> tuple[float, float]:
    """Close about half of a gap of ten points over five seeds.

    Returns:
        how often the interval of the share holds it, and how often there is one.
    """
    chance, asked = np.random.default_rng(2), Asked(Measure.ACCURACY, 5, 400)
    models = [Model(0.75, 0.05), Model(0.7, 0.0), Model(0.8, 0.05)]
    true_one, true_untouched, true_central = (model.truth(asked.measure) for model in models)
    share = (true_one - true_untouched) / (true_central - true_untouched)
    held = defined = 0
    for _ in range(number):
        one, untouched, central = (values[0] for values in answered(asked, models, 1, chance))
        same = np.repeat(untouched[:1], asked.seeds, axis=0)  # it is not trained, so it has no seeds
        closed = gap_closed(one, same, central, is_share=True)
        if closed is not None:
            defined += 1
            held += closed[1][0] <= share <= closed[1][1]
    return held / max(defined, 1), defined / number


def main() -> None:
    """Print the coverage of every row and the claims, and exit with 1 where one does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--comparisons", type=int, default=2000, help="that are simulated for each row")
    parser.add_argument("--quick", action="store_true", help="400 comparisons, 100 questions alone: a minute")
    parser.add_argument("--planted-defect", action="store_true", help="the percentile bootstrap: the bench must fail")
    options = parser.parse_args()
    number, questions = (400, QUESTIONS[:1]) if options.quick else (options.comparisons, QUESTIONS)
    intervals = bootstrapped if options.planted_defect else crossed
    found = [
        row
        for measure, seeds, asked, sd, figure in itertools.product(MEASURES, SEEDS, questions, SEED_SDS, FIGURES)
        for row in rows(Asked(measure, seeds, asked), (Model(figure, sd), Model(figure - WORSE, sd)), number, intervals)
    ]
    claims = [
        {
            "claim": f"{measure.value} of {of}, {seeds} seeds: 93 to 97 % of the intervals hold",
            "holds": all(row.holds for row in these),
            "least": min(row.coverage for row in these),
            "most": max(row.coverage for row in these),
            "mean": sum(row.coverage for row in these) / len(these),
        }
        for measure, of, seeds in itertools.product(MEASURES, ("a model", "a difference"), SEEDS)
        for these in [[row for row in found if (row.measure, row.of, row.seeds) == (measure.value, of, seeds)]]
    ]
    if not options.planted_defect:
        tables = max(number // 4, 100)
        slack = 3 * math.sqrt(0.95 * 0.05 / tables)
        false, (held, defined) = false_claims(tables), gaps_held(tables)
        claims += [
            {"claim": "at most 5 % of tables of equal models show one", "holds": false <= 0.05 + slack, "share": false},
            {
                "claim": "93 to 97 % of the intervals of a closed gap hold",
                "holds": HELD[0] - slack <= held <= HELD[1] + slack,
                "coverage": held,
                "defined": defined,
            },
        ]
    print(json.dumps({"comparisons": number, "rows": [asdict(row) for row in found], "claims": claims}))
    if not all(claim["holds"] for claim in claims):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
