"""Measure what a method asks of the full LLM before any layer is removed (`algorithms/methods/interface.py`).

It is measured on the run's public text, once for a run. What is chosen by it is the method's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fedsoda_edge.model import lora
from fedsoda_edge.model.bundle_writer import half_bytes
from fedsoda_edge.model.streaming import stream
from fedsoda_edge.ports.disk import write_durably
from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.algorithms.pruning import healed, representatives, sgp
from fedsoda_hub.algorithms.pruning.representatives import Components, Measured, Partition
from fedsoda_hub.federation.jobs import ProbeResult, ShapeMeasured
from fedsoda_hub.preparation.full_llm import StreamedLLM
from fedsoda_hub.preparation.shapes import choosing_texts, healed_errors, shape_healed
from fedsoda_hub.preparation.teacher import TeacherCache, TeacherOutput

KL_TIE = 1.05  # times the least public KL, up to which shapes count as equal
MEASURING, CHOOSING = "measuring layer similarity", "choosing groups"


class MeasuredLLM:
    """The run's full LLM as a `methods.interface.FullLLM`."""

    def __init__(self, llm: StreamedLLM, teacher: TeacherCache) -> None:
        self._llm = llm
        self._teacher = teacher

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return self._llm.num_layers

    def distances(self, num_layers: int) -> list[list[float]]:
        """Measure the angular distances between the outputs of the first `num_layers` layers, in units of pi."""
        how = self._llm.running.how(MEASURING)
        return self._finite(sgp.measure(self._llm.source, self._llm.text.used, num_layers, **how))

    def healed_distances(self, num_layers: int, size: int) -> list[list[float]]:
        """Measure what healing would leave of groups of up to `size` removed layers, as a share of the stream."""
        llm, texts = self._llm, choosing_texts(self._llm)
        how = llm.running.how(MEASURING)
        how["progress"](0, num_layers)
        return self._finite(healed.distances(llm.source, num_layers, size, texts, **how))

    def _finite(self, distances: list[list[float]]) -> list[list[float]]:
        self._llm.check_finite([value for row in distances for value in row])
        return distances

    def representatives(self, count: int, grouping: str, drawn_by: int | None = None) -> tuple[int, ...]:
        """Choose `count` layers that represent all, ascending; by chance where `drawn_by` gives a seed."""
        generator = None if drawn_by is None else torch.Generator().manual_seed(drawn_by)
        partition = self._partition(grouping)
        return representatives.select_layers(self._measured, count, partition, keep_ends=True, generator=generator)

    @cached_property
    def _measured(self) -> Measured:
        """The similarity and importance of all layers, measured once for a run."""
        llm = self._llm
        path = llm.directory.preparation / "layers.safetensors"
        if not path.exists():
            measured = representatives.measure_layers(
                llm.source, llm.text.used, seed=llm.settings.seed, **llm.running.how(MEASURING)
            )
            llm.check_finite([*measured.importance, *measured.similarity.flatten().tolist()])
            importance = torch.tensor(measured.importance, dtype=torch.float64)
            write_durably(path, save({"similarity": measured.similarity, "importance": importance}))
        held = load_file(path)
        return Measured(held["similarity"], tuple(held["importance"].tolist()))

    def components(self, count: int, grouping: str) -> Components:
        """Choose layers that keep their attention and layers that keep their MLP, in the bytes of `count` layers.

        Raises:
            UsageProblem: the blocks of the first and the last layer do not fit.
        """
        llm = self._llm
        attention, mlp = representatives.measure_components(
            llm.source, llm.text.used, seed=llm.settings.seed, **llm.running.how(MEASURING)
        )
        for of_half in (attention, mlp):
            llm.check_finite([*of_half.importance, *of_half.similarity.flatten().tolist()])
        base = llm.settings.method.adapter_base
        of_attention, of_mlp = (
            [
                half_bytes(llm.source.family, llm.source.fields, number, half, base, llm.dtype)
                for number in range(llm.num_layers)
            ]
            for half in ("attention", "mlp")
        )
        budget = sum(of_attention + of_mlp) * count // llm.num_layers  # layers of qwen3_moe are of two sizes
        return representatives.select_components(
            attention, mlp, of_attention, of_mlp, budget, self._partition(grouping)
        )

    def _partition(self, grouping: str) -> Partition:
        if grouping == "spectral":
            return partial(representatives.spectral, seed=self._llm.settings.seed)
        return representatives.contiguous

    def fits(self, plan: LayerPlan) -> bool:
        """Tell whether all files of this sub-LLM are within [method] bundle_bytes."""
        return self._llm.bundle_bytes(plan) <= self._llm.settings.method.bundle_bytes

    def nearest(self, plans: Sequence[LayerPlan]) -> LayerPlan:
        """Choose the plan that healing leaves least error of; by public KL on held-out blocks where the run does not heal.

        Of plans within KL_TIE of the least KL, the one with the greatest cosine between the adapter's gradients in sub-LLM
        and full LLM is taken (docs/methods.md (m3-auto)). No plan is quantized for this, which would change all alike.
        """
        if self._llm.settings.align.heal:
            return self._best_healed(plans)
        groups = [group for plan in plans for group in plan.groups]
        made = self._teacher.held_against(plans) | {group.start - 1 for group in groups if group.start}
        self._teacher.make(made)
        # The adapter of all of them is the same.
        adapter = self._llm.first_lora(self._llm.lora_spec(plans[0]).adapter)
        output = self._teacher.output(plans[0], adapter)
        found = [self._try(plan, adapter, output) for plan in plans]
        least = min(one.kl for one in found)
        good = [(one.cosine, plan) for one, plan in zip(found, plans, strict=True) if one.kl <= KL_TIE * least]
        chosen = max(good, key=lambda one: one[0])[1]
        self._teacher.forget(made - self._teacher.held_against([chosen]))
        return chosen

    def _best_healed(self, plans: Sequence[LayerPlan]) -> LayerPlan:
        errors = healed_errors(self._llm, plans)
        for plan, error in zip(plans, errors, strict=True):
            self._llm.running.report(shape_healed(CHOOSING, plan, error))
        return min(zip(errors, plans, strict=True), key=lambda one: one[0])[1]

    def _try(self, plan: LayerPlan, adapter: dict[str, Tensor], output: TeacherOutput) -> ProbeResult:
        """Measure how far this plan's sub-LLM is from the full LLM, before anything is trained."""
        llm, text = self._llm, self._llm.text
        spec, count, first = llm.lora_spec(plan), len(text.used), min(plan.retained)
        emulator = lora.initial([item for item in spec.emulator if item.layer is not None], llm.settings.seed)
        if first:
            below = self._teacher.target(first - 1)
        else:
            below = torch.stack(stream(llm.source, (), text.blocks)).to(llm.running.device)
        trained = tuple(layer for layer in plan.kept if layer >= first)
        student = llm.build(llm.source, trained)
        lora.attach(student, spec, lora.on(trained, {**emulator, **adapter}))
        found = self._teacher.drift_of(student, plan.adapter, below[count:], output)
        llm.running.report(
            ShapeMeasured(
                stage=CHOOSING,
                layers_per_group=len(plan.groups[0].removed),
                groups=len(plan.groups),
                kl=found.kl,
                cosine=found.cosine,
            )
        )
        return found
