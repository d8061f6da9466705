"""Measure one edge: speed and memory of local training beside the recipes that people use, on the same sub-LLM and data.

Arms, each in a child process of its own, interleaved ABBA:

    first        ours: sweep and first epoch, everything dense
    cached       ours: an epoch on cached border states, everything dense
    packed       ours: as where memory is short, adapter in NF4, head as it is stored
    recomputed   ours: packed, with activations computed again in the backward pass, which needs least
    plain        HF + PEFT, LoRA on the adapter only, dense, no checkpointing, the model's own loss
    recipe_sub   PEFT's QLoRA recipe (LoRA everywhere, gradient checkpointing, HF Trainer) on the sub-LLM
    recipe_full  the recipe on the full model

Figures are ratios of tokens a second, medians over the repeats with a 95 % bootstrap interval; memory is a child's
high-water mark less that after its imports. What ran is kept in --out, so that a second call continues there; delete
it to begin again. Exit status 1 when a target is missed; `--planted-defect` makes our arms
compute the border again for every sample and must make it fail.

`--geometry llama3-8b`, `qwen2-7b` and `mistral-7b` are models of that shape with random weights and need a GPU: all in
bf16, everything in the bundle quantized, and memory is what torch had allocated there at most, from the first byte for
ours, from the first step for the recipes. `--quick` makes a geometry small, so that it runs without a GPU too. Accuracy is
left to `bench_federation.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import edge_arms  # beside this file
import edge_recipes  # beside this file
import random_bundle  # beside this file
import torch
from edge_arms import states_of, train_ours, way
from edge_geometries import GEOMETRIES, TARGETS, Geometry, make

from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.bundle_writer import BundleSettings, shard_sizes
from fedsoda_edge.model.families import allowed_fields, family_of, layer_on_meta
from fedsoda_edge.ports.system import peak_rss_bytes
from fedsoda_edge.worker.checkpoint import RoundCheckpoint

ROOT = Path(__file__).resolve().parent.parent
SPEEDUPS = {"cached_over_recipe_sub": 6.0, "cached_over_plain": 2.5, "first_over_recipe_sub": 2.0}
MEMORY = {"recipe_sub": 0.30, "recipe_full": 0.15}  # of theirs

Arm = Callable[[Path, Geometry, bool], tuple[int, float, float]]  # (tokens, seconds, cpu seconds)
ARMS: dict[str, Arm] = {
    "first": edge_arms.first,
    "cached": edge_arms.cached,
    "packed": edge_arms.packed,
    "recomputed": edge_arms.recomputed,
    "recipe_sub": edge_recipes.recipe_sub,
    "recipe_full": edge_recipes.recipe_full,
    "plain": edge_recipes.plain,
}


# --- figures -----------------------------------------------------------------------------------------------


def run_arm(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Run an arm in a child process, and return its figures."""
    command = [sys.executable, __file__, "--geometry", options.geometry, "--out", options.out, "--arm", name]
    command += ["--quick"] if options.quick else []
    command += ["--planted-defect"] if options.planted_defect else []
    # Threads that spin at barriers starve each other on a machine that does anything else; this holds for every arm.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if ended.returncode:
        raise SystemExit(f"the arm {name} failed:\n{ended.stderr[-2000:]}")
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return found


def ratio(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Compute the median of the repeats' ratios, with a 95 % bootstrap interval."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    chance = random.Random(0)
    drawn = sorted(statistics.median(chance.choices(each, k=len(each))) for _ in range(2000))
    return {"median": statistics.median(each), "interval_95": [drawn[50], drawn[1949]]}


def is_bit_identical(directory: Path, geometry: Geometry) -> bool:
    """Tell whether cached states give the same delta as states that are computed again for every batch."""
    bundle = Bundle.open(directory / "model" / "bundle")
    deltas = []
    plan = way(bundle, geometry)
    for name, most in (("cache", None), ("none", 0)):
        states = states_of(bundle, geometry, directory / name, plan, most)
        deltas.append(train_ours(bundle, geometry, states, plan)().delta)
    return all(torch.equal(deltas[0][name], deltas[1][name]) for name in deltas[0])


def checkpoint_share(directory: Path, geometry: Geometry) -> float:
    """Measure the share of a step's time that saving it takes; long rounds save only every fiftieth part."""
    bundle = Bundle.open(directory / "model" / "bundle")
    plan = way(bundle, geometry)
    spent = 0.0

    class Timed(RoundCheckpoint):
        def is_due(self, step: int, steps: int) -> bool:
            return step < steps

        def save(self, step: int, tokens: int, micro_batch: int, tensors: dict[str, torch.Tensor]) -> None:
            nonlocal spent
            began = time.perf_counter()
            super().save(step, tokens, micro_batch, tensors)
            spent += time.perf_counter() - began

    checkpoint = Timed(directory / "checkpoint", {})
    states = states_of(bundle, geometry, directory / "cache", plan)
    trained = train_ours(bundle, geometry, states, plan, checkpoint)()
    checkpoint.forget()
    return spent / trained.seconds


def bits_per_parameter(geometry: Geometry) -> float:
    """Compute the bits a parameter of the sub-LLM's shards, with embedding and head in NF4 too, from shapes alone."""
    shape, plan = geometry.shape, geometry.plan
    family = family_of(shape.model_type)
    fields = allowed_fields(family, shape.config)
    spec = random_bundle.lora_spec(shape, plan, TARGETS)
    sizes = shard_sizes(family, fields, plan, BundleSettings(spec, "nf4", True), "bfloat16")
    weights = sum(size for name, size in sizes.items() if not name.endswith("_lora"))
    layer = sum(parameter.numel() for parameter in layer_on_meta(family, fields, 0).parameters())
    return 8 * weights / (layer * len(plan.kept) + (2 * shape.vocab + 1) * shape.width)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run all arms in turn, and return the figures and checks."""
    geometry, directory = geometry_of(options), Path(options.out)
    make(directory, geometry)
    for name in ("cache", "none"):
        shutil.rmtree(directory / name, ignore_errors=True)
    bundle = Bundle.open(directory / "model" / "bundle")
    states_of(bundle, geometry, directory / "cache", way(bundle, geometry)).sweep()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    repeats = options.repeats or geometry.repeats
    order = [name for repeat in range(repeats) for name in (list(ARMS) if repeat % 2 == 0 else reversed(ARMS))]
    done = directory / ("runs-defect.jsonl" if options.planted_defect else "runs.jsonl")
    kept = done.read_text().splitlines() if done.exists() else []
    for number, name in enumerate(order):
        if number == len(kept):
            kept.append(json.dumps({"arm": name, **run_arm(name, options)}))
            done.write_text("\n".join(kept) + "\n")
            print(f"{number + 1} of {len(order)}: {kept[-1]}", file=sys.stderr, flush=True)
        run = json.loads(kept[number])
        assert run["arm"] == name, f"{done} is from a bench with other arms; delete it"
        found[name].append(run)
    speed = {name: [run["tokens"] / run["seconds"] for run in runs] for name, runs in found.items()}
    work = {name: [run["tokens"] / run["cpu_seconds"] for run in runs] for name, runs in found.items()}
    peak = {name: statistics.median(run["peak_bytes"] for run in runs) for name, runs in found.items()}
    checks: list[dict[str, Any]] = []
    for name, target in SPEEDUPS.items():
        ours, _, theirs = name.partition("_over_")
        value, target = ratio(speed[ours], speed[theirs]), geometry.own_targets.get(name, target)
        checks.append({"claim": name, **value, "target": target, "holds": value["median"] >= target})
    for ours in ("packed", "recomputed"):
        for theirs, target in MEMORY.items():
            name = f"{ours}_over_{theirs}_memory"
            share, target = peak[ours] / peak[theirs], geometry.own_targets.get(name, target)
            checks.append({"claim": name, "ratio": share, "target": target, "holds": share <= target})
        if (most := geometry.most_bytes) is not None:
            checks.append({"claim": f"{ours}_peak", "bytes": peak[ours], "target": most, "holds": peak[ours] <= most})
    same, saving = is_bit_identical(directory, geometry), checkpoint_share(directory, geometry)
    bits = bits_per_parameter(GEOMETRIES["llama3-8b"])
    if geometry.everything_quantized:
        bits = bundle.manifest.bits_per_parameter
    checks += [
        {"claim": "cached and recomputed deltas are bit-identical", "holds": same},
        {
            "claim": "share of a step that its checkpoint takes",
            "share": saving,
            "target": 0.01,
            "holds": saving <= 0.01,
        },
        {
            "claim": "bits per parameter, everything quantized (of cpu: an 8B shape)",
            "bits": bits,
            "target": 4.2,
            "holds": bits <= 4.2,
        },
    ]
    return {
        "bench": "edge",
        "geometry": {"name": options.geometry, "quick": options.quick, **asdict(geometry), "repeats": repeats},
        "accelerator": None if geometry.device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens_per_second": {name: statistics.median(values) for name, values in speed.items()},
        "tokens_per_cpu_second": {name: statistics.median(values) for name, values in work.items()},
        "peak_bytes_above_imports" if geometry.device == "cpu" else "peak_bytes_allocated": peak,
        "checks": checks,
    }


def geometry_of(options: argparse.Namespace) -> Geometry:
    """Find the geometry that the options name."""
    geometry = GEOMETRIES[options.geometry]
    return geometry.small if options.quick else geometry


def main() -> None:
    """Measure, print the result, and exit with 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="cpu")
    parser.add_argument("--quick", action="store_true", help="make the geometry small, for a GPU or without one")
    parser.add_argument("--out", help="directory of models and caches; not given: bench-out/edge-GEOMETRY[-quick]")
    parser.add_argument("--repeats", type=int, default=0, help="repeats of every arm; 0: those of the geometry")
    parser.add_argument("--planted-defect", action="store_true", help="keep no border states: the bench must fail")
    parser.add_argument("--arm", choices=sorted(ARMS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    geometry = geometry_of(options)
    if geometry.device != "cpu" and not torch.cuda.is_available():
        parser.exit(
            2,
            f"--geometry {options.geometry} needs a GPU, and torch {torch.__version__} sees none here; "
            "use --geometry cpu, or --quick for a small model of this family\n",
        )
    options.out = options.out or str(ROOT / "bench-out" / f"edge-{options.geometry}{'-quick' * options.quick}")
    if options.arm:
        before = peak_rss_bytes()
        tokens, seconds, cpu = ARMS[options.arm](Path(options.out), geometry, options.planted_defect)
        peak = peak_rss_bytes() - before if geometry.device == "cpu" else torch.cuda.max_memory_allocated()
        print(json.dumps({"tokens": tokens, "seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak}))
        return
    result = measure(options)
    print(json.dumps(result, indent=1))
    if not all(check["holds"] for check in result["checks"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
