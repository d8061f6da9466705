"""Collect what an edge of a run pays: from the bundle, by the formulas of `plan`, and from its own events.

Means over runs are `summary.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.protocol.manifest import LoRASpec
from fedsoda_hub.compare.results import Costs
from fedsoda_hub.plan import predict
from fedsoda_hub.preparation.full_llm import open_full_llm
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.settings.run import RunSettings


def costs_of(settings: RunSettings) -> Costs:
    """Collect the costs of a run that is over; its edges' events lie in `events/` beside its RUN.toml."""
    bundle, source = Bundle.open(RunDirectory(settings.run_dir).bundle), open_full_llm(settings)
    dtype = str(source.dtype).removeprefix("torch.")
    plan = predict(source.family, source.fields, dtype, bundle.plan, settings)
    trained: dict[tuple[str, int], dict[str, Any]] = {}
    planned, measured = [], []
    for path in sorted((settings.directory / "events").iterdir()):
        for event in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if event.get("event") == "trained":
                trained[path.stem, event["round"]] = event
            elif event.get("event") == "memory":
                planned.append(next(part["bytes"] for part in event["parts"] if part["part"] == "peak"))
            elif event.get("worker_peak_rss_bytes"):
                measured.append(event["worker_peak_rss_bytes"])
    tokens = _mean([event["num_tokens"] for event in trained.values()])
    return Costs(
        trainable=_count(bundle.manifest.lora),
        parameters_per_round=plan.paper.parameters_per_round,
        model_bytes=sum(file.bytes for file in bundle.manifest.files),
        edge_memory_bytes=max(planned),
        edge_peak_rss_bytes=max(measured, default=None),
        gflop_per_edge_round=plan.ours.gflop_per_token.cached * tokens,
        seconds_per_edge_round=_mean([event["seconds"] for event in trained.values()]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _count(spec: LoRASpec) -> int:
    return sum(one.shape[0] * one.shape[1] for one in spec.adapter)
