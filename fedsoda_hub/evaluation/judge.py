"""Judge a run or an export: the full model untouched, the sub-LLM, and the full model with the adapter plugged in.

Here the adapter meets the full model. It runs in a process without sockets; the hub may be running, since only finished
blobs are read. How a model answers is `evaluator.py`'s.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import torch
from safetensors.torch import load, load_file
from torch import Tensor

from fedsoda_edge.data.chat import ChatTemplate
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model import delta, lora
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.protocol.manifest import LayerPlan, LoRASpec
from fedsoda_edge.protocol.template import TextTemplate
from fedsoda_hub.evaluation.evaluator import Evaluator, JudgedModel, QuestionsDone, Verdict
from fedsoda_hub.evaluation.questions import Question, read_questions
from fedsoda_hub.federation.jobs import EvaluateResult
from fedsoda_hub.preparation.full_llm import open_full_llm
from fedsoda_hub.preparation.prepare import bundle_of
from fedsoda_hub.preparation.running import pick_device
from fedsoda_hub.preparation.tokenizing import check_tokenizer, tokenizer_of
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.outcome import Outcome, read_outcome, rounds_there
from fedsoda_hub.settings.run import RunSettings, read_settings
from fedsoda_hub.settings.tables import Task

KEPT_BORDER_BYTES = 1 << 30  # border states that stay in memory between two evaluations of a run
SMALL = 10**9  # parameters, below which a model is judged in fp32


# --- models ------------------------------------------------------------------------------------------------


def judged_models(
    bundle: Bundle,
    source: Checkpoint,
    adapter: dict[str, Tensor],
    emulator: dict[str, Tensor],
) -> dict[str, JudgedModel]:
    """Make the models to judge: full, untouched; sub_llm, with the trained LoRA of its layers; plug_in, the full model
    with all of that LoRA.

    Args:
        adapter: LoRA of every layer that any sub-LLM of the run trained.
        emulator: LoRA of the sub-LLM's emulator.
    """
    plan, spec = bundle.plan, bundle.manifest.lora
    full = _full_models(source, plan, spec, adapter)
    return {
        "full": full["full"],
        "sub_llm": JudgedModel(bundle, plan.swept, plan.resident, spec, emulator, lora.on(plan.adapter, adapter)),
        "plug_in": full["plug_in"],
    }


def _full_models(
    source: Checkpoint, plan: LayerPlan, spec: LoRASpec, adapter: dict[str, Tensor]
) -> dict[str, JudgedModel]:
    """Make full and plug_in."""
    below, above = range(plan.border), range(plan.border, plan.num_layers)
    return {
        "full": JudgedModel(source, below, above, spec, {}, {}),
        "plug_in": JudgedModel(source, below, above, spec, {}, adapter),
    }


# --- verdicts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """The verdict on each model, by its name, and the questions that they answered. right_shares: as in `Evaluator`."""

    verdicts: Mapping[str, Verdict]
    questions: Sequence[Question]
    right_shares: Mapping[str, float]

    @property
    def result(self) -> EvaluateResult:
        """The figures, as the ledger keeps them."""
        return EvaluateResult(
            accuracy={name: verdict.accuracy for name, verdict in self.verdicts.items()},
            loss={name: verdict.loss for name, verdict in self.verdicts.items()},
            auc={name: verdict.auc for name, verdict in self.verdicts.items()},
            mean_rank={name: verdict.mean_rank for name, verdict in self.verdicts.items()},
            shares={name: verdict.shares for name, verdict in self.verdicts.items()},
            right_shares=dict(self.right_shares),
            num_examples=len(self.questions),
        )

    def samples(self, count: int) -> tuple[dict[str, str], ...]:
        """List the first `count` questions with each model's answer; few-shot examples are left out."""
        return tuple(
            {
                "prompt": question.prompt.removeprefix(question.examples),
                "completion": question.completion,
                **{name: verdict.chosen[at] for name, verdict in self.verdicts.items()},
            }
            for at, question in enumerate(self.questions[:count])
        )


class Evaluation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The report of `evaluate --json`, by model; None for a model that could not be judged."""

    accuracy: dict[str, float | None]
    loss: dict[str, float | None]
    auc: dict[str, float | None]
    mean_rank: dict[str, float | None]
    shares: dict[str, dict[str, float] | None]
    right_shares: dict[str, float]
    num_examples: int
    samples: tuple[dict[str, str], ...] = ()


def judge(evaluator: Evaluator, models: Mapping[str, JudgedModel], report: QuestionsDone | None = None) -> Judgement:
    """Let each model answer, and judge its answers.

    Raises:
        DataProblem: a question with its answer is longer than a model's positions.
    """
    verdicts = {name: evaluator.verdict(model, report) for name, model in models.items()}
    return Judgement(verdicts, evaluator.questions, evaluator.right_shares)


def _evaluation(judgement: Judgement, samples: int, unjudged: Sequence[str] = ()) -> Evaluation:
    result, nothing = judgement.result, dict.fromkeys(unjudged)
    return Evaluation(
        accuracy={**result.accuracy, **nothing},
        loss=result.loss | nothing,
        auc=result.auc | nothing,
        mean_rank=result.mean_rank | nothing,
        shares={**result.shares, **nothing},
        right_shares=result.right_shares,
        num_examples=result.num_examples,
        samples=judgement.samples(samples),
    )


# --- a run -------------------------------------------------------------------------------------------------


class Reached(Protocol):
    """The point that a run has reached, by digests of its blobs: an `Outcome`, or the job that asks for an evaluation."""

    @property
    def master(self) -> str: ...
    @property
    def emulator_view(self) -> str: ...
    @property
    def manifest(self) -> str: ...


class RunJudge:
    """A judge of a run on its data, which may be asked again after later rounds.

    The full model's border states stay the same and are computed once, the sub-LLM's until it is aligned again.

    Raises:
        DataProblem: the rows cannot be judged.
    """

    def __init__(self, settings: RunSettings, data: Path) -> None:
        self._run_dir = settings.run_dir
        self._bundles: dict[str, Bundle] = {}  # by manifest, so that their files are verified once
        self._source = open_full_llm(settings)
        self.evaluator = _evaluator(self._source, data, settings.task, settings.seed, settings.device, settings.dtype)

    def of(self, run_dir: Path) -> RunJudge:
        """Make a judge with the same questions for another run of the same full LLM.

        Border states are shared: those of the full LLM, and of a sub-LLM between runs with the same manifest.
        """
        other = copy.copy(self)
        other._run_dir = run_dir
        return other

    def models(self, master: str, emulator_view: str, manifest: str) -> dict[str, JudgedModel]:
        """Make full, sub_llm and plug_in from these blobs of the run."""
        blobs = RunDirectory(self._run_dir).blobs
        if manifest not in self._bundles:
            self._bundles[manifest] = bundle_of(self._run_dir, manifest)
        bundle = self._bundles[manifest]
        emulator = delta.from_bytes(blobs.get(emulator_view), bundle.manifest.lora.emulator)
        return judged_models(bundle, self._source, load(blobs.get(master)), emulator)

    def judged(self, adapter: dict[str, Tensor], emulator: dict[str, Tensor]) -> dict[str, JudgedModel]:
        """Make full, sub_llm and plug_in from these tensors and the layers that the run began with."""
        bundle = Bundle.open(RunDirectory(self._run_dir).bundle)
        return judged_models(bundle, self._source, adapter, emulator)

    def judge(self, reached: Reached, report: QuestionsDone | None = None) -> Judgement:
        """Judge the three models after the rounds of `reached`."""
        models = self.models(reached.master, reached.emulator_view, reached.manifest)
        judgement = judge(self.evaluator, models, report)
        self.evaluator.keep(KEPT_BORDER_BYTES)
        return judgement


def check_evaluation(settings: RunSettings) -> None:
    """Check that the run's evaluation data can be judged, so that this is known before the rounds.

    Raises:
        DataProblem: rows lack the template's columns, the file is empty, or a question is longer than the model's
            positions.
        UsageProblem: the model lacks ids that its tokenizer gives.
    """
    if settings.eval_data is not None:
        source, task = open_full_llm(settings), settings.task
        check_tokenizer(source)
        evaluator = _evaluator(source, settings.eval_data, task, settings.seed, settings.device, settings.dtype)
        evaluator.check_lengths(int(source.fields["max_position_embeddings"]))


def _evaluator(source: Checkpoint, data: Path, task: Task, seed: int, device: str, dtype: str) -> Evaluator:
    device, compute_dtype = pick_device(device, dtype)
    return Evaluator(
        read_questions(
            data,
            TextTemplate(task.prompt),
            TextTemplate(task.completion),
            task.shots,
            seed,
            ChatTemplate.read(source.own_tokenizer),
        ),
        tokenizer_of(source),
        choices=task.choices,
        compute_dtype=torch.float32 if _is_small(source) else compute_dtype,
        device=device,
    )


def _is_small(source: Checkpoint) -> bool:
    """Tell whether the model is judged in fp32: below SMALL parameters (docs/methods.md (m12-accuracy))."""
    layer = sum(tensor.numel() for tensor in source.layer(0).values())
    return layer * source.num_layers + 2 * source.embedding().numel() < SMALL


# --- a run or an export, by its path -----------------------------------------------------------------------


def evaluate_path(
    run_or_export: Path, data: Path, report: QuestionsDone | None = None, model: str | None = None, samples: int = 0
) -> Evaluation:
    """Judge a RUN.toml's run, or the export in a directory.

    Args:
        model: the full LLM of an export; None: as the export says.
        samples: how many questions the report lists with each model's answer.

    Raises:
        UsageProblem: the run or export does not exist, or its full LLM is not found.
        DataProblem: the rows cannot be judged.
    """
    if run_or_export.is_file():
        settings = read_settings(run_or_export)
        # Its error says what to do where the run has not got so far; that of a missing bundle would not.
        outcome = read_outcome(settings.run_dir, settings.path, best_by=settings.task.best_by)
        return _evaluation(RunJudge(settings, data).judge(outcome, report), samples)
    return _evaluate_export(run_or_export, data, report, model, samples)


def _evaluate_export(
    directory: Path, data: Path, report: QuestionsDone | None, model: str | None, samples: int
) -> Evaluation:
    """Judge an export wherever it lies, and the sub-LLM too if the export's run is still there."""
    if not (directory / "fedsoda.json").exists():
        what = "has no fedsoda.json, so it is not an export" if directory.is_dir() else "does not exist"
        raise UsageProblem(f"{directory} {what}; name a RUN.toml or a directory that `fedsoda-hub export` wrote")
    about = json.loads((directory / "fedsoda.json").read_text(encoding="utf-8"))
    if about["merged"]:
        raise UsageProblem(
            f"{directory} is a merged checkpoint, which no longer has the adapter by itself; evaluate the RUN.toml, or "
            "export without --merge and evaluate that"
        )
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
            f"{directory} belongs to the full model {about['model']!r}, and the run file {run_file}, which says where "
            "that model lies, does not exist; name the model with --model DIRECTORY"
        )
    plan = msgspec.convert(about["plan"], LayerPlan)
    if source.num_layers != plan.num_layers:
        raise UsageProblem(
            f"{source.name} has {source.num_layers} layers, but the export is for a model of {plan.num_layers}; name "
            "that model with --model DIRECTORY"
        )
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    prefix = f"base_model.model.{source.family.layers}."
    adapter = {
        "layers." + name.removeprefix(prefix).removesuffix(".weight"): tensor
        for name, tensor in load_file(directory / "adapter_model.safetensors").items()
    }
    task = msgspec.convert(about["task"], Task)
    if settings is None:
        spec = LoRASpec(config["r"], config["lora_alpha"], (), (), ())
        models = _full_models(source, plan, spec, adapter)
        evaluator = _evaluator(source, data, task, about["seed"], "auto", "bfloat16")
        return _evaluation(judge(evaluator, models, report), samples, unjudged=("sub_llm",))
    outcome = _of_export(settings, int(about["rounds"]))
    bundle = bundle_of(settings.run_dir, outcome.manifest)
    blob = RunDirectory(settings.run_dir).blobs.get(outcome.emulator_view)
    models = judged_models(bundle, source, adapter, delta.from_bytes(blob, bundle.manifest.lora.emulator))
    evaluator = _evaluator(source, data, task, about["seed"], settings.device, settings.dtype)
    return _evaluation(judge(evaluator, models, report), samples)


def _of_export(settings: RunSettings, rounds: int) -> Outcome:
    """Return what the run had reached when an export of these rounds was written; what it has reached now, where that is gone."""
    if rounds in rounds_there(settings.run_dir):
        return read_outcome(settings.run_dir, settings.path, round_number=rounds)
    return read_outcome(settings.run_dir, settings.path)
