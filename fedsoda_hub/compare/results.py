"""Say what came of a cell of a comparison: answers after its rounds, bytes, and what an edge paid."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.protocol.manifest import LoRASpec
from fedsoda_hub.compare.settings import Cell, Comparison
from fedsoda_hub.evaluation.evaluator import Evaluator, Judged
from fedsoda_hub.evaluation.export import RunJudge
from fedsoda_hub.federation.records import Prepared, RoundClosed
from fedsoda_hub.plan import predict
from fedsoda_hub.preparation.full_llm import open_full_llm
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import opened
from fedsoda_hub.settings.run import RunSettings

Result = dict[str, Any]
MAX_LOSS = 1e4  # nats; of a model that says no number


class Results:
    """The judges of one comparison. alive: called wherever judging says how far it is, and may raise."""

    def __init__(self, comparison: Comparison, out: Path, alive: Callable[..., None]) -> None:
        self._comparison = comparison
        self._out = out
        self._alive = alive
        self._judges: dict[str, RunJudge] = {}

    def of_cell(self, cell: Cell, settings: RunSettings) -> Result:
        """Judge a run that is over, after its rounds that are asked for, and add what it cost."""
        with opened(RunDirectory(settings.run_dir)) as ledger:
            records, traffic, state = ledger.records(), ledger.traffic(), ledger.replay()
        largest = state.largest
        closed = [record for record in records if isinstance(record, RoundClosed)]
        judge, every = self.judge(settings), self._comparison.compare.eval_every
        rounds: list[Result] = []
        for record in closed:
            is_last = record.round == settings.rounds.count
            answered: Result | None = None
            if is_last or (every and record.round % every == 0 and cell.alone is None):
                self._alive()
                models = judge.models(record.master, largest.emulator.digest, largest.manifest)
                answered = answered_by(judge.evaluator, models["plug_in"])
            sizes = [(up, down) for _, number, up, down in traffic if number == record.round]
            rounds.append(
                {
                    "round": record.round,
                    "master": record.master,
                    "accuracy": None if answered is None else share(answered),
                    "bytes_up": sum(up for up, _ in sizes),
                    "bytes_down": sum(down for _, down in sizes),
                }
            )
        result: Result = {
            "cell": str(cell),
            "edges": settings.rounds.min_edges,
            "rounds": rounds,
            "answered": {"plug_in": answered},
        }
        if cell.alone is None:
            result["answered"]["sub_llm"] = answered_by(judge.evaluator, models["sub_llm"])
            result["public_kl"] = next(record.public_kl for record in records if isinstance(record, Prepared))
            result["costs"] = self._costs(settings)
        judge.forget(models)
        return result

    def judge(self, settings: RunSettings) -> RunJudge:
        """Return the run's judge; questions and the full model's border states are shared by all cells that ask alike."""
        seed = settings.seed if settings.task.shots else 0
        about = [settings.model, settings.dtype, settings.device, msgspec.to_builtins(settings.task), seed]
        key = json.dumps(about)
        if key not in self._judges:
            self._judges[key] = RunJudge(settings, self._out / "eval.jsonl", self._alive)
        return self._judges[key].of(settings.run_dir)

    def _costs(self, settings: RunSettings) -> Result:
        """Say what an edge pays: of the bundle, by the formulas of `plan`, and as it was seen."""
        bundle, source = Bundle.open(RunDirectory(settings.run_dir).bundle), open_full_llm(settings)
        dtype = str(source.dtype).removeprefix("torch.")
        plan = predict(source.family, source.fields, dtype, bundle.plan, settings)
        trained: dict[tuple[str, int], Result] = {}
        planned, measured = [], []
        for path in sorted((settings.directory / "events").iterdir()):
            for event in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
                if event.get("event") == "trained":
                    trained[path.stem, event["round"]] = event
                elif event.get("event") == "memory":
                    planned.append(next(part["bytes"] for part in event["parts"] if part["part"] == "peak"))
                elif event.get("worker_peak_rss_bytes"):
                    measured.append(event["worker_peak_rss_bytes"])
        flop = plan["ours"]["gflop_per_token"]
        tokens = _mean([event["num_tokens"] for event in trained.values()])
        return {
            "trainable": _count(bundle.manifest.lora),
            "parameters_per_round": plan["paper"]["parameters_per_round"],
            "model_bytes": sum(file.bytes for file in bundle.manifest.files),
            "edge_memory_bytes": max(planned),
            "edge_peak_rss_bytes": max(measured, default=None),
            "gflop_per_edge_round": flop["cached"] * tokens,
            "seconds_per_edge_round": _mean([event["seconds"] for event in trained.values()]),
        }


def answered_by(evaluator: Evaluator, model: Judged) -> Result:
    """Answer all questions with a model.

    Returns:
        right: a 1 or 0 for each question. losses: of each, as `Answers` has them; JSON has no NaN.
    """
    answers = evaluator.answers(model)
    losses = answers.losses.nan_to_num(MAX_LOSS).clamp(max=MAX_LOSS)
    return {
        "right": "".join("01"[right] for right in evaluator.right(answers)),
        "losses": [round(loss, 6) for loss in losses.tolist()],
    }


def share(answered: Result) -> float:
    """Return the part of the questions that was answered right."""
    right: str = answered["right"]
    return right.count("1") / len(right)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _count(spec: LoRASpec) -> int:
    return sum(one.shape[0] * one.shape[1] for one in spec.adapter)
