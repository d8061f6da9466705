"""What the results of a comparison say together: one report, and its Markdown. Nothing is run or drawn here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import msgspec
import numpy as np

from fedsoda_edge.ports.console import human_bytes
from fedsoda_hub.compare.settings import Cell, Comparison
from fedsoda_hub.compare.statistics import Right, difference, first_at, is_shown, mean_and_spread

Results = Mapping[Cell | str, dict[str, Any]]


def summarise(comparison: Comparison, results: Results, transport: str) -> dict[str, Any]:
    """The report of `compare --json`, but for where files lie."""
    compare = comparison.compare
    splits = {split: _of_split(comparison, results, split) for split in compare.splits}
    return {
        "transport": transport,
        "eval_rows": len(next(iter(_rights(results)))),
        "compare": msgspec.to_builtins(compare),
        "variants": comparison.overrides,
        "baseline_of": comparison.baseline_of,
        "level_of": comparison.level_of,
        "dealt": {s: {f"{seed}": results[f"dealt {s} {seed}"] for seed in compare.seeds} for s in compare.splits},
        "splits": splits,
        "orderings": [
            f"{split}: {found['one' if found['points'] > 0 else 'other']} above "
            f"{found['other' if found['points'] > 0 else 'one']} by {abs(found['points']):.1f} points"
            for split, of in splits.items()
            for found in of["differences"]
            if found["is_shown"]
        ],
    }


def _rights(results: Results) -> list[str]:
    return [one["right"]["plug_in"] for key, one in results.items() if isinstance(key, Cell)]


def _array(rights: Sequence[str]) -> Right:
    return np.array([[float(right) for right in seed] for seed in rights])


def _of_split(comparison: Comparison, results: Results, split: str) -> dict[str, Any]:
    compare = comparison.compare
    answers: dict[str, Right] = {}
    rows: dict[str, Any] = {}
    for variant in comparison.settings:
        cells = [results[Cell(variant, split, seed)] for seed in compare.seeds]
        answers[variant] = _array([cell["right"]["plug_in"] for cell in cells])
        rows[variant] = _of_variant(cells, comparison.settings[variant].rounds.cohort)
    level = rows[comparison.level_of]["plug_in"]["mean"]
    for row in rows.values():
        curve = [(one["round"], one["accuracy"]) for one in row["by_round"] if one["accuracy"] is not None]
        number = first_at(level, curve)
        at = next((one for one in row["by_round"] if one["round"] == number), None)
        row["to_level"] = {"level": level, "rounds": number, "bytes": at and at["bytes_up"] + at["bytes_down"]}
    baselines = _baselines(comparison, results, split)
    answers |= {name: _array(rights) for name, rights in baselines.items() if name != "alone"}
    alone = _alone(comparison, results, split)
    if alone:
        answers["best edge alone"] = _array([max(seed, key=lambda right: right.count("1")) for seed in alone])
    return {
        "variants": rows,
        "baselines": {
            "untouched": _accuracies(answers, "untouched"),
            "alone": {
                "best": _accuracies(answers, "best edge alone"),
                "mean": mean_and_spread([float(_array(seed).mean()) for seed in alone]),
            }
            if alone
            else None,
            "central": _accuracies(answers, "central"),
        },
        "differences": [
            {"one": one, "other": other, **found, "is_shown": is_shown(found)}
            for one, other in combinations(answers, 2)
            for found in [difference(answers[one], answers[other])]
        ],
    }


def _baselines(comparison: Comparison, results: Results, split: str) -> dict[str, list[str]]:
    """Answers of each seed."""
    compare, found = comparison.compare, {}
    if "untouched" in compare.baselines:
        found["untouched"] = [results["untouched"]["right"]] * len(compare.seeds)
    if "central" in compare.baselines:
        found["central"] = [results[f"central {split} {seed}"]["right"] for seed in compare.seeds]
    return found


def _alone(comparison: Comparison, results: Results, split: str) -> list[list[str]]:
    """Answers of each edge trained alone, by seed."""
    if "alone" not in comparison.compare.baselines:
        return []
    return [
        [
            results[Cell(comparison.baseline_of, split, seed, edge)]["right"]["plug_in"]
            for edge in range(len(results[f"dealt {split} {seed}"]))
        ]
        for seed in comparison.compare.seeds
    ]


def _accuracies(answers: Mapping[str, Right], name: str) -> dict[str, Any] | None:
    return mean_and_spread(answers[name].mean(axis=1).tolist()) if name in answers else None


def _of_variant(cells: Sequence[dict[str, Any]], cohort: int) -> dict[str, Any]:
    """Means over seeds. Bytes of `by_round` are of all edges until then; of `bytes`, of an invited edge in a round."""
    plug_in, sub_llm = (_array([cell["right"][which] for cell in cells]) for which in ("plug_in", "sub_llm"))
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
        "plug_in": mean_and_spread(plug_in.mean(axis=1).tolist()),
        "sub_llm": mean_and_spread(sub_llm.mean(axis=1).tolist()),
        "by_round": by_round,
        "bytes": {
            "up_per_edge_round": totals["bytes_up"] / invited,
            "down_per_edge_round": totals["bytes_down"] / invited,
        },
        "public_kl": {kind: float(np.mean([c["public_kl"][kind] for c in cells])) for kind in cells[0]["public_kl"]},
        **costs,
    }


# --- Markdown ----------------------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any]) -> str:
    """Tables with the columns of the paper's 2, 3, 4 and 9, what is measured beside what the paper counts."""
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
    for split, of in splits.items():
        rows = of["variants"]
        parts += [
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
        "full model untouched": [one["untouched"] for one in found],
        "best edge alone": [one["alone"] and one["alone"]["best"] for one in found],
        "an edge alone": [one["alone"] and one["alone"]["mean"] for one in found],
        "central, all rows in one place": [one["central"] for one in found],
    }


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


def _or_never(value: Any, shown: Any) -> str:
    return "not reached" if value is None else str(shown(value))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
