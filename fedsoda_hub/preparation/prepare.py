"""Prepare a run: full LLM -> SGP -> healing -> NF4 -> LoRA -> ODA -> bundle. Resumable; one layer of the full LLM resident at a time.

The run's method says which layers are removed and what is aligned; where nothing is aligned, it is full LLM -> NF4 ->
bundle. Each stage leaves its result in the run's preparation with the fingerprint of what it was made from; a stage whose
result exists is skipped. Work between rounds is `realign.py`'s, when it is due is the round machine's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from fedsoda_edge.errors import DiskFull, UsageProblem
from fedsoda_edge.model import delta, lora
from fedsoda_edge.model.bundle import Bundle, read_manifest
from fedsoda_edge.model.bundle_writer import replace_emulator_lora, write_bundle, write_size_class
from fedsoda_edge.model.source import LayerSource
from fedsoda_edge.ports.disk import BlobStore, sha256_file, write_durably, write_durably_json
from fedsoda_edge.ports.system import sync_directory
from fedsoda_edge.protocol.manifest import ADAPTER_LORA, EMULATOR_LORA, File, LayerPlan, file_of
from fedsoda_edge.protocol.messages import Digest
from fedsoda_hub.algorithms.alignment import oda
from fedsoda_hub.federation.jobs import DiskNeeded, PreparedSubLLM, PrepareResult
from fedsoda_hub.preparation.align import Aligner
from fedsoda_hub.preparation.full_llm import StreamedLLM
from fedsoda_hub.preparation.heal import check_healing, healed_layers, is_healed
from fedsoda_hub.preparation.measured import MeasuredLLM
from fedsoda_hub.preparation.running import TakeProgress, to_nobody
from fedsoda_hub.preparation.teacher import TeacherCache
from fedsoda_hub.preparation.tokenizing import check_tokenizer
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.settings.run import GONE, RunSettings

READING = "reading the full LLM and the public text"  # the first stage; how long it takes is the disk's matter


def made_of(settings: RunSettings) -> Any:
    """Collect the settings that a bundle is made from; when and how long it is realigned is not among them.

    `heal` and `distance` are left out as the paper has them, and `closed_form`, which is gone, stands where it was: a run
    that began before finds its bundle again.
    """
    method = msgspec.to_builtins(msgspec.structs.replace(settings.method, realign_every=0))
    align: dict[str, object] = {}
    for key, value in msgspec.to_builtins(msgspec.structs.replace(settings.align, realign_steps=0)).items():
        align |= {key: value} if key != "steps" else {"closed_form": GONE["[align] closed_form"], key: value}
    for table, key, of_paper in ((method, "distance", "angular"), (align, "heal", False)):
        if table[key] == of_paper:
            del table[key]
    lora_table = msgspec.to_builtins(settings.lora)
    del lora_table["start_from"]  # what it holds counts, not where it lies
    return [method, lora_table, msgspec.to_builtins(settings.public), align]


class RunPreparation:
    """The preparation of a run. It keeps the full LLM open and the public text in memory as long as it lives.

    Raises:
        UsageProblem: text, lengths, tokenizer or model family do not suit the settings; nothing was computed yet.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        self.directory = RunDirectory(settings.run_dir)
        self.llm = StreamedLLM(settings)
        check_tokenizer(self.llm.source)
        self.llm.text.read()
        limit = int(self.llm.source.fields["max_position_embeddings"])
        for key, length in (
            ("[public] length", settings.public.length),
            ("[local] max_length", settings.local.max_length),
        ):
            if length > limit:
                raise UsageProblem(
                    f"{key} = {length}, but {self.llm.source.name} has {limit} positions; write at most {limit}"
                )
        if settings.align.heal:
            check_healing(self.llm)

    @cached_property
    def fingerprint(self) -> str:
        """The digest of everything that the stages are made from; weights and texts are read once for it."""
        settings = self.settings
        parts = [
            self.llm.source.revision,
            _sha256(settings.public_text),
            settings.seed,
            [settings.task.prompt, _sha256(settings.like_task)] if settings.reads_like_task else None,
            made_of(settings),
        ]
        if settings.start_from is not None and self.llm.start is not None:  # what is wrong with it is known at once
            parts.append(sha256_file(settings.start_from / "adapter_model.safetensors"))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def run(self, report: TakeProgress = to_nobody) -> PrepareResult:
        """Do the stages that are not done yet; return the digests that a run starts from, and public KL.

        Raises:
            DiskFull: the cached targets of the teacher need more than is free.
            UsageProblem: the model has too few layers for the method, cannot write the text that it should, or is not the one
                of the export that the run begins with.
        """
        self.llm.running.report = report
        _Stages(self.llm).finish(self.fingerprint)
        return self._result()

    def _result(self) -> PrepareResult:
        bundle_dir, blobs = self.directory.bundle, self.directory.blobs
        bundles = [Bundle.open(bundle_dir, number) for number in range(1 + len(self.settings.method.classes))]
        sub_llms = tuple(
            PreparedSubLLM(
                manifest=Digest(blobs.put((bundle_dir / file_of("manifest.json", size_class)).read_bytes())),
                adapter_view=Digest(blobs.put(delta.to_bytes(bundle.adapter_lora()))),
                emulator_view=Digest(blobs.put(delta.to_bytes(bundle.emulator_lora()))),
                public_kl=json.loads(_kl_file(self.directory, size_class).read_text()),
            )
            for size_class, bundle in enumerate(bundles)
        )
        if len(sub_llms) == 1:
            return PrepareResult(sub_llms=sub_llms, master=sub_llms[0].adapter_view)
        master = self.llm.first_master(bundle.plan for bundle in bundles)
        return PrepareResult(sub_llms=sub_llms, master=Digest(blobs.put(delta.to_bytes(master))))


class _Stages:
    """The stages from full LLM to bundle, in one call of `RunPreparation.run`."""

    def __init__(self, llm: StreamedLLM) -> None:
        self._llm = llm
        self._settings = llm.settings
        self._directory = llm.directory
        self._work = llm.directory.preparation
        self._teacher = TeacherCache(llm)
        self._aligner = Aligner(llm, self._teacher)

    def finish(self, fingerprint: str) -> None:
        """Leave a complete bundle in the run's directory, and delete what was made from anything else."""
        self._work.mkdir(parents=True, exist_ok=True)
        self._forget_other_runs(fingerprint)
        if self._directory.manifest.exists():
            return
        plans = self._plans()
        if any(self._llm.aligned(plan) for plan in plans):
            self._say_needed_disk(plans)
        unaligned = self._work / "unaligned"
        if not (unaligned / "manifest.json").exists():
            self._write_unaligned(unaligned, plans)
        for size_class in range(len(plans)):
            self._finish_class(unaligned, size_class, plans)
        shutil.rmtree(self._directory.bundle, ignore_errors=True)
        os.replace(unaligned, self._directory.bundle)
        sync_directory(self._directory.path)

    def _forget_other_runs(self, fingerprint: str) -> None:
        mark = self._work / "fingerprint"
        if mark.exists() and mark.read_text() == fingerprint:
            return
        shutil.rmtree(self._work)
        shutil.rmtree(self._directory.bundle, ignore_errors=True)
        self._work.mkdir()
        write_durably(mark, fingerprint.encode())

    def _plans(self) -> tuple[LayerPlan, ...]:
        """Choose the layers of each size class, the largest first; once for a run."""
        path = self._work / "plans.json"
        if path.exists():
            return msgspec.json.decode(path.read_bytes(), type=tuple[LayerPlan, ...])
        measured = MeasuredLLM(self._llm, self._teacher)
        plans = self._llm.method.plans(measured, self._settings.method, self._settings.seed)
        write_durably(path, msgspec.json.encode(plans))
        return plans

    def _say_needed_disk(self, plans: Sequence[LayerPlan]) -> None:
        llm, blocks = self._llm, len(self._llm.text.blocks)
        firsts = {min(aligned) for plan in plans if (aligned := llm.aligned(plan))}
        missing = len(self._teacher.missing(self._teacher.held_against(plans)))
        missing += sum(not self._aligner.below(first).exists() for first in firsts)
        hidden = int(llm.source.fields["hidden_size"])
        needed = missing * blocks * self._settings.public.length * hidden * llm.running.compute_dtype.itemsize
        free = shutil.disk_usage(self._work).free
        llm.running.report(DiskNeeded(stage="caching teacher targets", needed_bytes=needed, free_bytes=free))
        if needed > free:
            raise DiskFull(
                f"the cached teacher targets need {needed / 1e9:.1f} GB, but {self._work} has {free / 1e9:.1f} GB free; "
                "free some space, or lower [public] sequences or length"
            )

    def _write_unaligned(self, directory: Path, plans: Sequence[LayerPlan]) -> None:
        """Write the bundle with the shards of all layers that any sub-LLM keeps, or that one may keep in a later round."""
        s, llm, plan = self._settings, self._llm, plans[0]
        spec, source = llm.lora_spec(plan), llm.source
        if is_healed(
            llm, plan
        ):  # smaller sub-LLMs share the shards of the largest, and are brought near by their LoRA alone
            source = source.with_layers(healed_layers(llm, plan))
        kept = range(plan.num_layers) if s.method.reprune_every else chain(*(one.kept for one in plans))
        write_bundle(
            directory,
            source,
            plan,
            llm.bundle_settings(plan),
            name=llm.source.name,
            revision=llm.source.revision,
            adapter_lora=llm.first_lora(spec.adapter),
            emulator_lora=lora.initial(spec.emulator, s.seed),
            tokenizer_files=llm.source.tokenizer_files,
            spare=sorted(set(kept) - set(plan.kept)),
            progress=llm.running.progress("quantizing"),
        )

    def _finish_class(self, directory: Path, size_class: int, plans: Sequence[LayerPlan]) -> None:
        """Align one size class of the bundle, or only measure it where the method does not align."""
        plan = plans[size_class]
        if not (directory / file_of("manifest.json", size_class)).exists():
            spec = self._llm.lora_spec(plan, size_class)
            emulator = lora.initial(spec.emulator, self._settings.seed)
            write_size_class(directory, size_class, plan, spec, self._llm.first_lora(spec.adapter), emulator)
        bundle, kl_file = Bundle.open(directory, size_class), _kl_file(self._directory, size_class)
        if self._llm.aligned(plan):
            emulator, kl = self._aligner.first(bundle, size_class, plans)
            self._llm.check_finite(kl.values())
            write_durably_json(kl_file, kl)
            replace_emulator_lora(directory, emulator, size_class)
        else:
            kl = self._unaligned_kl(bundle)
            self._llm.check_finite(kl.values())
            write_durably_json(kl_file, kl)

    def _unaligned_kl(self, bundle: Bundle) -> dict[str, float]:
        """Measure the three public KLs where nothing is aligned, with one layer resident at a time."""
        plan, llm = bundle.plan, self._llm

        def kl(source: LayerSource, name: str) -> float:
            states = llm.held_out_after(source, plan.kept, f"running the {name} on public text")
            return oda.public_kl(llm.build(source, ()), states, self._teacher.final)

        pruned = 0.0  # exactly, if all layers are kept whole
        if len(plan.kept) < plan.num_layers or plan.lacking:
            pruned = kl(llm.source.without(plan.lacking), "pruned LLM")
        quantized = kl(bundle, "sub-LLM")
        return {"pruned": pruned, "quantized": quantized, "aligned": quantized}


def _kl_file(directory: RunDirectory, size_class: int) -> Path:
    return directory.preparation / f"public_kl.{size_class}.json"


def _sha256(file: Path | None) -> str | None:
    return None if file is None else sha256_file(file)


def bundle_of(run_dir: Path, manifest: str) -> Bundle:
    """Open a sub-LLM of a prepared run by its manifest's digest. Its manifest and LoRA are blobs, its shards files."""
    directory = RunDirectory(run_dir)
    blobs: BlobStore = directory.blobs

    def path_of(file: File) -> Path:
        is_lora = file.name in (ADAPTER_LORA, EMULATOR_LORA)
        return blobs.path(file.sha256) if is_lora else directory.bundle / file.name

    return Bundle(read_manifest(blobs.get(manifest)), path_of)
