"""Combine the results of a comparison into one report and its Markdown. Running and drawing are other files'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import TypeVar

import msgspec
import numpy as np

from fedsoda_edge.units import human_bytes
from fedsoda_hub.compare.results import (
    Alone,
    Baselines,
    CellResult,
    CompareReport,
    Costs,
    EdgeRoundBytes,
    KeptAnswers,
    LevelReached,
    NamedDifference,
    Results,
    RoundPoint,
    Split,
    Spread,
    Variant,
)
from fedsoda_hub.compare.settings import Cell, Comparison
from fedsoda_hub.compare.statistics import AnswersBySeed, difference, first_at, mean_and_spread

T = TypeVar("T")


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
    """Write what a difference shows: a line by accuracy and a line by loss, each only if it is shown."""
    lines = []
    if found.is_shown:
        better, worse = (found.one, found.other) if found.points > 0 else (found.other, found.one)
        lines.append(f"{split}: {better} above {worse} by {abs(found.points):.1f} points")
    if found.loss.is_shown:
        nats = found.loss.nats
        better, worse = (found.one, found.other) if nats < 0 else (found.other, found.one)
        lines.append(f"{split}: loss of {better} below that of {worse} by {abs(nats):.3f} nats a completion id")
    return lines


def _of_seeds(answered: Sequence[KeptAnswers]) -> AnswersBySeed:
    return AnswersBySeed(
        np.array([[float(right) for right in seed.right] for seed in answered]),
        np.array([seed.losses for seed in answered]),
    )


def _of_split(comparison: Comparison, results: Results, split: str) -> Split:
    compare = comparison.compare
    cells = {
        variant: [results.cells[Cell(variant, split, seed)] for seed in compare.seeds]
        for variant in comparison.settings
    }
    answers = {
        variant: _of_seeds([cell.answered["plug_in"] for cell in of_variant]) for variant, of_variant in cells.items()
    }
    level = _mean_accuracy(answers[comparison.level_of]).mean
    rows = {
        variant: _of_variant(of_variant, comparison.settings[variant].rounds.cohort, level)
        for variant, of_variant in cells.items()
    }
    answers |= {name: _of_seeds(answered) for name, answered in _baselines(comparison, results, split).items()}
    alone = _alone(comparison, results, split)
    if alone:
        answers["best edge alone"] = _of_seeds([max(edges, key=lambda one: one.right.count("1")) for edges in alone])
    return Split(
        variants=rows,
        baselines=Baselines(
            untouched=_accuracies(answers, "untouched"),
            alone=Alone(
                best=_mean_accuracy(answers["best edge alone"]),
                mean=mean_and_spread([float(_of_seeds(edges).right.mean()) for edges in alone]),
            )
            if alone
            else None,
            central=_accuracies(answers, "central"),
            losses={name: _mean_loss(answers[name]) for name in answers if name not in rows},
        ),
        differences=[
            NamedDifference(one=one, other=other, **msgspec.structs.asdict(difference(answers[one], answers[other])))
            for one, other in combinations(answers, 2)
        ],
    )


def _baselines(comparison: Comparison, results: Results, split: str) -> dict[str, list[KeptAnswers]]:
    """Collect the answers of the untouched and the central model, a set a seed, by baseline."""
    compare, found = comparison.compare, {}
    if results.untouched is not None:
        found["untouched"] = [results.untouched] * len(compare.seeds)
    if "central" in compare.baselines:
        found["central"] = [results.central[split, seed] for seed in compare.seeds]
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


def _accuracies(answers: Mapping[str, AnswersBySeed], name: str) -> Spread | None:
    return _mean_accuracy(answers[name]) if name in answers else None


def _mean_accuracy(answered: AnswersBySeed) -> Spread:
    return mean_and_spread(answered.right.mean(axis=1).tolist())


def _mean_loss(answered: AnswersBySeed) -> Spread:
    return mean_and_spread(answered.losses.mean(axis=1).tolist())


def _of_variant(cells: Sequence[CellResult], cohort: int, level: float) -> Variant:
    """Compute the means of a variant over seeds.

    Args:
        level: the accuracy that the variant is timed to.
    """
    plug_in, sub_llm = (_of_seeds([cell.answered[which] for cell in cells]) for which in ("plug_in", "sub_llm"))
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
        plug_in=_mean_accuracy(plug_in),
        sub_llm=_mean_accuracy(sub_llm),
        loss={"plug_in": _mean_loss(plug_in), "sub_llm": _mean_loss(sub_llm)},
        by_round=by_round,
        bytes=EdgeRoundBytes(up_per_edge_round=up / invited, down_per_edge_round=down / invited),
        public_kl=_mean_kl([cell.public_kl for cell in cells if cell.public_kl is not None]),
        to_level=_reached(level, by_round),
    )


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


# --- Markdown ----------------------------------------------------------------------------------------------


LABELS = {
    "untouched": "full model untouched",
    "best edge alone": "best edge alone",
    "central": "central, all rows in one place",
}


def markdown(report: CompareReport) -> str:
    """Write the tables of a report, with the columns of the paper's Tables 2, 3, 4 and 9."""
    splits = report.splits
    any_split = next(iter(splits.values()))
    names = list(any_split.variants)
    parts = [
        "# Comparison\n",
        f"{report.eval_rows:,} questions, seeds {', '.join(map(str, report.compare.seeds))}, "
        f"{report.transport} transport. Accuracy is that of the full model with the adapter LoRA plugged in, in %, mean "
        "± standard deviation over seeds.\n",
        "## Accuracy (Tables 2 to 4)\n",
        _table(
            ["", *splits],
            [
                *([name, *(_percent(of.variants[name].plug_in) for of in splits.values())] for name in names),
                *(
                    [label, *(_percent(found) for found in row)]
                    for label, row in _baseline_rows(splits).items()
                    if any(row)
                ),
            ],
        ),
    ]
    parts += [
        "## Loss of the plug-in, nats a completion id\n",
        _table(
            ["", *splits],
            [
                *([name, *(_nats(of.variants[name].loss["plug_in"]) for of in splits.values())] for name in names),
                *(
                    [LABELS[name], *(_nats(of.baselines.losses[name]) for of in splits.values())]
                    for name in any_split.baselines.losses
                ),
            ],
        ),
    ]
    for split, of in splits.items():
        rows = of.variants
        parts += [
            f"## What the edges train on, {split}\n",
            "The sub-LLM with its adapter LoRA on the same questions, what is lost when the LoRA is plugged into the full "
            "model, and how far the sub-LLM is from the full model on public text before round 1 (KL, nats an id).\n",
            _table(
                ["", "sub-LLM, %", "plug-in less that, points", "loss of the sub-LLM", "KL pruned", "in NF4", "aligned"],
                [[name, *_trained_on(rows[name])] for name in names],
            ),
            f"## Costs, {split} (Tables 2 and 4)\n",
            _table(
                ["", "trainable", "parameters a round", "bytes an edge and round, up", "down", "model", "edge memory",
                 "GFLOP an edge and round", "seconds"],
                [[name, *_costs(rows[name])] for name in names],
            ),
            f"## To the accuracy of {report.level_of}, {split} (Table 9)\n",
            _table(
                ["", "rounds", "bytes of all edges"],
                [
                    [name, _or_never(reached.rounds, str), _or_never(reached.bytes, human_bytes)]
                    for name in names
                    for reached in [rows[name].to_level]
                ],
            ),
        ]  # fmt: skip
    shown = "\n".join(f"- {line}" for line in report.orderings) or "None."
    parts += [
        "## Orderings\n",
        "Only those whose paired 95 % interval (bootstrap over seeds and questions) excludes 0. No other is claimed.\n",
        shown + "\n",
    ]
    return "\n".join(parts)


def _baseline_rows(splits: Mapping[str, Split]) -> dict[str, list[Spread | None]]:
    found = [of.baselines for of in splits.values()]
    return {
        LABELS["untouched"]: [one.untouched for one in found],
        LABELS["best edge alone"]: [None if one.alone is None else one.alone.best for one in found],
        "an edge alone": [None if one.alone is None else one.alone.mean for one in found],
        LABELS["central"]: [one.central for one in found],
    }


def _trained_on(row: Variant) -> list[str]:
    return [
        _percent(row.sub_llm),
        f"{100 * (row.plug_in.mean - row.sub_llm.mean):+.1f}",
        _nats(row.loss["sub_llm"]),
        *(f"{row.public_kl[kind]:.3f}" for kind in ("pruned", "quantized", "aligned")),
    ]


def _costs(row: Variant) -> list[str]:
    measured = row.edge_peak_rss_bytes
    return [
        f"{row.trainable:,.0f}",
        f"{row.parameters_per_round:,.0f}",
        human_bytes(row.bytes.up_per_edge_round),
        human_bytes(row.bytes.down_per_edge_round),
        human_bytes(row.model_bytes),
        f"{human_bytes(row.edge_memory_bytes)} planned" if measured is None else human_bytes(measured),
        f"{row.gflop_per_edge_round:.3g}",
        f"{row.seconds_per_edge_round:.3g}",
    ]


def _percent(found: Spread | None) -> str:
    if found is None:
        return ""
    spread = "" if found.spread is None else f" ± {100 * found.spread:.1f}"
    return f"{100 * found.mean:.1f}{spread}"


def _nats(found: Spread) -> str:
    spread = "" if found.spread is None else f" ± {found.spread:.3f}"
    return f"{found.mean:.3f}{spread}"


def _or_never(value: T | None, shown: Callable[[T], str]) -> str:
    return "not reached" if value is None else shown(value)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
