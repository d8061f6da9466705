"""Job 1: full LLM -> SGP -> NF4 -> LoRA -> ODA -> bundle. Resumable; one layer of the full LLM resident at a time.

The run's method says which layers go and what is aligned; where nothing is, it is full LLM -> NF4 -> bundle.

Each stage leaves its result under `<run>/prepare/` with the fingerprint of what it was made from; a stage
whose result is there is skipped. Rounds are the daemon's business.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fedsoda_edge.data import SampleTokenizer
from fedsoda_edge.errors import DiskFull, UsageProblem
from fedsoda_edge.model import border_map, delta, lora
from fedsoda_edge.model.bundle import (
    Bundle,
    BundleSettings,
    encode_manifest,
    half_bytes,
    read_manifest,
    replace_emulator_lora,
    shard_sizes,
    sub_manifest,
    write_bundle,
    write_durably_json,
    write_size_class,
)
from fedsoda_edge.model.families import Family
from fedsoda_edge.model.streaming import Checkpoint, LayerSource, stream
from fedsoda_edge.model.sub_llm import SubLLM, build
from fedsoda_edge.ports.disk import BlobStore, sha256_file, write_durably
from fedsoda_edge.ports.system import sync_directory
from fedsoda_edge.protocol.manifest import ADAPTER_LORA, EMULATOR_LORA, File, LayerPlan, LoRASpec, file_of
from fedsoda_hub.algorithms import closed_form, drift, fedpruner, flexlora, oda, representatives, ridge, sgp
from fedsoda_hub.algorithms.methods import method_of
from fedsoda_hub.algorithms.representatives import Components, Measured, Partition
from fedsoda_hub.config import RunSettings
from fedsoda_hub.public_text import read_blocks, read_prompts
from fedsoda_hub.self_generated import generate_blocks, generate_prompts

Report = Callable[[dict[str, Any]], None]
KL_TIE = 1.05


def pick_device(wanted: str, dtype: str) -> tuple[str, torch.dtype]:
    """(device, compute dtype): `dtype` on CUDA; fp32 on a CPU, where 16-bit products are several times slower."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageProblem(f"device = {wanted!r}, but torch sees no CUDA device here; use device = 'cpu'")
    return device, torch.float32 if device == "cpu" else getattr(torch, dtype)


def open_full_llm(settings: RunSettings) -> Checkpoint:
    """The run's full LLM; a model hub's id at the commit that the run first saw, however long it lasts."""
    pin = settings.run_dir / "model_revision.json"
    held = json.loads(pin.read_text()) if pin.exists() else {}
    revision = held.get("revision") if held.get("model") == settings.model else None
    source = Checkpoint.open(settings.model, relative_to=settings.directory, revision=revision)
    if source.name == settings.model and revision is None:
        settings.run_dir.mkdir(parents=True, exist_ok=True)
        write_durably_json(pin, {"model": settings.model, "revision": source.revision})
    return source


def lora_spec(
    settings: RunSettings,
    family: Family,
    fields: dict[str, Any],
    plan: LayerPlan,
    size_class: int = 0,
    *,
    is_mapped: bool = True,
) -> LoRASpec:
    """The tensors of a size class's two LoRAs, and of its border map beside the emulator's where something is aligned.

    Args:
        is_mapped: whether there is anything to fit a map on that the settings ask for.
    """
    rank, targets = settings.lora.of_class(size_class), settings.lora.targets
    aligned = method_of(settings.method).aligned(plan)
    on_adapter, on_emulator = (
        lora.specs(family, fields, layers, targets, rank, plan.lacking) for layers in (plan.adapter, aligned)
    )
    is_mapped = is_mapped and bool(aligned) and settings.align.border_map != "none"
    bordering = border_map.specs(int(fields["hidden_size"]), settings.align.border_rank if is_mapped else 0)
    return LoRASpec(rank, settings.lora.alpha, tuple(targets), on_adapter, (*bordering, *on_emulator))


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
        self.method = method_of(settings.method)
        self.device, self.compute_dtype = pick_device(settings.device, settings.dtype)
        self.source = open_full_llm(settings)
        # What is read is read now: files that do not serve are refused before any work.
        if settings.public_text is not None:
            _ = self._blocks
        if settings.like_task is not None:
            _ = self._prompts
        limit = int(self.source.fields["max_position_embeddings"])
        for key, length in (
            ("[public] length", settings.public.length),
            ("[local] max_length", settings.local.max_length),
        ):
            if length > limit:
                raise UsageProblem(f"{key} = {length}, but {self.source.name} has {limit} positions; lower it")
        if settings.align.closed_form:
            family, fields, s = self.source.family, self.source.fields, settings.lora
            emulator = range(self.source.num_layers - settings.method.adapter_layers)
            names = [item.name for item in lora.specs(family, fields, emulator, s.targets, s.rank)]
            closed_form.check(self.source, emulator, names)

    def fingerprint(self) -> str:
        """Of everything the stages are made from; reads the weights once."""
        settings = self.settings
        parts = [
            self.source.revision,
            _sha256(settings.public_text),
            settings.seed,
            [settings.task.prompt, _sha256(settings.like_task)] if settings.align.border_map != "none" else None,
            made_of(settings),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    # --- public text -----------------------------------------------------------------------------------

    @property
    def used(self) -> list[Tensor]:
        return self._blocks[: self.settings.public.sequences]

    @property
    def held_out(self) -> list[Tensor]:
        return self._blocks[self.settings.public.sequences :]

    @cached_property
    def _blocks(self) -> list[Tensor]:
        """Public blocks, those that are used and then those that are held out."""
        public, file = self.settings.public, self.settings.public_text
        if file is None:
            return self._written(
                "public",
                "writing public text",
                lambda **how: list(chain(*generate_blocks(self.source, public.sequences, public.length, **how))),
            )
        tokenizer, bos = self.source.path / "tokenizer.json", self.source.fields.get("bos_token_id")
        return list(chain(*read_blocks(file, tokenizer, bos, public.sequences, public.length)))

    @cached_property
    def _prompts(self) -> list[Tensor]:
        """What the border map is fitted on; nothing where the run has none.

        Raises:
            UsageProblem: there is nothing to fit the map on that the settings insist on.
        """
        s = self.settings
        if s.align.border_map == "none":
            return []
        if s.like_task is not None:
            tokenizer = SampleTokenizer(self.source.path / "tokenizer.json", None)
            return read_prompts(s.like_task, s.prompt, tokenizer, s.local.max_length)
        try:
            return self._written(
                "prompts",
                "writing prompts like the task's",
                lambda **how: generate_prompts(self.source, s.prompt, s.local.max_length, **how),
            )
        except UsageProblem as problem:
            if s.align.border_map == "ridge":
                raise
            self.report({"stage": "no border map", "why": str(problem)})
            return []

    def _written(self, name: str, stage: str, write: Callable[..., list[Tensor]]) -> list[Tensor]:
        """What the full LLM writes, ids of each text; once for a run."""
        path = self.work / f"{name}.safetensors"
        if not path.exists():
            texts = write(
                seed=self.settings.seed,
                compute_dtype=self.compute_dtype,
                device=self.device,
                progress=self._progress(stage),
            )
            gc.collect()
            lengths = torch.tensor([len(ids) for ids in texts])
            write_durably(path, save({"ids": torch.cat(texts), "lengths": lengths}))
        held = load_file(path)
        return list(held["ids"].split(held["lengths"].tolist()))

    # --- stages ----------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Do what is not done; the digests of what a run starts from, and the public KL."""
        self.work.mkdir(parents=True, exist_ok=True)
        self._forget_other_runs()
        bundle_dir = self.run_dir / "bundle"
        if not (bundle_dir / "manifest.json").exists():
            plans = self.plans()
            if any(self.method.aligned(plan) for plan in plans):
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
        s, source = self.settings, self.source
        return lora.initial(lora.specs(source.family, source.fields, layers, s.lora.targets, s.lora.rank), s.seed)

    def reprune(self, round_number: int, master: dict[str, Tensor]) -> dict[str, Any]:
        """Other layers for each size class: manifests, and their first views, which are cut from the master.

        Drawn by what was measured when the run was prepared: similarity and importance are the base's, which is frozen.
        """
        plans = fedpruner.redrawn(self, self.settings.method, self.settings.seed, round_number)
        master = self._first_master(plans) | master
        made = []
        for size_class, plan in enumerate(plans):
            spec = self._lora_spec(plan, size_class)
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
            spec = self._lora_spec(plan, size_class)
            first = (lora.initial(layout, self.settings.seed) for layout in (spec.adapter, spec.emulator))
            write_size_class(directory, size_class, plan, spec, *first)
        bundle, kl_file = Bundle.open(directory, size_class), self.work / f"public_kl.{size_class}.json"
        if self.method.aligned(plan):
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
        plans = self.method.plans(self, self.settings.method, self.settings.seed)
        write_durably(path, msgspec.json.encode(plans))
        return plans

    # What a method asks: algorithms.methods.FullLLM.

    @property
    def num_layers(self) -> int:
        return self.source.num_layers

    def distances(self, num_layers: int) -> list[list[float]]:
        return sgp.measure(
            self.source,
            self.used,
            num_layers,
            compute_dtype=self.compute_dtype,
            device=self.device,
            progress=self._progress("measuring layer similarity"),
        )

    def representatives(self, count: int, grouping: str, drawn_by: int | None = None) -> tuple[int, ...]:
        generator = None if drawn_by is None else torch.Generator().manual_seed(drawn_by)
        partition = self._partition(grouping)
        return representatives.select_layers(self._measured, count, partition, keep_ends=True, generator=generator)

    @cached_property
    def _measured(self) -> Measured:
        """Similarity and importance of all layers, measured once for a run."""
        path = self.work / "layers.safetensors"
        if not path.exists():
            measured = representatives.measure_layers(
                self.source,
                self.used,
                seed=self.settings.seed,
                compute_dtype=self.compute_dtype,
                device=self.device,
                progress=self._progress("measuring layer similarity"),
            )
            importance = torch.tensor(measured.importance, dtype=torch.float64)
            write_durably(path, save({"similarity": measured.similarity, "importance": importance}))
        held = load_file(path)
        return Measured(held["similarity"], tuple(held["importance"].tolist()))

    def components(self, count: int, grouping: str) -> Components:
        attention, mlp = representatives.measure_components(
            self.source,
            self.used,
            seed=self.settings.seed,
            compute_dtype=self.compute_dtype,
            device=self.device,
            progress=self._progress("measuring layer similarity"),
        )
        dtype, base = str(self.source.dtype).removeprefix("torch."), self.settings.method.adapter_base
        of_attention, of_mlp = (
            [
                half_bytes(self.source.family, self.source.fields, number, half, base, dtype)
                for number in range(self.num_layers)
            ]
            for half in ("attention", "mlp")
        )
        budget = sum(of_attention + of_mlp) * count // self.num_layers  # layers of qwen3_moe are of two sizes
        return representatives.select_components(
            attention, mlp, of_attention, of_mlp, budget, self._partition(grouping)
        )

    def _partition(self, grouping: str) -> Partition:
        if grouping == "spectral":
            return partial(representatives.spectral, seed=self.settings.seed)
        return representatives.contiguous

    def fits(self, plan: LayerPlan) -> bool:
        dtype = str(self.source.dtype).removeprefix("torch.")
        sizes = shard_sizes(self.source.family, self.source.fields, plan, self._bundle_settings(plan), dtype)
        tokenizer = sum(file.stat().st_size for file in self.source.tokenizer_files)
        return sum(sizes.values()) + tokenizer <= self.settings.method.bundle_bytes

    def nearest(self, plans: Sequence[LayerPlan]) -> LayerPlan:
        """By public KL after closed-form alignment, on held-out blocks; of those within KL_TIE of the least, by the cosine
        between the adapter's gradients in sub-LLM and full LLM (method.md 8d). Neither is quantized: that is alike for all.
        """
        groups = [group for plan in plans for group in plan.groups]
        made = self._held_against(plans) | {group.start - 1 for group in groups if group.start}
        self._make_targets(made)
        adapter = lora.initial(self._lora_spec(plans[0]).adapter, self.settings.seed)  # that of all of them
        wanted = self._wanted(plans[0], adapter)
        found = [self._try(plan, adapter, wanted) for plan in plans]
        least = min(one["kl"] for one in found)
        good = [(one["cosine"], plan) for one, plan in zip(found, plans, strict=True) if one["kl"] <= KL_TIE * least]
        chosen = max(good, key=lambda one: one[0])[1]
        for layer in made - self._held_against([chosen]):
            (self.work / f"teacher.{layer}.safetensors").unlink()
        return chosen

    def _try(self, plan: LayerPlan, adapter: dict[str, Tensor], wanted: tuple[Tensor, Tensor]) -> dict[str, float]:
        """How far this plan's sub-LLM is from the full LLM, whose answers are `wanted`, before anything is trained."""
        spec, count, first = self._lora_spec(plan), len(self.used), min(plan.retained)
        emulator = lora.initial([item for item in spec.emulator if item.layer is not None], self.settings.seed)
        ids = [*self.used, *self.held_out]
        below = self._target(first - 1) if first else torch.stack(stream(self.source, (), ids)).to(self.device)
        with contextlib.suppress(UsageProblem):  # of this family nothing can be solved for: unaligned, then
            emulator = self._solve(self.source, plan, below[:count], emulator, spec.scale)
        trained = tuple(layer for layer in plan.kept if layer >= first)
        student = build(self.source, trained, compute_dtype=self.compute_dtype, device=self.device)
        lora.attach(student, spec, lora.on(trained, {**emulator, **adapter}))
        found = self._apart(student, plan.adapter, below[count:], wanted)
        n, p = len(plan.groups[0].removed), len(plan.groups)
        self.report({"stage": "choosing groups", "layers_per_group": n, "groups": p, **found})
        return found

    def _progress(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self.report({"stage": stage, "done": done, "total": total})

    def _say_needed_disk(self) -> None:
        hidden = int(self.source.fields["hidden_size"])
        blocks = len(self.used) + len(self.held_out)
        firsts = {min(aligned) for plan in self.plans() if (aligned := self.method.aligned(plan))}
        files = {*(f"teacher.{n}" for n in self._target_layers()), *(f"student.below.{n}" for n in firsts)}
        missing = sum(not (self.work / f"{name}.safetensors").exists() for name in files)
        needed = missing * blocks * self.settings.public.length * hidden * self.compute_dtype.itemsize
        free = shutil.disk_usage(self.work).free
        self.report({"stage": "caching teacher targets", "needed_bytes": needed, "free_bytes": free})
        if needed > free:
            raise DiskFull(
                f"cached teacher targets need {needed / 1e9:.1f} GB, {self.work} has {free / 1e9:.1f} GB free; "
                "free space, or lower [public] sequences or length"
            )

    def _lora_spec(self, plan: LayerPlan, size_class: int = 0) -> LoRASpec:
        is_mapped = bool(self.method.aligned(plan) and self._prompts)
        return lora_spec(self.settings, self.source.family, self.source.fields, plan, size_class, is_mapped=is_mapped)

    def _bundle_settings(self, plan: LayerPlan) -> BundleSettings:
        method = self.settings.method
        return BundleSettings(
            self._lora_spec(plan), method.adapter_base, method.quantize_embedding, method.emulator_base
        )

    def _write_unaligned(self, directory: Path, plans: Sequence[LayerPlan]) -> None:
        """With the shards of all layers that a smaller sub-LLM keeps, or one of a later round may."""
        s, plan = self.settings, plans[0]
        spec = self._lora_spec(plan)
        kept = range(plan.num_layers) if s.method.reprune_every else chain(*(one.kept for one in plans))
        write_bundle(
            directory,
            self.source,
            plan,
            self._bundle_settings(plan),
            name=self.source.name,
            revision=self.source.revision,
            adapter_lora=lora.initial(spec.adapter, s.seed),
            emulator_lora=lora.initial(spec.emulator, s.seed),
            tokenizer_files=self.source.tokenizer_files,
            spare=sorted(set(kept) - set(plan.kept)),
            progress=self._progress("quantizing"),
        )

    # --- alignment -------------------------------------------------------------------------------------

    def _align_first(self, bundle: Bundle, size_class: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Pre-alignment; the aligned emulator LoRA and the public KL of each stage."""
        done = self.work / f"emulator_lora.{size_class}.safetensors"
        kl_done = self.work / f"first_kl.{size_class}.json"
        if done.exists() and kl_done.exists():
            return load_file(done), json.loads(kl_done.read_text())
        plan, adapter = bundle.plan, bundle.adapter_lora()
        final = self._teacher_final(plan, self._first_master([plan]))
        wanted = final[len(self.used) :]
        pruned = stream(self.source, plan.swept, self.held_out, compute_dtype=self.compute_dtype, device=self.device)
        tail = build(self.source, plan.resident, compute_dtype=self.compute_dtype, device=self.device)
        kl = {"pruned": oda.public_kl(tail, torch.stack(pruned).to(self.device), wanted)}
        del tail
        student, states = self._student(bundle, bundle.emulator_lora(), adapter)
        kl["quantized"] = oda.public_kl(student, states[len(self.used) :], wanted)
        if self.settings.align.closed_form:
            begun = lora.on(plan.emulator, bundle.emulator_lora())
            solved = self._solve(bundle, plan, states[: len(self.used)], begun, bundle.manifest.lora.scale)
            lora.load(student, solved)
            kl["closed_form"] = oda.public_kl(student, states[len(self.used) :], wanted)
        emulator = self._train(student, plan, states, final, self.settings.align.steps, version=0)
        kl["aligned"] = oda.public_kl(student, states[len(self.used) :], wanted)
        emulator |= self._fit_border_map(bundle, emulator)
        write_durably(done, save(emulator))
        write_durably_json(kl_done, kl)
        return emulator, kl

    def _solve(
        self, source: LayerSource, plan: LayerPlan, states: Tensor, emulator: dict[str, Tensor], scale: float
    ) -> dict[str, Tensor]:
        """The emulator LoRA in closed form. states: (N, T, C) of the public blocks below its first layer."""
        held_against = self.method.held_against(plan)
        return closed_form.align(
            source,
            plan,
            self.used,
            list(states),
            {layer: self._target(other)[: len(self.used)] for layer, other in held_against.items()},
            emulator,
            scale,
            compute_dtype=self.compute_dtype,
            device=self.device,
            progress=self._progress("solving for the emulator LoRA"),
        )

    def _unaligned_kl(self, bundle: Bundle) -> dict[str, float]:
        """The three public KLs where nothing is aligned; one layer resident at a time, whatever trains."""

        plan, wanted = bundle.plan, self._full_final
        pruned = 0.0  # exactly, where all layers are kept whole
        if len(plan.kept) < plan.num_layers or plan.lacking:
            source = self.source.without(plan.lacking)
            pruned = oda.public_kl(self._ends(source), self._ran(source, plan.kept, "pruned LLM"), wanted)
        quantized = oda.public_kl(self._ends(bundle), self._ran(bundle, plan.kept, "sub-LLM"), wanted)
        return {"pruned": pruned, "quantized": quantized, "aligned": quantized}

    @cached_property
    def _full_final(self) -> Tensor:
        """(N, T, C): the full LLM's final hidden states on the held-out blocks, for all size classes."""
        with torch.no_grad():
            return self._ends(self.source).hidden(states=self._ran(self.source, range(self.num_layers), "full LLM"))

    def _ends(self, source: LayerSource) -> SubLLM:
        return build(source, (), compute_dtype=self.compute_dtype, device=self.device)

    def _ran(self, source: LayerSource, layers: Sequence[int], name: str) -> Tensor:
        states = stream(
            source,
            layers,
            self.held_out,
            compute_dtype=self.compute_dtype,
            device=self.device,
            progress=self._progress(f"running the {name} on public text"),
        )
        return torch.stack(states).to(self.device)

    def probe(self, adapter_master: dict[str, Tensor], emulator_view: dict[str, Tensor]) -> dict[str, float]:
        """How far sub-LLM and full LLM are apart with the current adapter LoRA, on the held-out blocks."""
        bundle = Bundle.open(self.run_dir / "bundle")
        wanted = self._wanted(bundle.plan, adapter_master)
        student, states = self._student(bundle, emulator_view, adapter_master)
        return self._apart(student, bundle.plan.adapter, states[len(self.used) :], wanted)

    def _wanted(self, plan: LayerPlan, adapter: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """On the held-out blocks the full LLM's final hidden (N, T, C) with this adapter LoRA, and its gradient (P,)."""
        teacher, border = self._teacher(plan, adapter), self._target(plan.emulator[-1])[len(self.used) :]
        with torch.no_grad():
            final = torch.cat([teacher.hidden(states=states) for states in border.split(8)])
        return final, drift.adapter_gradient(teacher, plan.adapter, border, torch.stack(self.held_out))

    def _apart(
        self, student: SubLLM, adapter: Sequence[int], states: Tensor, wanted: tuple[Tensor, Tensor]
    ) -> dict[str, float]:
        """Public KL, and the cosine of the adapter's gradients. states: (N, T, C) of the held-out blocks below the student."""
        final, gradient = wanted
        made = drift.adapter_gradient(student, adapter, states, torch.stack(self.held_out))
        return {"kl": oda.public_kl(student, states, final), "cosine": drift.cosine(gradient, made)}

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
        final = self._teacher_final(plan, adapter_master)
        wanted = final[len(self.used) :]
        adapter = flexlora.cut(adapter_master, lora.initial(spec.adapter, self.settings.seed))  # at the class's rank
        student, states = self._student(bundle, emulator_view, adapter)
        before = oda.public_kl(student, states[len(self.used) :], wanted)
        trained = self._train(student, plan, states, final, self.settings.align.realign_steps, version)
        trained |= self._fit_border_map(bundle, trained)
        coded, view = delta.step_down(trained, emulator_view, spec.emulator, codec)
        lora.load(student, lora.on(plan.emulator, view))
        after = oda.public_kl(student, states[len(self.used) :], wanted)
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
        count = len(self.used)
        teacher = oda.Teacher(
            {layer: self._target(other)[:count] for layer, other in self.method.held_against(plan).items()},
            self._target(plan.emulator[-1])[:count],
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
        if not any(item.name.startswith(border_map.PREFIX) for item in bundle.manifest.lora.emulator):
            return {}
        path = self.work / "teacher.prompts.safetensors"
        if not path.exists():
            states = stream(
                self.source,
                bundle.plan.emulator,
                self._prompts,
                compute_dtype=self.compute_dtype,
                device=self.device,
                progress=self._progress("running the full LLM on prompts like the task's"),
            )
            write_durably(path, save({"hidden": torch.cat(states)}))
        teacher = load_file(path)["hidden"].split([len(ids) for ids in self._prompts])
        student = stream(
            bundle,
            bundle.plan.sub_emulator,
            self._prompts,
            lora=emulator,
            lora_scale=bundle.manifest.lora.scale,
            compute_dtype=self.compute_dtype,
            device=self.device,
            progress=self._progress("running the sub-LLM on prompts like the task's"),
        )
        width = int(self.source.fields["hidden_size"])
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
        spec, kept = bundle.manifest.lora, bundle.plan.kept
        first = min(spec.aligned, default=bundle.plan.border)
        states = self._cached(f"student.below.{first}", bundle, tuple(layer for layer in kept if layer < first))
        trained = tuple(layer for layer in kept if layer >= first)
        student = build(bundle, trained, compute_dtype=self.compute_dtype, device=self.device)
        lora.attach(student, spec, lora.on(trained, {**emulator, **adapter}))
        return student, states.to(self.device)

    def _cached(self, name: str, source: LayerSource, layers: Sequence[int]) -> Tensor:
        """(N, T, C): all public blocks after these layers, made once."""
        path = self.work / f"{name}.safetensors"
        if not path.exists():
            states = stream(
                source,
                layers,
                [*self.used, *self.held_out],
                compute_dtype=self.compute_dtype,
                device=self.device,
                progress=self._progress("running the sub-LLM on public text"),
            )
            write_durably(path, save({"hidden": torch.stack(states)}))
        return load_file(path)["hidden"]

    def _target(self, layer: int) -> Tensor:
        """(N, T, C): the full LLM's output of an emulator layer on all public blocks, made once for all groups."""
        path = self.work / f"teacher.{layer}.safetensors"
        if not path.exists():
            self._make_targets(self._target_layers())
        return load_file(path)["hidden"].to(self.device)

    def _make_targets(self, layers: Collection[int]) -> None:
        """The files of `_target`, in one pass."""

        def keep(number: int, hidden: list[Tensor]) -> None:
            if number in layers:
                data = save({"hidden": torch.stack(hidden)})
                write_durably(self.work / f"teacher.{number}.safetensors", data)

        stream(
            self.source,
            range(max(layers) + 1),
            [*self.used, *self.held_out],
            compute_dtype=self.compute_dtype,
            device=self.device,
            visit=keep,
            progress=self._progress("running the full LLM on public text"),
        )
        gc.collect()

    def _target_layers(self) -> set[int]:
        """Full-LLM layers whose outputs a student is held against: the method's, and the emulator's last."""
        return self._held_against(self.plans())

    def _held_against(self, plans: Sequence[LayerPlan]) -> set[int]:
        return {layer for plan in plans for layer in self.method.held_against(plan).values()} | {plans[0].emulator[-1]}

    def _teacher_final(self, plan: LayerPlan, adapter: dict[str, Tensor]) -> Tensor:
        """(N, T, C): the full LLM's final hidden with this adapter LoRA, from its cached emulator's output."""
        border, teacher = self._target(plan.emulator[-1]), self._teacher(plan, adapter)
        with torch.no_grad():
            return torch.cat([teacher.hidden(states=states) for states in border.split(8)])

    def _teacher(self, plan: LayerPlan, adapter: dict[str, Tensor]) -> SubLLM:
        """The full LLM above its emulator, with this adapter LoRA."""
        above = range(plan.emulator[-1] + 1, plan.num_layers)
        teacher = build(self.source, above, compute_dtype=self.compute_dtype, device=self.device)
        s = self.settings.lora
        layout = lora.specs(self.source.family, self.source.fields, above, s.targets, s.rank)
        spec = LoRASpec(rank=s.rank, alpha=s.alpha, targets=tuple(s.targets), adapter=layout, emulator=())
        lora.attach(teacher, spec, lora.on(above, adapter))
        return teacher


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
