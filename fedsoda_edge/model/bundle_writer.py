"""Write a bundle: its shards one at a time, its manifest last, and what changes in it before an edge has seen it.

Count, too, how large a bundle would be, from sizes alone. Which layers are kept is left to the plan, reading files to
`bundle.py`.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import save
from torch import Tensor

from fedsoda_edge.model.bundle import DTYPES, read_manifest
from fedsoda_edge.model.families import (
    Family,
    build_config,
    family_of,
    layer_on_meta,
    linear_modules,
    parameter_shapes,
    skeleton,
)
from fedsoda_edge.model.nf4 import NF4Tensor, nf4_entries, quantize
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.ports.disk import sha256, write_durably
from fedsoda_edge.ports.system import sync_directory
from fedsoda_edge.protocol.coded import safetensors_bytes, tensor_bytes
from fedsoda_edge.protocol.manifest import (
    ADAPTER_LORA,
    EMULATOR_LORA,
    FORMAT_VERSION,
    BundleManifest,
    File,
    Half,
    LayerPlan,
    LoRASpec,
    check_plan,
    encode_manifest,
    file_of,
)
from fedsoda_edge.protocol.needs import edge_needs, make_shape, shape_of

SHARDS = "shards.json"  # lists all layers in a bundle's directory, where the manifest's plan leaves some of them out


@dataclass(frozen=True)
class BundleSettings:
    """The settings of a bundle beside its plan. A base is "nf4" or "bf16" (dense, in the checkpoint's own dtype)."""

    lora: LoRASpec
    adapter_base: str
    quantize_embedding: bool
    emulator_base: str = "nf4"

    def is_dense(self, number: int, plan: LayerPlan) -> bool:
        """Tell whether this layer is stored dense, in the checkpoint's own dtype."""
        return (self.adapter_base if number in plan.adapter else self.emulator_base) != "nf4"


class _Files:
    """The files of a bundle that is being written, in the order of its manifest."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.written: list[File] = []

    def add(self, name: str, data: bytes) -> None:
        """Write a file durably and note its digest."""
        write_durably(self._directory / name, data)
        self.written.append(_file(name, data))

    def add_shard(self, role: str, tensors: dict[str, Tensor]) -> None:
        """Write the shard of a role ("layers.7", "head", ...) durably and note its digest."""
        self.add(f"{role}.safetensors", _shard(tensors))


def write_bundle(
    directory: Path,
    source: Checkpoint,
    plan: LayerPlan,
    settings: BundleSettings,
    *,
    name: str,
    revision: str,
    adapter_lora: dict[str, Tensor],
    emulator_lora: dict[str, Tensor],
    tokenizer_files: Sequence[Path],
    spare: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> BundleManifest:
    """Write shards one at a time and the manifest last, then give the directory its name.

    The same input gives the same bytes. A half-written bundle never has the name `directory`.

    Args:
        directory: becomes the bundle; a bundle that was there before is replaced.
        name, revision: the full LLM's, as the manifest names them.
        adapter_lora, emulator_lora: the first views, fp32, with the names and shapes of `settings.lora`.
        spare: layers that the plan does not keep, but other sub-LLMs of the same shards train (`sub_manifest`).
        progress: called as progress(layers written, layers in all).

    Raises:
        UsageProblem: the plan breaks a rule of layer plans.
        DiskFull: nothing half-written stays.
    """
    check_plan(plan)
    source = source.without(plan.lacking)
    with _whole_or_not_at_all(directory) as temporary:
        files = _Files(temporary)
        parameters: dict[int, int] = {}
        for done, number in enumerate((*plan.kept, *spare)):
            layer = layer_on_meta(source.family, source.fields, number, plan.lacking.get(number))
            stored = source.stored_layer(number)
            is_dense = settings.adapter_base != "nf4" if number in spare else settings.is_dense(number, plan)
            files.add_shard(f"layers.{number}", packed(stored, set() if is_dense else _quantizable(layer)))
            if number not in spare:
                parameters[number] = sum(math.prod(tensor.shape) for tensor in stored.values())
            if progress is not None:
                progress(done + 1, len(plan.kept) + len(spare))
        if spare:
            write_durably(temporary / SHARDS, msgspec.json.encode(files.written))
            del files.written[len(plan.kept) :]
        ends = {"embedding": {"weight": source.embedding()}, "norm": source.norm()}
        if not source.fields.get("tie_word_embeddings"):
            ends["head"] = {"weight": source.head()}
        end_parameters = sum(tensor.numel() for tensors in ends.values() for tensor in tensors.values())
        for role, tensors in ends.items():
            is_packed = settings.quantize_embedding and role != "norm"
            files.add_shard(role, packed(tensors, {"weight"} if is_packed else set()))
        weight_bytes = sum(file.bytes for file in files.written)
        files.add_shard("emulator_lora", emulator_lora)
        files.add_shard("adapter_lora", adapter_lora)
        if tokenizer_files:  # as Transformers reads them, so that an edge, which has tokenizer.json alone, has its ids
            for file, data in source.own_tokenizer.items():
                files.add(file, data)
        dtype = next(key for key, value in DTYPES.items() if value == source.dtype)
        shape = make_shape(
            source.family.model_type,
            source.fields,
            plan,
            parameters,
            settings.lora,
            adapter_base=settings.adapter_base,
            emulator_base=settings.emulator_base,
            quantized_embedding=settings.quantize_embedding,
            dtype=dtype,
        )
        manifest = BundleManifest(
            format_version=FORMAT_VERSION,
            family=source.family.model_type,
            config=source.fields,
            dtype=dtype,
            source=name,
            source_revision=revision,
            plan=plan,
            lora=settings.lora,
            adapter_base=settings.adapter_base,
            quantized_embedding=settings.quantize_embedding,
            files=tuple(files.written),
            needs=edge_needs(shape, files.written),
            bits_per_parameter=8 * weight_bytes / (sum(parameters.values()) + end_parameters),
            emulator_base=settings.emulator_base,
        )
        write_durably(temporary / "manifest.json", encode_manifest(manifest))
    return manifest


Entries = dict[str, tuple[str, tuple[int, ...]]]  # a shard's tensors by name: (dtype as safetensors names it, shape)


def shard_sizes(
    family: Family, fields: dict[str, Any], plan: LayerPlan, settings: BundleSettings, dtype: str
) -> dict[str, int]:
    """Count the bytes of each shard that `write_bundle` writes for a checkpoint of this shape, by role, without weights.

    Args:
        fields: the allowed part of the model's config.
        dtype: the checkpoint's, as a manifest names it.
    """
    shards: dict[str, Entries] = {}
    for number in plan.kept:
        layer = layer_on_meta(family, fields, number, plan.lacking.get(number))
        shards[f"layers.{number}"] = _layer_entries(layer, dtype, is_dense=settings.is_dense(number, plan))
    model = skeleton(family, build_config(family, fields, plan.adapter[:1]))
    for role, path in family.ends.items():
        if role == "head" and fields.get("tie_word_embeddings"):
            continue
        wanted = {"weight"} if settings.quantize_embedding and role != "norm" else set()
        shards[role] = _entries(parameter_shapes(model.get_submodule(path)), wanted, dtype)
    for role, specs in (("emulator_lora", settings.lora.emulator), ("adapter_lora", settings.lora.adapter)):
        shards[role] = {spec.name: ("F32", spec.shape) for spec in specs}
    return {role: safetensors_bytes(entries, {}) for role, entries in shards.items()}


def half_bytes(family: Family, fields: dict[str, Any], number: int, half: Half, base: str, dtype: str) -> int:
    """Count the bytes of the tensors that hold one half of a layer in a bundle, its norms among them, without a header.

    Args:
        base: "nf4" or "bf16".
        dtype: the checkpoint's, as a manifest names it.
    """
    layer = layer_on_meta(family, fields, number, "mlp" if half == "attention" else "attention")
    return tensor_bytes(_layer_entries(layer, dtype, is_dense=base != "nf4"))


def _layer_entries(layer: Any, dtype: str, *, is_dense: bool) -> Entries:
    return _entries(parameter_shapes(layer), set() if is_dense else _quantizable(layer), dtype)


def _entries(shapes: Mapping[str, tuple[int, ...]], wanted: set[str], dtype: str) -> Entries:
    """List what a shard holds for tensors of these shapes, those of `wanted` in NF4."""
    kind = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    entries: Entries = {}
    for name, shape in shapes.items():
        if name in wanted:
            entries |= {f"{name}.{part}": entry for part, entry in nf4_entries(math.prod(shape)).items()}
        else:
            entries[name] = (kind, shape)
    return entries


@contextmanager
def _whole_or_not_at_all(directory: Path) -> Iterator[Path]:
    """Make a temporary directory, which gets the name `directory` at the end and is removed when something fails."""
    temporary = directory.with_name(f"{directory.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(directory.parent)


def replace_emulator_lora(directory: Path, tensors: dict[str, Tensor], size_class: int = 0) -> BundleManifest:
    """Put the aligned emulator LoRA into a bundle that nobody has seen yet: one shard and the manifest change.

    Raises:
        DiskFull: nothing half-written stays.
    """
    manifest = read_manifest((directory / file_of("manifest.json", size_class)).read_bytes())
    data = _shard(tensors)
    write_durably(directory / file_of(EMULATOR_LORA, size_class), data)
    files = _with(manifest.files, {EMULATOR_LORA: data})
    return _write_manifest(directory, size_class, msgspec.structs.replace(manifest, files=files))


def write_size_class(
    directory: Path,
    size_class: int,
    plan: LayerPlan,
    spec: LoRASpec,
    adapter_lora: dict[str, Tensor],
    emulator_lora: dict[str, Tensor],
) -> BundleManifest:
    """Add a smaller sub-LLM of the shards in a bundle's directory: its manifest and its LoRA.

    Args:
        size_class: 1, 2, ...; 0 is the bundle's largest sub-LLM.

    Raises:
        UsageProblem: the plan breaks a rule of layer plans.
        DiskFull: nothing half-written stays.
    """
    manifest = sub_manifest(directory, plan, spec, adapter_lora, emulator_lora)
    write_durably(directory / file_of(EMULATOR_LORA, size_class), _shard(emulator_lora))
    own = _shard(adapter_lora)
    if own != (directory / ADAPTER_LORA).read_bytes():
        write_durably(directory / file_of(ADAPTER_LORA, size_class), own)
    return _write_manifest(directory, size_class, manifest)


def sub_manifest(
    directory: Path,
    plan: LayerPlan,
    spec: LoRASpec,
    adapter_lora: dict[str, Tensor],
    emulator_lora: dict[str, Tensor],
) -> BundleManifest:
    """Make the manifest of another sub-LLM of the shards in a bundle's directory; the caller stores its LoRA.

    Raises:
        UsageProblem: the plan breaks a rule of layer plans.
        KeyError: the directory has no shard of a layer that the plan keeps.
    """
    check_plan(plan)
    whole = read_manifest((directory / "manifest.json").read_bytes())
    family = family_of(whole.family)
    listed = directory / SHARDS
    shards = msgspec.json.decode(listed.read_bytes(), type=list[File]) if listed.exists() else whole.files
    by_name = {file.name: file for file in shards}
    layers = [by_name[f"layers.{number}.safetensors"] for number in plan.kept]
    others = [file for file in whole.files if not file.name.startswith("layers.")]
    lora_shards = {EMULATOR_LORA: _shard(emulator_lora), ADAPTER_LORA: _shard(adapter_lora)}
    files = (*layers, *_with(others, lora_shards))

    def weight_bytes(files: Sequence[File]) -> int:
        names = {f"{role}.safetensors" for role in family.ends}
        return sum(file.bytes for file in files if file.name in names or file.name.startswith("layers."))

    def in_layers(kept: Sequence[int]) -> int:
        lacking = whole.plan.lacking
        layers = [layer_on_meta(family, whole.config, number, lacking.get(number)) for number in kept]
        return sum(parameter.numel() for layer in layers for parameter in layer.parameters())

    ends = 8 * weight_bytes(whole.files) / whole.bits_per_parameter - in_layers(whole.plan.kept)
    manifest = msgspec.structs.replace(
        whole,
        plan=plan,
        lora=spec,
        files=files,
        bits_per_parameter=8 * weight_bytes(files) / (ends + in_layers(plan.kept)),
    )
    return msgspec.structs.replace(manifest, needs=edge_needs(shape_of(manifest), files))


def _shard(tensors: dict[str, Tensor]) -> bytes:
    return save({key: value.contiguous() for key, value in sorted(tensors.items())})


def _file(name: str, data: bytes) -> File:
    return File(name=name, sha256=sha256(data), bytes=len(data))


def _with(files: Sequence[File], changed: Mapping[str, bytes]) -> tuple[File, ...]:
    """Return the same files, with the size and digest of those that have other bytes."""
    return tuple(_file(file.name, changed[file.name]) if file.name in changed else file for file in files)


def _write_manifest(directory: Path, size_class: int, manifest: BundleManifest) -> BundleManifest:
    write_durably(directory / file_of("manifest.json", size_class), encode_manifest(manifest))
    return manifest


def _quantizable(layer: Any) -> set[str]:
    """Name the weights that may be stored in NF4: those of linear modules, and stacks of experts.

    A router's matrix stays dense: it decides too much for its size.
    """
    stacks = {name for name, parameter in layer.named_parameters() if parameter.ndim == 3}
    return {f"{name}.weight" for name in linear_modules(layer)} | stacks


def packed(layer: Mapping[str, Tensor | NF4Tensor], wanted: Container[str]) -> dict[str, Tensor]:
    """Make the tensors of a layer's shard: those of `wanted` quantized, a stack as one tall matrix; others as they are."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in layer.items():
        if isinstance(tensor, NF4Tensor):
            tensors |= tensor.tensors(name)
        elif name in wanted:
            tensors |= quantize(tensor.flatten(0, -2)).tensors(name)
        else:
            tensors[name] = tensor
    return tensors
