"""What a worker does on an edge, as arms of a bench: the sweep with the first epoch, and epochs on cached border states.

The recipes that they are compared with are `edge_recipes.py`'s.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from edge_geometries import SUPERVISED, Geometry, samples  # beside this file

from fedsoda_edge.model import lora
from fedsoda_edge.model.bundle import DTYPES, Bundle
from fedsoda_edge.model.sub_llm import build
from fedsoda_edge.ports.system import return_memory_at_once
from fedsoda_edge.protocol.messages import LocalSettings
from fedsoda_edge.protocol.needs import MemoryPlan, SampleSizes, plans, shape_of
from fedsoda_edge.worker.batches import SweptSamples
from fedsoda_edge.worker.border_cache import CachedStates, CacheSettings
from fedsoda_edge.worker.checkpoint import RoundCheckpoint
from fedsoda_edge.worker.training import TrainedDelta, fine_tune, probe

KEY = bytes(32)  # the data is random: nothing to hide


def way(bundle: Bundle, geometry: Geometry, *, packed: bool = False, recompute: bool = False) -> MemoryPlan:
    """Of training one sample at a time."""
    labels = geometry.length - round(geometry.length * (1 - SUPERVISED))
    found = plans(shape_of(bundle.manifest), geometry.device, SampleSizes(1, geometry.length, labels))
    return next(plan for plan in found if (plan.packed, plan.recompute) == (packed, recompute))


def states_of(
    bundle: Bundle, geometry: Geometry, at: Path, plan: MemoryPlan, max_bytes: int | None = None
) -> CachedStates:
    return CachedStates(
        bundle,
        [sample.ids for sample in samples(geometry)],
        emulator=bundle.emulator_lora(),
        emulator_name="initial",
        settings=CacheSettings(at, KEY, "bf16", max_bytes, plan.slice_bytes, not plan.packed),
        compute_dtype=DTYPES[plan.dtype],
        device=geometry.device,
    )


def wake(geometry: Geometry) -> None:
    """A GPU's first product takes a second, of whichever arm it is."""
    if geometry.device != "cpu":
        one = torch.ones(64, 64, device=geometry.device, dtype=geometry.compute_dtype)
        torch.mm(one, one)
        torch.cuda.synchronize()


def train_ours(
    bundle: Bundle,
    geometry: Geometry,
    states: CachedStates,
    plan: MemoryPlan,
    checkpoint: RoundCheckpoint | None = None,
) -> Callable[[], TrainedDelta]:
    """The adapter built and one step run, as recipes are not timed in their first either; call it to train one epoch."""
    spec, view = bundle.manifest.lora, bundle.adapter_lora()
    sub_llm = build(
        bundle,
        bundle.plan.adapter,
        compute_dtype=DTYPES[plan.dtype],
        device=geometry.device,
        dense=not plan.packed,
        dense_head=not plan.packed,
        recompute=plan.recompute,
    )
    lora.attach(sub_llm, spec, view)
    settings = LocalSettings(
        epochs=1,
        max_steps=0,
        batch_size=plan.batch_size,
        learning_rate=1e-4,
        weight_decay=0.01,
        max_grad_norm=1.0,
        proximal_mu=0.01,
        max_length=geometry.length,
    )
    swept, at_once = SweptSamples(samples(geometry), states), plan.micro_batch
    probe(sub_llm, swept, view, [0], at_once)
    return lambda: fine_tune(
        sub_llm,
        swept,
        view,
        settings,
        seed=0,
        round_number=1,
        edge="bench",
        micro_batch=at_once,
        checkpoint=checkpoint,
    )


def first(directory: Path, geometry: Geometry, is_broken: bool) -> tuple[int, float, float]:
    bundle = Bundle.open(directory / "model" / "bundle")
    shutil.rmtree(directory / "fresh", ignore_errors=True)
    plan = way(bundle, geometry)
    states = states_of(bundle, geometry, directory / "fresh", plan, 0 if is_broken else None)
    wake(geometry)
    began, cpu = time.perf_counter(), time.process_time()
    states.sweep()
    swept, swept_cpu = time.perf_counter() - began, time.process_time() - cpu
    train = train_ours(bundle, geometry, states, plan)
    began, cpu = time.perf_counter(), time.process_time()
    trained = train()
    return trained.num_tokens, swept + time.perf_counter() - began, swept_cpu + time.process_time() - cpu


def cached(
    directory: Path, geometry: Geometry, is_broken: bool, *, packed: bool = False, recompute: bool = False
) -> tuple[int, float, float]:
    bundle = Bundle.open(directory / "model" / "bundle")
    plan = way(bundle, geometry, packed=packed, recompute=recompute)
    if plan.frugal:
        return_memory_at_once()
    # What is read was swept dense: the arms differ in training alone.
    where = directory / ("none" if is_broken else "cache")
    states = states_of(bundle, geometry, where, way(bundle, geometry), 0 if is_broken else None)
    train = train_ours(bundle, geometry, states, plan)
    began, cpu = time.perf_counter(), time.process_time()
    trained = train()
    return trained.num_tokens, time.perf_counter() - began, time.process_time() - cpu


def packed(directory: Path, geometry: Geometry, is_broken: bool) -> tuple[int, float, float]:
    return cached(directory, geometry, is_broken, packed=True)


def recomputed(directory: Path, geometry: Geometry, is_broken: bool) -> tuple[int, float, float]:
    return cached(directory, geometry, is_broken, packed=True, recompute=True)
