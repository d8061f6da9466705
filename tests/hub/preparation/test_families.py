"""Every family goes the whole way: similarity, NF4, alignment, adapter LoRA, and PEFT on the full model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedsoda_edge.data.samples import SampleTokenizer
from fedsoda_edge.model import delta
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.ports.disk import BlobStore
from fedsoda_hub.evaluation.export import export
from fedsoda_hub.evaluation.judge import evaluate_path
from fedsoda_hub.evaluation.questions import read_questions
from tests.edge.model.test_bundle import random_lora
from tests.hub.runs import finish, make_run, prepare
from tests.tiny import FAMILY_CONFIGS, make_tiny

QUICK = ("gemma3_text", "phi3", "qwen3_moe")  # those that differ most; --all takes every one


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(FAMILY_CONFIGS)],
)
def test_a_family_goes_from_its_checkpoint_to_an_adapter_for_it(tmp_path: Path, family: str) -> None:
    model = make_tiny(tmp_path / family, family)
    attention = {"targets": ["q_proj", "v_proj"]}
    settings = make_run(tmp_path / "run", model, lora=attention if family == "qwen3_moe" else {})
    prepared = prepare(settings)
    kl = prepared.sub_llms[0].public_kl
    assert kl["aligned"] < kl["quantized"]

    bundle = Bundle.open(settings.run_dir / "bundle")
    spec = bundle.manifest.lora
    tensors = random_lora(spec, 21)
    master = {item.name: tensors[item.name] for item in spec.adapter}
    finish(
        settings, BlobStore(settings.run_dir / "blobs").put(delta.to_bytes(master)), prepared.sub_llms[0].emulator_view
    )
    export(settings, tmp_path / "adapter")
    data = settings.eval_data
    assert data is not None
    reported = evaluate_path(tmp_path / "adapter", data)

    full: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    plugged: Any = PeftModel.from_pretrained(full, str(tmp_path / "adapter")).eval()
    held = {name for name, _ in plugged.named_parameters() if ".lora_" in name}
    assert len(held) == len(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    questions = read_questions(data, settings.prompt, settings.completion)
    tokenizer = SampleTokenizer(model / "tokenizer.json", 2)
    total, count = 0.0, 0
    for question in questions:
        sample = tokenizer.sample(question.prompt, question.completion)
        assert sample is not None
        with torch.no_grad():
            logs = plugged(torch.tensor([sample.ids])).logits[0].double().log_softmax(-1)
        for at in range(sample.start, len(sample.ids)):
            total, count = total - float(logs[at - 1, sample.ids[at]]), count + 1
    assert reported.loss["plug_in"] == pytest.approx(total / count, rel=1e-4)

    export(settings, tmp_path / "merged", merge=True)
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer.encode("Say the cat: yes")])
    with torch.no_grad():
        ours, theirs = merged(ids).logits.log_softmax(-1), plugged(ids).logits.log_softmax(-1)
    assert float((ours - theirs).abs().mean()) < 0.05  # merged weights are rounded to bf16
