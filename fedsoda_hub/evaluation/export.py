"""Export what a run trained for the full LLM: as a PEFT adapter, or merged into a checkpoint.

It runs in a process without sockets. The hub may be running: only finished blobs are read. Judging an export is
`judge.py`'s.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

import msgspec
from safetensors.torch import load, save
from torch import Tensor

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.bundle import peft_config
from fedsoda_edge.model.foreign_files import read_json
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.ports.disk import write_durably, write_durably_json
from fedsoda_hub.preparation.checkpoint_writer import CheckpointWriter, check_room, new_directory, write_config
from fedsoda_hub.preparation.full_llm import open_full_llm
from fedsoda_hub.preparation.prepare import bundle_of
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.outcome import read_outcome
from fedsoda_hub.settings.run import RunSettings


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """The report of `export --json`.

    export: the directory. round: the last of the `rounds` that it holds. kept: whether it is the last or the best round of
    the run, or the one that was asked for. metric, value: of the plug-in after that round, where it was evaluated.
    """

    export: str
    rounds: int
    merged: bool
    round: int
    kept: Literal["last", "best", "asked"]
    metric: str | None
    value: float | None


def export(settings: RunSettings, directory: Path, *, merge: bool = False, round_number: int | None = None) -> Exported:
    """Write the PEFT adapter, or with `merge` a Transformers checkpoint of the full LLM with it merged in.

    Args:
        round_number: the round that is exported; None: the one that the run keeps.

    Raises:
        UsageProblem: no round has closed yet, the round is not there, or `directory` holds something that is not an export.
        DiskFull: the disk has no space left; `directory` is as it was.
    """
    best_by = settings.task.best_by
    outcome = read_outcome(settings.run_dir, settings.path, best_by=best_by, round_number=round_number)
    bundle = bundle_of(settings.run_dir, outcome.manifest)
    spec, family, manifest = bundle.manifest.lora, bundle.family, bundle.manifest
    tensors = load(RunDirectory(settings.run_dir).blobs.get(outcome.master))
    _check_replaced(settings, directory)
    source = open_full_llm(settings) if merge else None
    if source is not None:
        check_room(directory, source.bytes)
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
        "evaluated_round": outcome.evaluated_round,
        "merged": merge,
    }
    with new_directory(directory, replaces=True) as temporary:
        if source is not None:
            _write_merged(source, spec.scale, tensors, temporary)
        else:
            renamed, modules = {}, set()
            for name, tensor in tensors.items():
                module, _, leaf = name.rpartition(".")
                path = family.layers + module.removeprefix("layers")
                modules.add(path)
                renamed[f"base_model.model.{path}.{leaf}.weight"] = tensor.float().contiguous()
            write_durably_json(temporary / "adapter_config.json", peft_config(spec, sorted(modules), manifest.source))
            weights = save(dict(sorted(renamed.items())), {"format": "pt"})
            write_durably(temporary / "adapter_model.safetensors", weights)
        write_durably_json(temporary / "fedsoda.json", about)
    metric = settings.task.metric
    value = outcome.figure(metric)
    return Exported(
        export=str(directory.resolve()),
        rounds=outcome.rounds,
        merged=merge,
        round=outcome.rounds,
        kept="asked" if round_number is not None else "last" if best_by is None else "best",
        metric=None if value is None else metric,
        value=value,
    )


def _check_replaced(settings: RunSettings, directory: Path) -> None:
    """Refuse to replace what is not an export, and the model that the export is for.

    Raises:
        UsageProblem: `directory` holds something else.
    """
    if not directory.exists():
        return
    if (settings.directory / Path(settings.model).expanduser()).resolve() == directory.resolve():
        raise UsageProblem(f"{directory} is the model of this run itself; name a new directory with --to")
    if not directory.is_dir() or (any(directory.iterdir()) and not (directory / "fedsoda.json").exists()):
        raise UsageProblem(f"{directory} is not empty and is not an export; name a new directory with --to")


def _write_merged(source: Checkpoint, scale: float, tensors: dict[str, Tensor], directory: Path) -> None:
    """Write W + (alpha / r) B A, computed in fp32 and rounded once to the checkpoint's dtype."""
    family = source.family
    writer = CheckpointWriter(directory)
    writer.add(f"{family.embedding}.weight", source.embedding())
    for number in range(source.num_layers):
        for name, tensor in source.layer(number).items():
            key = f"layers.{number}.{name.removesuffix('.weight')}"
            if f"{key}.lora_A" in tensors:
                step = scale * tensors[f"{key}.lora_B"] @ tensors[f"{key}.lora_A"]
                tensor = (tensor.float() + step).to(tensor.dtype)
            writer.add(f"{family.layers}.{number}.{name}", tensor)
    for name, tensor in source.norm().items():
        writer.add(f"{family.norm}.{name}", tensor)
    if not source.fields.get("tie_word_embeddings"):
        writer.add(f"{family.head}.weight", source.head())
    writer.finish()
    config = read_json(source.path / "config.json")
    for key in ("torch_dtype", "transformers_weights"):
        config.pop(key, None)
    config["dtype"] = str(source.dtype).removeprefix("torch.")
    config["tie_word_embeddings"] = bool(source.fields.get("tie_word_embeddings"))
    write_config(directory, config)
    for file in (source.path / "generation_config.json", *source.tokenizer_files):
        if file.exists():
            shutil.copyfile(file, directory / file.name)
