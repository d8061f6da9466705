"""Say what the results of a comparison say together: one report, and its Markdown. Nothing is run or drawn here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import msgspec
import numpy as np

from fedsoda_edge.units import human_bytes
from fedsoda_hub.compare.settings import Cell, Comparison
from fedsoda_hub.compare.statistics import Answered, difference, first_at, mean_and_spread

Results = Mapping[Cell | str, dict[str, Any]]


def summarise(comparison: Comparison, results: Results, transport: str) -> dict[str, Any]:
    """Make the report of `compare --json`, except for where files lie."""
    compare = comparison.compare
    splits = {split: _of_split(comparison, results, split) for split in compare.splits}
    return {
        "transport": transport,
        "eval_rows": next(len(one["answered"]["plug_in"]["right"]) for one in results.values() if "answered" in one),
        "compare": msgspec.to_builtins(compare),
        "variants": comparison.overrides,
        "baseline_of": comparison.baseline_of,
        "level_of": comparison.level_of,
        "dealt": {s: {f"{seed}": results[f"dealt {s} {seed}"] for seed in compare.seeds} for s in compare.splits},
        "splits": splits,
        "orderings": [
            line for split, of in splits.items() for found in of["differences"] for line in _orderings(split, found)
        ],
    }


def _orderings(split: str, found: Mapping[str, Any]) -> list[str]:
    """Say what a difference shows: one line by accuracy, one by loss, or none."""
    lines = []
    if found["is_shown"]:
        better, worse = ("one", "other") if found["points"] > 0 else ("other", "one")
        lines.append(f"{split}: {found[better]} above {found[worse]} by {abs(found['points']):.1f} points")
    if found["loss"]["is_shown"]:
        nats = found["loss"]["nats"]
        better, worse = ("one", "other") if nats < 0 else ("other", "one")
        lines.append(
            f"{split}: loss of {found[better]} below that of {found[worse]} by {abs(nats):.3f} nats a completion id"
        )
    return lines


def _of_seeds(answered: Sequence[Mapping[str, Any]]) -> Answered:
    return Answered(
        np.array([[float(right) for right in seed["right"]] for seed in answered]),
        np.array([seed["losses"] for seed in answered]),
    )


def _of_split(comparison: Comparison, results: Results, split: str) -> dict[str, Any]:
    compare = comparison.compare
    answers: dict[str, Answered] = {}
    rows: dict[str, Any] = {}
    for variant in comparison.settings:
        cells = [results[Cell(variant, split, seed)] for seed in compare.seeds]
        answers[variant] = _of_seeds([cell["answered"]["plug_in"] for cell in cells])
        rows[variant] = _of_variant(cells, comparison.settings[variant].rounds.cohort)
    level = rows[comparison.level_of]["plug_in"]["mean"]
    for row in rows.values():
        curve = [(one["round"], one["accuracy"]) for one in row["by_round"] if one["accuracy"] is not None]
        number = first_at(level, curve)
        at = next((one for one in row["by_round"] if one["round"] == number), None)
        row["to_level"] = {"level": level, "rounds": number, "bytes": at and at["bytes_up"] + at["bytes_down"]}
    baselines = _baselines(comparison, results, split)
    answers |= {name: _of_seeds(answered) for name, answered in baselines.items()}
    alone = _alone(comparison, results, split)
    if alone:
        answers["best edge alone"] = _of_seeds([max(edges, key=lambda one: one["right"].count("1")) for edges in alone])
    return {
        "variants": rows,
        "baselines": {
            "untouched": _accuracies(answers, "untouched"),
            "alone": {
                "best": _accuracies(answers, "best edge alone"),
                "mean": mean_and_spread([float(_of_seeds(edges).right.mean()) for edges in alone]),
            }
            if alone
            else None,
            "central": _accuracies(answers, "central"),
            "losses": {name: _mean_loss(answers[name]) for name in answers if name not in rows},
        },
        "differences": [
            {"one": one, "other": other, **difference(answers[one], answers[other])}
            for one, other in combinations(answers, 2)
        ],
    }


def _baselines(comparison: Comparison, results: Results, split: str) -> dict[str, list[dict[str, Any]]]:
    """Collect the answers of each seed, by baseline."""
    compare, found = comparison.compare, {}
    if "untouched" in compare.baselines:
        found["untouched"] = [results["untouched"]["answered"]] * len(compare.seeds)
    if "central" in compare.baselines:
        found["central"] = [results[f"central {split} {seed}"]["answered"] for seed in compare.seeds]
    return found


def _alone(comparison: Comparison, results: Results, split: str) -> list[list[dict[str, Any]]]:
    """Collect the answers of each edge trained alone, by seed."""
    if "alone" not in comparison.compare.baselines:
        return []
    return [
        [
            results[Cell(comparison.baseline_of, split, seed, edge)]["answered"]["plug_in"]
            for edge in range(len(results[f"dealt {split} {seed}"]))
        ]
        for seed in comparison.compare.seeds
    ]


def _accuracies(answers: Mapping[str, Answered], name: str) -> dict[str, Any] | None:
    return _mean_accuracy(answers[name]) if name in answers else None


def _mean_accuracy(answered: Answered) -> dict[str, Any]:
    return mean_and_spread(answered.right.mean(axis=1).tolist())


def _mean_loss(answered: Answered) -> dict[str, Any]:
    return mean_and_spread(answered.losses.mean(axis=1).tolist())


def _of_variant(cells: Sequence[dict[str, Any]], cohort: int) -> dict[str, Any]:
    """Take means over seeds. Bytes of `by_round` are of all edges until then; of `bytes`, of an invited edge in a round."""
    plug_in, sub_llm = (_of_seeds([cell["answered"][which] for cell in cells]) for which in ("plug_in", "sub_llm"))
    totals = {"bytes_up": 0.0, "bytes_down": 0.0}
    by_round = []
    for rounds in zip(*(cell["rounds"] for cell in cells), strict=True):
        for which in totals:
            totals[which] += float(np.mean([one[which] for one in rounds]))
        known = [one["accuracy"] for one in rounds if one["accuracy"] is not None]
        by_round.append({"round": rounds[0]["round"], "accuracy": float(np.mean(known)) if known else None, **totals})
    invited = float(np.mean([min(cohort, cell["edges"]) for cell in cells])) * len(by_round)
    costs = {
        name: None if cells[0]["costs"][name] is None else float(np.mean([cell["costs"][name] for cell in cells]))
        for name in cells[0]["costs"]
    }
    return {
        "plug_in": _mean_accuracy(plug_in),
        "sub_llm": _mean_accuracy(sub_llm),
        "loss": {"plug_in": _mean_loss(plug_in), "sub_llm": _mean_loss(sub_llm)},
        "by_round": by_round,
        "bytes": {
            "up_per_edge_round": totals["bytes_up"] / invited,
            "down_per_edge_round": totals["bytes_down"] / invited,
        },
        "public_kl": {kind: float(np.mean([c["public_kl"][kind] for c in cells])) for kind in cells[0]["public_kl"]},
        **costs,
    }


# --- Markdown ----------------------------------------------------------------------------------------------


LABELS = {
    "untouched": "full model untouched",
    "best edge alone": "best edge alone",
    "central": "central, all rows in one place",
}


def markdown(report: Mapping[str, Any]) -> str:
    """Write tables with the columns of the paper's 2, 3, 4 and 9, what is measured beside what the paper counts."""
    splits = report["splits"]
    names = list(next(iter(splits.values()))["variants"])
    parts = [
        "# Comparison\n",
        f"{report['eval_rows']:,} questions, seeds {', '.join(map(str, report['compare']['seeds']))}, "
        f"{report['transport']} transport. Accuracy is of the full model with the adapter LoRA plugged in, in %, mean "
        "± standard deviation over seeds.\n",
        "## Accuracy (Tables 2 to 4)\n",
        _table(
            ["", *splits],
            [
                *([name, *(_percent(of["variants"][name]["plug_in"]) for of in splits.values())] for name in names),
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
                *(
                    [name, *(_nats(of["variants"][name]["loss"]["plug_in"]) for of in splits.values())]
                    for name in names
                ),
                *(
                    [LABELS[name], *(_nats(of["baselines"]["losses"][name]) for of in splits.values())]
                    for name in next(iter(splits.values()))["baselines"]["losses"]
                ),
            ],
        ),
    ]
    for split, of in splits.items():
        rows = of["variants"]
        parts += [
            f"## What the edges train on, {split}\n",
            "The sub-LLM with its adapter LoRA on the same questions, what is lost where the LoRA goes into the full model, and "
            "how far the sub-LLM is from the full model on public text before round 1 (KL, nats an id).\n",
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
            f"## To the accuracy of {report['level_of']}, {split} (Table 9)\n",
            _table(
                ["", "rounds", "bytes of all edges"],
                [
                    [name, _or_never(reached["rounds"], str), _or_never(reached["bytes"], human_bytes)]
                    for name in names
                    for reached in [rows[name]["to_level"]]
                ],
            ),
        ]  # fmt: skip
    shown = "\n".join(f"- {line}" for line in report["orderings"]) or "None."
    parts += [
        "## Orderings\n",
        "Only where the paired 95 % interval (bootstrap over seeds and questions) excludes 0. No other is claimed.\n",
        shown + "\n",
    ]
    return "\n".join(parts)


def _baseline_rows(splits: Mapping[str, Any]) -> dict[str, list[Any]]:
    found = [of["baselines"] for of in splits.values()]
    return {
        LABELS["untouched"]: [one["untouched"] for one in found],
        LABELS["best edge alone"]: [one["alone"] and one["alone"]["best"] for one in found],
        "an edge alone": [one["alone"] and one["alone"]["mean"] for one in found],
        LABELS["central"]: [one["central"] for one in found],
    }


def _trained_on(row: Mapping[str, Any]) -> list[str]:
    return [
        _percent(row["sub_llm"]),
        f"{100 * (row['plug_in']['mean'] - row['sub_llm']['mean']):+.1f}",
        _nats(row["loss"]["sub_llm"]),
        *(f"{row['public_kl'][kind]:.3f}" for kind in ("pruned", "quantized", "aligned")),
    ]


def _costs(row: Mapping[str, Any]) -> list[str]:
    planned, measured = row["edge_memory_bytes"], row["edge_peak_rss_bytes"]
    return [
        f"{row['trainable']:,.0f}",
        f"{row['parameters_per_round']:,.0f}",
        human_bytes(row["bytes"]["up_per_edge_round"]),
        human_bytes(row["bytes"]["down_per_edge_round"]),
        human_bytes(row["model_bytes"]),
        f"{human_bytes(planned)} planned" if measured is None else human_bytes(measured),
        f"{row['gflop_per_edge_round']:.3g}",
        f"{row['seconds_per_edge_round']:.3g}",
    ]


def _percent(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    spread = "" if found["spread"] is None else f" ± {100 * found['spread']:.1f}"
    return f"{100 * found['mean']:.1f}{spread}"


def _nats(found: Mapping[str, Any]) -> str:
    spread = "" if found["spread"] is None else f" ± {found['spread']:.3f}"
    return f"{found['mean']:.3f}{spread}"


def _or_never(value: Any, shown: Any) -> str:
    return "not reached" if value is None else str(shown(value))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
