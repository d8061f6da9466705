"""Federate the demo's model and task over 10 edges of which 2 attack, by each rule of [aggregation] robust.

Training, coding with error feedback, aggregation, the hub's steps and judging are the product's; sockets and ledger are
left out, and border states are swept once for all cells of a seed, so that a cell is ten or twenty seconds of one core.
Splits: `mixed`, each desk's messages dealt by Dirichlet(1); `rare`, one honest edge alone holds a desk's messages, the rest
is dealt evenly. A cell is a split, a rule, an attack or none, and a seed; its answers are kept in --out, and a second call
continues. Claimed of the recommended rule: with each attack accuracy is at most 2 points below the plain mean without one,
without one it costs less than 0.5 points, and the rare desk's accuracy falls by less than 2 points. A claim holds where the
mean over seeds does; beside it stands the 95 % interval (docs/methods.md (m12-claims)), and what is `shown` has 5 seeds.
`--planted-defect` runs the plain mean under the recommended rule's name: the script exits with 1, as for any claim that
does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
import torch
from torch import Tensor

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.data.samples import read_samples
from fedsoda_edge.model import delta, lora
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.sub_llm import SubLLM, build
from fedsoda_edge.ports.disk import write_durably_json
from fedsoda_edge.worker.batches import SweptSamples
from fedsoda_edge.worker.training import fine_tune
from fedsoda_hub.algorithms.aggregation import robust
from fedsoda_hub.algorithms.aggregation.weighted_mean import CodedUpdate
from fedsoda_hub.compare.attacks import Kind, attackers_among, flipped, forged
from fedsoda_hub.compare.splits import deal
from fedsoda_hub.compare.statistics import LEAST_SEEDS, interval
from fedsoda_hub.demo import task
from fedsoda_hub.demo.run import write_rows, write_run
from fedsoda_hub.evaluation.judge import RunJudge
from fedsoda_hub.preparation.full_llm import open_full_llm
from fedsoda_hub.preparation.prepare import RunPreparation
from fedsoda_hub.preparation.tokenizing import tokenizer_of
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.settings.run import RunSettings, read_settings
from fedsoda_hub.settings.tables import Aggregation, Robust

ROOT = Path(__file__).resolve().parent.parent
RECOMMENDED: Robust = "centered-clip"
RULES: tuple[Robust, ...] = get_args(Robust)
KINDS: tuple[Kind, ...] = get_args(Kind)
NUM_EDGES, SHARE, ROUNDS, STEPS = 10, 0.2, 6, 12
EDGES = tuple(f"edge-{number}" for number in range(NUM_EDGES))
RARE = "health"
POINTS_ATTACKED, POINTS_CLEAN, POINTS_RARE = 2.0, 0.5, 2.0


@dataclass(frozen=True)
class Cell:
    """One federation. attack None: all edges are honest."""

    split: str
    rule: Robust
    attack: Kind | None
    seed: int

    @property
    def name(self) -> str:
        """The cell's name, of which its file has its own."""
        return f"{self.split}-{self.rule}-{self.attack or 'honest'}-{self.seed}"


def cells(seeds: int, rules: Sequence[Robust], kinds: Sequence[Kind]) -> Iterator[Cell]:
    """List all cells: every rule and attack of a seed before the next seed."""
    for seed in range(seeds):
        for rule in rules:
            yield from (Cell("mixed", rule, attack, seed) for attack in (None, *kinds))
            yield Cell("rare", rule, None, seed)


# --- a federation -----------------------------------------------------------------------------------------------


class Bench:
    """All that the cells share: one prepared run of the demo, its judge by seed, and swept rows."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._directory = tempfile.TemporaryDirectory()
        self.settings = self._prepared(0)
        self.bundle = Bundle.open(RunDirectory(self.settings.run_dir).bundle)
        self.emulator = self.bundle.emulator_lora()
        self.swept = cache(self._swept)
        self.judge = cache(self._judge)

    def _prepared(self, seed: int) -> RunSettings:
        run = write_run(Path(self._directory.name) / "run", ROUNDS, seed)
        settings = read_settings(run)
        local = msgspec.structs.replace(settings.local, max_steps=STEPS)
        settings = msgspec.structs.replace(settings, local=local)
        RunPreparation(settings).run()
        return settings

    def _judge(self, seed: int) -> RunJudge:
        path = Path(self._directory.name) / f"eval-{seed}.jsonl"
        prompt, completion = self.settings.prompt, self.settings.completion
        rows = [
            {"prompt": prompt.render(row), "completion": completion.render(row)}
            for row in task.evaluation(seed)
        ]
        write_rows(path, rows)
        return RunJudge(self.settings, path)

    def rows(self, split: str, seed: int) -> list[list[task.DemoRow]]:
        """Deal the three offices' messages to the edges."""
        pool = [row for office in range(len(task.OFFICES)) for row in task.training(office, seed)]
        order = np.random.default_rng([seed, 3]).permutation(len(pool)).tolist()
        if split == "mixed":
            parts = deal("dirichlet-1", order, [row["desk"] for row in pool], edges=NUM_EDGES, least=10, seed=seed)
        else:
            rare = [at for at in order if pool[at]["desk"] == RARE]
            common = [at for at in order if pool[at]["desk"] != RARE]
            parts = [common[edge :: NUM_EDGES] for edge in range(NUM_EDGES)]
            parts[0] += rare[: 2 * len(parts[0])]
        return [[pool[at] for at in part] for part in parts]

    def _swept(self, split: str, seed: int, is_flipped: bool) -> list[SweptSamples]:
        """Sweep each edge's rows to the border. is_flipped: only the attackers', with flipped labels."""
        found, attackers = [], attackers_among(EDGES, SHARE)
        tokenizer, local = tokenizer_of(open_full_llm(self.settings)), self.settings.local
        for edge, rows in zip(EDGES, self.rows(split, seed), strict=True):
            if is_flipped and edge not in attackers:
                continue
            held = [{**row, "desk": flipped(row["desk"], task.DESKS)} for row in rows] if is_flipped else rows
            path = Path(self._directory.name) / "rows.jsonl"
            write_rows(path, held)
            read = read_samples(
                LocalData(path), self.settings.prompt, self.settings.completion, tokenizer, local.max_length, None
            )
            plan, spec = self.bundle.plan, self.bundle.manifest.lora
            found.append(
                SweptSamples.sweep(
                    self.bundle, plan.swept, read.samples, emulator=self.emulator, lora_scale=spec.scale
                )
            )
        return found

    def run(self, cell: Cell, rule: Robust) -> dict[str, object]:
        """Federate one cell by this rule; return its answers and what the rule kept of whose updates."""
        attackers = attackers_among(EDGES, SHARE) if cell.attack is not None else ()
        swept = dict(zip(EDGES, self.swept(cell.split, cell.seed, False), strict=True))
        if cell.attack == "label-flip":
            swept |= dict(zip(attackers, self.swept(cell.split, cell.seed, True), strict=True))
        how, codec = Aggregation(robust=rule), self.settings.wire.codec
        spec, local = self.bundle.manifest.lora, self.settings.local
        master = view = self.bundle.adapter_lora()
        layout, residuals = spec.adapter, dict[str, dict[str, Tensor]]()
        model = self.model()
        kept: list[dict[str, float]] = []
        for number in range(1, ROUNDS + 1):
            own, coded = {}, {}
            for edge in EDGES:
                trained = fine_tune(
                    model, swept[edge], view, local, seed=cell.seed, round_number=number, edge=edge
                )
                own[edge] = trained.delta
                coded[edge], residuals[edge] = delta.encode_with_feedback(
                    trained.delta, residuals.get(edge), view, layout, codec
                )
            honest = [delta.decode(coded[edge], layout, codec) for edge in EDGES if edge not in attackers]
            for at, edge in enumerate(attackers):
                assert cell.attack is not None
                made = forged(cell.attack, own[edge], honest, len(attackers), cell.seed * 1000 + number * 10 + at)
                if cell.attack != "label-flip":
                    coded[edge] = delta.encode(made, codec)
            updates = [
                CodedUpdate(edge, len(swept[edge].samples), partial(bytes, coded[edge]), view, layout) for edge in EDGES
            ]
            merged = robust.merge(updates, codec, self.settings.rounds.max_weight, how)
            kept.append(merged.kept)
            master = delta.moved(master, merged.mean, codec)
            _, view = delta.step_down(master, view, layout, codec)
        judge = self.judge(cell.seed)
        models = judge.judged(master, self.emulator)
        answers = judge.evaluator.answers(models["plug_in"])
        right = judge.evaluator.right(answers)
        gold = [judge.evaluator.choices[at] for at in judge.evaluator.gold]
        shares = {edge: float(np.mean([one.get(edge, np.nan) for one in kept])) for edge in EDGES}
        return {
            "right": "".join("01"[one] for one in right),
            "gold": gold,
            "kept": {edge: None if np.isnan(share) else round(share, 4) for edge, share in shares.items()},
        }

    @cache  # noqa: B019  (one bench a process)
    def model(self) -> SubLLM:
        """Build the layers that train, once."""
        spec, plan = self.bundle.manifest.lora, self.bundle.plan
        model = build(self.bundle, plan.resident)
        lora.attach(model, spec, lora.on(plan.resident, self.emulator) | self.bundle.adapter_lora())
        return model


# --- what it shows ------------------------------------------------------------------------------------------------


class Kept(msgspec.Struct):
    """A cell's answers. right: a 1 or 0 for each question. kept: the mean share of each edge's updates."""

    right: str
    gold: list[str]
    kept: dict[str, float | None]

    def values(self, label: str | None = None) -> list[float]:
        """List for each question of this label, or of all, whether it was answered right."""
        return [float(one) for one, gold in zip(self.right, self.gold, strict=True) if label in (None, gold)]


def difference(one: Sequence[list[float]], other: Sequence[list[float]]) -> dict[str, object]:
    """Subtract accuracies, in points; None where there is one seed and so no interval."""
    gap = 100 * (np.array(one) - np.array(other))
    ends = interval(gap)
    return {
        "points": round(float(gap.mean()), 2),
        "interval_95": None if ends is None else [round(end, 2) for end in ends],
        "seeds": len(gap),
        "is_shown": len(gap) >= LEAST_SEEDS and ends is not None and (ends[0] > 0 or ends[1] < 0),
    }


def report(found: dict[Cell, Kept], rules: Sequence[Robust], kinds: Sequence[Kind]) -> dict[str, object]:
    """Compare each rule with the plain mean without attackers, over the seeds that both have."""
    rows: dict[str, dict[str, object]] = {}

    def compared(split: str, rule: Robust, attack: Kind | None, label: str | None = None) -> dict[str, object] | None:
        seeds = [
            seed
            for seed in sorted({cell.seed for cell in found})
            if Cell(split, rule, attack, seed) in found and Cell(split, "none", None, seed) in found
        ]
        if not seeds:
            return None
        these = [found[Cell(split, rule, attack, seed)] for seed in seeds]
        plain = [found[Cell(split, "none", None, seed)] for seed in seeds]
        attackers = attackers_among(EDGES, SHARE) if attack else ()
        kept = [[one.kept[edge] for one in these for edge in EDGES if (edge in attackers) == is_of] for is_of in (0, 1)]
        known = [[share for share in shares if share is not None] for shares in kept]
        return difference([one.values(label) for one in these], [one.values(label) for one in plain]) | {
            "accuracy": round(100 * float(np.mean([one.values(label) for one in these])), 2),
            "kept_of_honest": round(float(np.mean(known[0])), 3) if known[0] else None,
            "kept_of_attackers": round(float(np.mean(known[1])), 3) if known[1] else None,
        }

    for rule in rules:
        rows[rule] = {
            "honest": compared("mixed", rule, None),
            **{kind: compared("mixed", rule, kind) for kind in kinds},
            f"rare: all of {RARE} on one edge, accuracy of {RARE}": compared("rare", rule, None, RARE),
            "rare: all desks": compared("rare", rule, None),
        }
    return {"rounds": ROUNDS, "steps": STEPS, "edges": NUM_EDGES, "attackers": SHARE, "rules": rows}


def claims(rows: dict[str, dict[str, dict[str, float] | None]], kinds: Sequence[Kind]) -> list[dict[str, object]]:
    """Judge the recommended rule by the means over the seeds that were run."""
    of = rows[RECOMMENDED]
    bounds = {"honest": POINTS_CLEAN, **dict.fromkeys(kinds, POINTS_ATTACKED)}
    bounds[f"rare: all of {RARE} on one edge, accuracy of {RARE}"] = POINTS_RARE
    return [
        {"claim": f"{RECOMMENDED}, {name}: loses less than {bound:g} points", "holds": held["points"] > -bound, **held}
        for name, bound in bounds.items()
        if (held := of[name]) is not None
    ]


def main() -> None:
    """Run the cells that are not done, print the report, and exit with 1 where a claim does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "bench-out" / "robust", help="where answers are kept")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES)
    parser.add_argument("--attacks", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--report", action="store_true", help="of what is done already; run nothing")
    parser.add_argument("--planted-defect", action="store_true", help="the plain mean instead: the bench must fail")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rules = tuple(dict.fromkeys(("none", RECOMMENDED, *options.rules)))
    kinds, out = tuple(options.attacks), options.out / ("defect" if options.planted_defect else "cells")
    out.mkdir(parents=True, exist_ok=True)
    found: dict[Cell, Kept] = {}
    bench: Bench | None = None
    for cell in cells(options.seeds, rules, kinds):
        path = out / f"{cell.name}.json"
        if not path.exists():
            if options.report:
                continue
            bench = bench or Bench(options.out)
            write_durably_json(path, bench.run(cell, "none" if options.planted_defect else cell.rule))
            print(cell.name, file=sys.stderr, flush=True)
        found[cell] = msgspec.json.decode(path.read_bytes(), type=Kept)
    made = report(found, rules, kinds)
    judged = claims(made["rules"], kinds)  # type: ignore[arg-type]  # as they were just made
    print(json.dumps({**made, "claims": judged}))
    if not judged or not all(claim["holds"] for claim in judged):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
