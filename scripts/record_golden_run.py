"""Record what tests/test_golden_run.py opens: a run that stopped in round 3 of 4, and ledgers of two that ended.

The stopped run: two edges of different size classes; the emulator is aligned again before rounds 2 and 4. In round 3 the
hub has taken the update of b and is stopped; a finishes its training after that, so its update waits for a receipt.
The ledgers hold what that run lacks: probes, views of each class, layers drawn again, moments, a deadline, an edge that
left and came back. tests/golden/run/README.md says when to record again; run it as a module, from the checkout:

    python -m scripts.record_golden_run --to DIRECTORY

What must still work with the recorded run is `tests/test_golden_run.py`'s.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file

from tests.commands import Commands, small_disk
from tests.tiny import make_tiny_llama

Tables = dict[str, dict[str, Any]]
Processes = dict[str, subprocess.Popen[str]]

STOPPED: Tables = {
    "method": {"adapter_layers": 2, "layers_per_group": 1, "groups": 1, "classes": [2], "realign_every": 2},
    "lora": {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj", "down_proj"]},
    "public": {"text": "public.txt", "like_task": "prompts.jsonl", "sequences": 4, "length": 16},
    "align": {"border_map": "ridge", "border_rank": 4, "steps": 4, "realign_steps": 2, "learning_rate": 1e-3},
    "rounds": {"count": 4, "min_edges": 2, "quorum": 1.0, "deadline_seconds": 3e9},  # it never passes, whenever resumed
    "local": {"epochs": 40, "max_steps": 40, "batch_size": 4, "learning_rate": 5e-3, "max_length": 32},
    "wire": {"codec": "nf4"},
    "task": {"prompt": "Say {word}:", "completion": "{answer}", "eval_data": "eval.jsonl"},
    "listen": {"port": 0},
}
# Changes of STOPPED; None leaves a key out.
PROBED: Tables = {
    "method": {"realign_every": "auto"},
    "lora": {"ranks": [2, 1]},
    "rounds": {"count": 3},
    "local": {"learning_rate": 5e-2},
    "aggregation": {"rule": "flexlora"},
    "wire": {"codec": "bf16"},
}
PRUNED: Tables = {
    "method": {"name": "fedpruner", "drop_layers": 2, "classes": [3], "reprune_every": 1}
    | dict.fromkeys(("adapter_layers", "layers_per_group", "groups", "realign_every")),
    "align": dict.fromkeys(STOPPED["align"]),
    "public": {"like_task": None},
    "rounds": {"count": 3, "quorum": 0.5, "deadline_seconds": 30},
    "aggregation": {"optimizer": "fedavgm", "learning_rate": 0.5},
}
WORDS = ["cow", "hen", "bus", "car", "rice", "soup"]
MANIFESTS = ("manifest.json", "manifest.1.json")  # by size class
# Logs, locks, and hidden states of public text, which are computed again if they are missing.
NOT_NEEDED = ("*.log", "lock", "small_disk", "teacher.*", "student.*")
OF_A_LEDGER = ("run.toml", "public.txt", "prompts.jsonl", "eval.jsonl", "golden.run/ledger.sqlite")


def write_run(directory: Path, changes: Tables) -> None:
    """Write RUN.toml, model, texts and rows; weights are rounded to a coarse grid, so that their file compresses."""
    make_tiny_llama(directory / "model", layers=6, intermediate=64, kv_heads=1, vocab=266, tie=True)
    weights = directory / "model" / "model.safetensors"
    coarse = {name: torch.round(tensor * 32) / 32 for name, tensor in load_file(weights).items()}
    save_file(coarse, weights, {"format": "pt"})
    lines = ['name = "golden"', 'model = "model"', 'device = "cpu"']
    for table in {**STOPPED, **changes}:
        values = STOPPED.get(table, {}) | changes.get(table, {})
        lines += [
            f"[{table}]",
            *(f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None),
        ]
    (directory / "run.toml").write_text("\n".join(lines) + "\n")
    (directory / "public.txt").write_text("The cat sat on the mat and the dog ran in the rain. " * 5)
    write_rows(directory / "prompts.jsonl", [{"word": f"{word} {n}"} for n in range(9) for word in WORDS])
    for name in ("a", "b", "eval"):
        rows = [{"word": f"{word} {name}", "answer": "yes" if n % 2 else "no"} for n, word in enumerate(WORDS)]
        write_rows(directory / f"{name}.jsonl", rows)


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def begin(commands: Commands) -> tuple[str, Processes]:
    """Start the hub and both edges; b has too little disk for the largest sub-LLM. Return the hub's URL and all processes."""
    directory = commands.directory
    for edge in "ab":
        commands.ask("fedsoda_hub", "token", "create", "run.toml", "--name", edge, "--out", f"{edge}.token")
    hub = commands.start("hub", "fedsoda_hub", "serve", "run.toml", "--exit-when-done")
    url = commands.wait_for("hub", event="listening")["url"]
    commands.wait_for("hub", event="prepared")
    bundle = directory / "golden.run" / "bundle"
    needs = [json.loads((bundle / name).read_text())["needs"]["disk_bytes"] for name in MANIFESTS]
    little = small_disk(directory / "small_disk", sum(needs) // 2)
    return url, {"hub": hub, "a": join(commands, "a", url, {}), "b": join(commands, "b", url, little)}


def join(commands: Commands, edge: str, url: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start the join of an edge."""
    arguments = ["--device", "cpu", "--cache-key", "keep", "--token-file", f"{edge}.token", "--data", f"{edge}.jsonl"]
    home = {"FEDSODA_HOME": str(commands.directory / f"home-{edge}")}
    return commands.start(edge, "fedsoda_edge", "join", url, *arguments, environment={**home, **environment})


def worker_of(agent: subprocess.Popen[str]) -> psutil.Process:
    """Find the worker of a join."""
    [worker] = psutil.Process(agent.pid).children()
    return worker


def stop_in_round_3(directory: Path) -> dict[str, Any]:
    """Let the run reach the point at which it is resumed, and return what the commands say of it there."""
    with Commands(directory) as commands:
        _, running = begin(commands)
        commands.wait_for("a", event="training", round=3)
        worker = worker_of(running["a"])
        worker.suspend()
        commands.wait_for("hub", event="update_accepted", round=3, edge="b")
        commands.stop(running["hub"])
        worker.resume()
        [home] = (directory / "home-a" / "runs").iterdir()
        while not (home / "pending" / "meta.json").exists():
            time.sleep(0.02)
        commands.stop(running["a"], running["b"])
        status = commands.ask("fedsoda_hub", "status", "run.toml")
        assert (status["phase"], status["accepted"]) == ("collecting", ["b"])
        prepared = commands.ask("fedsoda_hub", "prepare", "run.toml")
        del prepared["bundle"]  # a path of this machine
        environment = {"FEDSODA_HOME": str(directory / "home-a")}
        return {
            "status": status,
            "tokens": commands.ask("fedsoda_hub", "token", "list", "run.toml")["tokens"],
            "join": commands.ask("fedsoda_edge", "status", environment=environment)["join"],
            "prepared": prepared,
        }


def run_to_the_end(directory: Path) -> dict[str, Any]:
    """Let all rounds run, and return what the hub says of them."""
    with Commands(directory) as commands:
        _, running = begin(commands)
        commands.finish(*running.values())
        return {"status": commands.ask("fedsoda_hub", "status", "run.toml")}


def run_with_interruptions(directory: Path) -> dict[str, Any]:
    """Let all rounds run, and return what the hub says of them.

    In round 2 edge a leaves and comes back, and edge b, which is suspended, misses the deadline.
    """
    with Commands(directory) as commands:
        url, running = begin(commands)
        commands.wait_for("b", event="training", round=2)
        worker = worker_of(running["b"])
        worker.suspend()
        commands.stop(running["a"])
        environment = {"FEDSODA_HOME": str(directory / "home-a")}
        commands.ask("fedsoda_edge", "leave", url, "--token-file", "a.token", environment=environment)
        commands.wait_for("hub", event="edge_answered", round=2, edge="a")
        running["a"] = join(commands, "a", url, {})
        commands.wait_for("hub", event="round_closed", round=2)
        worker.resume()
        commands.finish(*running.values())
        return {"status": commands.ask("fedsoda_hub", "status", "run.toml")}


def strip(directory: Path) -> None:
    """Delete what a resumed run does not need; b fetches its bundle again."""
    for pattern in NOT_NEEDED:
        for path in directory.rglob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(directory / "home-b" / "store")


def pack(archive: tarfile.TarFile, source: Path, name: str) -> None:
    """Add files to an archive without owners and times."""

    def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        return entry

    archive.add(source, name, filter=anonymous)


def main() -> None:
    """Record the three runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--to", type=Path, required=True, help="a new directory for run.tar.xz and expected.json")
    options = parser.parse_args()
    options.to.mkdir(parents=True)
    with (
        tempfile.TemporaryDirectory() as temporary,
        tarfile.open(options.to / "run.tar.xz", "w:xz", preset=9) as archive,
    ):
        expected: dict[str, Any] = {}
        for name, changes, record in (
            ("stopped", {}, stop_in_round_3),
            ("probed", PROBED, run_to_the_end),
            ("pruned", PRUNED, run_with_interruptions),
        ):
            directory = Path(temporary) / name
            directory.mkdir()
            write_run(directory, changes)
            expected[name] = record(directory)
            if name == "stopped":
                strip(directory)
            for part in (".",) if name == "stopped" else OF_A_LEDGER:
                pack(archive, directory / part, f"{name}/{part}")
    (options.to / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
