"""Align the sub-LLMs of a run: train the emulator LoRA, fit the border map, before round 1 and again.

Here the inputs of an alignment are found or made: the teacher's targets, the student and its hidden states below the
first layer that trains. The mathematics is that of `algorithms/alignment/`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fedsoda_edge.model import border as border_map
from fedsoda_edge.model import lora
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.streaming import stream
from fedsoda_edge.model.sub_llm import SubLLM
from fedsoda_edge.ports.disk import write_durably, write_durably_json
from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.algorithms.alignment import oda, ridge
from fedsoda_hub.federation.jobs import BorderMapFitted, Stage
from fedsoda_hub.preparation.full_llm import StreamedLLM
from fedsoda_hub.preparation.teacher import TeacherCache


class Aligner:
    """The alignment of a run's sub-LLMs with its full LLM. Files that it leaves in the preparation are found again."""

    def __init__(self, llm: StreamedLLM, teacher: TeacherCache) -> None:
        self._llm = llm
        self._teacher = teacher
        self._work = llm.directory.preparation

    def first(
        self, bundle: Bundle, size_class: int, plans: Sequence[LayerPlan]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Align a size class before round 1, once for a run.

        Args:
            plans: those of all sub-LLMs, the largest first, so that one pass makes the targets of all.

        Returns:
            the aligned emulator LoRA with its border map, and public KL, nats, after each stage.
        """
        done = self._work / f"emulator_lora.{size_class}.safetensors"
        kl_done = self._work / f"first_kl.{size_class}.json"
        if done.exists() and kl_done.exists():
            return load_file(done), json.loads(kl_done.read_text())
        plan, llm, count = bundle.plan, self._llm, len(self._llm.text.used)
        self._teacher.make(self._teacher.held_against(plans))
        final = self._teacher.final_with(plan, llm.first_master([plan]))
        wanted = final[count:]
        pruned = llm.held_out_after(llm.source, plan.swept, "running the pruned LLM on public text")
        # The pruned LLM has no LoRA, so neither has what it is compared with.
        bare = wanted if llm.start is None else self._teacher.final_with(plan, llm.fresh_master([plan]))[count:]
        kl = {"pruned": oda.public_kl(llm.build(llm.source, plan.resident), pruned, bare)}
        student, states = self.student(bundle, bundle.emulator_lora(), bundle.adapter_lora())
        kl["quantized"] = oda.public_kl(student, states[count:], wanted)
        emulator = self.train(student, plan, states, final, llm.settings.align.steps, version=0)
        kl["aligned"] = oda.public_kl(student, states[count:], wanted)
        emulator |= self.fit_border_map(bundle, emulator)
        write_durably(done, save(emulator))
        write_durably_json(kl_done, kl)
        return emulator, kl

    def train(
        self, student: SubLLM, plan: LayerPlan, states: Tensor, final: Tensor, steps: int, version: int
    ) -> dict[str, Tensor]:
        """Train the student's emulator LoRA in place, and return it.

        Args:
            states: (N, T, C) of all public blocks below the student.
            final: (N, T, C), the teacher's final hidden states on them.
            version: that of the alignment, which decides the order of the blocks together with the run's seed.
        """
        align, count = self._llm.settings.align, len(self._llm.text.used)
        border = self._teacher.target(plan.emulator[-1])[:count]

        def report(done: int, total: int, kl: float) -> None:
            self._llm.running.report(Stage(stage="aligning", done=done, total=total, kl=kl))

        oda.align(
            student,
            plan,
            states[:count],
            oda.Teacher(self._teacher.retained(plan), border, final[:count]),
            oda.AlignSettings(
                steps, align.batch_size, align.learning_rate, align.representation_weight, align.kl_weight
            ),
            seed=self._llm.settings.seed * 1000 + version,
            progress=report,
        )
        return lora.on(plan.emulator, lora.snapshot(student))

    def fit_border_map(self, bundle: Bundle, emulator: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fit the border map of the sub-emulator with this LoRA; no tensors where the bundle has no map."""
        if not any(item.name.startswith(border_map.PREFIX) for item in bundle.manifest.lora.emulator):
            return {}
        llm, path, prompts = self._llm, self._work / "teacher.prompts.safetensors", self._llm.text.like_task
        if not path.exists():
            how = llm.running.how("running the full LLM on prompts like the task's")
            write_durably(path, save({"hidden": torch.cat(stream(llm.source, bundle.plan.emulator, prompts, **how))}))
        teacher = load_file(path)["hidden"].split([len(ids) for ids in prompts])
        student = stream(
            bundle,
            bundle.plan.sub_emulator,
            prompts,
            lora=emulator,
            lora_scale=bundle.manifest.lora.scale,
            **llm.running.how("running the sub-LLM on prompts like the task's"),
        )
        width = int(llm.source.fields["hidden_size"])
        fit = ridge.fit(zip(student, teacher, strict=True), width, llm.settings.align.border_rank)
        llm.running.report(
            BorderMapFitted(
                stage="fitting the border map",
                error_before=fit.error_before,
                error_whole=fit.error_whole,
                error=fit.error,
            )
        )
        return fit.tensors

    def student(self, bundle: Bundle, emulator: dict[str, Tensor], adapter: dict[str, Tensor]) -> tuple[SubLLM, Tensor]:
        """Build the student from its first aligned layer on, with the states of all public blocks below it.

        It has no border map, which was fitted for text like the task's and is far off elsewhere: an alignment that saw it
        on public text would bend the emulator LoRA to undo it. Adapter layers may lie below the student only in a method
        that aligns before round 1 alone, when their LoRA is zero.

        Returns:
            the student, and (N, T, C) states, which never change.
        """
        spec, kept, llm = bundle.manifest.lora, bundle.plan.kept, self._llm
        first = min(spec.aligned, default=bundle.plan.border)
        path = self.below(first)
        if not path.exists():
            below = tuple(layer for layer in kept if layer < first)
            how = llm.running.how("running the sub-LLM on public text")
            write_durably(path, save({"hidden": torch.stack(stream(bundle, below, llm.text.blocks, **how))}))
        trained = tuple(layer for layer in kept if layer >= first)
        student = llm.build(bundle, trained)
        lora.attach(student, spec, lora.on(trained, {**emulator, **adapter}))
        return student, load_file(path)["hidden"].to(llm.running.device)

    def below(self, first: int) -> Path:
        """Name the file of the states of all public blocks, (N, T, C), below this layer of a student."""
        return self._work / f"student.below.{first}.safetensors"
