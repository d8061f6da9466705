"""Job 1: full LLM -> SGP -> NF4 -> LoRA -> ODA -> bundle. Resumable; one layer of the full LLM resident at a time.

The run's method says which layers go and what is aligned; where nothing is, it is full LLM -> NF4 -> bundle.

Each stage leaves its result under `<run>/prepare/` with the fingerprint of what it was made from; a stage
whose result is there is skipped. What is asked of the full LLM alone is in `full_llm.py`; rounds are the daemon's business.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fedsoda_edge.errors import DiskFull, UsageProblem
from fedsoda_edge.model import border, delta, lora
from fedsoda_edge.model.bundle import Bundle, read_manifest
from fedsoda_edge.model.bundle_writer import replace_emulator_lora, sub_manifest, write_bundle, write_size_class
from fedsoda_edge.model.source import LayerSource
from fedsoda_edge.model.streaming import stream
from fedsoda_edge.model.sub_llm import SubLLM
from fedsoda_edge.ports.disk import BlobStore, sha256_file, write_durably, write_durably_json
from fedsoda_edge.ports.system import sync_directory
from fedsoda_edge.protocol.manifest import ADAPTER_LORA, EMULATOR_LORA, File, LayerPlan, encode_manifest, file_of
from fedsoda_hub.algorithms.aggregation import flexlora
from fedsoda_hub.algorithms.alignment import oda, ridge
from fedsoda_hub.algorithms.methods import fedpruner
from fedsoda_hub.preparation.full_llm import Report, StreamedLLM
from fedsoda_hub.settings.run import RunSettings


def made_of(settings: RunSettings) -> Any:
    """The tables that a bundle is made of: not when and how long it is aligned again."""
    method = msgspec.structs.replace(settings.method, realign_every=0)
    align = msgspec.structs.replace(settings.align, realign_steps=0)
    return msgspec.to_builtins([method, settings.lora, settings.public, align])


class Preparation:
    """The pieces of a run that need the full LLM, made once and found again."""

    def __init__(self, settings: RunSettings, report: Report = lambda _: None) -> None:
        self.settings = settings
        self.report = report
        self.run_dir = settings.run_dir
        self.work = self.run_dir / "prepare"
        self.blobs = BlobStore(self.run_dir / "blobs")
        self.llm = StreamedLLM(settings, self.work, report)
        self.llm.read()
        limit = int(self.llm.source.fields["max_position_embeddings"])
        for key, length in (
            ("[public] length", settings.public.length),
            ("[local] max_length", settings.local.max_length),
        ):
            if length > limit:
                raise UsageProblem(f"{key} = {length}, but {self.llm.source.name} has {limit} positions; lower it")
        if settings.align.closed_form:
            self.llm.check_closed_form()

    def fingerprint(self) -> str:
        """Of everything the stages are made from; reads the weights once."""
        settings = self.settings
        parts = [
            self.llm.source.revision,
            _sha256(settings.public_text),
            settings.seed,
            [settings.task.prompt, _sha256(settings.like_task)] if settings.align.border_map != "none" else None,
            made_of(settings),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    # --- stages ----------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Do what is not done; the digests of what a run starts from, and the public KL."""
        self.work.mkdir(parents=True, exist_ok=True)
        self._forget_other_runs()
        bundle_dir = self.run_dir / "bundle"
        if not (bundle_dir / "manifest.json").exists():
            plans = self.plans()
            if any(self.llm.method.aligned(plan) for plan in plans):
                self._say_needed_disk()
            unaligned = self.work / "unaligned"
            if not (unaligned / "manifest.json").exists():
                self._write_unaligned(unaligned, plans)
            for size_class, plan in enumerate(plans):
                self._finish_class(unaligned, size_class, plan)
            shutil.rmtree(bundle_dir, ignore_errors=True)
            os.replace(unaligned, bundle_dir)
            sync_directory(self.run_dir)
        bundles = [Bundle.open(bundle_dir, number) for number in range(1 + len(self.settings.method.classes))]
        views = [self.blobs.put(delta.to_bytes(bundle.adapter_lora())) for bundle in bundles]
        largest, *smaller = [
            {
                "manifest": self.blobs.put((bundle_dir / file_of("manifest.json", size_class)).read_bytes()),
                "emulator_view": self.blobs.put(delta.to_bytes(bundle.emulator_lora())),
                "public_kl": json.loads((self.work / f"public_kl.{size_class}.json").read_text()),
                "adapter_view": view if size_class == 0 or view != views[0] else None,
            }
            for size_class, (bundle, view) in enumerate(zip(bundles, views, strict=True))
        ]
        if not smaller:
            return largest
        master = self._first_master(bundle.plan for bundle in bundles)
        return largest | {"smaller": smaller, "master": self.blobs.put(delta.to_bytes(master))}

    def _first_master(self, plans: Iterable[LayerPlan]) -> dict[str, Tensor]:
        """w before anything is trained, of all layers that train in one of these plans, at the run's rank."""
        layers = sorted({layer for plan in plans for layer in plan.adapter})
        s, source = self.settings, self.llm.source
        return lora.initial(lora.specs(source.family, source.fields, layers, s.lora.targets, s.lora.rank), s.seed)

    def reprune(self, round_number: int, master: dict[str, Tensor]) -> dict[str, Any]:
        """Other layers for each size class: manifests, and their first views, which are cut from the master.

        Drawn by what was measured when the run was prepared: similarity and importance are the base's, which is frozen.
        """
        plans = fedpruner.redrawn(self.llm, self.settings.method, self.settings.seed, round_number)
        master = self._first_master(plans) | master
        made = []
        for size_class, plan in enumerate(plans):
            spec = self.llm.lora_spec(plan, size_class)
            view = flexlora.cut(master, lora.initial(spec.adapter, self.settings.seed))
            manifest = sub_manifest(self.run_dir / "bundle", plan, spec, view, {})
            made.append(
                {
                    "manifest": self.blobs.put(encode_manifest(manifest)),
                    "view": self.blobs.put(delta.to_bytes(view)),
                }
            )
        largest, *smaller = made
        return {"master": self.blobs.put(delta.to_bytes(master)), **largest, "smaller": smaller}

    def _finish_class(self, directory: Path, size_class: int, plan: LayerPlan) -> None:
        """Align one size class of the bundle, or measure it where the method does not align."""
        if not (directory / file_of("manifest.json", size_class)).exists():
            spec = self.llm.lora_spec(plan, size_class)
            first = (lora.initial(layout, self.settings.seed) for layout in (spec.adapter, spec.emulator))
            write_size_class(directory, size_class, plan, spec, *first)
        bundle, kl_file = Bundle.open(directory, size_class), self.work / f"public_kl.{size_class}.json"
        if self.llm.method.aligned(plan):
            emulator, kl = self._align_first(bundle, size_class)
            write_durably_json(kl_file, kl)
            replace_emulator_lora(directory, emulator, size_class)
        else:
            write_durably_json(kl_file, self._unaligned_kl(bundle))

    def _forget_other_runs(self) -> None:
        mark = self.work / "fingerprint"
        fingerprint = self.fingerprint()
        if mark.exists() and mark.read_text() == fingerprint:
            return
        shutil.rmtree(self.work)
        shutil.rmtree(self.run_dir / "bundle", ignore_errors=True)
        self.work.mkdir()
        write_durably(mark, fingerprint.encode())

    def plans(self) -> tuple[LayerPlan, ...]:
        """The method's by size class, made once; one where the run has no more."""
        path = self.work / "plans.json"
        if path.exists():
            return msgspec.json.decode(path.read_bytes(), type=tuple[LayerPlan, ...])
        plans = self.llm.method.plans(self.llm, self.settings.method, self.settings.seed)
        write_durably(path, msgspec.json.encode(plans))
        return plans

    def _say_needed_disk(self) -> None:
        llm = self.llm
        blocks = len(llm.used) + len(llm.held_out)
        firsts = {min(aligned) for plan in self.plans() if (aligned := self.llm.method.aligned(plan))}
        missing = len(llm.missing_targets(llm.held_against(self.plans())))
        missing += sum(not self._below_file(first).exists() for first in firsts)
        hidden = int(llm.source.fields["hidden_size"])
        needed = missing * blocks * self.settings.public.length * hidden * llm.compute_dtype.itemsize
        free = shutil.disk_usage(self.work).free
        self.report({"stage": "caching teacher targets", "needed_bytes": needed, "free_bytes": free})
        if needed > free:
            raise DiskFull(
                f"cached teacher targets need {needed / 1e9:.1f} GB, {self.work} has {free / 1e9:.1f} GB free; "
                "free space, or lower [public] sequences or length"
            )

    def _write_unaligned(self, directory: Path, plans: Sequence[LayerPlan]) -> None:
        """With the shards of all layers that a smaller sub-LLM keeps, or one of a later round may."""
        s, plan = self.settings, plans[0]
        spec = self.llm.lora_spec(plan)
        kept = range(plan.num_layers) if s.method.reprune_every else chain(*(one.kept for one in plans))
        write_bundle(
            directory,
            self.llm.source,
            plan,
            self.llm.bundle_settings(plan),
            name=self.llm.source.name,
            revision=self.llm.source.revision,
            adapter_lora=lora.initial(spec.adapter, s.seed),
            emulator_lora=lora.initial(spec.emulator, s.seed),
            tokenizer_files=self.llm.source.tokenizer_files,
            spare=sorted(set(kept) - set(plan.kept)),
            progress=self.llm.progress("quantizing"),
        )

    # --- alignment -------------------------------------------------------------------------------------

    def _align_first(self, bundle: Bundle, size_class: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Pre-alignment; the aligned emulator LoRA and the public KL of each stage."""
        done = self.work / f"emulator_lora.{size_class}.safetensors"
        kl_done = self.work / f"first_kl.{size_class}.json"
        if done.exists() and kl_done.exists():
            return load_file(done), json.loads(kl_done.read_text())
        plan, llm, count = bundle.plan, self.llm, len(self.llm.used)
        self._make_targets()
        final = llm.final_with(plan, self._first_master([plan]))
        wanted = final[count:]
        pruned = llm.ran(llm.source, plan.swept, "running the pruned LLM on public text")
        kl = {"pruned": oda.public_kl(llm.build(llm.source, plan.resident), pruned, wanted)}
        student, states = self._student(bundle, bundle.emulator_lora(), bundle.adapter_lora())
        kl["quantized"] = oda.public_kl(student, states[count:], wanted)
        if self.settings.align.closed_form:
            begun = lora.on(plan.emulator, bundle.emulator_lora())
            lora.load(student, llm.solve(bundle, plan, states[:count], begun, bundle.manifest.lora.scale))
            kl["closed_form"] = oda.public_kl(student, states[count:], wanted)
        emulator = self._train(student, plan, states, final, self.settings.align.steps, version=0)
        kl["aligned"] = oda.public_kl(student, states[count:], wanted)
        emulator |= self._fit_border_map(bundle, emulator)
        write_durably(done, save(emulator))
        write_durably_json(kl_done, kl)
        return emulator, kl

    def _unaligned_kl(self, bundle: Bundle) -> dict[str, float]:
        """The three public KLs where nothing is aligned; one layer resident at a time, whatever trains."""
        plan, llm = bundle.plan, self.llm

        def kl(source: LayerSource, name: str) -> float:
            states = llm.ran(source, plan.kept, f"running the {name} on public text")
            return oda.public_kl(llm.build(source, ()), states, llm.final)

        pruned = 0.0  # exactly, where all layers are kept whole
        if len(plan.kept) < plan.num_layers or plan.lacking:
            pruned = kl(llm.source.without(plan.lacking), "pruned LLM")
        quantized = kl(bundle, "sub-LLM")
        return {"pruned": pruned, "quantized": quantized, "aligned": quantized}

    def _make_targets(self) -> None:
        self.llm.make_targets(self.llm.held_against(self.plans()))

    def probe(self, adapter_master: dict[str, Tensor], emulator_view: dict[str, Tensor]) -> dict[str, float]:
        """How far sub-LLM and full LLM are apart with the current adapter LoRA, on the held-out blocks."""
        bundle = Bundle.open(self.run_dir / "bundle")
        self._make_targets()
        wanted = self.llm.wanted(bundle.plan, adapter_master)
        student, states = self._student(bundle, emulator_view, adapter_master)
        return self.llm.apart(student, bundle.plan.adapter, states[len(self.llm.used) :], wanted)

    def realign(
        self,
        version: int,
        adapter_master: dict[str, Tensor],
        emulator_view: dict[str, Tensor],
        codec: str,
        size_class: int = 0,
    ) -> dict[str, Any]:
        """Realignment with the current adapter LoRA in teacher and student; the coded step and the new view."""
        bundle = Bundle.open(self.run_dir / "bundle", size_class)
        plan, spec = bundle.plan, bundle.manifest.lora
        self._make_targets()
        final, count = self.llm.final_with(plan, adapter_master), len(self.llm.used)
        adapter = flexlora.cut(adapter_master, lora.initial(spec.adapter, self.settings.seed))  # at the class's rank
        student, states = self._student(bundle, emulator_view, adapter)
        before = oda.public_kl(student, states[count:], final[count:])
        trained = self._train(student, plan, states, final, self.settings.align.realign_steps, version)
        trained |= self._fit_border_map(bundle, trained)
        coded, view = delta.step_down(trained, emulator_view, spec.emulator, codec)
        lora.load(student, lora.on(plan.emulator, view))
        after = oda.public_kl(student, states[count:], final[count:])
        return {
            "view": self.blobs.put(delta.to_bytes(view)),
            "delta": self.blobs.put(coded),
            "kl_before": before,
            "kl_after": after,
        }

    def _train(
        self,
        student: SubLLM,
        plan: LayerPlan,
        states: Tensor,
        teacher_final: Tensor,
        steps: int,
        version: int,
    ) -> dict[str, Tensor]:
        align = self.settings.align
        count = len(self.llm.used)
        teacher = oda.Teacher(
            {layer: self.llm.target(other)[:count] for layer, other in self.llm.method.held_against(plan).items()},
            self.llm.target(plan.emulator[-1])[:count],
            teacher_final[:count],
        )
        oda.align(
            student,
            plan,
            states[:count],
            teacher,
            oda.AlignSettings(
                steps, align.batch_size, align.learning_rate, align.representation_weight, align.kl_weight
            ),
            seed=self.settings.seed * 1000 + version,
            progress=lambda done, total, kl: self.report({"stage": "aligning", "done": done, "total": total, "kl": kl}),
        )
        return lora.on(plan.emulator, lora.snapshot(student))

    def _fit_border_map(self, bundle: Bundle, emulator: dict[str, Tensor]) -> dict[str, Tensor]:
        """The map's tensors for the sub-emulator with this LoRA; none where the bundle has no map."""
        if not any(item.name.startswith(border.PREFIX) for item in bundle.manifest.lora.emulator):
            return {}
        llm, path = self.llm, self.work / "teacher.prompts.safetensors"
        if not path.exists():
            how = llm.how("running the full LLM on prompts like the task's")
            write_durably(
                path, save({"hidden": torch.cat(stream(llm.source, bundle.plan.emulator, llm.prompts, **how))})
            )
        teacher = load_file(path)["hidden"].split([len(ids) for ids in llm.prompts])
        student = stream(
            bundle,
            bundle.plan.sub_emulator,
            llm.prompts,
            lora=emulator,
            lora_scale=bundle.manifest.lora.scale,
            **llm.how("running the sub-LLM on prompts like the task's"),
        )
        width = int(llm.source.fields["hidden_size"])
        fit = ridge.fit(zip(student, teacher, strict=True), width, self.settings.align.border_rank)
        errors = {"error_before": fit.error_before, "error_whole": fit.error_whole, "error": fit.error}
        self.report({"stage": "fitting the border map", **errors})
        return fit.tensors

    def _student(
        self, bundle: Bundle, emulator: dict[str, Tensor], adapter: dict[str, Tensor]
    ) -> tuple[SubLLM, Tensor]:
        """The student from its first aligned layer on, and its hidden states below that, which never change.

        Without the border map: it was fitted for text like the task's, and elsewhere it is far off. An alignment that saw
        it on public text would bend the emulator LoRA to undo it.
        Adapter layers may lie below it in a method that aligns before round 1 alone: their LoRA is zero then.
        """
        spec, kept, llm = bundle.manifest.lora, bundle.plan.kept, self.llm
        first = min(spec.aligned, default=bundle.plan.border)
        path = self._below_file(first)
        if not path.exists():
            below = tuple(layer for layer in kept if layer < first)
            how = llm.how("running the sub-LLM on public text")
            write_durably(path, save({"hidden": torch.stack(stream(bundle, below, [*llm.used, *llm.held_out], **how))}))
        trained = tuple(layer for layer in kept if layer >= first)
        student = llm.build(bundle, trained)
        lora.attach(student, spec, lora.on(trained, {**emulator, **adapter}))
        return student, load_file(path)["hidden"].to(llm.device)

    def _below_file(self, first: int) -> Path:
        """(N, T, C): all public blocks below this layer of a student."""
        return self.work / f"student.below.{first}.safetensors"


def _sha256(file: Path | None) -> str | None:
    return None if file is None else sha256_file(file)


def manifest_of(run_dir: Path) -> Any:
    """The manifest of a prepared run."""
    path = run_dir / "bundle" / "manifest.json"
    if not path.exists():
        raise UsageProblem(f"{run_dir} has no bundle yet; run `fedsoda-hub prepare` or `serve` first")
    return read_manifest(path.read_bytes())


def bundle_of(run_dir: Path, manifest: str) -> Bundle:
    """A sub-LLM of a prepared run by its manifest's digest. Shards are prepare's; manifest and LoRA are blobs."""
    blobs = BlobStore(run_dir / "blobs")

    def path_of(file: File) -> Path:
        is_lora = file.name in (ADAPTER_LORA, EMULATOR_LORA)
        return blobs.path(file.sha256) if is_lora else run_dir / "bundle" / file.name

    return Bundle(read_manifest(blobs.get(manifest)), path_of)
