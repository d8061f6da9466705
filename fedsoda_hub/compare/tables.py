"""Write the report of a comparison as Markdown. Making the report is `summary.py`'s, drawing it `pictures.py`'s."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from fedsoda_edge.units import human_bytes
from fedsoda_hub.compare.results import (
    AnswerShare,
    CompareReport,
    Estimate,
    GapClosed,
    NamedDifference,
    Paired,
    Split,
    Variant,
)
from fedsoda_hub.compare.statistics import LEAST_SEEDS, Measure
from fedsoda_hub.compare.summary import BEST_ALONE, CENTRAL, UNTOUCHED

T = TypeVar("T")
LABELS = {
    UNTOUCHED: "full model untouched",
    BEST_ALONE: "best edge alone",
    CENTRAL: "central, all rows in one place",
}
TITLES = {
    Measure.ACCURACY: "Accuracy, % (Tables 2 to 4)",
    Measure.AUC: "AUC",
    Measure.MEAN_RANK: "Mean rank of the right choice",
    Measure.LOSS: "Loss, nats a completion id",
}
NAMES = {Measure.ACCURACY: "accuracy", Measure.AUC: "AUC", Measure.MEAN_RANK: "mean rank", Measure.LOSS: "loss"}
UNITS = {**NAMES, Measure.ACCURACY: "points of accuracy", Measure.LOSS: "nats"}


def markdown(report: CompareReport) -> str:
    """Write the tables of a report, with the columns of the paper's Tables 2, 3, 4 and 9."""
    seeds, splits = report.compare.seeds, report.splits
    parts = [
        "# Comparison\n",
        f"{report.eval_rows:,} questions, seeds {', '.join(map(str, seeds))}, {report.transport} transport. Figures are "
        "those of the full model with the adapter LoRA plugged in, mean ± standard deviation over seeds (95 % interval for "
        "other seeds and other questions)."
        + (" All seeds share one bundle of each variant." if report.compare.prepare == "once" else "")
        + "\n",
    ]
    for measure, title in TITLES.items():
        figures = {split: _figures(of, measure) for split, of in splits.items()}
        rows = _distinct(figures.values())
        if rows:
            told = [[name, *(_told(figures[split].get(name), measure) for split in splits)] for name in rows]
            parts += [f"## {title}\n", _table(["", *splits], told)]
    for split, of in splits.items():
        parts += [*_of_split(report, split, of), *_differences(split, of, len(seeds))]
    shown = "\n".join(f"- {line}" for line in report.orderings) or _not_shown(len(seeds)).capitalize() + "."
    parts += [
        "## Orderings\n",
        f"Only those that are shown: with at least {LEAST_SEEDS} seeds, and a p-value below .05 that is adjusted for all "
        "pairs of the split (Holm). No other is claimed.\n",
        shown + "\n",
    ]
    return "\n".join(parts)


def _figures(of: Split, measure: Measure) -> dict[str, Estimate]:
    """Collect a measure of all models of a split, by the names of the rows."""
    variants, baselines = of.variants.items(), of.baselines
    match measure:
        case Measure.ACCURACY:
            alone = baselines.alone
            found = {
                LABELS[UNTOUCHED]: baselines.untouched,
                LABELS[BEST_ALONE]: None if alone is None else alone.best,
                "an edge alone": None if alone is None else alone.mean,
                LABELS[CENTRAL]: baselines.central,
            }
            known = {name: figure for name, figure in found.items() if figure is not None}
            return {name: row.plug_in for name, row in variants} | known
        case Measure.AUC:
            rows, others = {name: row.auc for name, row in variants}, baselines.aucs
        case Measure.MEAN_RANK:
            rows, others = {name: row.mean_rank for name, row in variants}, baselines.mean_ranks
        case Measure.LOSS:
            rows, others = {name: row.loss for name, row in variants}, baselines.losses
    plug_ins = {name: figures["plug_in"] for name, figures in rows.items() if figures}
    return plug_ins | {LABELS[name]: figure for name, figure in others.items()}


def _of_split(report: CompareReport, split: str, of: Split) -> list[str]:
    """Write the tables of a split, but not its differences."""
    rows = of.variants
    parts = [
        f"## What the edges train on, {split}\n",
        "The sub-LLM with its adapter LoRA on the same questions, what is lost when the LoRA is plugged into the full "
        "model, and how far the sub-LLM is from the full model on public text before round 1 (KL, nats an id).\n",
        _table(
            ["", "sub-LLM, %", "plug-in less that, points", "loss of the sub-LLM", "KL pruned", "in NF4", "aligned",
             "AUC or mean rank of the sub-LLM"],
            [[name, *_trained_on(row)] for name, row in rows.items()],
        ),
    ]  # fmt: skip
    answers = _distinct(
        [*(row.shares["plug_in"] for row in rows.values() if row.shares), *of.baselines.shares.values()]
    )
    if answers:
        parts += [
            f"## Share of each answer, {split}, %\n",
            "How often each answer was chosen: by the plug-in / by its sub-LLM.\n",
            _table(["", *map(_cell, answers)], _shares(of, answers)),
        ]
    if any(row.gap_closed for row in rows.values()):
        measures = _distinct(row.gap_closed for row in rows.values())
        closed = [[name, *(_closed(row.gap_closed.get(by)) for by in measures)] for name, row in rows.items()]
        parts += [
            f"## Share of the gap from the untouched model to central training, {split}, %\n",
            "Not defined where central training is not better by more than its interval, which one seed does not have.\n",
            _table(["", *(f"by {NAMES[Measure(by)]}" for by in measures)], closed),
        ]
    return [
        *parts,
        f"## Costs, {split} (Tables 2 and 4)\n",
        _table(
            ["", "trainable", "parameters a round", "bytes an edge and round, up", "down", "model", "edge memory",
             "GFLOP an edge and round", "seconds"],
            [[name, *_costs(row)] for name, row in rows.items()],
        ),
        f"## To the accuracy of {report.level_of}, {split} (Table 9)\n",
        _table(
            ["", "rounds", "bytes of all edges"],
            [
                [name, _or_never(row.to_level.rounds, str), _or_never(row.to_level.bytes, human_bytes)]
                for name, row in rows.items()
            ],
        ),
    ]  # fmt: skip


def _trained_on(row: Variant) -> list[str]:
    auc, mean_rank = row.auc.get("sub_llm"), row.mean_rank.get("sub_llm")
    return [
        _told(row.sub_llm, Measure.ACCURACY),
        f"{100 * (row.plug_in.mean - row.sub_llm.mean):+.1f}",
        _told(row.loss["sub_llm"], Measure.LOSS),
        *(f"{row.public_kl[kind]:.3f}" for kind in ("pruned", "quantized", "aligned")),
        _told(mean_rank, Measure.MEAN_RANK) if auc is None else _told(auc, Measure.AUC),
    ]


def _shares(of: Split, answers: Sequence[str]) -> list[list[str]]:
    """Write a row of shares for the right answers, for each variant and for each baseline, in the order of `answers`."""

    def percents(shares: Mapping[str, AnswerShare], told: Callable[[AnswerShare], float]) -> list[str]:
        return [f"{100 * told(shares[answer]):.1f}" if answer in shares else "" for answer in answers]

    variants = {name: row.shares for name, row in of.variants.items() if row.shares}
    every = [*(shares["plug_in"] for shares in variants.values()), *of.baselines.shares.values()]
    rows = [["right", *percents({k: v for shares in every for k, v in shares.items()}, lambda one: one.right)]]
    for name, shares in variants.items():
        plug_in, sub_llm = (percents(shares[which], lambda one: one.chosen.mean) for which in ("plug_in", "sub_llm"))
        rows.append([name, *(f"{one} / {other}" for one, other in zip(plug_in, sub_llm, strict=True))])
    for name, shares_of in of.baselines.shares.items():
        rows.append([LABELS[name], *percents(shares_of, lambda one: one.chosen.mean)])
    return rows


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


# --- differences -------------------------------------------------------------------------------------------


def _differences(split: str, of: Split, num_seeds: int) -> list[str]:
    """Write all pairs of a split with what each measure shows of them; nothing where there is one model."""
    measures = _distinct(_paired(found) for found in of.differences)
    if not measures:
        return []
    heads = ["", *(head for measure in measures for head in (UNITS[measure], "p (Holm)")), "shown by"]
    rows = []
    for found in of.differences:
        of_pair = _paired(found)
        cells = [cell for measure in measures for cell in _difference(of_pair.get(measure), measure)]
        shown = ", ".join(NAMES[measure] for measure, (_, one) in of_pair.items() if one.is_shown)
        rows.append([f"{found.one} - {found.other}", *cells, shown or _not_shown(num_seeds)])
    return [
        f"## Differences, {split}\n",
        "The first less the second with its 95 % interval, and the p-value adjusted for all pairs.\n",
        _table(heads, rows),
    ]


def _paired(found: NamedDifference) -> dict[Measure, tuple[float, Paired]]:
    """Collect the mean of each measure's difference and what it shows."""
    paired: dict[Measure, tuple[float, Paired]] = {Measure.ACCURACY: (found.points, found)}
    if found.auc is not None:
        paired[Measure.AUC] = found.auc.auc, found.auc
    if found.mean_rank is not None:
        paired[Measure.MEAN_RANK] = found.mean_rank.ranks, found.mean_rank
    return paired | {Measure.LOSS: (found.loss.nats, found.loss)}


def _difference(found: tuple[float, Paired] | None, measure: Measure) -> tuple[str, str]:
    if found is None:
        return "", ""
    mean, of = found
    digits = 1 if measure is Measure.ACCURACY else 3
    p = "" if of.p_holm is None else "< .001" if of.p_holm < 0.001 else f"{of.p_holm:.3f}"
    return f"{mean:+.{digits}f}{_ends(of.interval_95, 1, digits)}", p


def _not_shown(num_seeds: int) -> str:
    few = f" ({num_seeds} {'seed' if num_seeds == 1 else 'seeds'}; at least {LEAST_SEEDS} are needed)"
    return f"not shown{few if num_seeds < LEAST_SEEDS else ''}"


# --- cells -------------------------------------------------------------------------------------------------


def _told(figure: Estimate | None, measure: Measure) -> str:
    if figure is None:
        return ""
    scale, digits = (100, 1) if measure is Measure.ACCURACY else (1, 3)
    spread = "" if figure.spread is None else f" ± {scale * figure.spread:.{digits}f}"
    return f"{scale * figure.mean:.{digits}f}{spread}{_ends(figure.interval_95, scale, digits)}"


def _closed(closed: GapClosed | None) -> str:
    return "not defined" if closed is None else f"{100 * closed.share:.0f}{_ends(closed.interval_95, 100, 0)}"


def _ends(ends: tuple[float, float] | None, scale: float, digits: int) -> str:
    return "" if ends is None else f" ({scale * ends[0]:.{digits}f} to {scale * ends[1]:.{digits}f})"


def _or_never(value: T | None, shown: Callable[[T], str]) -> str:
    return "not reached" if value is None else shown(value)


def _distinct(found: Iterable[Mapping[T, object]]) -> list[T]:
    """List all keys, each where it comes first."""
    return list(dict.fromkeys(name for one in found for name in one))


def _cell(text: str) -> str:
    """Write a text of others so that it stays in its cell."""
    return " ".join(text.replace("|", "/").split())


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
