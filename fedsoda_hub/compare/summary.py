"""Combine the results of a comparison into one report. Running, tables and drawing are other files'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import msgspec
import numpy as np

from fedsoda_hub.compare.results import (
    Alone,
    AnswerShare,
    AUCDifference,
    Baselines,
    CellResult,
    CompareReport,
    Costs,
    EdgeRoundBytes,
    Estimate,
    GapClosed,
    KeptAnswers,
    LevelReached,
    LossDifference,
    NamedDifference,
    Paired,
    RankDifference,
    Results,
    RoundPoint,
    Split,
    Variant,
)
from fedsoda_hub.compare.settings import Cell, Comparison
from fedsoda_hub.compare.statistics import (
    Array,
    Measure,
    Scale,
    first_at,
    gap_closed,
    interval,
    paired_differences,
    placements,
)

BySeed = Sequence[KeptAnswers]
Figures = dict[Measure, Array]  # of a model, each (seeds, questions)
UNTOUCHED, CENTRAL, BEST_ALONE = "untouched", "central", "best edge alone"


def summarise(comparison: Comparison, results: Results, transport: str) -> CompareReport:
    """Make the report of `compare --json`, without the paths of files."""
    compare = comparison.compare
    splits = {split: _of_split(comparison, results, split) for split in compare.splits}
    return CompareReport(
        transport=transport,
        eval_rows=len(next(iter(results.cells.values())).answered["plug_in"].right),
        compare=compare,
        variants=comparison.overrides,
        baseline_of=comparison.baseline_of,
        level_of=comparison.level_of,
        dealt={split: {f"{seed}": results.dealt[split, seed] for seed in compare.seeds} for split in compare.splits},
        splits=splits,
        orderings=[
            line for split, of in splits.items() for found in of.differences for line in _orderings(split, found)
        ],
    )


def _orderings(split: str, found: NamedDifference) -> list[str]:
    """Write what a difference shows: a line for each measure by which it is shown."""

    def ordered(is_one_better: bool, sentence: str) -> str:
        better, worse = (found.one, found.other) if is_one_better else (found.other, found.one)
        return f"{split}: " + sentence.format(better=better, worse=worse)

    lines = []
    if found.is_shown:
        lines.append(ordered(found.points > 0, f"{{better}} above {{worse}} by {abs(found.points):.1f} points"))
    if found.auc is not None and found.auc.is_shown:
        by = abs(found.auc.auc)
        lines.append(ordered(found.auc.auc > 0, f"AUC of {{better}} above that of {{worse}} by {by:.3f}"))
    if found.mean_rank is not None and found.mean_rank.is_shown:
        by = abs(found.mean_rank.ranks)
        lines.append(ordered(found.mean_rank.ranks < 0, f"mean rank of {{better}} below that of {{worse}} by {by:.2f}"))
    if found.loss.is_shown:
        by = abs(found.loss.nats)
        sentence = f"loss of {{better}} below that of {{worse}} by {by:.3f} nats a completion id"
        lines.append(ordered(found.loss.nats < 0, sentence))
    return lines


# --- a split -----------------------------------------------------------------------------------------------


def _of_split(comparison: Comparison, results: Results, split: str) -> Split:
    compare = comparison.compare
    cells = {
        variant: [results.cells[Cell(variant, split, seed)] for seed in compare.seeds]
        for variant in comparison.settings
    }
    baselines = _baselines(comparison, results, split)
    alone = _alone(comparison, results, split)
    if alone:
        baselines[BEST_ALONE] = [max(edges, key=lambda one: one.accuracy) for edges in alone]
    figures = {name: _figures(answered) for name, answered in baselines.items()}
    plug_ins = {name: _figures([cell.answered["plug_in"] for cell in of_variant]) for name, of_variant in cells.items()}
    level = float(plug_ins[comparison.level_of][Measure.ACCURACY].mean())
    rows = {
        variant: _of_variant(of_variant, comparison.settings[variant].rounds.cohort, level, plug_ins[variant], figures)
        for variant, of_variant in cells.items()
    }
    mean_alone = np.array([[_right(edge) for edge in edges] for edges in alone]).mean(axis=1) if alone else None
    return Split(
        variants=rows,
        baselines=Baselines(
            untouched=_estimates(figures, Measure.ACCURACY).get(UNTOUCHED),
            alone=None
            if mean_alone is None
            else Alone(
                best=_estimates(figures, Measure.ACCURACY)[BEST_ALONE],
                mean=_estimate(mean_alone, Scale.LOGIT),
            ),
            central=_estimates(figures, Measure.ACCURACY).get(CENTRAL),
            losses=_estimates(figures, Measure.LOSS),
            aucs=_estimates(figures, Measure.AUC),
            mean_ranks=_estimates(figures, Measure.MEAN_RANK),
            shares=_shares(baselines),
        ),
        differences=_differences({**plug_ins, **figures}),
    )


def _baselines(comparison: Comparison, results: Results, split: str) -> dict[str, BySeed]:
    """Collect the answers of the untouched and the central model, a set a seed, by baseline."""
    compare, found = comparison.compare, dict[str, BySeed]()
    if results.untouched is not None:
        found[UNTOUCHED] = [results.untouched] * len(compare.seeds)
    if "central" in compare.baselines:
        found[CENTRAL] = [results.central[split, seed] for seed in compare.seeds]
    return found


def _alone(comparison: Comparison, results: Results, split: str) -> list[list[KeptAnswers]]:
    """Collect the answers of each edge trained alone: a list of edges a seed."""
    if "alone" not in comparison.compare.baselines:
        return []
    return [
        [
            results.cells[Cell(comparison.baseline_of, split, seed, edge)].answered["plug_in"]
            for edge in range(len(results.dealt[split, seed]))
        ]
        for seed in comparison.compare.seeds
    ]


# --- figures -----------------------------------------------------------------------------------------------


def _right(answered: KeptAnswers) -> list[float]:
    return [float(right) for right in answered.right]


def _figures(answered: BySeed) -> Figures:
    """Collect the value of each question, by measure, of a model's answers with each seed."""
    found = {
        Measure.ACCURACY: np.array([_right(seed) for seed in answered]),
        Measure.LOSS: np.array([seed.losses for seed in answered]),
    }
    chose = [seed.of_choices for seed in answered if seed.of_choices is not None]
    margins, ranks = [one.margins for one in chose if one.margins], [one.ranks for one in chose if one.ranks]
    if margins:
        found[Measure.AUC] = placements(np.array(margins), np.array(chose[0].gold) == 1)
    if ranks:
        found[Measure.MEAN_RANK] = np.array(ranks)
    return found


def _estimate(values: Array, scale: Scale) -> Estimate:
    per_seed = values.mean(axis=1).tolist()
    return Estimate(
        mean=float(np.mean(per_seed)),
        spread=float(np.std(per_seed, ddof=1)) if len(per_seed) > 1 else None,
        per_seed=per_seed,
        interval_95=interval(values, scale),
    )


def _estimates(figures: Mapping[str, Figures], measure: Measure) -> dict[str, Estimate]:
    return {name: _estimate(of[measure], measure.scale) for name, of in figures.items() if measure in of}


def _shares(models: Mapping[str, BySeed]) -> dict[str, dict[str, AnswerShare]]:
    """Compute how often each model chose each answer; models that chose among none are left out."""
    found = {}
    for name, answered in models.items():
        chose = [seed.of_choices for seed in answered if seed.of_choices is not None]
        if chose:
            chosen, gold = np.array([one.chosen for one in chose]), np.array(chose[0].gold)
            found[name] = {
                answer: AnswerShare(
                    chosen=_estimate((chosen == place).astype(np.float64), Scale.LOGIT),
                    right=float((gold == place).mean()),
                )
                for place, answer in enumerate(chose[0].choices)
            }
    return found


def _differences(figures: Mapping[str, Figures]) -> list[NamedDifference]:
    """Compare any two models by each measure; the pairs of a measure are one table."""
    pairs = list(combinations(figures, 2))
    by_measure: dict[Measure, dict[tuple[str, str], tuple[float, Paired]]] = {}
    for measure in Measure:
        both = [pair for pair in pairs if all(measure in figures[name] for name in pair)]
        unit = 100 if measure is Measure.ACCURACY else 1  # points
        values = [(unit * figures[one][measure], unit * figures[other][measure]) for one, other in both]
        by_measure[measure] = dict(zip(both, paired_differences(values), strict=True))
    found, asdict = [], msgspec.structs.asdict
    for pair in pairs:
        (points, of_points), (nats, of_loss) = by_measure[Measure.ACCURACY][pair], by_measure[Measure.LOSS][pair]
        auc, ranks = by_measure[Measure.AUC].get(pair), by_measure[Measure.MEAN_RANK].get(pair)
        found.append(
            NamedDifference(
                one=pair[0],
                other=pair[1],
                points=points,
                **asdict(of_points),
                loss=LossDifference(nats=nats, **asdict(of_loss)),
                auc=None if auc is None else AUCDifference(auc=auc[0], **asdict(auc[1])),
                mean_rank=None if ranks is None else RankDifference(ranks=ranks[0], **asdict(ranks[1])),
            )
        )
    return found


# --- a variant ---------------------------------------------------------------------------------------------


def _of_variant(
    cells: Sequence[CellResult], cohort: int, level: float, plug_in: Figures, baselines: Mapping[str, Figures]
) -> Variant:
    """Compute the means of a variant over seeds.

    Args:
        level: the accuracy that the variant is timed to.
        plug_in: the figures of its plug-in. baselines: those of the baselines.
    """
    answered = {which: [cell.answered[which] for cell in cells] for which in ("plug_in", "sub_llm")}
    figures = {"plug_in": plug_in, "sub_llm": _figures(answered["sub_llm"])}
    accuracies = _estimates(figures, Measure.ACCURACY)
    by_round: list[RoundPoint] = []
    up = down = 0.0
    for rounds in zip(*(cell.rounds for cell in cells), strict=True):
        up += float(np.mean([one.bytes_up for one in rounds]))
        down += float(np.mean([one.bytes_down for one in rounds]))
        known = [one.accuracy for one in rounds if one.accuracy is not None]
        accuracy = float(np.mean(known)) if known else None
        by_round.append(RoundPoint(round=rounds[0].round, accuracy=accuracy, bytes_up=up, bytes_down=down))
    invited = float(np.mean([min(cohort, cell.edges) for cell in cells])) * len(by_round)
    return Variant(
        **msgspec.structs.asdict(_mean_costs([cell.costs for cell in cells if cell.costs is not None])),
        plug_in=accuracies["plug_in"],
        sub_llm=accuracies["sub_llm"],
        loss=_estimates(figures, Measure.LOSS),
        auc=_estimates(figures, Measure.AUC),
        mean_rank=_estimates(figures, Measure.MEAN_RANK),
        shares=_shares(answered),
        gap_closed=_gap_closed(plug_in, baselines),
        by_round=by_round,
        bytes=EdgeRoundBytes(up_per_edge_round=up / invited, down_per_edge_round=down / invited),
        public_kl=_mean_kl([cell.public_kl for cell in cells if cell.public_kl is not None]),
        to_level=_reached(level, by_round),
    )


def _gap_closed(plug_in: Figures, baselines: Mapping[str, Figures]) -> dict[str, GapClosed | None]:
    """Compute the share of the gap from untouched to central by accuracy, and by AUC or mean rank."""
    if not {UNTOUCHED, CENTRAL} <= baselines.keys():
        return {}
    untouched, central = baselines[UNTOUCHED], baselines[CENTRAL]
    found: dict[str, GapClosed | None] = {}
    for measure in (Measure.ACCURACY, Measure.AUC, Measure.MEAN_RANK):
        if all(measure in figures for figures in (plug_in, untouched, central)):
            closed = gap_closed(plug_in[measure], untouched[measure], central[measure], is_share=measure.is_share)
            found[measure.value] = None if closed is None else GapClosed(share=closed[0], interval_95=closed[1])
    return found


def _mean_costs(costs: Sequence[Costs]) -> Costs:
    of_each = [msgspec.structs.asdict(one) for one in costs]
    known = [name for name, value in of_each[0].items() if value is not None]
    means = {name: float(np.mean([one[name] for one in of_each])) for name in known}
    return msgspec.structs.replace(costs[0], **means)


def _mean_kl(kls: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {stage: float(np.mean([kl[stage] for kl in kls])) for stage in kls[0]}


def _reached(level: float, by_round: Sequence[RoundPoint]) -> LevelReached:
    number = first_at(level, [(one.round, one.accuracy) for one in by_round if one.accuracy is not None])
    at = next((one for one in by_round if one.round == number), None)
    return LevelReached(level=level, rounds=number, bytes=None if at is None else at.bytes_up + at.bytes_down)
