"""Try on a GPU what only a GPU can show, and print one JSON with its name.

    tests    those marked cuda (tests/test_device.py): training on NF4 through bitsandbytes, border states and their cache,
             preparing, healing, judging, an edge that takes part, memory within the plan, sensors, all against fp32 on a CPU
    edge     `bench_edge` on the shape of Llama 3 8B with random weights: speed and peak memory beside the usual recipe
    doctor   what this machine says of itself

Each part has a share of the time and says where it ran out of it. `--cpu` runs the same parts at small sizes without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {"tests": 150.0, "edge": 270.0, "doctor": 40.0}  # at most, 460 in all


def ended(command: list[str], seconds: float, home: Path) -> dict[str, Any]:
    """Run a command of this checkout, and return its status, its output and how long it took."""
    begun = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FEDSODA_HOME": str(home), "COLUMNS": "200"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
        status: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, err = process.communicate()
        status = None
    return {"status": status, "out": out, "err": err, "seconds": round(time.monotonic() - begun, 1)}


def tests(device: str, home: Path) -> dict[str, Any]:
    """Run the tests that are marked cuda on the device."""
    pytest = ["-m", "pytest", "-q", "-m", "cuda", "--device", device, "tests", "-rfE", "--tb=line"]
    found = ended([sys.executable, *pytest, "-p", "no:cacheprovider", "-o", "addopts="], SECONDS["tests"], home)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", found["out"])}
    failures = [line for line in found["out"].splitlines() if line.startswith(("FAILED", "ERROR"))]
    held = found["status"] == 0 and counts.get("passed", 0) > 0
    return {"holds": held, "seconds": found["seconds"], **counts, "failures": failures or found["err"][-500:]}


def edge(device: str, home: Path) -> dict[str, Any]:
    """Measure an edge on the shape of Llama 3 8B, two repeats; small on a CPU."""
    command = [
        sys.executable,
        "scripts/bench_edge.py",
        "--geometry",
        "llama3-8b",
        "--repeats",
        "2",
        "--out",
        str(home / "edge"),
    ]
    found = ended(command + (["--quick"] if device == "cpu" else []), SECONDS["edge"], home)
    try:
        report = json.loads(found["out"])
    except ValueError:
        runs = (
            (home / "edge" / "runs.jsonl").read_text().splitlines() if (home / "edge" / "runs.jsonl").exists() else []
        )
        kept = [json.loads(line) for line in runs]
        return {"holds": False, "seconds": found["seconds"], "runs": kept, "said": found["err"][-500:]}
    # At small sizes on a CPU the ratios mean nothing: there the run itself is what is tried.
    return {"holds": device == "cpu" or found["status"] == 0, "seconds": found["seconds"], **report}


def doctor(device: str, home: Path) -> dict[str, Any]:
    """Let doctor describe the machine; a GPU must be among what it names."""
    found = ended([sys.executable, "-m", "fedsoda_edge", "doctor", "--json"], SECONDS["doctor"], home)
    try:
        report = json.loads(found["out"])
    except ValueError:
        return {"holds": False, "seconds": found["seconds"], "said": (found["out"] + found["err"])[-500:]}
    named = json.dumps(report)
    return {
        "holds": device == "cpu" or "NVIDIA" in named or "GPU" in named,
        "seconds": found["seconds"],
        "steps": report,
    }


def main() -> None:
    """Run all parts, print the JSON, and exit with 1 where one does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="run everything at small sizes without a GPU")
    options = parser.parse_args()
    import torch

    if not options.cpu and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device here; name a Python with a CUDA build in PYTHON, or give --cpu")
    device = "cpu" if options.cpu else "cuda"
    with tempfile.TemporaryDirectory(prefix="fedsoda-gpu-") as directory:
        parts = {part.__name__: part(device, Path(directory)) for part in (doctor, tests, edge)}
    report = {
        "bench": "gpu",
        "accelerator": None if options.cpu else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "holds": all(part["holds"] for part in parts.values()),
        **parts,
    }
    print(json.dumps(report))
    if not report["holds"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
