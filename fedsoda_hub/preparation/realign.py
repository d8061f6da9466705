"""Work on a prepared run between its rounds: probe how far it has drifted, align it again, draw other layers.

When that is due is `federation/schedule.py`'s.
"""

from __future__ import annotations

import math
from functools import cached_property

from safetensors.torch import load
from torch import Tensor

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model import delta, lora
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.bundle_writer import sub_manifest
from fedsoda_edge.protocol.coded import of_alignment
from fedsoda_edge.protocol.manifest import encode_manifest
from fedsoda_edge.protocol.messages import Digest
from fedsoda_hub.algorithms.aggregation import flexlora
from fedsoda_hub.algorithms.alignment import oda
from fedsoda_hub.algorithms.methods import fedpruner
from fedsoda_hub.federation.jobs import (
    Probe,
    ProbeResult,
    Realign,
    RealignedSubLLM,
    RealignResult,
    Reprune,
    RepruneResult,
    RepruneSubLLM,
)
from fedsoda_hub.preparation.align import Aligner
from fedsoda_hub.preparation.full_llm import StreamedLLM
from fedsoda_hub.preparation.measured import MeasuredLLM
from fedsoda_hub.preparation.running import TakeProgress, to_nobody
from fedsoda_hub.preparation.teacher import TeacherCache


class PreparedRun:
    """A prepared run. The files of its bundles are verified once.

    Args:
        llm: `RunPreparation.llm`, whose text and weights are open already.
    """

    def __init__(self, llm: StreamedLLM) -> None:
        self._llm = llm
        self._teacher = TeacherCache(llm)
        self._aligner = Aligner(llm, self._teacher)

    @cached_property
    def _bundles(self) -> list[Bundle]:
        """The sub-LLMs that the run began with, the largest first."""
        classes = range(1 + len(self._llm.settings.method.classes))
        return [Bundle.open(self._llm.directory.bundle, size_class) for size_class in classes]

    def probe(self, job: Probe, report: TakeProgress = to_nobody) -> ProbeResult:
        """Measure how far the largest sub-LLM is from the full LLM with the job's adapter LoRA, on held-out blocks."""
        self._llm.running.report = report
        bundle, spec = self._bundles[0], self._bundles[0].manifest.lora
        blobs = self._llm.directory.blobs
        adapter = delta.from_bytes(blobs.get(job.master), spec.adapter)
        emulator = delta.from_bytes(blobs.get(job.emulator_view), spec.emulator)
        self._make_targets()
        output = self._teacher.output(bundle.plan, adapter)
        student, states = self._aligner.student(bundle, emulator, adapter)
        held_out = states[len(self._llm.text.used) :]
        return self._teacher.drift_of(student, bundle.plan.adapter, held_out, output)

    def realign(self, job: Realign, report: TakeProgress = to_nobody) -> RealignResult:
        """Align every sub-LLM, one after the other, with the current adapter LoRA in teacher and student."""
        self._llm.running.report = report
        blobs = self._llm.directory.blobs
        master = load(blobs.get(job.master))
        self._make_targets()
        return RealignResult(
            tuple(
                self._realign(job.version, bundle, master, load(blobs.get(view)))
                for bundle, view in zip(self._bundles, job.emulator_views, strict=True)
            )
        )

    def _realign(
        self, version: int, bundle: Bundle, master: dict[str, Tensor], emulator_view: dict[str, Tensor]
    ) -> RealignedSubLLM:
        settings, blobs = self._llm.settings, self._llm.directory.blobs
        plan, spec = bundle.plan, bundle.manifest.lora
        final, count = self._teacher.final_with(plan, master), len(self._llm.text.used)
        adapter = flexlora.cut(master, lora.initial(spec.adapter, settings.seed))  # at the class's rank
        student, states = self._aligner.student(bundle, emulator_view, adapter)
        before = oda.public_kl(student, states[count:], final[count:])
        trained = self._aligner.train(student, plan, states, final, settings.align.realign_steps, version)
        trained |= self._aligner.fit_border_map(bundle, trained)
        coded, view = delta.step_down(trained, emulator_view, spec.emulator, of_alignment(settings.wire.codec))
        lora.load(student, lora.on(plan.emulator, view))
        after = oda.public_kl(student, states[count:], final[count:])
        _check_aligned(before, after)
        return RealignedSubLLM(
            view=Digest(blobs.put(delta.to_bytes(view))),
            delta=Digest(blobs.put(coded)),
            kl_before=before,
            kl_after=after,
        )

    def _make_targets(self) -> None:
        """Make the teacher's targets that are missing: a person may have deleted them."""
        self._teacher.make(self._teacher.held_against([bundle.plan for bundle in self._bundles]))

    def reprune(self, job: Reprune, report: TakeProgress = to_nobody) -> RepruneResult:
        """Draw other layers for each size class, with manifests and first views, which are cut from the master.

        Layers are drawn by what was measured when the run was prepared: similarity and importance are properties of the
        base, which is frozen.
        """
        llm, settings, blobs = self._llm, self._llm.settings, self._llm.directory.blobs
        llm.running.report = report
        plans = fedpruner.redrawn(self._measured, settings.method, settings.seed, job.round)
        master = llm.first_master(plans) | load(blobs.get(job.master))
        made = []
        for size_class, plan in enumerate(plans):
            spec = llm.lora_spec(plan, size_class)
            view = flexlora.cut(master, lora.initial(spec.adapter, settings.seed))
            manifest = sub_manifest(llm.directory.bundle, plan, spec, view, {})
            made.append(
                RepruneSubLLM(
                    manifest=Digest(blobs.put(encode_manifest(manifest))),
                    view=Digest(blobs.put(delta.to_bytes(view))),
                )
            )
        return RepruneResult(master=Digest(blobs.put(delta.to_bytes(master))), sub_llms=tuple(made))

    @cached_property
    def _measured(self) -> MeasuredLLM:
        return MeasuredLLM(self._llm, self._teacher)


def _check_aligned(before: float, after: float) -> None:
    """Check the public KL of an alignment, which edges would get next.

    Raises:
        UsageProblem: it is not a number, so what the rounds or the alignment made of the LoRA cannot be used.
    """
    if not (math.isfinite(before) and math.isfinite(after)):
        raise UsageProblem(
            f"public KL is {before:g} before the realignment and {after:g} after it, so the LoRA holds what is not a number; "
            "lower [align] learning_rate or [local] learning_rate, and begin a new run from a round that was good: "
            "`fedsoda-hub export --round N` writes it, [lora] start_from names it"
        )
