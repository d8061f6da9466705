"""Measure the memory plan: predicted against measured peak of a worker's process, over shapes and ways to train.

Each cell is a child process with a bundle of random weights: it sweeps its samples and trains one round in the planned
way. The high-water mark of the whole process is compared. Exit status 1 when a prediction is off by more than 15 % where
512 MiB or more are measured; `--planted-defect` predicts without activations and must fail. Speed is left to
`bench_edge.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch
from edge_arms import states_of, train_ours  # beside this file
from edge_geometries import SUPERVISED, Geometry, make
from random_bundle import Shape

from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.ports.system import peak_rss_bytes, return_memory_at_once
from fedsoda_edge.protocol.needs import MemoryPlan, SampleSizes, plans, shape_of

ROOT = Path(__file__).resolve().parent.parent

TOLERANCE, FROM_BYTES = 0.15, 512 << 20
CELLS = {  # shape, batch size, samples
    "narrow": (Geometry(Shape(512, 10, 32000, 512), 1, 8), 8),
    "wide": (Geometry(Shape(2048, 8, 16000, 256), 1, 8), 4),
    "vocabulary": (Geometry(Shape(1024, 8, 96000, 512), 1, 4), 2),
}
WAYS = ("dense", "dense, halved", "packed", "packed, recomputed")


Cell = tuple[Geometry, int]


def ways(bundle: Bundle, cell: Cell, process_bytes: int) -> dict[str, MemoryPlan]:
    """Find a memory plan of each kind for this shape."""
    geometry, batch_size = cell
    labels = geometry.length - round(geometry.length * (1 - SUPERVISED))
    samples = SampleSizes(batch_size, geometry.length, labels, geometry.samples)
    found = list(plans(shape_of(bundle.manifest), "cpu", samples, process_bytes))
    dense, packed, recomputed = (plan for plan in found if plan.micro_batch == batch_size)
    halved = next(plan for plan in found if plan.micro_batch == batch_size // 2)
    return dict(zip(WAYS, (dense, halved, packed, recomputed), strict=True))


def child(directory: Path, cell: Cell, way: str) -> dict[str, Any]:
    """Sweep and train one epoch this way in this process, and return predicted and measured bytes."""
    process_bytes = psutil.Process().memory_info().rss
    geometry, _ = cell
    bundle = Bundle.open(directory / "model" / "bundle")
    plan = ways(bundle, cell, process_bytes)[way]
    if plan.frugal:
        return_memory_at_once()
    states = states_of(bundle, geometry, directory / f"cache-{WAYS.index(way)}", plan)
    states.sweep()
    after_sweep = peak_rss_bytes()
    train_ours(bundle, geometry, states, plan)()
    return {
        "predicted_bytes": plan.peak,
        "measured_bytes": peak_rss_bytes(),
        "after_sweep_bytes": after_sweep,
        "plan": msgspec.to_builtins(plan),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run every cell in a child process, and return the figures."""
    cells = []
    for name, cell in CELLS.items():
        directory = Path(options.out) / name
        make(directory, cell[0])
        for way in WAYS:
            command = [sys.executable, __file__, "--out", options.out, "--cell", name, "--way", way]
            environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
            shutil.rmtree(directory / f"cache-{WAYS.index(way)}", ignore_errors=True)
            ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if ended.returncode:
                raise SystemExit(f"{name}, {way} failed:\n{ended.stderr[-2000:]}")
            found = json.loads(ended.stdout.splitlines()[-1])
            plan = found.pop("plan")
            predicted = found["predicted_bytes"] - (plan["activations"] if options.planted_defect else 0)
            ratio = predicted / found["measured_bytes"]
            counts = found["measured_bytes"] >= FROM_BYTES
            cells.append(
                {
                    "shape": name,
                    "way": way,
                    **found,
                    "ratio": ratio,
                    "holds": not counts or abs(ratio - 1) <= TOLERANCE,
                    "plan": plan,
                }
            )
            print(f"{name}, {way}: predicted / measured {ratio:.2f}", file=sys.stderr, flush=True)
    return {"bench": "memory", "torch": torch.__version__, "tolerance": TOLERANCE, "cells": cells}


def main() -> None:
    """Measure, print the result, and exit with 1 where a prediction is off."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default=str(ROOT / "bench-out" / "memory"), help="directory of models and caches")
    parser.add_argument(
        "--planted-defect", action="store_true", help="predict without activations: the bench must fail"
    )
    parser.add_argument("--cell", choices=sorted(CELLS), help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(child(Path(options.out) / options.cell, CELLS[options.cell], options.way)))
        return
    result = measure(options)
    print(json.dumps(result, indent=1))
    if not all(cell["holds"] for cell in result["cells"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
