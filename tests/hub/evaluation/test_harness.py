"""lm-evaluation-harness loads an export onto the full LLM and finds what the hub reports.

Its own log-likelihoods end before eos and the hub's after it (docs/methods.md (m12-accuracy)), so eos is written into the
choices here. With `peft=` it cuts the embedding to the tokenizer's length, which moves every log-likelihood of a
checkpoint that pads its vocabulary; this one does not.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fedsoda_edge.model import delta
from fedsoda_edge.ports.disk import BlobStore
from fedsoda_hub.evaluation.export import export
from fedsoda_hub.evaluation.judge import evaluate_path
from fedsoda_hub.settings.run import RunSettings
from tests.hub.evaluation.test_export import master_of
from tests.hub.runs import WORDS, finish, make_run, prepare
from tests.tiny import make_tiny_llama

pytestmark = [
    pytest.mark.slow,  # the harness takes seconds to import, and runs twice
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs pip install 'fedsoda[harness]'"),
]

CHOICES = ["elm", "fig", "fir", "oak"]  # of as many ids each, so that no choice wins by its length
TASK = """
task: say
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "Say {{word}}:"
doc_to_choice: ["elm</s>", "fig</s>", "fir</s>", "oak</s>"]
doc_to_target: "{{['elm', 'fig', 'fir', 'oak'].index(answer)}}"
metric_list: [{metric: acc}]
"""


def harness(directory: Path, out: Path, model_args: str) -> tuple[float, list[list[float]]]:
    """(accuracy, log-likelihood of every choice of every row) of the task in `directory`, by the harness' command."""
    command = ["-m", "lm_eval", "--model", "hf", "--model_args", model_args, "--include_path", str(directory)]
    command += ["--tasks", "say", "--device", "cpu", "--output_path", str(out), "--log_samples"]
    env = os.environ | {"HF_HOME": str(directory / "cache"), "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # the second run need not compile the harness again
    subprocess.run([sys.executable, *command], check=True, env=env)
    [results], [samples] = out.rglob("results_*.json"), out.rglob("samples_say_*.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    scores = [[float(score) for score, _ in row["filtered_resps"]] for row in rows]
    return json.loads(results.read_text())["results"]["say"]["acc,none"], scores


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunSettings:
    """A run of a model with exactly its tokenizer's vocabulary, whose adapter LoRA is not zero."""
    directory = tmp_path_factory.mktemp("harness")
    model = make_tiny_llama(directory / "tiny", vocab=266)
    assert len(AutoTokenizer.from_pretrained(model)) == 266
    settings = make_run(directory / "run", model, align={"steps": 0})
    rows = [{"word": word, "answer": CHOICES[at % 4]} for at, word in enumerate(WORDS)]
    (settings.directory / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    emulator = prepare(settings).sub_llms[0].emulator_view
    trained = {name: 4 * tensor for name, tensor in master_of(settings).items()}  # enough to change answers
    finish(settings, BlobStore(settings.run_dir / "blobs").put(delta.to_bytes(trained)), emulator)
    return settings


def test_the_harness_finds_what_the_hub_reports(finished: RunSettings, tmp_path: Path) -> None:
    assert finished.eval_data is not None
    adapter, full, rows = tmp_path / "adapter", finished.model, finished.eval_data.read_text().splitlines()
    export(finished, adapter)
    (tmp_path / "say.yaml").write_text(TASK % json.dumps(str(finished.eval_data)))
    reported = evaluate_path(adapter, finished.eval_data, model=full, samples=len(rows))

    tokenizer: Any = AutoTokenizer.from_pretrained(full)
    gold = [CHOICES.index(json.loads(row)["answer"]) for row in rows]
    ids = sum(len(tokenizer(f" {CHOICES[right]}</s>", add_special_tokens=False).input_ids) for right in gold)
    found = {
        "full": harness(tmp_path, tmp_path / "full", f"pretrained={full},dtype=float32"),
        "plug_in": harness(tmp_path, tmp_path / "plug_in", f"pretrained={full},peft={adapter},dtype=float32"),
    }
    for name, (accuracy, scores) in found.items():
        own = [score[right] for score, right in zip(scores, gold, strict=True)]
        assert [CHOICES[score.index(max(score))] for score in scores] == [row[name] for row in reported.samples]
        assert accuracy == reported.accuracy[name]
        assert -math.fsum(own) / ids == pytest.approx(reported.loss[name], rel=1e-5)
    assert found["full"][0] != found["plug_in"][0], "the adapter LoRA must matter for this to say anything"
