"""Measure NF4 on the CPU: forward and backward (gradient of the input) of NF4Linear and of bitsandbytes' Linear4bit.

Per shape and dtype, in one process and in the order A B B A: `ratio` is stock / ours, the median over the repeats
with a 95 % bootstrap interval, from wall and from CPU seconds. `dense` multiplies with a matrix that exists
already, so stock / dense is the bound of any NF4 layer that multiplies in the same dtype. `transient_bytes` is the growth
of VmHWM over what the process held, output and gradient included; each arm in a process of its own.

Exit 1 when a check fails. The checks are the transient of both dtypes and, in bf16 with 64 rows or more, the ratio
MIN_RATIO; in fp32 and with few rows the ratio is not checked: in fp32 tiles save memory, not time
(docs/decisions.md (d17-tiles)).
`--planted-defect` lets our arm dequantize the whole matrix, twice: that must fail. Whole models are left to `bench_edge.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor

from fedsoda_edge.model import nf4

ROOT = Path(__file__).resolve().parent.parent
# (input rows, matrix rows, matrix columns, repeats); the last two are large, so they are run few times.
SHAPES = [(8, 1024, 1024, 9), (512, 1024, 1024, 7), (512, 1024, 2816, 7), (512, 4096, 4096, 3), (512, 4096, 14336, 2)]
QUICK = [(8, 1024, 1024, 9), (64, 1024, 1024, 7)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIN_RATIO, MAX_TRANSIENT = 1.9, 4_000_000
TRANSIENT_SHAPE = (8, 4096, 4096)

Step = Callable[[], None]


class Defective(nf4.NF4Linear):
    """An NF4 layer that dequantizes the whole matrix, twice."""

    def forward(self, input: Tensor) -> Tensor:
        made: Tensor = _Twice.apply(input, self)
        return made


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nf4.NF4Linear) -> Tensor:
        ctx.layer = layer
        layer.dense(x.dtype)
        return torch.nn.functional.linear(x, layer.dense(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.layer.dense(grad.dtype)
        return grad @ ctx.layer.dense(grad.dtype), None


def layers(rows: int, cols: int, dtype: torch.dtype, arms: list[str], is_defective: bool) -> dict[str, Any]:
    """Make the layer of each arm, with the same weights."""
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)) * 0.02
    made: dict[str, Any] = {}
    for arm in arms:
        if arm == "ours":
            made[arm] = (Defective if is_defective else nf4.NF4Linear)(nf4.quantize(weight), None, "cpu")
        elif arm == "stock":
            stock = bnb.nn.Linear4bit(cols, rows, bias=False, compute_dtype=dtype, quant_type="nf4")
            stock.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
            made[arm] = stock.to(
                "cpu"
            ).train()  # in eval mode it may repack itself and lose its gradient (docs/decisions.md (d5-nf4-layer))
        else:
            dense = weight.to(dtype)
            made[arm] = lambda x, dense=dense: torch.nn.functional.linear(x, dense)
    return made


def step_of(layer: Any, x: Tensor, grad: Tensor) -> Step:
    """Make a function that runs a layer forward and backward."""

    def step() -> None:
        x.grad = None
        y = layer(x)
        assert y.grad_fn is not None, "the layer passes no gradient on"
        y.backward(grad)
        assert x.grad is not None

    return step


def timed(step: Step) -> tuple[float, float]:
    """Run a step, and return its wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def interval(values: list[float]) -> list[float]:
    """Compute the 95 % interval of the median from 2000 resamples."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(2000))
    return [round(medians[50], 3), round(medians[1949], 3)]


def compare(shape: tuple[int, int, int, int], dtype_name: str, is_defective: bool) -> dict[str, Any]:
    """Time all arms on one shape in one dtype."""
    num_rows, rows, cols, repeats = shape
    dtype = DTYPES[dtype_name]
    x = torch.randn(num_rows, cols).to(dtype).requires_grad_()
    grad = torch.randn(num_rows, rows).to(dtype)
    arms = ["stock", "ours", "dense"] if dtype == torch.float32 else ["stock", "ours"]
    steps = {arm: step_of(layer, x, grad) for arm, layer in layers(rows, cols, dtype, arms, is_defective).items()}
    for step in steps.values():
        step()
    times: dict[str, list[tuple[float, float]]] = {arm: [] for arm in arms}
    for _ in range(repeats):
        pairs: dict[str, list[tuple[float, float]]] = {arm: [] for arm in arms}
        for arm in (*arms, *reversed(arms)):
            pairs[arm].append(timed(steps[arm]))
        for arm, (one, two) in pairs.items():
            times[arm].append(((one[0] + two[0]) / 2, (one[1] + two[1]) / 2))
    found: dict[str, Any] = {"rows_in": num_rows, "matrix": [rows, cols], "dtype": dtype_name, "repeats": repeats}
    for at, clock in enumerate(("wall", "cpu")):
        for arm in arms:
            found[f"{arm}_{clock}_ms"] = round(statistics.median(each[at] for each in times[arm]) * 1e3, 2)
        for arm in arms[1:]:
            ratios = [a[at] / b[at] for a, b in zip(times["stock"], times[arm], strict=True)]
            found[f"stock_over_{arm}_{clock}"] = round(statistics.median(ratios), 3)
            found[f"stock_over_{arm}_{clock}_95"] = interval(ratios)
    return found


def peak() -> int:
    """Read the high-water mark of this process, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def transient(arm: str, dtype_name: str, is_defective: bool) -> int:
    """Measure the bytes that a step adds to what the process held before; call it in a process of its own.

    A step on a small layer comes first, so that code and tables are loaded. The output, the gradient (131 KB each in
    fp32) and what MKL takes to pack operands are counted too.
    """
    num_rows, rows, cols = TRANSIENT_SHAPE
    dtype = DTYPES[dtype_name]
    small, large = (layers(it, it, dtype, [arm], is_defective)[arm] for it in (64, rows))
    step_of(small, torch.randn(num_rows, 64).to(dtype).requires_grad_(), torch.randn(num_rows, 64).to(dtype))()
    step = step_of(large, torch.randn(num_rows, cols).to(dtype).requires_grad_(), torch.randn(num_rows, rows).to(dtype))
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM starts again from what is held now
    before = peak()
    step()
    return peak() - before


def transient_of(arm: str, dtype_name: str, is_defective: bool) -> int:
    """Measure the transient bytes of an arm in a child process."""
    call = [sys.executable, "-W", "ignore", __file__, "--transient", arm, dtype_name]
    call += ["--planted-defect"] if is_defective else []
    # One arena, trimmed at once: freed memory of the set-up must not hide what the step takes.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    return int(subprocess.run(call, check=True, capture_output=True, text=True, env=environment).stdout)


def main() -> int:
    """Measure, print the report, and return 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="small shapes only")
    parser.add_argument(
        "--planted-defect", action="store_true", help="our arm dequantizes the whole matrix twice: the bench must fail"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated; not given: both")
    parser.add_argument("--max-size", type=int, default=0, help="leave out matrices with more weights; 0: none")
    parser.add_argument("--transient", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.transient:
        arm, name = options.transient
        print(transient(arm, name, options.planted_defect))
        return 0
    shapes = [it for it in (QUICK if options.quick else SHAPES) if it[1] * it[2] <= (options.max_size or it[1] * it[2])]
    names = options.dtype or list(DTYPES)
    memory = {
        name: {arm: transient_of(arm, name, options.planted_defect) for arm in ("stock", "ours")} for name in names
    }
    results = []
    for shape in shapes:
        for name in names:
            results.append(compare(shape, name, options.planted_defect))
            print(json.dumps(results[-1]), file=sys.stderr)
    checks = {f"transient of {name} <= {MAX_TRANSIENT}": memory[name]["ours"] <= MAX_TRANSIENT for name in names}
    for found in results:
        if found["dtype"] == "bf16" and found["rows_in"] >= 64:
            what = f"bf16 {found['rows_in']} x {found['matrix']}: stock / ours >= {MIN_RATIO}"
            checks[what] = found["stock_over_ours_wall"] >= MIN_RATIO
    report = {
        "cpu": torch.cpu.get_capabilities().get("cpu_name"),
        "threads": options.threads,
        "load": os.getloadavg(),
        "versions": {"torch": torch.__version__, "bitsandbytes": bnb.__version__},
        "results": results,
        "transient_bytes": memory,
        "checks": checks,
    }
    print(json.dumps(report, indent=1))
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
