"""Train the ceiling of a comparison: the same LoRA on the full 16-bit model, with all rows in one place.

Judging it is `run.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from torch import Tensor

from fedsoda_edge.data.chat import ChatTemplate
from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.data.samples import read_samples
from fedsoda_edge.model import lora
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.sub_llm import build
from fedsoda_edge.worker.batches import SweptSamples
from fedsoda_edge.worker.training import fine_tune, num_steps
from fedsoda_hub.preparation.full_llm import open_full_llm
from fedsoda_hub.preparation.running import pick_device
from fedsoda_hub.preparation.tokenizing import tokenizer_of
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.settings.run import RunSettings


def steps_a_round(settings: RunSettings, edge_rows: Sequence[int]) -> int:
    """Count the steps that a round's cohort takes in the mean, from how many rows each edge holds."""
    share = min(1.0, settings.rounds.cohort / len(edge_rows))
    return round(share * sum(num_steps(number, settings.local) for number in edge_rows))


def train_central(
    settings: RunSettings, data: Path, steps: int, rates: Sequence[float], said: Callable[[], None]
) -> dict[float, dict[str, Tensor]]:
    """Train the adapter LoRA with each learning rate, with as many rounds as the run has.

    Args:
        settings: those of a prepared run.
        data: the file of all rows.
        steps: optimiser steps of a round (`steps_a_round`).
        said: called after each round.

    Returns:
        the adapter LoRA, fp32, by learning rate.

    Raises:
        DataProblem: the rows lack a column of the template.
    """
    source, bundle = open_full_llm(settings), Bundle.open(RunDirectory(settings.run_dir).bundle)
    spec, plan, local = bundle.manifest.lora, bundle.plan, settings.local
    device, dtype = pick_device(settings.device, settings.dtype)
    tokenizer, chat = tokenizer_of(source), ChatTemplate.read(source.own_tokenizer)
    rows = read_samples(LocalData(data), settings.prompt, settings.completion, tokenizer, local.max_length, chat)
    swept = SweptSamples.sweep(
        source, plan.emulator, rows.samples, emulator={}, lora_scale=spec.scale, compute_dtype=dtype, device=device
    )
    epochs = -(-steps * local.batch_size // len(rows.samples))
    trained = {}
    for rate in rates:
        central = msgspec.structs.replace(local, max_steps=steps, epochs=epochs, learning_rate=rate)
        tail = build(source, plan.adapter, compute_dtype=dtype, device=device)
        view = bundle.adapter_lora()
        lora.attach(tail, spec, view)
        for number in range(1, settings.rounds.count + 1):
            step = fine_tune(tail, swept, view, central, seed=settings.seed, round_number=number, edge="central")
            view = {name: view[name] + step.delta[name] for name in view}
            said()
        trained[rate] = view
    return trained
