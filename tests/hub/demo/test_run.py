"""The demo runs to its end: the whole of it, and each edge's training alone, which no other command does."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.ports.disk import sha256_file
from fedsoda_hub.demo import run
from fedsoda_hub.settings.run import RunSettings
from tests.schema import HUB


@pytest.mark.slow
def test_an_edge_alone_trains_in_a_worker_like_that_of_a_join(tmp_path: Path, prepared: RunSettings) -> None:
    shutil.copytree(prepared.directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "RUN.toml").rename(tmp_path / "run.toml")
    store = tmp_path / "homes" / "village" / "store"
    store.mkdir(parents=True)
    for file in (tmp_path / "small.run" / "bundle").iterdir():
        shutil.copyfile(file, store / sha256_file(file))
    rows = [{"message": f"cat {number}", "desk": "farm" if number % 2 else "food"} for number in range(12)]
    (tmp_path / "village.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    view = load_file(asyncio.run(run.train_alone_at(tmp_path, "village", 2, 0)))
    start = Bundle.open(prepared.run_dir / "bundle").adapter_lora()
    assert view.keys() == start.keys()
    assert any(not torch.equal(view[name], start[name]) for name in view)


@pytest.mark.slow
@pytest.mark.timeout(900)  # minutes on a machine that has other work
def test_the_demo_ends_with_a_report_and_an_export(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedsoda_hub", "demo", "--rounds", "1", "--dir", str(tmp_path / "demo"), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    HUB.check("demo", report)
    assert report["rounds"] == 1
    assert set(report["accuracy"]) == {"full", "sub_llm", "plug_in", "local_only"}
    assert (Path(report["export"]) / "adapter_model.safetensors").is_file()
