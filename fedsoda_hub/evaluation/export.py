"""Export what a run trained for the full LLM: as a PEFT adapter, or merged into a checkpoint.

It runs in a process without sockets. The hub may be running: only finished blobs are read. Judging an export is
`judge.py`'s.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec
from safetensors.torch import load, save
from torch import Tensor

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.bundle import Bundle, peft_config
from fedsoda_edge.ports.disk import write_durably, write_durably_json
from fedsoda_hub.preparation.full_llm import open_full_llm
from fedsoda_hub.preparation.prepare import bundle_of
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import read_outcome
from fedsoda_hub.settings.run import RunSettings


class Exported(msgspec.Struct, frozen=True):
    """The report of `export --json`: the directory, the rounds that it holds, and whether it is merged."""

    export: str
    rounds: int
    merged: bool


def export(settings: RunSettings, directory: Path, *, merge: bool = False) -> Exported:
    """Write the PEFT adapter, or with `merge` a Transformers checkpoint of the full LLM with it merged in.

    Raises:
        UsageProblem: no round has closed yet, or `directory` holds something that is not an export.
        DiskFull: the disk has no space left; `directory` is as it was.
    """
    outcome = read_outcome(settings.run_dir, settings.path)
    bundle = bundle_of(settings.run_dir, outcome.manifest)
    spec, family, manifest = bundle.manifest.lora, bundle.family, bundle.manifest
    tensors = load(RunDirectory(settings.run_dir).blobs.get(outcome.master))
    if directory.exists() and any(directory.iterdir()) and not (directory / "fedsoda.json").exists():
        raise UsageProblem(f"{directory} is not empty and is not an export; name a new directory with --to")
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
        "run_file": os.path.relpath(settings.path, directory),
        "seed": settings.seed,
        "template": {"prompt": settings.task.prompt, "completion": settings.task.completion},
        "task": msgspec.to_builtins(msgspec.structs.replace(settings.task, eval_data=None)),
        "plan": msgspec.to_builtins(bundle.plan),
        "evaluation": msgspec.to_builtins(outcome.evaluation),
        "merged": merge,
    }
    write_durably_json(temporary / "fedsoda.json", about)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(temporary, directory)
    return Exported(export=str(directory.resolve()), rounds=outcome.rounds, merged=merge)


def _write_merged(settings: RunSettings, bundle: Bundle, tensors: dict[str, Tensor], directory: Path) -> None:
    """Write W + (alpha / r) B A, computed in fp32 and rounded once to the checkpoint's dtype."""
    source = open_full_llm(settings)
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
