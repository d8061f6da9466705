"""Make small runs on disk for tests of the hub: a RUN.toml, its public text and its evaluation data."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from fedsoda_edge.model import delta
from fedsoda_edge.protocol.messages import Digest
from fedsoda_hub.federation.jobs import PrepareResult
from fedsoda_hub.federation.state import HeldView, ServedSubLLM
from fedsoda_hub.preparation.prepare import RunPreparation
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import opened
from fedsoda_hub.settings.run import RunSettings, read_settings


def all_blobs_kept() -> AbstractContextManager[Any]:
    """Let hubs keep the updates and views of all rounds, for tests that compute each of them again."""
    return mock.patch("fedsoda_hub.serving.uploads.Uploads.tidy", mock.AsyncMock())


SMALL: dict[str, dict[str, Any]] = {
    "method": {"distance": "angular", "adapter_layers": 2, "layers_per_group": 1, "groups": 2, "realign_every": 5},
    "lora": {"rank": 4, "alpha": 8},
    "public": {"text": "public.txt", "sequences": 12, "length": 24},
    "align": {
        "heal": False,
        "border_map": "none",
        "steps": 8,
        "realign_steps": 4,
        "batch_size": 4,
        "learning_rate": 1e-2,
    },
    "local": {"max_length": 64},
    "wire": {"codec": "bf16"},
    "task": {"prompt": "Say {word}:", "completion": "{answer}", "eval_data": "eval.jsonl"},
}
# Changes of SMALL for a run whose edges get every layer.
FULL: dict[str, dict[str, Any]] = {
    "method": {"emulator": "full", "layers_per_group": None, "groups": None, "realign_every": None},
    "align": {"steps": None, "realign_steps": None},
}
WORDS = ["the", "cat", "on", "a", "mat", "an", "inn", "in", "rain", "one", "other", "than", "then", "tan", "tin", "ton"]


def make_run(directory: Path, model: Path, dtype: str = "float32", /, **tables: dict[str, Any]) -> RunSettings:
    """Settings of a run of `model` in `directory`; `tables` change SMALL, where None leaves a key out.

    Its products are in fp32, as those of references are, on every CPU.
    """
    directory.mkdir(parents=True, exist_ok=True)
    chooser = random.Random(0)
    (directory / "public.txt").write_text(" ".join(chooser.choices(WORDS, k=150)))
    rows = [{"word": word, "answer": "yes" if i % 3 else "no"} for i, word in enumerate(WORDS)]
    (directory / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ['name = "small"', f"model = {json.dumps(str(model))}", 'device = "cpu"', f'dtype = "{dtype}"']
    for table in {**SMALL, **tables}:
        lines.append(f"[{table}]")
        merged = SMALL.get(table, {}) | tables.get(table, {})
        lines += [f"{key} = {json.dumps(value)}" for key, value in merged.items() if value is not None]
    (directory / "RUN.toml").write_text("\n".join(lines))
    return read_settings(directory / "RUN.toml")


def finish(settings: RunSettings, master: str, emulator_view: str) -> None:
    """Leave a ledger that says one round has closed with these digests."""
    directory = RunDirectory(settings.run_dir)
    manifest = Digest(directory.blobs.put(directory.manifest.read_bytes()))
    view = HeldView(Digest(master))
    largest = ServedSubLLM(manifest=manifest, public_kl={}, adapter=view, emulator=HeldView(Digest(emulator_view)))
    with opened(directory) as ledger:
        state = ledger.replay()
        state.master, state.sub_llms, state.losses = Digest(master), (largest,), [1.0]
        ledger.snapshot(state)


class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


@contextmanager
def killed_after(writes: int) -> Iterator[None]:
    """End a prepare in here after so many durable writes: each gives a file its name."""
    left, replace = writes, os.replace

    def write(source: Path, target: Path) -> None:
        nonlocal left
        is_file = Path(source).is_file()
        replace(source, target)
        left -= is_file
        if left == 0:
            raise Killed

    with mock.patch.object(os, "replace", write), pytest.raises(Killed):
        yield


def prepare(settings: RunSettings) -> PrepareResult:
    return RunPreparation(settings).run()


def public_kl(settings: RunSettings) -> dict[str, float]:
    """Prepare a run; the public KL of its largest sub-LLM."""
    return prepare(settings).sub_llms[0].public_kl


def put(settings: RunSettings, tensors: Mapping[str, Tensor]) -> Digest:
    """Leave tensors as a blob of the run, as a job names them."""
    return Digest(RunDirectory(settings.run_dir).blobs.put(delta.to_bytes(tensors)))
