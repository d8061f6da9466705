"""The adapter LoRA as a PEFT adapter for the full LLM, and what judges it: `export` and `evaluate`.

Runs in a process without sockets. The hub may be running: only finished blobs are read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fedsoda_edge.data import SampleTokenizer
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model import delta
from fedsoda_edge.model.bundle import Bundle, peft_config, write_durably_json
from fedsoda_edge.model.streaming import Checkpoint
from fedsoda_edge.ports.disk import BlobStore, write_durably
from fedsoda_hub.config import RunSettings, read_settings
from fedsoda_hub.evaluation import Evaluator, Judged, read_questions, summary
from fedsoda_hub.ledger import Outcome, read_outcome
from fedsoda_hub.prepare import pick_device

Report = Callable[[int, int], None]


def export(settings: RunSettings, directory: Path, *, merge: bool = False) -> dict[str, Any]:
    """Write the PEFT adapter, or with `merge` a Transformers checkpoint of the full LLM with it merged in.

    Raises:
        UsageProblem: no round has closed yet, or `directory` holds something that is not an export.
    """
    outcome = read_outcome(settings.run_dir)
    bundle = Bundle.open(settings.run_dir / "bundle")
    spec, family, manifest = bundle.manifest.lora, bundle.family, bundle.manifest
    tensors = delta.from_bytes(BlobStore(settings.run_dir / "blobs").get(outcome.master), spec.adapter)
    if directory.exists() and any(directory.iterdir()) and not (directory / "fedsoda.json").exists():
        raise UsageProblem(f"{directory} is not empty and no export of ours; name a new directory with --to")
    temporary = directory.with_name(f"{directory.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if merge:
        _write_merged(settings, bundle, tensors, temporary)
    else:
        renamed, modules = {}, set()
        for name, tensor in tensors.items():
            module, _, leaf = name.rpartition(".")
            path = family.layers + module.removeprefix("layers")
            modules.add(path)
            renamed[f"base_model.model.{path}.{leaf}.weight"] = tensor.float().contiguous()
        write_durably_json(temporary / "adapter_config.json", peft_config(spec, sorted(modules), manifest.source))
        write_durably(temporary / "adapter_model.safetensors", save(dict(sorted(renamed.items())), {"format": "pt"}))
    about = {
        "schema": 1,
        "run": settings.name,
        "rounds": outcome.rounds,
        "model": settings.model if "/" in manifest.source else manifest.source,
        "model_revision": manifest.source_revision,
        "bundle": os.path.relpath(settings.run_dir / "bundle", directory),
        "run_file": os.path.relpath(settings.path, directory),
        "template": {"prompt": settings.task.prompt, "completion": settings.task.completion},
        "choices": settings.task.choices,
        "plan": msgspec.to_builtins(bundle.plan),
        "evaluation": outcome.evaluation,
        "merged": merge,
    }
    write_durably_json(temporary / "fedsoda.json", about)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(temporary, directory)
    return {"export": str(directory.resolve()), "rounds": outcome.rounds, "merged": merge}


def _write_merged(settings: RunSettings, bundle: Bundle, tensors: dict[str, Tensor], directory: Path) -> None:
    """W + (alpha / r) B A in fp32, rounded once to the checkpoint's dtype."""
    source = Checkpoint.open(settings.model, relative_to=settings.directory)
    family = source.family
    scale = bundle.manifest.lora.scale
    weights = {f"{family.embedding}.weight": source.embedding()}
    weights |= {f"{family.norm}.{name}": tensor for name, tensor in source.norm().items()}
    if not source.fields.get("tie_word_embeddings"):
        weights[f"{family.head}.weight"] = source.head()
    for number in range(source.num_layers):
        for name, tensor in source.layer(number).items():
            key = f"layers.{number}.{name.removesuffix('.weight')}"
            if f"{key}.lora_A" in tensors:
                step = scale * tensors[f"{key}.lora_B"] @ tensors[f"{key}.lora_A"]
                tensor = (tensor.float() + step).to(tensor.dtype)
            weights[f"{family.layers}.{number}.{name}"] = tensor
    write_durably(directory / "model.safetensors", save(dict(sorted(weights.items())), {"format": "pt"}))
    for file in (source.path / "config.json", source.path / "generation_config.json", *source.tokenizer_files):
        if file.exists():
            shutil.copyfile(file, directory / file.name)


def judged_models(
    settings: RunSettings, bundle: Bundle, source: Checkpoint, adapter: dict[str, Tensor], emulator: dict[str, Tensor]
) -> dict[str, Judged]:
    """full: untouched. sub_llm: with trained LoRA. plug_in: full with the adapter LoRA."""
    plan, spec = bundle.plan, bundle.manifest.lora
    none: dict[str, Tensor] = {}
    return {
        "full": Judged(source, plan.emulator, plan.adapter, spec, none, {}),
        "sub_llm": Judged(bundle, plan.sub_emulator, plan.adapter, spec, emulator, adapter),
        "plug_in": Judged(source, plan.emulator, plan.adapter, spec, none, adapter),
    }


def evaluate_run(
    settings: RunSettings, outcome: Outcome, data: Path, report: Report | None = None, adapter: Path | None = None
) -> dict[str, Any]:
    """Judge the three models of a run on `data`; `adapter` names an export's tensors instead of the run's."""
    bundle = Bundle.open(settings.run_dir / "bundle")
    source = Checkpoint.open(settings.model, relative_to=settings.directory)
    blobs = BlobStore(settings.run_dir / "blobs")
    spec = bundle.manifest.lora
    if adapter is None:
        trained = delta.from_bytes(blobs.get(outcome.master), spec.adapter)
    else:
        prefix = f"base_model.model.{source.family.layers}."
        trained = {
            "layers." + name.removeprefix(prefix).removesuffix(".weight"): tensor
            for name, tensor in load_file(adapter).items()
        }
    emulator = delta.from_bytes(blobs.get(outcome.emulator_view), spec.emulator)
    device, compute_dtype = pick_device(settings.device)
    evaluator = Evaluator(
        read_questions(data, settings.prompt, settings.completion),
        SampleTokenizer(source.path / "tokenizer.json", source.fields.get("eos_token_id")),
        choices=settings.task.choices,
        compute_dtype=torch.float32 if _is_small(source) else compute_dtype,
        device=device,
        report=report,
    )
    return summary(evaluator, judged_models(settings, bundle, source, trained, emulator))


def _is_small(source: Checkpoint) -> bool:
    """Below 1 B parameters accuracy is taken in fp32 (contract.md)."""
    layer = sum(tensor.numel() for tensor in source.layer(0).values())
    return layer * source.num_layers + 2 * source.embedding().numel() < 10**9


def evaluate_path(run_or_export: Path, data: Path, report: Report | None = None) -> dict[str, Any]:
    """`fedsoda-hub evaluate`: a RUN.toml, or the directory of an export, which names its run.

    Raises:
        UsageProblem: it is neither, or the export's run is not there any more.
    """
    if run_or_export.is_file():
        settings = read_settings(run_or_export)
        return evaluate_run(settings, read_outcome(settings.run_dir), data, report)
    about_file = run_or_export / "fedsoda.json"
    if not about_file.exists():
        raise UsageProblem(f"{run_or_export} is neither a RUN.toml nor an export (it has no fedsoda.json)")
    about = json.loads(about_file.read_text(encoding="utf-8"))
    if about["merged"]:
        raise UsageProblem(f"{run_or_export} is a merged checkpoint; evaluate the run or the unmerged export")
    run_file = (run_or_export / about["run_file"]).resolve()
    settings = read_settings(run_file)
    return evaluate_run(
        settings, read_outcome(settings.run_dir), data, report, run_or_export / "adapter_model.safetensors"
    )
