"""Federate the demo's model and task over 10 edges of which 2 attack, by each rule of [aggregation] robust.

Training, coding with error feedback, aggregation, the hub's steps and judging are the product's; sockets and ledger are
left out. The last 3 layers train, as in the demo, on states that are swept once for all cells of a seed, so that a cell is a few seconds of
one core; with --head LoRA is on one linear layer before the head alone, and a cell a fraction of a second.
Splits: `mixed`, each desk's messages dealt by Dirichlet(1); `rare`, one honest edge alone holds a desk's messages, and as many
rows as [rounds] max_weight lets count, the rest is dealt evenly: less, or fewer rounds, and the plain mean does not learn that
desk. What it knows of it comes and goes with the rounds, so it is asked after several. A cell is a split, a rule, an attack or none, and a seed; its answers are kept in --out, and a second call
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
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import torch
from torch import Tensor

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.data.samples import read_samples
from fedsoda_edge.model import delta, lora
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.model.sub_llm import build
from fedsoda_edge.ports.disk import write_durably_json
from fedsoda_edge.protocol.manifest import LoRASpec, TensorSpec
from fedsoda_edge.protocol.messages import LocalSettings
from fedsoda_edge.protocol.template import TextTemplate
from fedsoda_edge.worker.batches import SweptSamples
from fedsoda_edge.worker.training import data_order, fine_tune
from fedsoda_hub.algorithms.aggregation import robust
from fedsoda_hub.algorithms.aggregation.weighted_mean import CodedUpdate
from fedsoda_hub.compare.attacks import attackers_among, flipped, forged
from fedsoda_hub.compare.settings import AttackKind as Kind
from fedsoda_hub.compare.splits import deal
from fedsoda_hub.compare.statistics import LEAST_SEEDS, interval
from fedsoda_hub.demo import task
from fedsoda_hub.demo.run import MODEL, write_rows
from fedsoda_hub.evaluation.evaluator import Evaluator, JudgedModel
from fedsoda_hub.evaluation.questions import read_questions
from fedsoda_hub.preparation.tokenizing import tokenizer_of
from fedsoda_hub.settings.tables import Aggregation, Robust, RoundSettings

ROOT = Path(__file__).resolve().parent.parent
RECOMMENDED: Robust = "krum"
RULES: tuple[Robust, ...] = get_args(Robust)
KINDS: tuple[Kind, ...] = get_args(Kind)
Row = dict[str, dict[str, Any] | None]  # of a rule: what it loses, by attack
NUM_EDGES, SHARE, ROUNDS, LAYERS, RANK, ROWS, QUESTIONS, CODEC = 10, 0.2, 4, 3, 8, 480, 128, "nf4"
LOCAL = LocalSettings(epochs=100, max_steps=6, batch_size=8, learning_rate=8e-3, max_length=96)
STEPS_OF_HEAD = 12
PROMPT, COMPLETION = TextTemplate(task.PROMPT), TextTemplate(task.COMPLETION)
EDGES = tuple(f"edge-{number}" for number in range(NUM_EDGES))
RARE = "health"
ASKED_AFTER: dict[str, tuple[int, ...]] = {
    "mixed": (ROUNDS,),
    "rare": (4, 8, 12, 16),
}  # rounds, by split; the last ends it
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
        for attack in (None, *kinds):
            yield from (Cell("mixed", rule, attack, seed) for rule in rules)
        yield from (Cell("rare", rule, None, seed) for rule in rules)


# --- a federation -----------------------------------------------------------------------------------------------


class Bench:
    """All that the cells of one process share: rows as states below the demo model's last layers, and these."""

    def __init__(self) -> None:
        self.source = Checkpoint.open(str(MODEL))
        count = int(self.source.fields["num_hidden_layers"])
        self.below, self.above = range(count - LAYERS), range(count - LAYERS, count)
        self.tokenizer = tokenizer_of(self.source)
        hidden, inner = int(self.source.fields["hidden_size"]), int(self.source.fields["intermediate_size"])
        heads = int(self.source.fields["num_key_value_heads"]) * int(self.source.fields["head_dim"])
        of = {"q_proj": (hidden, hidden), "k_proj": (heads, hidden), "v_proj": (heads, hidden)}
        shapes = {f"self_attn.{name}": shape for name, shape in of.items()}
        shapes |= {"mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
        layout = sorted(
            (
                TensorSpec(f"layers.{layer}.{name}.lora_{factor}", (RANK, into) if factor == "A" else (out, RANK))
                for layer in self.above
                for name, (out, into) in shapes.items()
                for factor in "AB"
            ),
            key=lambda spec: spec.name,
        )
        self.spec = LoRASpec(RANK, 2.0 * RANK, tuple(name.split(".")[1] for name in shapes), tuple(layout), ())
        self.none: dict[str, Tensor] = {}  # one object, so that the questions' states are computed once
        self.model = build(self.source, self.above)
        lora.attach(self.model, self.spec, lora.initial(layout, 0))
        self.swept, self.evaluator, self.first = cache(self._swept), cache(self._evaluator), cache(self._first)

    def _evaluator(self, seed: int) -> Evaluator:
        rows = task.evaluation(seed)[:QUESTIONS]
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "eval.jsonl"
            write_rows(path, rows)
            return Evaluator(read_questions(path, PROMPT, COMPLETION), self.tokenizer)

    def rows(self, split: str, seed: int) -> list[list[task.DemoRow]]:
        """Deal the three offices' messages to the edges."""
        pool = [row for office in range(len(task.OFFICES)) for row in task.training(office, seed)]
        order = np.random.default_rng([seed, 3]).permutation(len(pool)).tolist()[:ROWS]
        if split == "mixed":
            parts = deal("dirichlet-1", order, [row["desk"] for row in pool], edges=NUM_EDGES, least=16, seed=seed)
        else:
            common = [at for at in order if pool[at]["desk"] != RARE]
            rare = [at for at, row in enumerate(pool) if row["desk"] == RARE]
            parts = [common[edge::NUM_EDGES] for edge in range(NUM_EDGES)]
            parts[0] = parts[0][:8] + rare[: round(RoundSettings().max_weight * len(parts[0])) - 8]
        return [[pool[at] for at in part] for part in parts]

    def _swept(self, split: str, seed: int, edge: int, is_flipped: bool) -> SweptSamples:
        """Sweep an edge's rows to below the last layers, perhaps with flipped labels."""
        rows = self.rows(split, seed)[edge]
        held = [{**row, "desk": flipped(row["desk"], task.DESKS)} for row in rows] if is_flipped else rows
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "rows.jsonl"
            write_rows(path, held)
            read = read_samples(LocalData(path), PROMPT, COMPLETION, self.tokenizer, LOCAL.max_length, None)
        return SweptSamples.sweep(self.source, self.below, read.samples, emulator={}, lora_scale=self.spec.scale)

    def _trained(
        self, swept: SweptSamples, view: dict[str, Tensor], seed: int, number: int, edge: int
    ) -> dict[str, Tensor]:
        return fine_tune(self.model, swept, view, LOCAL, seed=seed, round_number=number, edge=EDGES[edge]).delta

    def _first(self, split: str, seed: int, edge: int, is_flipped: bool) -> dict[str, Tensor]:
        """Train the first round of an edge, which is the same by every rule."""
        swept = self.swept(split, seed, edge, is_flipped)
        return self._trained(swept, lora.initial(self.spec.adapter, seed), seed, 1, edge)

    def judged(self, master: dict[str, Tensor], seed: int) -> tuple[list[bool], list[str]]:
        """Answer the questions of a seed with this LoRA; return what is right, and the right answers."""
        judge = self.evaluator(seed)
        model = JudgedModel(self.source, self.below, self.above, self.spec, self.none, master)
        return judge.right(judge.answers(model)), [judge.choices[at] for at in judge.gold]

    def run(self, cell: Cell, rule: Robust) -> dict[str, object]:
        """Federate one cell by this rule; return its answers and what the rule kept of whose updates."""
        attackers = attackers_among(EDGES, SHARE) if cell.attack is not None else ()
        how, layout = Aggregation(robust=rule), self.spec.adapter
        master = view = lora.initial(layout, cell.seed)
        residuals: dict[str, dict[str, Tensor]] = {}
        kept: list[dict[str, float]] = []
        right: list[bool] = []
        gold: list[str] = []
        for number in range(1, ASKED_AFTER[cell.split][-1] + 1):
            own, coded, sizes = {}, {}, {}
            for at, edge in enumerate(EDGES):
                about = (cell.split, cell.seed, at, cell.attack == "label-flip" and edge in attackers)
                swept = self.swept(*about)
                sizes[edge] = len(swept.samples)
                own[edge] = self.first(*about) if number == 1 else self._trained(swept, view, cell.seed, number, at)
                coded[edge], residuals[edge] = delta.encode_with_feedback(
                    own[edge], residuals.get(edge), view, layout, CODEC
                )
            honest = [delta.decode(coded[edge], layout, CODEC) for edge in EDGES if edge not in attackers]
            for at, edge in enumerate(attackers):
                if cell.attack is not None and cell.attack != "label-flip":
                    drawn = cell.seed * 1000 + number * 10 + at
                    coded[edge] = delta.encode(forged(cell.attack, own[edge], honest, len(attackers), drawn), CODEC)
            updates = [CodedUpdate(edge, sizes[edge], partial(bytes, coded[edge]), view, layout) for edge in EDGES]
            merged = robust.merge(updates, CODEC, RoundSettings().max_weight, how)
            kept.append(merged.kept)
            master = delta.moved(master, merged.mean, CODEC)
            _, view = delta.step_down(master, view, layout, CODEC)
            if number in ASKED_AFTER[cell.split]:
                answers, choices = self.judged(master, cell.seed)
                right += answers
                gold += choices
        shares = {edge: [one[edge] for one in kept if edge in one] for edge in EDGES}
        return {
            "right": "".join("01"[one] for one in right),
            "gold": gold,
            "kept": {edge: round(sum(of) / len(of), 4) if of else None for edge, of in shares.items()},
        }


@dataclass(frozen=True)
class FinalStates:
    """Rows as their last state before the answer (N, C), normed, and the desk of each (N,)."""

    states: Tensor
    labels: Tensor

    @property
    def samples(self) -> Tensor:
        """One for each row."""
        return self.labels


class HeadBench(Bench):
    """The same with LoRA on one linear layer, an identity between the final norm and the head: a cell is a second.

    Rows pass the whole model once; an answer is the desk whose first id has the largest logit.
    """

    def __init__(self) -> None:
        super().__init__()
        width = int(self.source.fields["hidden_size"])
        layout = tuple(
            TensorSpec(
                f"layers.{self.above[-1]}.mixer.lora_{factor}", (RANK, width) if factor == "A" else (width, RANK)
            )
            for factor in "AB"
        )
        self.spec = LoRASpec(RANK, 2.0 * RANK, ("mixer",), layout, ())
        prompt = PROMPT.render({"message": ""})
        samples = [self.tokenizer.sample(prompt, " " + desk) for desk in task.DESKS]
        self.desks = [sample.ids[sample.start] for sample in samples if sample is not None]
        assert len(set(self.desks)) == len(task.DESKS), "a desk is told by its first id"
        self.held, self.asked = cache(self._held), cache(self._asked)

    def _states(self, rows: Sequence[task.DemoRow]) -> FinalStates:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "rows.jsonl"
            write_rows(path, list(rows))
            read = read_samples(LocalData(path), PROMPT, COMPLETION, self.tokenizer, LOCAL.max_length, None)
        swept = SweptSamples.sweep(
            self.source, range(self.above[-1] + 1), read.samples, emulator={}, lora_scale=self.spec.scale
        )
        norm = self.model.model.get_submodule(self.model.family.norm)
        last = [swept.states[at][sample.start - 1] for at, sample in enumerate(read.samples)]
        labels = [self.desks.index(sample.ids[sample.start]) for sample in read.samples]
        with torch.no_grad():
            return FinalStates(norm(torch.stack(last).float()), torch.tensor(labels))

    def _swept(self, split: str, seed: int, edge: int, is_flipped: bool) -> FinalStates:  # type: ignore[override]
        held = self.held(split, seed, edge)
        if not is_flipped:
            return held
        return FinalStates(held.states, (held.labels + 1) % len(task.DESKS))  # as `flipped` orders the desks

    def _held(self, split: str, seed: int, edge: int) -> FinalStates:
        return self._states(self.rows(split, seed)[edge])

    def _asked(self, seed: int) -> FinalStates:
        return self._states(task.evaluation(seed)[:QUESTIONS])

    def _logits(self, states: Tensor, view: dict[str, Tensor]) -> Tensor:
        a, b = (view[spec.name] for spec in self.spec.adapter)
        return (states + self.spec.scale * states @ a.T @ b.T) @ self.model.head[self.desks].float().T

    def _trained(  # type: ignore[override]
        self, swept: FinalStates, view: dict[str, Tensor], seed: int, number: int, edge: int
    ) -> dict[str, Tensor]:
        now = {name: value.clone().requires_grad_() for name, value in view.items()}
        optimizer = torch.optim.AdamW(list(now.values()), lr=LOCAL.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
        order = list(islice(data_order(len(swept.labels), LOCAL.epochs, seed, number, EDGES[edge]), STEPS_OF_HEAD * 8))
        for step in range(STEPS_OF_HEAD):
            these = order[8 * step : 8 * step + 8]
            loss = torch.nn.functional.cross_entropy(self._logits(swept.states[these], now), swept.labels[these])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {name: value.detach() - view[name] for name, value in now.items()}

    def judged(self, master: dict[str, Tensor], seed: int) -> tuple[list[bool], list[str]]:
        """Answer the questions of a seed with this LoRA; return what is right, and the right answers."""
        asked = self.asked(seed)
        found = self._logits(asked.states, master).argmax(dim=1) == asked.labels
        return found.tolist(), [task.DESKS[at] for at in asked.labels.tolist()]


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
    """Subtract accuracies, in points; no interval where there is one seed.

    Each seed asks other questions, so its mean is the unit: of equal columns the interval is that of the paired t test.
    """
    means = [np.mean(a) - np.mean(b) for a, b in zip(one, other, strict=True)]
    gap = 100 * np.array([means, means]).T
    ends = interval(gap)
    return {
        "points": round(float(gap.mean()), 2),
        "interval_95": None if ends is None else [round(end, 2) for end in ends],
        "seeds": len(gap),
        "is_shown": len(gap) >= LEAST_SEEDS and ends is not None and (ends[0] > 0 or ends[1] < 0),
    }


def mean_of(shares: Sequence[float | None]) -> float | None:
    """Average the shares that are known; None: none is."""
    known = [share for share in shares if share is not None]
    return round(float(np.mean(known)), 3) if known else None


def report(found: dict[Cell, Kept], rules: Sequence[Robust], kinds: Sequence[Kind]) -> dict[str, Row]:
    """Compare each rule with the plain mean without attackers, over the seeds that both have."""
    rows: dict[str, Row] = {}

    def compared(split: str, rule: Robust, attack: Kind | None, label: str | None = None) -> dict[str, Any] | None:
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
        return difference([one.values(label) for one in these], [one.values(label) for one in plain]) | {
            "accuracy": round(100 * float(np.mean([np.mean(one.values(label)) for one in these])), 2),
            "kept_of_first": mean_of([one.kept[EDGES[0]] for one in these]),
            "kept_of_honest": mean_of(kept[0]),
            "kept_of_attackers": mean_of(kept[1]),
        }

    for rule in rules:
        rows[rule] = row = {"honest": compared("mixed", rule, None)}
        for kind in kinds:
            row[kind] = compared("mixed", rule, kind)
        row[f"rare: all of {RARE} on one edge, accuracy of {RARE}"] = compared("rare", rule, None, RARE)
        row["rare: all desks"] = compared("rare", rule, None)
    return rows


def claims(rows: dict[str, Row], kinds: Sequence[Kind]) -> list[dict[str, object]]:
    """Judge the recommended rule by the means over the seeds that were run."""
    of = rows[RECOMMENDED]
    bounds: dict[str, float] = {"honest": POINTS_CLEAN, **dict.fromkeys(kinds, POINTS_ATTACKED)}
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
    parser.add_argument("--head", action="store_true", help="LoRA on one linear layer before the head: minutes for all")
    parser.add_argument("--report", action="store_true", help="of what is done already; run nothing")
    parser.add_argument("--planted-defect", action="store_true", help="the plain mean instead: the bench must fail")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rules = tuple(dict.fromkeys(("none", RECOMMENDED, *options.rules)))
    kinds, out = tuple(options.attacks), options.out / ("head" if options.head else "layers")
    if options.planted_defect:
        out /= "defect"
    out.mkdir(parents=True, exist_ok=True)
    found: dict[Cell, Kept] = {}
    bench: Bench | None = None
    for cell in cells(options.seeds, rules, kinds):
        path = out / f"{cell.name}.json"
        if not path.exists():
            if options.report:
                continue
            bench = bench or (HeadBench() if options.head else Bench())
            write_durably_json(path, bench.run(cell, "none" if options.planted_defect else cell.rule))
            print(cell.name, file=sys.stderr, flush=True)
        found[cell] = msgspec.json.decode(path.read_bytes(), type=Kept)
    rows = report(found, rules, kinds)
    judged = claims(rows, kinds)
    sizes = {
        "rounds": ROUNDS,
        "steps": STEPS_OF_HEAD if options.head else LOCAL.max_steps,
        "edges": NUM_EDGES,
        "share": SHARE,
    }
    print(json.dumps({**sizes, "rules": rows, "claims": judged}))
    if not judged or not all(claim["holds"] for claim in judged):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
