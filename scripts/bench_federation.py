"""Measure a federation on real input: SST-2 with the demo's 24-layer model, real hub and edge processes.

Every cell (split, seed, codec, adapter base, emulator) is one federated run. Its scores on the dev rows are kept in
--out, so that a second call continues where the first stopped. All cells take about 2 hours on 2 cores. Arms of each:

    untouched   the full model                      sub_llm     the sub-LLM with its trained LoRA
    plug_in     the full model with the adapter LoRA local_only  each edge alone, as many steps, plugged in
    ceiling     the same LoRA trained centrally on the full 16-bit model, as many examples in sum,
                best of three learning rates (no split, codec or adapter base: one per seed)

The script fails (exit 1) when a claim it makes does not hold; `--planted-defect` trains with learning rate 0
and must make it fail. Other tasks and methods are left to `bench_compare.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.data.samples import SampleTokenizer, read_samples
from fedsoda_edge.model import delta, lora
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.model.sub_llm import build
from fedsoda_edge.protocol.manifest import LoRASpec
from fedsoda_edge.protocol.messages import LocalSettings
from fedsoda_edge.protocol.template import TextTemplate
from fedsoda_edge.worker.batches import SweptSamples
from fedsoda_edge.worker.training import fine_tune
from fedsoda_hub.compare.statistics import paired_differences
from fedsoda_hub.evaluation.evaluator import Evaluator, JudgedModel, auc
from fedsoda_hub.evaluation.judge import KEPT_BORDER_BYTES, judged_models
from fedsoda_hub.evaluation.questions import read_questions
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.outcome import read_outcome
from fedsoda_hub.settings.run import read_settings

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "fedsoda_hub" / "demo" / "model"
PROMPT, COMPLETION = TextTemplate("Review: {sentence}\nSentiment:"), TextTemplate("{label}")
EDGES, ROWS = 4, 8000
ROUNDS, STEPS, BATCH = 10, 100, 8
LEARNING_RATE, CENTRAL_RATES = 2e-3, (5e-4, 1e-3, 2e-3)
# One draw of Dirichlet(0.5) over four edges per label in which every edge holds both labels
# (random.Random(15), gamma variates, rounded): the share of each label's rows that an edge gets.
SHARES = {
    "iid": {"positive": (0.25, 0.25, 0.25, 0.25), "negative": (0.25, 0.25, 0.25, 0.25)},
    "dirichlet-0.5": {"positive": (0.31, 0.10, 0.43, 0.16), "negative": (0.04, 0.36, 0.05, 0.55)},
}


class Variant(NamedTuple):
    """The settings in which cells of a split and seed differ."""

    codec: str
    base: str
    emulator: str = "sub"

    def __str__(self) -> str:
        return "/".join(self[: 2 if self.emulator == "sub" else 3])  # the names of cells in published results


MAIN = Variant("int8", "nf4")
FULL_EMULATOR = Variant("int8", "nf4", "full")
# The cells of each split: on both the main one and its full emulator, and on IID each other change of the main one.
VARIANTS = {
    "iid": (MAIN, FULL_EMULATOR, Variant("nf4", "nf4"), Variant("bf16", "nf4"), Variant("int8", "bf16")),
    "dirichlet-0.5": (MAIN, FULL_EMULATOR),
}
LOCAL = LocalSettings(
    epochs=100,
    max_steps=STEPS,
    batch_size=BATCH,
    learning_rate=LEARNING_RATE,
    weight_decay=0.01,
    max_grad_norm=1.0,
    proximal_mu=0.01,
    max_length=96,
)


def split_rows(rows: list[dict[str, str]], split: str, seed: int) -> list[list[dict[str, str]]]:
    """Deal rows to edges by label shares; every split of a seed has the same rows."""
    chance = random.Random(seed)
    chosen = chance.sample(rows, min(ROWS, len(rows)))
    parts: list[list[dict[str, str]]] = [[] for _ in range(EDGES)]
    for label, shares in SHARES[split].items():
        mine = [row for row in chosen if row["label"] == label]
        at = 0.0
        for part, share in zip(parts, shares, strict=True):
            part += mine[round(at * len(mine)) : round((at + share) * len(mine))]
            at += share
    for part in parts:
        chance.shuffle(part)
    return parts


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_toml(directory: Path, data: Path, *, seed: int, variant: Variant, rounds: int, rate: float) -> Path:
    """Write the RUN.toml of a cell, and return its path."""
    path = directory / "run.toml"
    align = (
        ""
        if variant.emulator == "full"
        else '[align]\nheal = false\nborder_map = "none"\nsteps = 120\nrealign_steps = 30\nlearning_rate = 3e-3\n'
    )
    path.write_text(
        f"""name = "bench"
model = "{MODEL}"
seed = {seed}
[method]
emulator = "{variant.emulator}"
adapter_base = "{variant.base}"
[public]
text = "{data / "wikitext2" / "test.txt"}"
sequences = 128
length = 128
{align}[rounds]
count = {rounds}
min_edges = {EDGES}
quorum = 1.0
[local]
epochs = {LOCAL.epochs}
max_steps = {LOCAL.max_steps}
batch_size = {LOCAL.batch_size}
learning_rate = {rate}
proximal_mu = {LOCAL.proximal_mu}
max_length = {LOCAL.max_length}
[wire]
codec = "{variant.codec}"
[task]
prompt = "Review: {{sentence}}\\nSentiment:"
completion = "{{label}}"
[listen]
port = 0
""",
        encoding="utf-8",
    )
    return path


def command(name: str, *arguments: str | Path) -> list[str]:
    """Make the command line of fedsoda-hub or fedsoda-edge."""
    return [sys.executable, "-m", f"fedsoda_{name}", *map(str, arguments)]


def prepared(out: Path, data: Path, seed: int, variant: Variant, log: Any) -> Path:
    """Prepare a run, once for each (seed, adapter base, emulator), and return its directory."""
    directory = out / "prepared" / f"s{seed}-{variant.base}{'-full' if variant.emulator == 'full' else ''}"
    directory.mkdir(parents=True, exist_ok=True)
    file = run_toml(
        directory, data, seed=seed, variant=variant._replace(codec="int8"), rounds=ROUNDS, rate=LEARNING_RATE
    )
    subprocess.run(command("hub", "prepare", file), check=True, stdout=log, stderr=log)
    return directory / "bench.run"


def federate(cell: Path, prepared_run: Path, toml: Path, parts: list[list[dict[str, str]]], log: Any) -> None:
    """Run one federation of real processes, `serve` and four `join`s over loopback."""
    run_dir = cell / "bench.run"
    if not run_dir.exists():
        run_dir.mkdir()
        for name in ("prepare", "bundle", "blobs"):
            shutil.copytree(prepared_run / name, run_dir / name)
    environment = {**os.environ, "FEDSODA_THREADS": "1", "OMP_NUM_THREADS": "1"}
    hub = subprocess.Popen(
        command("hub", "serve", toml, "--exit-when-done", "--jsonl"),
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=environment,
    )
    edges: list[subprocess.Popen[str]] = []
    try:
        assert hub.stdout is not None
        url = next(event["url"] for event in map(json.loads, hub.stdout) if event["event"] == "listening")
        for number, part in enumerate(parts):
            token = cell / f"edge-{number}.token"
            if not token.exists():
                make = command("hub", "token", "create", toml, "--name", f"edge-{number}", "--out", token)
                subprocess.run(make, check=True, stderr=log)
            data = cell / f"edge-{number}.jsonl"
            write_rows(data, part)
            join = command("edge", "join", url, "--token-file", token, "--data", data)
            home = {**environment, "FEDSODA_HOME": str(cell / f"home-{number}")}
            edges.append(subprocess.Popen(join, stdout=log, stderr=log, text=True, env=home))
        for line in hub.stdout:
            log.write(line)
        if hub.wait() != 0 or any(edge.wait() != 0 for edge in edges):
            raise SystemExit(f"a process of {cell} failed; see {log.name}")
    finally:
        for process in (hub, *edges):
            if process.poll() is None:
                process.terminate()
                process.wait()


def train_alone(
    swept: SweptSamples, source: Any, adapter: Any, spec: LoRASpec, seed: int, edge: str, rounds: int, rate: float
) -> dict[str, torch.Tensor]:
    """Train one learner for `rounds` rounds with the code that edges run, and return its adapter LoRA."""
    import msgspec

    settings = msgspec.structs.replace(LOCAL, learning_rate=rate)
    tail = build(source, adapter)
    view = lora.initial(spec.adapter, seed)
    lora.attach(tail, spec, view)
    for number in range(1, rounds + 1):
        step = fine_tune(tail, swept, view, settings, seed=seed, round_number=number, edge=edge).delta
        view = {name: view[name] + step[name] for name in view}
    return view


def judge(evaluator: Evaluator, model: JudgedModel) -> dict[str, torch.Tensor]:
    """Let a model answer, and return what bootstrap and tables need: (questions, choices) scores."""
    answers = evaluator.answers(model)
    assert answers.scores is not None
    return {"scores": answers.scores}


class Bench:
    """One run of this script: its cells, arms and figures."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out = Path(options.out).resolve()
        self.data = Path(options.shared).resolve() / "data"
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = (self.out / "log.txt").open("a")
        self.source = Checkpoint.open(str(MODEL))
        self.tokenizer = SampleTokenizer(self.source.path / "tokenizer.json", 2)
        dev = [json.loads(line) for line in (self.data / "sst2" / "dev.jsonl").open()]
        dev = random.Random(0).sample(dev, min(options.eval_rows, len(dev)))
        write_rows(self.out / "dev.jsonl", dev)
        self.questions = read_questions(self.out / "dev.jsonl", PROMPT, COMPLETION)
        self.train = [json.loads(line) for line in (self.data / "sst2" / "train.jsonl").open()]
        self.evaluator = Evaluator(self.questions, self.tokenizer)
        self.none: dict[
            str, torch.Tensor
        ] = {}  # one object, so that all models share the full emulator's border states

    def note(self, text: str) -> None:
        """Print a line with the time on stderr."""
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    def samples(self, rows: list[dict[str, str]]) -> Any:
        """Read rows as samples, as an edge would."""
        with tempfile.TemporaryDirectory() as directory:
            write_rows(Path(directory) / "rows.jsonl", rows)
            data = LocalData(Path(directory) / "rows.jsonl")
            return read_samples(data, PROMPT, COMPLETION, self.tokenizer, LOCAL.max_length).samples

    def plugged(self, spec: LoRASpec, bundle: Bundle, adapter: dict[str, torch.Tensor]) -> JudgedModel:
        """Make the full model with this adapter LoRA plugged in."""
        plan = bundle.plan
        return JudgedModel(
            self.source, range(plan.border), range(plan.border, plan.num_layers), spec, self.none, adapter
        )

    def cell(self, split: str, seed: int, variant: Variant) -> dict[str, dict[str, torch.Tensor]]:
        """Run one cell unless it is done, and return the scores of its arms."""
        cell = self.out / "cells" / f"{split}-s{seed}-{variant}".replace("/", "-")
        done = cell / "scores.safetensors"
        if not done.exists():
            self.note(f"cell {cell.name}")
            started = time.monotonic()
            cell.mkdir(parents=True, exist_ok=True)
            rate = 0.0 if self.options.planted_defect else LEARNING_RATE
            run = prepared(self.out, self.data, seed, variant, self.log)
            toml = run_toml(cell, self.data, seed=seed, variant=variant, rounds=self.options.rounds, rate=rate)
            federate(cell, run, toml, split_rows(self.train, split, seed), self.log)
            settings = read_settings(toml)
            directory, outcome = RunDirectory(settings.run_dir), read_outcome(settings.run_dir)
            bundle = Bundle.open(directory.bundle)
            spec, blobs = bundle.manifest.lora, directory.blobs
            adapter = delta.from_bytes(blobs.get(outcome.master), spec.adapter)
            emulator = delta.from_bytes(blobs.get(outcome.emulator_view), spec.emulator)
            models = judged_models(bundle, self.source, adapter, emulator)
            scores = {
                "plug_in": judge(self.evaluator, self.plugged(spec, bundle, adapter))["scores"],
                "sub_llm": judge(self.evaluator, models["sub_llm"])["scores"],
            }
            self.evaluator.keep(KEPT_BORDER_BYTES)
            save_file({name: value.contiguous() for name, value in scores.items()}, done)
            self.note(f"cell {cell.name}: {time.monotonic() - started:.0f} s")
        return {name: {"scores": value} for name, value in load_file(done).items()}

    def local_only(self, split: str, seed: int) -> list[torch.Tensor]:
        """Train each edge alone for as many steps, plug it into the full model, and return its scores."""
        done = self.out / "alone" / f"{split}-s{seed}.safetensors"
        if not done.exists():
            self.note(f"local-only {done.stem}")
            done.parent.mkdir(exist_ok=True)
            bundle = Bundle.open(prepared(self.out, self.data, seed, MAIN, self.log) / "bundle")
            spec, plan = bundle.manifest.lora, bundle.plan
            scores = {}
            for number, part in enumerate(split_rows(self.train, split, seed)):
                emulator = bundle.emulator_lora()
                swept = SweptSamples.sweep(
                    bundle, plan.sub_emulator, self.samples(part), emulator=emulator, lora_scale=spec.scale
                )
                rounds, edge = self.options.rounds, f"edge-{number}"
                trained = train_alone(swept, bundle, plan.adapter, spec, seed, edge, rounds, LEARNING_RATE)
                scores[f"edge-{number}"] = judge(self.evaluator, self.plugged(spec, bundle, trained))["scores"]
            save_file(scores, done)
        return [value for _, value in sorted(load_file(done).items())]

    def ceiling(self, seed: int) -> dict[str, torch.Tensor]:
        """Train centrally on the full model with each learning rate; return the scores, and those of the untouched model."""
        done = self.out / "ceiling" / f"s{seed}.safetensors"
        if not done.exists():
            self.note(f"ceiling, seed {seed}")
            done.parent.mkdir(exist_ok=True)
            bundle = Bundle.open(prepared(self.out, self.data, seed, MAIN, self.log) / "bundle")
            spec, plan = bundle.manifest.lora, bundle.plan
            rows = [row for part in split_rows(self.train, "iid", seed) for row in part]
            swept = SweptSamples.sweep(
                self.source, plan.emulator, self.samples(rows), emulator={}, lora_scale=spec.scale
            )
            scores = {"untouched": judge(self.evaluator, self.plugged(spec, bundle, self.none))["scores"]}
            for rate in CENTRAL_RATES:
                rounds = EDGES * self.options.rounds
                trained = train_alone(swept, self.source, plan.adapter, spec, seed, "central", rounds, rate)
                scores[f"{rate}"] = judge(self.evaluator, self.plugged(spec, bundle, trained))["scores"]
            save_file(scores, done)
        return load_file(done)

    # --- figures -------------------------------------------------------------------------------------------

    def right(self, scores: torch.Tensor) -> torch.Tensor:
        """Tell for each question whether it is answered right: 1 or 0, float64 (questions,)."""
        gold = torch.tensor([self.evaluator.choices.index(q.completion) for q in self.questions])
        return (scores.argmax(dim=1) == gold).double()

    def figures(self, runs: list[torch.Tensor]) -> dict[str, Any]:
        """Compute the means over seeds of accuracy, AUC and completion NLL."""
        gold = torch.tensor([self.evaluator.choices.index(q.completion) for q in self.questions])
        supervised = sum(self.evaluator.supervised_ids())
        positive = gold == 1
        picked = [scores[torch.arange(len(gold)), gold] for scores in runs]
        return {
            "accuracy": mean([float(self.right(scores).mean()) for scores in runs]),
            "accuracy_per_seed": [round(float(self.right(scores).mean()), 4) for scores in runs],
            "auc": mean([auc(scores[:, 1] - scores[:, 0], positive) or 0.0 for scores in runs]),
            "nll": mean([-float(chosen.sum()) / supervised for chosen in picked]),
        }

    def difference(self, one: list[torch.Tensor], other: list[torch.Tensor]) -> dict[str, Any]:
        """Subtract accuracies, in points, with the interval of `compare`: over seeds and dev rows, both drawn by chance."""
        right = [torch.stack([self.right(scores) for scores in runs]).numpy() for runs in (one, other)]
        [(gap, shown)] = paired_differences([(right[0], right[1])])
        return {"points": 100 * gap, "interval_95": [100 * end for end in shown.interval_95 or ()], "p": shown.p}

    def report(self) -> dict[str, Any]:
        """Run everything that is not done, and return all figures and checks."""
        seeds = list(range(self.options.seeds))
        labels = [q.completion for q in self.questions]
        majority = max(labels.count(choice) for choice in set(labels)) / len(labels)
        result: dict[str, Any] = {
            "bench": "federation",
            "eval_rows": len(labels),
            "majority": majority,
            "rounds": self.options.rounds,
            "steps": STEPS,
            "batch": BATCH,
            "rows": ROWS,
            "seeds": seeds,
            "shares": SHARES,
            "splits": {},
            "checks": [],
        }
        variants = {split: found[: 2 if self.options.main_only else None] for split, found in VARIANTS.items()}
        for split in SHARES:  # the federated runs come first: everything else is compared with them
            for variant in variants[split]:
                for seed in seeds:
                    self.cell(split, seed, variant)
        ceilings = [self.ceiling(seed) for seed in seeds]
        untouched = [scores["untouched"] for scores in ceilings]
        best = max(CENTRAL_RATES, key=lambda rate: mean([float(self.right(s[f"{rate}"]).mean()) for s in ceilings]))
        ceiling = [scores[f"{best}"] for scores in ceilings]
        result["untouched"] = self.figures(untouched)
        result["ceiling"] = {**self.figures(ceiling), "learning_rate": best}
        floor = max(result["untouched"]["accuracy"], majority)
        codecs: dict[str, list[torch.Tensor]] = {}
        for split in SHARES:
            part: dict[str, Any] = {}
            main: list[torch.Tensor] = []
            for variant in variants[split]:
                cells = [self.cell(split, seed, variant) for seed in seeds]
                plug_in = [cell["plug_in"]["scores"] for cell in cells]
                main = main or plug_in
                of_codecs = variant.base == "nf4" and variant.emulator == "sub"
                if of_codecs and len({each.codec for each in variants[split]}) == 3:  # codecs compare on the same rows
                    codecs.setdefault(variant.codec, []).extend(plug_in)
                figures = {
                    "plug_in": self.figures(plug_in),
                    "sub_llm": self.figures([c["sub_llm"]["scores"] for c in cells]),
                }
                gained = figures["plug_in"]["accuracy"] - floor
                figures["gap_closed"] = gained / (result["ceiling"]["accuracy"] - floor)
                figures["plug_in_minus_untouched"] = self.difference(plug_in, untouched)
                figures["plug_in_minus_sub_llm"] = self.difference(plug_in, [c["sub_llm"]["scores"] for c in cells])
                figures["plug_in_minus_main"] = self.difference(plug_in, main)
                part[str(variant)] = figures
            alone = [self.local_only(split, seed) for seed in seeds]
            top = [max(edges, key=lambda scores: float(self.right(scores).mean())) for edges in alone]
            everyone = [scores for edges in alone for scores in edges]
            part["local_only"] = {"best": self.figures(top), "mean": self.figures(everyone)}
            part["plug_in_minus_best_alone"] = self.difference(main, top)
            result["splits"][split] = part
            gain = part[str(MAIN)]["plug_in_minus_untouched"]
            result["checks"].append(
                {"claim": f"{split}: plug-in beats the untouched model", "holds": gain["interval_95"][0] > 0, **gain}
            )
        if len(codecs) == 3:
            loss = {codec: self.difference(codecs["bf16"], codecs[codec])["points"] for codec in codecs}
            smallest = next(codec for codec in ("nf4", "int8", "bf16") if loss[codec] <= 0.5)
            result["codec"] = {"points_lost_to_bf16": loss, "smallest_within_half_a_point": smallest}
        return result


def mean(values: list[float]) -> float:
    """Compute the mean."""
    return sum(values) / len(values)


def main() -> None:
    """Run the bench, print its report, and exit with 1 where a claim does not hold."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="It takes about 2 hours on 2 cores; it may be stopped and continues from --out. --main-only, --seeds 2 and "
        "fewer --rounds or --eval-rows take less.",
    )
    parser.add_argument(
        "--shared", default=str(ROOT.parent / "shared"), help="directory with data/sst2 and data/wikitext2"
    )
    parser.add_argument("--out", default=str(ROOT / "bench-out" / "federation"))
    parser.add_argument("--seeds", type=int, default=3, help="2 or more: of one seed nothing follows for others")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--eval-rows", type=int, default=2000, help="dev rows, a fixed sample; 6735 for all")
    parser.add_argument("--main-only", action="store_true", help="only int8 codec and NF4 adapter base, both emulators")
    parser.add_argument("--planted-defect", action="store_true", help="learning rate 0: the bench must fail")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds {options.seeds}: one seed says nothing of others; write 2 or more")
    if not (Path(options.shared) / "data" / "sst2").is_dir():
        raise SystemExit(f"{options.shared}/data/sst2 does not exist; name the directory of the data with --shared")
    torch.set_num_threads(int(os.environ.get("FEDSODA_THREADS", "2")))
    result = Bench(options).report()
    print(json.dumps(result, indent=1))
    if not all(check["holds"] for check in result["checks"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
