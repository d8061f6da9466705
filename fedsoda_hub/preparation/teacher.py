"""Make what a run's sub-LLMs are compared with on public text: the full LLM's targets, final states and gradients.

Outputs of the emulator's layers never change during a run, so they are cached on disk. Training against them is
`align.py`'s.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fedsoda_edge.model import lora
from fedsoda_edge.model.streaming import stream
from fedsoda_edge.model.sub_llm import SubLLM
from fedsoda_edge.ports.disk import write_durably
from fedsoda_edge.protocol.manifest import LayerPlan, LoRASpec
from fedsoda_hub.algorithms.alignment import drift, oda
from fedsoda_hub.federation.jobs import ProbeResult
from fedsoda_hub.preparation.full_llm import StreamedLLM


@dataclass(frozen=True)
class TeacherOutput:
    """The full LLM's output on the held-out blocks with an adapter LoRA: final hidden states (N, T, C), gradient (P,)."""

    final: Tensor
    gradient: Tensor


class TeacherCache:
    """The teacher of a run's sub-LLMs, with its targets as files in the run's preparation."""

    def __init__(self, llm: StreamedLLM) -> None:
        self._llm = llm

    # --- targets --------------------------------------------------------------------------------------------

    def held_against(self, plans: Sequence[LayerPlan]) -> set[int]:
        """Collect the layers whose outputs sub-LLMs of these plans are compared with: the method's, the emulator's last."""
        of_method = {layer for plan in plans for layer in self._llm.method.held_against(plan).values()}
        return of_method | {plans[0].emulator[-1]}

    def target(self, layer: int) -> Tensor:
        """Load the output of an emulator layer on all public blocks, (N, T, C); `make` has written it before."""
        return load_file(self._file_of(layer))["hidden"].to(self._llm.running.device)

    def _file_of(self, layer: int) -> Path:
        return self._llm.directory.preparation / f"teacher.{layer}.safetensors"

    def missing(self, layers: Collection[int]) -> set[int]:
        """Find the layers among these that have no target yet."""
        return {layer for layer in layers if not self._file_of(layer).exists()}

    def make(self, layers: Collection[int]) -> None:
        """Write the targets that are missing, in one pass over the full LLM.

        Raises:
            DiskFull: the disk has no space left.
        """
        missing = self.missing(layers)
        if not missing:
            return

        def keep(number: int, hidden: list[Tensor]) -> None:
            if number in missing:
                write_durably(self._file_of(number), save({"hidden": torch.stack(hidden)}))

        stream(
            self._llm.source,
            range(max(missing) + 1),
            self._llm.text.blocks,
            visit=keep,
            **self._llm.running.how("running the full LLM on public text"),
        )
        gc.collect()

    def forget(self, layers: Collection[int]) -> None:
        """Delete the targets of these layers."""
        for layer in layers:
            self._file_of(layer).unlink()

    def retained(self, plan: LayerPlan) -> dict[int, Tensor]:
        """Load the targets of the student's kept layers, (used blocks, T, C) each, by layer of the student."""
        count = len(self._llm.text.used)
        return {layer: self.target(other)[:count] for layer, other in self._llm.method.held_against(plan).items()}

    # --- final hidden states and gradients ------------------------------------------------------------------

    @cached_property
    def final(self) -> Tensor:
        """The final hidden states on the held-out blocks, without any LoRA: (N, T, C)."""
        llm = self._llm
        states = llm.held_out_after(llm.source, range(llm.num_layers), "running the full LLM on public text")
        return _final(llm.build(llm.source, ()), states)

    def final_with(self, plan: LayerPlan, adapter: Mapping[str, Tensor]) -> Tensor:
        """Compute the final hidden states on all public blocks with this adapter LoRA, from the emulator's target.

        Returns:
            (N, T, C).
        """
        return _final(self._above(plan, adapter), self.target(plan.emulator[-1]))

    def output(self, plan: LayerPlan, adapter: Mapping[str, Tensor]) -> TeacherOutput:
        """Compute the full LLM's output on the held-out blocks with this adapter LoRA."""
        teacher, text = self._above(plan, adapter), self._llm.text
        border = self.target(plan.emulator[-1])[len(text.used) :]
        gradient = drift.adapter_gradient(teacher, plan.adapter, border, torch.stack(text.held_out))
        return TeacherOutput(_final(teacher, border), gradient)

    def drift_of(self, student: SubLLM, adapter: Sequence[int], states: Tensor, output: TeacherOutput) -> ProbeResult:
        """Measure public KL, and the cosine between the adapter's gradients in teacher and student.

        Args:
            adapter: the layers of the adapter.
            states: (N, T, C) of the held-out blocks below the student.
            output: the teacher's, with the same adapter LoRA.
        """
        made = drift.adapter_gradient(student, adapter, states, torch.stack(self._llm.text.held_out))
        kl = oda.public_kl(student, states, output.final)
        return ProbeResult(kl=kl, cosine=drift.cosine(output.gradient, made))

    def _above(self, plan: LayerPlan, adapter: Mapping[str, Tensor]) -> SubLLM:
        """Build the full LLM's layers above the emulator, with this adapter LoRA."""
        source, s = self._llm.source, self._llm.settings.lora
        above = range(plan.emulator[-1] + 1, plan.num_layers)
        teacher = self._llm.build(source, above)
        layout = lora.specs(source.family, source.fields, above, s.targets, s.rank)
        spec = LoRASpec(rank=s.rank, alpha=s.alpha, targets=tuple(s.targets), adapter=layout, emulator=())
        lora.attach(teacher, spec, lora.on(above, adapter))
        return teacher


def _final(above: SubLLM, states: Tensor) -> Tensor:
    """Compute the final hidden states above `states`, a few blocks at a time: (N, T, C)."""
    with torch.no_grad():
        return torch.cat([above.hidden(states=some) for some in states.split(8)])
