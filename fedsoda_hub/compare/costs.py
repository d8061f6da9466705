"""Collect what an edge of a run pays: from the bundle, by the formulas of `plan`, and from its own events.

Means over runs are `summary.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedsoda_edge import events
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
    trained: dict[tuple[str, int], events.RoundTrained] = {}
    planned, measured = [], []
    for path in sorted((settings.directory / "events").iterdir()):
        for line in path.read_bytes().splitlines():
            match events.read(line):
                case events.RoundTrained() as event:
                    trained[path.stem, event.round] = event
                case events.Memory(parts=parts):
                    planned.append(next(part.bytes for part in parts if part.part == "peak"))
                case events.JoinEnded(worker_peak_rss_bytes=peak) if peak:
                    measured.append(peak)
    tokens = _mean([event.num_tokens for event in trained.values()])
    return Costs(
        trainable=_count(bundle.manifest.lora),
        parameters_per_round=plan.paper.parameters_per_round,
        model_bytes=sum(file.bytes for file in bundle.manifest.files),
        edge_memory_bytes=max(planned),
        edge_peak_rss_bytes=max(measured, default=None),
        gflop_per_edge_round=plan.ours.gflop_per_token.cached * tokens,
        seconds_per_edge_round=_mean([event.seconds for event in trained.values()]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _count(spec: LoRASpec) -> int:
    return sum(one.shape[0] * one.shape[1] for one in spec.adapter)
