"""The recipes that people use, as arms of a bench: PEFT's QLoRA recipe, and plain LoRA on the adapter, as their guides have them.

What they are compared with is `edge_arms.py`'s.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import random_bundle  # beside this file
import torch
from edge_geometries import ADAPTER_LAYERS, TARGETS, Geometry, samples  # beside this file
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


def _rows(geometry: Geometry) -> list[dict[str, Any]]:
    rows = []
    for sample in samples(geometry):
        ids = torch.tensor(sample.ids)
        labels = ids.clone()
        labels[: sample.start] = -100
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


class _Clock(TrainerCallback):
    """From the end of the first step, which is not counted, to the end of the last."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._step = 0
        self._marks: list[tuple[float, float]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self._step in (0, self._geometry.steps):
            if self._geometry.device != "cpu":
                torch.cuda.synchronize()  # what it was told may not be done yet
            self._marks.append((time.perf_counter(), time.process_time()))
        self._step += 1

    @property
    def spent(self) -> tuple[int, float, float]:
        (began, cpu), (ended, cpu_ended) = self._marks
        return self._geometry.steps * self._geometry.length, ended - began, cpu_ended - cpu


def _recipe(model: Any, directory: Path, geometry: Geometry) -> tuple[int, float, float]:
    """PEFT's documented QLoRA recipe, as it stands in its guides."""
    model = prepare_model_for_kbit_training(model)
    model = get_peft_model(
        model, LoraConfig(r=random_bundle.RANK, lora_alpha=16, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    )
    if geometry.device != "cpu":
        torch.cuda.reset_peak_memory_stats()  # what loading took is not held against it
    clock = _Clock(geometry)
    arguments = TrainingArguments(
        output_dir=str(directory / "trainer"),
        per_device_train_batch_size=1,
        max_steps=geometry.steps + 1,
        use_cpu=geometry.device == "cpu",
        bf16=geometry.device != "cpu",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=True,
        learning_rate=1e-4,
    )
    Trainer(model=model, args=arguments, train_dataset=_rows(geometry), callbacks=[clock]).train()
    _assert_trained(model)
    return clock.spent


def _assert_trained(model: Any) -> None:
    """Stock Linear4bit can lose its gradient without a word (docs/decisions.md (d5-nf4-layer)): such an arm would be quick and wrong."""
    moved = [float(p.detach().norm()) for name, p in model.named_parameters() if "lora_B" in name]
    assert any(moved), "no LoRA tensor moved: the baseline trains nothing"


def _load(directory: Path, geometry: Geometry, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, device_map={"": geometry.device}, **options)


def recipe_sub(directory: Path, geometry: Geometry, _: bool) -> tuple[int, float, float]:
    return _recipe(_load(directory / "model" / "plain", geometry), directory, geometry)


def recipe_full(directory: Path, geometry: Geometry, _: bool) -> tuple[int, float, float]:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=geometry.compute_dtype,
    )
    return _recipe(_load(directory / "model" / "full", geometry, quantization_config=config), directory, geometry)


def plain(directory: Path, geometry: Geometry, _: bool) -> tuple[int, float, float]:
    # Dense, and on a CPU in fp32: below the adapter nothing has a gradient, and there bitsandbytes takes a kernel that is
    # five times as slow on CPUs without AVX512; bf16 is slower still. Its memory is not compared.
    dtype = geometry.compute_dtype
    model = _load(directory / "model" / "plain", geometry, dtype=dtype).dequantize().to(dtype)
    kept = len(geometry.plan.kept)
    adapter = range(kept - ADAPTER_LAYERS, kept)
    names = [
        name
        for name, _ in model.named_modules()
        if name.split(".")[-1] in TARGETS and int(name.split(".")[2]) in adapter
    ]
    model = get_peft_model(
        model, LoraConfig(r=random_bundle.RANK, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM")
    )
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    rows, clock = _rows(geometry), _Clock(geometry)
    for step in range(geometry.steps + 1):
        row = {name: value[None].to(geometry.device) for name, value in rows[step % len(rows)].items()}
        model(**row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.on_step_end()
    _assert_trained(model)
    return clock.spent
