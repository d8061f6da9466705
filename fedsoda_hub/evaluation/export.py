"""The adapter LoRA as a PEFT adapter for the full LLM, and what judges it: `export` and `evaluate`.

Runs in a process without sockets. The hub may be running: only finished blobs are read.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load, load_file, save
from torch import Tensor

from fedsoda_edge.data.samples import SampleTokenizer
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model import delta, lora
from fedsoda_edge.model.bundle import Bundle, peft_config
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.ports.disk import BlobStore, write_durably, write_durably_json
from fedsoda_edge.protocol.manifest import LayerPlan, LoRASpec
from fedsoda_edge.protocol.template import TextTemplate
from fedsoda_hub.evaluation.evaluator import Evaluator, Judged, read_questions, summary
from fedsoda_hub.preparation.full_llm import open_full_llm, pick_device
from fedsoda_hub.preparation.prepare import bundle_of
from fedsoda_hub.run.ledger import Outcome, read_outcome
from fedsoda_hub.settings.run import RunSettings, read_settings
from fedsoda_hub.settings.tables import Task

KEPT_BORDER_BYTES = 256 << 20  # of evaluation data, between two evaluations of a run

Report = Callable[[int, int], None]


def export(settings: RunSettings, directory: Path, *, merge: bool = False) -> dict[str, Any]:
    """Write the PEFT adapter, or with `merge` a Transformers checkpoint of the full LLM with it merged in.

    Raises:
        UsageProblem: no round has closed yet, or `directory` holds something that is not an export.
    """
    outcome = read_outcome(settings.run_dir, settings.path)
    bundle = bundle_of(settings.run_dir, outcome.manifest)
    spec, family, manifest = bundle.manifest.lora, bundle.family, bundle.manifest
    tensors = load(BlobStore(settings.run_dir / "blobs").get(outcome.master))
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
        "run_file": os.path.relpath(settings.path, directory),
        "seed": settings.seed,
        "template": {"prompt": settings.task.prompt, "completion": settings.task.completion},
        "task": msgspec.to_builtins(msgspec.structs.replace(settings.task, eval_data=None)),
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


def judged_models(
    bundle: Bundle,
    source: Checkpoint,
    adapter: dict[str, Tensor],
    emulator: dict[str, Tensor],
    none: dict[str, Tensor] | None = None,
) -> dict[str, Judged]:
    """full: untouched. sub_llm: with the trained LoRA of its layers. plug_in: full with all of it.

    Args:
        adapter: of every layer that any sub-LLM of the run trained.
        none: the empty emulator LoRA of the full model; the same object again finds its border states again.
    """
    plan, spec = bundle.plan, bundle.manifest.lora
    full = _full_models(source, plan, spec, adapter, {} if none is None else none)
    return {
        "full": full["full"],
        "sub_llm": Judged(bundle, plan.swept, plan.resident, spec, emulator, lora.on(plan.adapter, adapter)),
        "plug_in": full["plug_in"],
    }


def _full_models(
    source: Checkpoint, plan: LayerPlan, spec: LoRASpec, adapter: dict[str, Tensor], none: dict[str, Tensor]
) -> dict[str, Judged]:
    """Both with the same object `none`, so that they share the border's states."""
    below, above = range(plan.border), range(plan.border, plan.num_layers)
    return {
        "full": Judged(source, below, above, spec, none, {}),
        "plug_in": Judged(source, below, above, spec, none, adapter),
    }


def _evaluator(
    source: Checkpoint, data: Path, task: Task, seed: int, device: str, dtype: str, report: Report | None
) -> Evaluator:
    device, compute_dtype = pick_device(device, dtype)
    return Evaluator(
        read_questions(data, TextTemplate(task.prompt), TextTemplate(task.completion), task.shots, seed),
        SampleTokenizer(source.path / "tokenizer.json", source.fields.get("eos_token_id")),
        choices=task.choices,
        compute_dtype=torch.float32 if _is_small(source) else compute_dtype,
        device=device,
        report=report,
    )


def _is_small(source: Checkpoint) -> bool:
    """Below 1 B parameters accuracy is taken in fp32 (contract.md)."""
    layer = sum(tensor.numel() for tensor in source.layer(0).values())
    return layer * source.num_layers + 2 * source.embedding().numel() < 10**9


class RunJudge:
    """Judges a run on its data, again after later rounds: what the full model says below the adapter stays the same."""

    def __init__(self, settings: RunSettings, data: Path, report: Report | None = None) -> None:
        self._run_dir = settings.run_dir
        self._bundles: dict[str, Bundle] = {}  # by manifest: their files are verified once
        self._source = open_full_llm(settings)
        self._none: dict[str, Tensor] = {}
        self.evaluator = _evaluator(
            self._source, data, settings.task, settings.seed, settings.device, settings.dtype, report
        )

    def of(self, run_dir: Path) -> RunJudge:
        """The same questions to another run of the same full LLM; what that says below the adapter is kept for all."""
        other = copy.copy(self)
        other._run_dir, other._bundles = run_dir, {}
        return other

    def models(self, master: str, emulator_view: str, manifest: str) -> dict[str, Judged]:
        """full, sub_llm and plug_in with these blobs of the run."""
        blobs = BlobStore(self._run_dir / "blobs")
        if manifest not in self._bundles:
            self._bundles[manifest] = bundle_of(self._run_dir, manifest)
        bundle = self._bundles[manifest]
        emulator = delta.from_bytes(blobs.get(emulator_view), bundle.manifest.lora.emulator)
        return judged_models(bundle, self._source, load(blobs.get(master)), emulator, self._none)

    def judged(self, adapter: dict[str, Tensor], emulator: dict[str, Tensor]) -> dict[str, Judged]:
        """The same with these tensors, and the layers that the run began with."""
        return judged_models(Bundle.open(self._run_dir / "bundle"), self._source, adapter, emulator, self._none)

    def judge(self, outcome: Outcome, samples: int = 0) -> dict[str, Any]:
        """The three models after the rounds of `outcome`."""
        models = self.models(outcome.master, outcome.emulator_view, outcome.manifest)
        result = summary(self.evaluator, models, samples)
        self.forget(models)
        return result

    def forget(self, models: dict[str, Judged]) -> None:
        """Free the border states of the sub-LLM; those of the full model too where they are many."""
        self.evaluator.forget(models["sub_llm"])
        if self.evaluator.border_bytes > KEPT_BORDER_BYTES:
            self.evaluator.forget(models["full"])


def check_evaluation(settings: RunSettings) -> None:
    """Whether the run's evaluation data can be judged: known at the start, not after the rounds.

    Raises:
        DataProblem: rows without the template's columns, an empty file, a question longer than the model's positions.
    """
    if settings.eval_data is not None:
        source = open_full_llm(settings)
        task = settings.task
        evaluator = _evaluator(source, settings.eval_data, task, settings.seed, settings.device, settings.dtype, None)
        evaluator.check_lengths(int(source.fields["max_position_embeddings"]))


def evaluate_export(
    directory: Path, data: Path, report: Report | None = None, model: str | None = None, samples: int = 0
) -> dict[str, Any]:
    """Judge an export wherever it lies; the sub-LLM too where the run it came from is still beside it, else None.

    Args:
        model: the full LLM; None: as the export says, by hub id or in the run's own directory.

    Raises:
        UsageProblem: this is no export, a merged one, or the full LLM is not to be found.
    """
    if not (directory / "fedsoda.json").exists():
        what = "has no fedsoda.json, so it is no export" if directory.is_dir() else "is not there"
        raise UsageProblem(f"{directory} {what}; name a RUN.toml or a directory that `fedsoda-hub export` wrote")
    about = json.loads((directory / "fedsoda.json").read_text(encoding="utf-8"))
    if about["merged"]:
        raise UsageProblem(f"{directory} is a merged checkpoint; evaluate the run or the unmerged export")
    run_file = (directory / about["run_file"]).resolve()
    settings = read_settings(run_file) if run_file.is_file() else None
    if model is not None:
        source = Checkpoint.open(model)
    elif settings is not None:
        source = open_full_llm(settings)
    elif "/" in about["model"]:
        source = Checkpoint.open(about["model"], revision=about["model_revision"])
    else:
        raise UsageProblem(
            f"{directory} belongs to the full model {about['model']!r}, and its run file {run_file} is not there "
            "to say where that lies; name it with --model DIRECTORY"
        )
    plan = msgspec.convert(about["plan"], LayerPlan)
    if source.num_layers != plan.num_layers:
        raise UsageProblem(f"{source.name} has {source.num_layers} layers, the export is for {plan.num_layers}")
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    prefix = f"base_model.model.{source.family.layers}."
    adapter = {
        "layers." + name.removeprefix(prefix).removesuffix(".weight"): tensor
        for name, tensor in load_file(directory / "adapter_model.safetensors").items()
    }
    spec = LoRASpec(config["r"], config["lora_alpha"], (), (), ())
    models: dict[str, Judged] = _full_models(source, plan, spec, adapter, {})
    if settings is not None:
        outcome = read_outcome(settings.run_dir, settings.path)
        bundle = bundle_of(settings.run_dir, outcome.manifest)
        blob = BlobStore(settings.run_dir / "blobs").get(outcome.emulator_view)
        models = judged_models(bundle, source, adapter, delta.from_bytes(blob, bundle.manifest.lora.emulator))
    task = msgspec.convert(about["task"], Task)
    device, dtype = (settings.device, settings.dtype) if settings else ("auto", "bfloat16")
    result = summary(_evaluator(source, data, task, about["seed"], device, dtype, report), models, samples)
    if settings is None:
        for figure in ("accuracy", "loss", "auc"):
            result[figure]["sub_llm"] = None
    return result


def evaluate_path(
    run_or_export: Path, data: Path, report: Report | None = None, model: str | None = None, samples: int = 0
) -> dict[str, Any]:
    """`fedsoda-hub evaluate`: a RUN.toml, or the directory of an export."""
    if run_or_export.is_file():
        settings = read_settings(run_or_export)
        outcome = read_outcome(
            settings.run_dir, settings.path
        )  # says what is missing, where a bundle would only say that it is
        return RunJudge(settings, data, report).judge(outcome, samples)
    return evaluate_export(run_or_export, data, report, model, samples)
