"""Hold the full LLM of a run, one layer resident at a time, and lay out what a sub-LLM of it carries.

It lives as long as its process works on the run: weights are opened, and public text is read, once. What is measured of
it before any layer is removed is `measured.py`'s, what its sub-LLMs are compared with is `teacher.py`'s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model import border, lora
from fedsoda_edge.model.bundle_writer import BundleSettings, shard_sizes
from fedsoda_edge.model.families import Family
from fedsoda_edge.model.source import Checkpoint, LayerSource
from fedsoda_edge.model.streaming import stream
from fedsoda_edge.model.sub_llm import SubLLM, build
from fedsoda_edge.ports.disk import write_durably_json
from fedsoda_edge.protocol.manifest import LayerPlan, LoRASpec, TensorSpec
from fedsoda_hub.algorithms.methods.by_name import method_of
from fedsoda_hub.preparation.run_text import RunText
from fedsoda_hub.preparation.running import RunningLayers
from fedsoda_hub.preparation.start_from import begun_with, read_start
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.settings.run import RunSettings


def open_full_llm(settings: RunSettings) -> Checkpoint:
    """Open the run's full LLM; a model of a model hub always at the commit that the run first saw.

    Raises:
        UsageProblem: the model is not found, or of a family that is not supported.
    """
    pin = RunDirectory(settings.run_dir).model_revision
    held = json.loads(pin.read_text()) if pin.exists() else {}
    revision = held.get("revision") if held.get("model") == settings.model else None
    source = Checkpoint.open(settings.model, relative_to=settings.directory, revision=revision)
    if source.name == settings.model and revision is None:
        pin.parent.mkdir(parents=True, exist_ok=True)
        write_durably_json(pin, {"model": settings.model, "revision": source.revision})
    return source


def aligned_layers(settings: RunSettings, plan: LayerPlan) -> tuple[int, ...]:
    """List the kept layers of a plan that carry emulator LoRA: none where these settings never align by LoRA or map."""
    align = settings.align
    never = not (align.steps or settings.method.realign_every) and align.border_map == "none"
    return () if never else method_of(settings.method).aligned(plan)


def lora_spec(
    settings: RunSettings,
    family: Family,
    fields: dict[str, Any],
    plan: LayerPlan,
    size_class: int = 0,
    *,
    is_mapped: bool = True,
) -> LoRASpec:
    """Lay out a size class's adapter LoRA and emulator LoRA, with its border map where something is aligned.

    Args:
        is_mapped: whether there are prompts to fit a border map on.
    """
    rank, targets = settings.lora.of_class(size_class), settings.lora.targets
    aligned = aligned_layers(settings, plan)
    on_adapter, on_emulator = (
        lora.specs(family, fields, layers, targets, rank, plan.lacking) for layers in (plan.adapter, aligned)
    )
    is_mapped = is_mapped and bool(aligned) and settings.align.border_map != "none"
    of_map = border.map_specs(int(fields["hidden_size"]), settings.align.border_rank if is_mapped else 0)
    return LoRASpec(rank, settings.lora.alpha, tuple(targets), on_adapter, (*of_map, *on_emulator))


class StreamedLLM:
    """The run's full LLM with its public text and directory, as all of preparation uses them.

    Raises:
        UsageProblem: the model or the device is not available.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        self.directory = RunDirectory(settings.run_dir)
        self.method = method_of(settings.method)
        self.running = RunningLayers(settings)
        self.source = open_full_llm(settings)
        self.text = RunText(settings, self.source, self.directory.texts, self.running)

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return self.source.num_layers

    @property
    def dtype(self) -> str:
        """The checkpoint's dtype, as a bundle's manifest names it."""
        return str(self.source.dtype).removeprefix("torch.")

    def check_finite(self, values: Iterable[float]) -> None:
        """Check what was computed with the full LLM's own layers from the run's public text.

        Raises:
            UsageProblem: some of it is not finite.
        """
        if not all(map(math.isfinite, values)):
            raise UsageProblem(
                f"{self.source.name} computes values that are not finite from the public text (in "
                f"{str(self.running.compute_dtype).removeprefix('torch.')} on {self.running.device}), though its weights are: some "
                "are too large; see whether Transformers writes text with this model, and fetch it again, or write another dtype"
            )

    def aligned(self, plan: LayerPlan) -> tuple[int, ...]:
        """List the kept layers of a plan that carry emulator LoRA."""
        return aligned_layers(self.settings, plan)

    def build(self, source: LayerSource, layers: Sequence[int]) -> SubLLM:
        """Build the model that holds these layers of the full LLM or of a bundle."""
        return build(source, layers, compute_dtype=self.running.compute_dtype, device=self.running.device)

    def held_out_after(self, source: LayerSource, layers: Sequence[int], stage: str) -> Tensor:
        """Run the held-out blocks through these layers, one resident at a time; return their states (N, T, C)."""
        states = stream(source, layers, self.text.held_out, **self.running.how(stage))
        return torch.stack(states).to(self.running.device)

    def lora_spec(self, plan: LayerPlan, size_class: int = 0) -> LoRASpec:
        """Lay out the LoRA of a sub-LLM of this plan, with a border map where there are prompts to fit it on."""
        is_mapped = bool(self.aligned(plan) and self.text.like_task)
        return lora_spec(self.settings, self.source.family, self.source.fields, plan, size_class, is_mapped=is_mapped)

    def bundle_settings(self, plan: LayerPlan) -> BundleSettings:
        """Collect how the layers of this plan are stored."""
        method = self.settings.method
        return BundleSettings(
            self.lora_spec(plan), method.adapter_base, method.quantize_embedding, method.emulator_base
        )

    def bundle_bytes(self, plan: LayerPlan) -> int:
        """Count the bytes of all files of this plan's bundle but its manifest."""
        shards = shard_sizes(self.source.family, self.source.fields, plan, self.bundle_settings(plan), self.dtype)
        return sum(shards.values()) + sum(map(len, self.source.own_tokenizer.values()))

    def first_master(self, plans: Iterable[LayerPlan]) -> dict[str, Tensor]:
        """Make w before any training: LoRA of all layers that train in one of these plans, at the run's rank."""
        return self.fresh_master(plans) if self.start is None else self.first_lora(self._master_layout(plans))

    def fresh_master(self, plans: Iterable[LayerPlan]) -> dict[str, Tensor]:
        """Make w as `first_master`, of fresh LoRA, which changes nothing."""
        return lora.initial(self._master_layout(plans), self.settings.seed)

    def _master_layout(self, plans: Iterable[LayerPlan]) -> list[TensorSpec]:
        layers = sorted({layer for plan in plans for layer in plan.adapter})
        s, source = self.settings, self.source
        return list(lora.specs(source.family, source.fields, layers, s.lora.targets, s.lora.rank))

    def first_lora(self, layout: Sequence[TensorSpec]) -> dict[str, Tensor]:
        """Make adapter LoRA before any training: fresh, or that of the export that the run begins with.

        Raises:
            UsageProblem: that export cannot be read, or is of another model or layout.
        """
        fresh = lora.initial(layout, self.settings.seed)
        return fresh if self.start is None else begun_with(layout, fresh, self.start)

    @cached_property
    def start(self) -> dict[str, Tensor] | None:
        """The LoRA of the export that the run begins with; None: it begins with fresh LoRA.

        Raises:
            UsageProblem: the export cannot be read, or is of another model, rank or alpha.
        """
        s = self.settings
        return None if s.start_from is None else read_start(s.start_from, self.source, s.lora.rank, s.lora.alpha)
