"""The full LLM on a run's public text, one layer resident at a time: what a method asks of it before any of its layers
goes, and what every sub-LLM of the run is held against. Bundles and their alignment are `prepare.py`'s.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fedsoda_edge.data.samples import SampleTokenizer
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model import border, lora
from fedsoda_edge.model.bundle_writer import BundleSettings, half_bytes, shard_sizes
from fedsoda_edge.model.families import Family
from fedsoda_edge.model.source import Checkpoint, LayerSource
from fedsoda_edge.model.streaming import stream
from fedsoda_edge.model.sub_llm import SubLLM, build
from fedsoda_edge.ports.disk import write_durably, write_durably_json
from fedsoda_edge.protocol.manifest import LayerPlan, LoRASpec
from fedsoda_hub.algorithms.alignment import closed_form, drift, oda
from fedsoda_hub.algorithms.methods.by_name import method_of
from fedsoda_hub.algorithms.pruning import representatives, sgp
from fedsoda_hub.algorithms.pruning.representatives import Components, Measured, Partition
from fedsoda_hub.preparation.public_text import read_blocks, read_prompts
from fedsoda_hub.preparation.self_generated import generate_blocks, generate_prompts
from fedsoda_hub.settings.run import RunSettings

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
    of_map = border.map_specs(int(fields["hidden_size"]), settings.align.border_rank if is_mapped else 0)
    return LoRASpec(rank, settings.lora.alpha, tuple(targets), on_adapter, (*of_map, *on_emulator))


class StreamedLLM:
    """A `methods.FullLLM`, and the teacher of the run's sub-LLMs.

    Args:
        work: what was written, measured and computed lies there and is found again.
    """

    def __init__(self, settings: RunSettings, work: Path, report: Report) -> None:
        self.settings = settings
        self.work = work
        self.report = report
        self.method = method_of(settings.method)
        self.device, self.compute_dtype = pick_device(settings.device, settings.dtype)
        self.source = open_full_llm(settings)

    def how(self, stage: str) -> dict[str, Any]:
        """What all that runs layers takes beside its input; `stage` is what its progress is called."""
        return {
            "compute_dtype": self.compute_dtype,
            "device": self.device,
            "progress": self.progress(stage),
        }

    def progress(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self.report({"stage": stage, "done": done, "total": total})

    def build(self, source: LayerSource, layers: Sequence[int]) -> SubLLM:
        return build(source, layers, compute_dtype=self.compute_dtype, device=self.device)

    # --- text ------------------------------------------------------------------------------------------

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
    def prompts(self) -> list[Tensor]:
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

    def read(self) -> None:
        """Read now what is read from files: those that do not serve are refused before any work."""
        if self.settings.public_text is not None:
            _ = self._blocks
        if self.settings.like_task is not None:
            _ = self.prompts

    def _written(self, name: str, stage: str, write: Callable[..., list[Tensor]]) -> list[Tensor]:
        """What the full LLM writes, ids of each text; once for a run."""
        path = self.work / f"{name}.safetensors"
        if not path.exists():
            texts = write(seed=self.settings.seed, **self.how(stage))
            gc.collect()
            lengths = torch.tensor([len(ids) for ids in texts])
            write_durably(path, save({"ids": torch.cat(texts), "lengths": lengths}))
        held = load_file(path)
        return list(held["ids"].split(held["lengths"].tolist()))

    # --- what a method asks: methods.FullLLM ------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        return self.source.num_layers

    def distances(self, num_layers: int) -> list[list[float]]:
        return sgp.measure(self.source, self.used, num_layers, **self.how("measuring layer similarity"))

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
                self.source, self.used, seed=self.settings.seed, **self.how("measuring layer similarity")
            )
            importance = torch.tensor(measured.importance, dtype=torch.float64)
            write_durably(path, save({"similarity": measured.similarity, "importance": importance}))
        held = load_file(path)
        return Measured(held["similarity"], tuple(held["importance"].tolist()))

    def components(self, count: int, grouping: str) -> Components:
        attention, mlp = representatives.measure_components(
            self.source, self.used, seed=self.settings.seed, **self.how("measuring layer similarity")
        )
        base = self.settings.method.adapter_base
        of_attention, of_mlp = (
            [
                half_bytes(self.source.family, self.source.fields, number, half, base, self._dtype)
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

    @property
    def _dtype(self) -> str:
        return str(self.source.dtype).removeprefix("torch.")

    def fits(self, plan: LayerPlan) -> bool:
        sizes = shard_sizes(self.source.family, self.source.fields, plan, self.bundle_settings(plan), self._dtype)
        tokenizer = sum(file.stat().st_size for file in self.source.tokenizer_files)
        return sum(sizes.values()) + tokenizer <= self.settings.method.bundle_bytes

    def nearest(self, plans: Sequence[LayerPlan]) -> LayerPlan:
        """By public KL after closed-form alignment, on held-out blocks; of those within KL_TIE of the least, by the cosine
        between the adapter's gradients in sub-LLM and full LLM (method.md 8d). Neither is quantized: that is alike for all.
        """
        groups = [group for plan in plans for group in plan.groups]
        made = self.held_against(plans) | {group.start - 1 for group in groups if group.start}
        self.make_targets(made)
        adapter = lora.initial(self.lora_spec(plans[0]).adapter, self.settings.seed)  # that of all of them
        wanted = self.wanted(plans[0], adapter)
        found = [self._try(plan, adapter, wanted) for plan in plans]
        least = min(one["kl"] for one in found)
        good = [(one["cosine"], plan) for one, plan in zip(found, plans, strict=True) if one["kl"] <= KL_TIE * least]
        chosen = max(good, key=lambda one: one[0])[1]
        for layer in made - self.held_against([chosen]):
            self._target_file(layer).unlink()
        return chosen

    def _try(self, plan: LayerPlan, adapter: dict[str, Tensor], wanted: tuple[Tensor, Tensor]) -> dict[str, float]:
        """How far this plan's sub-LLM is from the full LLM, whose answers are `wanted`, before anything is trained."""
        spec, count, first = self.lora_spec(plan), len(self.used), min(plan.retained)
        emulator = lora.initial([item for item in spec.emulator if item.layer is not None], self.settings.seed)
        ids = [*self.used, *self.held_out]
        below = self.target(first - 1) if first else torch.stack(stream(self.source, (), ids)).to(self.device)
        with contextlib.suppress(UsageProblem):  # of this family nothing can be solved for: unaligned, then
            emulator = self.solve(self.source, plan, below[:count], emulator, spec.scale)
        trained = tuple(layer for layer in plan.kept if layer >= first)
        student = self.build(self.source, trained)
        lora.attach(student, spec, lora.on(trained, {**emulator, **adapter}))
        found = self.apart(student, plan.adapter, below[count:], wanted)
        n, p = len(plan.groups[0].removed), len(plan.groups)
        self.report({"stage": "choosing groups", "layers_per_group": n, "groups": p, **found})
        return found

    # --- what a sub-LLM of a plan would be -------------------------------------------------------------------

    def lora_spec(self, plan: LayerPlan, size_class: int = 0) -> LoRASpec:
        is_mapped = bool(self.method.aligned(plan) and self.prompts)
        return lora_spec(self.settings, self.source.family, self.source.fields, plan, size_class, is_mapped=is_mapped)

    def bundle_settings(self, plan: LayerPlan) -> BundleSettings:
        method = self.settings.method
        return BundleSettings(
            self.lora_spec(plan), method.adapter_base, method.quantize_embedding, method.emulator_base
        )

    def check_closed_form(self) -> None:
        """Raises UsageProblem where this family's emulator LoRA cannot be solved for."""
        family, fields, s = self.source.family, self.source.fields, self.settings.lora
        emulator = range(self.num_layers - self.settings.method.adapter_layers)
        names = [item.name for item in lora.specs(family, fields, emulator, s.targets, s.rank)]
        closed_form.check(self.source, emulator, names)

    def solve(
        self, source: LayerSource, plan: LayerPlan, states: Tensor, emulator: dict[str, Tensor], scale: float
    ) -> dict[str, Tensor]:
        """The emulator LoRA in closed form, begun at `emulator`. source: of the sub-LLM's layers. states: (N, T, C) of the
        used blocks below its first layer with LoRA."""
        held_against = self.method.held_against(plan)
        return closed_form.align(
            source,
            plan,
            self.used,
            list(states),
            {layer: self.target(other)[: len(self.used)] for layer, other in held_against.items()},
            emulator,
            scale,
            **self.how("solving for the emulator LoRA"),
        )

    # --- what a sub-LLM is held against -------------------------------------------------------------------------

    def held_against(self, plans: Sequence[LayerPlan]) -> set[int]:
        """Layers whose outputs the sub-LLMs of these plans are held against: the method's, and the emulator's last."""
        return {layer for plan in plans for layer in self.method.held_against(plan).values()} | {plans[0].emulator[-1]}

    def target(self, layer: int) -> Tensor:
        """(N, T, C): the output of an emulator layer on all public blocks, of which `make_targets` left a file."""
        return load_file(self._target_file(layer))["hidden"].to(self.device)

    def _target_file(self, layer: int) -> Path:
        return self.work / f"teacher.{layer}.safetensors"

    def missing_targets(self, layers: Collection[int]) -> set[int]:
        return {layer for layer in layers if not self._target_file(layer).exists()}

    def make_targets(self, layers: Collection[int]) -> None:
        """The files of `target` that are not there, in one pass."""
        missing = self.missing_targets(layers)
        if not missing:
            return

        def keep(number: int, hidden: list[Tensor]) -> None:
            if number in missing:
                write_durably(self._target_file(number), save({"hidden": torch.stack(hidden)}))

        stream(
            self.source,
            range(max(missing) + 1),
            [*self.used, *self.held_out],
            visit=keep,
            **self.how("running the full LLM on public text"),
        )
        gc.collect()

    @cached_property
    def final(self) -> Tensor:
        """(N, T, C): the final hidden states on the held-out blocks, without any LoRA."""
        states = self.ran(self.source, range(self.num_layers), "running the full LLM on public text")
        return _final(self.build(self.source, ()), states)

    def ran(self, source: LayerSource, layers: Sequence[int], stage: str) -> Tensor:
        """(N, T, C): the held-out blocks after these layers, one resident at a time."""
        return torch.stack(stream(source, layers, self.held_out, **self.how(stage))).to(self.device)

    def final_with(self, plan: LayerPlan, adapter: Mapping[str, Tensor]) -> Tensor:
        """(N, T, C): the final hidden on all public blocks with this adapter LoRA, from the emulator's target."""
        return _final(self._above(plan, adapter), self.target(plan.emulator[-1]))

    def wanted(self, plan: LayerPlan, adapter: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """On the held-out blocks the final hidden (N, T, C) with this adapter LoRA, and the adapter's gradient (P,)."""
        teacher, states = self._above(plan, adapter), self.target(plan.emulator[-1])[len(self.used) :]
        gradient = drift.adapter_gradient(teacher, plan.adapter, states, torch.stack(self.held_out))
        return _final(teacher, states), gradient

    def apart(
        self, student: SubLLM, adapter: Sequence[int], states: Tensor, wanted: tuple[Tensor, Tensor]
    ) -> dict[str, float]:
        """Public KL, and the cosine of the adapter's gradients. states: (N, T, C) of the held-out blocks below the student."""
        final, gradient = wanted
        made = drift.adapter_gradient(student, adapter, states, torch.stack(self.held_out))
        return {"kl": oda.public_kl(student, states, final), "cosine": drift.cosine(gradient, made)}

    def _above(self, plan: LayerPlan, adapter: Mapping[str, Tensor]) -> SubLLM:
        """The layers above the emulator, with this adapter LoRA."""
        above = range(plan.emulator[-1] + 1, plan.num_layers)
        teacher, s = self.build(self.source, above), self.settings.lora
        layout = lora.specs(self.source.family, self.source.fields, above, s.targets, s.rank)
        spec = LoRASpec(rank=s.rank, alpha=s.alpha, targets=tuple(s.targets), adapter=layout, emulator=())
        lora.attach(teacher, spec, lora.on(above, adapter))
        return teacher


def _final(above: SubLLM, states: Tensor) -> Tensor:
    """(N, T, C): the final hidden states above `states`, a few blocks at a time."""
    with torch.no_grad():
        return torch.cat([above.hidden(states=some) for some in states.split(8)])
