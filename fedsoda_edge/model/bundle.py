"""The sub-LLM as verified, content-addressed files: one safetensors shard per layer, and manifest.json.

The hub writes a bundle once; an edge reads the same files from its store by digest. Which layers are kept
is the plan's business, downloading is `store.py`'s.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fedsoda_edge.errors import BlobCorrupt, UsageProblem
from fedsoda_edge.model import border as border_map
from fedsoda_edge.model import lora
from fedsoda_edge.model.families import (
    FAMILIES,
    Family,
    branch,
    build_config,
    family_of,
    layer_on_meta,
    linear_modules,
    skeleton,
)
from fedsoda_edge.model.nf4 import (
    BLOCK,
    CODEBOOK,
    NF4Tensor,
    dequantize,
    dequantize_rows,
    dynamic_map,
    nf4_entries,
    quantize,
)
from fedsoda_edge.model.streaming import Checkpoint, read_rows
from fedsoda_edge.model.sub_llm import local_name
from fedsoda_edge.ports.disk import sha256, sha256_file, write_durably
from fedsoda_edge.ports.system import sync_directory
from fedsoda_edge.protocol.coded import safetensors_bytes, tensor_bytes
from fedsoda_edge.protocol.manifest import (
    ADAPTER_LORA,
    EMULATOR_LORA,
    FORMAT_VERSION,
    MAX_SIZE,
    BundleManifest,
    File,
    Half,
    LayerPlan,
    LoRASpec,
    TensorSpec,
    check_plan,
    file_of,
    parse_manifest,
)
from fedsoda_edge.protocol.needs import edge_needs, make_shape, shape_of

SHARDS = "shards.json"  # of all layers in a bundle's directory, where the manifest's plan leaves some of them out
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class BundleSettings:
    """What prepare decides beside the plan. Bases are "nf4" or "bf16" (the checkpoint's own dtype)."""

    lora: LoRASpec
    adapter_base: str
    quantize_embedding: bool
    emulator_base: str = "nf4"

    def is_dense(self, number: int, plan: LayerPlan) -> bool:
        """Whether this layer is stored as it is."""
        return (self.adapter_base if number in plan.adapter else self.emulator_base) != "nf4"


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
    """Write shards one at a time and the manifest last, then move the whole into place.

    The same input gives the same bytes. Raises DiskFull; a half-written bundle never has the name `directory`.

    Args:
        spare: layers beside the plan's, which train in other sub-LLMs of the same shards (`sub_manifest`).
    """
    check_plan(plan)
    source = source.without(plan.lacking)
    with _whole_or_not_at_all(directory) as temporary:
        files: list[File] = []
        parameters: dict[int, int] = {}

        def shard(role: str, tensors: dict[str, Tensor]) -> None:
            data = save({key: value.contiguous() for key, value in sorted(tensors.items())})
            write_durably(temporary / f"{role}.safetensors", data)
            files.append(File(name=f"{role}.safetensors", sha256=sha256(data), bytes=len(data)))

        for done, number in enumerate((*plan.kept, *spare)):
            layer = layer_on_meta(source.family, source.fields, number, plan.lacking.get(number))
            dense = source.layer(number)
            is_dense = settings.adapter_base != "nf4" if number in spare else settings.is_dense(number, plan)
            shard(f"layers.{number}", _packed(dense, set() if is_dense else _quantizable(layer)))
            if number not in spare:
                parameters[number] = sum(tensor.numel() for tensor in dense.values())
            if progress is not None:
                progress(done + 1, len(plan.kept) + len(spare))
        if spare:
            write_durably(temporary / SHARDS, msgspec.json.encode(files))
            del files[len(plan.kept) :]
        ends = {"embedding": {"weight": source.embedding()}, "norm": source.norm()}
        if not source.fields.get("tie_word_embeddings"):
            ends["head"] = {"weight": source.head()}
        end_parameters = sum(tensor.numel() for tensors in ends.values() for tensor in tensors.values())
        for role, tensors in ends.items():
            shard(role, _packed(tensors, {"weight"} if settings.quantize_embedding and role != "norm" else set()))
        weight_bytes = sum(file.bytes for file in files)
        shard("emulator_lora", emulator_lora)
        shard("adapter_lora", adapter_lora)
        for path in tokenizer_files:
            data = path.read_bytes()
            write_durably(temporary / path.name, data)
            files.append(File(name=path.name, sha256=sha256(data), bytes=len(data)))
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
            files=tuple(files),
            needs=edge_needs(shape, files),
            bits_per_parameter=8 * weight_bytes / (sum(parameters.values()) + end_parameters),
            emulator_base=settings.emulator_base,
        )
        write_durably(temporary / "manifest.json", encode_manifest(manifest))
    return manifest


Entries = dict[str, tuple[str, tuple[int, ...]]]  # of a shard: (dtype as safetensors names it, shape) by name


def shard_sizes(
    family: Family, fields: dict[str, Any], plan: LayerPlan, settings: BundleSettings, dtype: str
) -> dict[str, int]:
    """Bytes of each shard that `write_bundle` writes for a checkpoint of this shape, by role; no weights needed."""
    shards: dict[str, Entries] = {}
    for number in plan.kept:
        layer = layer_on_meta(family, fields, number, plan.lacking.get(number))
        shards[f"layers.{number}"] = _layer_entries(layer, dtype, is_dense=settings.is_dense(number, plan))
    model = skeleton(family, build_config(family, fields, plan.adapter[:1]))
    ends = {"embedding": family.embedding, "norm": family.norm}
    if not fields.get("tie_word_embeddings"):
        ends["head"] = family.head
    for role, path in ends.items():
        wanted = {"weight"} if settings.quantize_embedding and role != "norm" else set()
        shards[role] = _entries(_shapes_of(model.get_submodule(path)), wanted, dtype)
    for role, specs in (("emulator_lora", settings.lora.emulator), ("adapter_lora", settings.lora.adapter)):
        shards[role] = {spec.name: ("F32", spec.shape) for spec in specs}
    return {role: safetensors_bytes(entries, {}) for role, entries in shards.items()}


def half_bytes(family: Family, fields: dict[str, Any], number: int, half: Half, base: str, dtype: str) -> int:
    """Of the tensors that hold one half of a layer in a bundle, its norms among them; the file's header is not counted."""
    layer = layer_on_meta(family, fields, number, "mlp" if half == "attention" else "attention")
    return tensor_bytes(_layer_entries(layer, dtype, is_dense=base != "nf4"))


def _layer_entries(layer: Any, dtype: str, *, is_dense: bool) -> Entries:
    return _entries(_shapes_of(layer), set() if is_dense else _quantizable(layer), dtype)


def _entries(shapes: Mapping[str, tuple[int, ...]], wanted: set[str], dtype: str) -> Entries:
    """What a shard holds of tensors of these shapes, those wanted in NF4."""
    kind = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    entries: Entries = {}
    for name, shape in shapes.items():
        if name in wanted:
            entries |= {f"{name}.{part}": entry for part, entry in nf4_entries(math.prod(shape)).items()}
        else:
            entries[name] = (kind, shape)
    return entries


def _shapes_of(module: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


@contextmanager
def _whole_or_not_at_all(directory: Path) -> Iterator[Path]:
    """A temporary directory that gets the name `directory` at the end, or goes when something fails."""
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
    """Give a bundle that no one has seen yet its aligned emulator LoRA: one shard and the manifest change."""
    manifest = read_manifest((directory / file_of("manifest.json", size_class)).read_bytes())
    data = _lora_shard(tensors)
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
    """A smaller sub-LLM of the shards in a bundle's directory: its manifest and its LoRA are added.

    Args:
        size_class: 1, 2, ...; the bundle's own is 0.
    """
    manifest = sub_manifest(directory, plan, spec, adapter_lora, emulator_lora)
    write_durably(directory / file_of(EMULATOR_LORA, size_class), _lora_shard(emulator_lora))
    own = _lora_shard(adapter_lora)
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
    """The manifest of another sub-LLM of the shards in a bundle's directory; who asks stores its LoRA."""
    check_plan(plan)
    whole = read_manifest((directory / "manifest.json").read_bytes())
    listed = directory / SHARDS
    shards = msgspec.json.decode(listed.read_bytes(), type=list[File]) if listed.exists() else whole.files
    by_name = {file.name: file for file in shards}
    layers = [by_name[f"layers.{number}.safetensors"] for number in plan.kept]
    others = [file for file in whole.files if not file.name.startswith("layers.")]
    lora_shards = {EMULATOR_LORA: _lora_shard(emulator_lora), ADAPTER_LORA: _lora_shard(adapter_lora)}
    files = (*layers, *_with(others, lora_shards))

    def weight_bytes(files: Sequence[File]) -> int:
        names = {f"{role}.safetensors" for role in ("embedding", "norm", "head")}
        return sum(file.bytes for file in files if file.name in names or file.name.startswith("layers."))

    def in_layers(kept: Sequence[int]) -> int:
        family, lacking = family_of(whole.family), whole.plan.lacking
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


def _lora_shard(tensors: dict[str, Tensor]) -> bytes:
    return save({key: value.contiguous() for key, value in sorted(tensors.items())})


def _with(files: Sequence[File], changed: Mapping[str, bytes]) -> tuple[File, ...]:
    """The same files, of which these have other bytes."""
    made = {name: File(name=name, sha256=sha256(data), bytes=len(data)) for name, data in changed.items()}
    return tuple(made.get(file.name, file) for file in files)


def _write_manifest(directory: Path, size_class: int, manifest: BundleManifest) -> BundleManifest:
    write_durably(directory / file_of("manifest.json", size_class), encode_manifest(manifest))
    return manifest


def _quantizable(layer: Any) -> set[str]:
    """Weights of linear modules, and stacks of experts; a router's matrix decides too much for its size."""
    stacks = {name for name, parameter in layer.named_parameters() if parameter.ndim == 3}
    return {f"{name}.weight" for name in linear_modules(layer)} | stacks


def _packed(dense: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Those wanted to NF4, a stack as one tall matrix; the rest as it is."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in dense.items():
        if name in wanted:
            tensors |= quantize(tensor.flatten(0, -2)).tensors(name)
        else:
            tensors[name] = tensor
    return tensors


def encode_manifest(manifest: BundleManifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=1)


def read_manifest(data: bytes) -> BundleManifest:
    """Parse and check a manifest, which may come from the network, before anything of its sizes is allocated.

    Raises:
        BlobCorrupt: it is no manifest, or one of a newer format, or says something no bundle can say.
    """
    manifest = parse_manifest(data)
    plan, spec = manifest.plan, manifest.lora
    if manifest.dtype not in DTYPES:
        raise BlobCorrupt(f"the manifest names the dtype {manifest.dtype[:20]!r}; known: {', '.join(DTYPES)}")
    try:
        family = family_of(manifest.family)
        check_plan(plan)
        for size in family.sizes:
            if not 0 < int(manifest.config.get(size, 1)) <= MAX_SIZE:
                raise ValueError(f"{size} is {manifest.config[size]}")
        # One layer on the meta device: finds unknown activations, rotary types and shapes at no cost.
        skeleton(family, build_config(family, manifest.config, plan.adapter[:1]))
        if not set(spec.aligned) <= set(plan.sub_emulator):
            raise ValueError(f"its emulator LoRA lies on the layers {spec.aligned}")
        adapter, emulator = (
            lora.specs(family, manifest.config, on, spec.targets, spec.rank, plan.lacking)
            for on in (plan.adapter, spec.aligned)
        )
        bordering = border_map.specs_like(spec.emulator, int(manifest.config["hidden_size"]))
        if (adapter, (*bordering, *emulator)) != (spec.adapter, spec.emulator):
            raise ValueError("its LoRA tensors are not those of its plan, targets and rank")
    except Exception as error:  # a config class raises whatever its validation likes
        raise BlobCorrupt(f"the manifest is not one of a bundle: {error}") from error
    return manifest


class Bundle:
    """A bundle's files as a LayerSource. Files are verified against their digests when first opened."""

    def __init__(self, manifest: BundleManifest, path_of: Callable[[File], Path]) -> None:
        self.manifest = manifest
        self.plan = manifest.plan
        self.family = FAMILIES[manifest.family]
        self.fields = manifest.config
        self.num_layers = manifest.plan.num_layers
        self.dtype = DTYPES[manifest.dtype]
        self.lacking: Mapping[int, Half] = manifest.plan.lacking
        self._path_of = path_of
        self._verified: set[str] = set()
        self._shape_of: dict[str, dict[str, tuple[int, ...]]] = {}  # by role

    @classmethod
    def open(cls, directory: Path, size_class: int = 0) -> Bundle:
        """A bundle in a directory, as prepare writes it."""
        try:
            manifest = read_manifest((directory / file_of("manifest.json", size_class)).read_bytes())
        except FileNotFoundError:
            raise UsageProblem(f"{directory} has no manifest.json; it is no bundle") from None

        def path_of(file: File) -> Path:
            own = directory / file_of(file.name, size_class)
            return own if own.exists() else directory / file.name

        return cls(manifest, path_of)

    def path(self, name: str) -> Path:
        """The verified file of that name. Raises BlobCorrupt when its bytes are not the manifest's."""
        file = self.manifest.file(name)
        path = self._path_of(file)
        if name not in self._verified:
            actual = sha256_file(path)
            if actual != file.sha256:
                raise BlobCorrupt(
                    f"{path} has digest {actual[:12]}, the manifest says {file.sha256[:12]}; delete it to fetch it anew"
                )
            self._verified.add(name)
        return path

    def embedding(self) -> Tensor:
        return self._dense("embedding")["weight"]

    def embedding_rows(self, ids: Tensor) -> Tensor:
        [(vocab, width)] = self._shapes("embedding").values()
        path = self.path("embedding.safetensors")
        with _no_shard(path), safe_open(path, framework="pt") as file:
            if "weight" in file.keys():  # noqa: SIM118  the file is no mapping
                table = file.get_slice("weight")
                if tuple(table.get_shape()) != (vocab, width):
                    raise ValueError(f"weight is {tuple(table.get_shape())}, not {(vocab, width)}")
                return read_rows(table, ids)
            if width % BLOCK:  # a block runs over the ends of rows
                return self.embedding()[ids]
            parts = {name: file.get_slice(f"weight.{name}") for name in ("codes", "absmax")}
            wide = {"codes": width // 2, "absmax": width // BLOCK}
            for name, part in parts.items():
                if part.get_shape() != [vocab * wide[name]]:
                    raise ValueError(f"weight.{name} is {part.get_shape()}, not {[vocab * wide[name]]}")
            codes, absmax = (
                torch.stack([parts[name][row * wide[name] : (row + 1) * wide[name]] for row in ids.tolist()])
                for name in ("codes", "absmax")
            )
            ends = (file.get_tensor("weight.nested_absmax"), file.get_tensor("weight.offset"))
            return dequantize_rows(codes, absmax, ids, *ends)

    def norm(self) -> dict[str, Tensor]:
        return self._dense("norm")

    def head(self) -> Tensor:
        return self._dense("embedding" if self.fields.get("tie_word_embeddings") else "head")["weight"]

    def stored_head(self) -> Tensor | NF4Tensor:
        return self._stored("embedding" if self.fields.get("tie_word_embeddings") else "head")["weight"]

    def layer(self, number: int) -> dict[str, Tensor]:
        return self._dense(f"layers.{number}")

    def stored_layer(self, number: int) -> dict[str, Tensor | NF4Tensor]:
        """Matrices in NF4 (dense where the base is bf16)."""
        return self._stored(f"layers.{number}")

    def adapter_lora(self) -> dict[str, Tensor]:
        """The adapter LoRA of the first view, fp32."""
        return self._lora("adapter_lora", self.manifest.lora.adapter)

    def emulator_lora(self) -> dict[str, Tensor]:
        """The emulator LoRA after pre-alignment, fp32."""
        return self._lora("emulator_lora", self.manifest.lora.emulator)

    def _lora(self, role: str, layout: Sequence[TensorSpec]) -> dict[str, Tensor]:
        path = self.path(f"{role}.safetensors")
        with _no_shard(path):
            tensors = load_file(path)
            _check_shapes(tensors, {spec.name: spec.shape for spec in layout})
        return tensors

    def _dense(self, role: str) -> dict[str, Tensor]:
        shapes = self._shapes(role)
        return {
            name: dequantize(value).reshape(shapes[name]) if isinstance(value, NF4Tensor) else value
            for name, value in self._stored(role).items()
        }

    def _stored(self, role: str) -> dict[str, Tensor | NF4Tensor]:
        path = self.path(f"{role}.safetensors")
        stored: dict[str, Tensor | NF4Tensor] = {}
        with _no_shard(path):
            tensors = load_file(path)
            for name in [name for name in tensors if name.endswith(".codes")]:
                matrix = name.removesuffix(".codes")
                stored[matrix] = NF4Tensor.from_tensors(matrix, tensors)
            parts = (".codes", ".absmax", ".nested_absmax", ".offset", ".shape")
            stored |= {name: tensor for name, tensor in tensors.items() if not name.endswith(parts)}
            _check_shapes(stored, self._shapes(role))
        return stored

    def _shapes(self, role: str) -> dict[str, tuple[int, ...]]:
        """What the shard must hold, from the family's own modules on the meta device."""
        if role in self._shape_of:
            return self._shape_of[role]
        family = self.family
        if role.startswith("layers."):
            number = int(role.removeprefix("layers."))
            module = layer_on_meta(family, self.fields, number, self.lacking.get(number))
        else:
            ends = {"embedding": family.embedding, "norm": family.norm, "head": family.head}
            model = skeleton(family, build_config(family, self.fields, self.plan.adapter[:1]))
            module = model.get_submodule(ends[role])
        self._shape_of[role] = _shapes_of(module)
        return self._shape_of[role]

    def materialize(self, directory: Path) -> None:
        """Write a checkpoint that plain Transformers with bitsandbytes loads, with the same logits.

        Layers keep local positions there, as any Transformers checkpoint does; LoRA lies beside it as a PEFT
        adapter in `lora/`. A quantized embedding and stacks of experts are written dense in fp32: bitsandbytes has
        no 4-bit form for them. The half that a layer lacks is written as zeros, which add nothing. A border map has
        no place in it and is left out.
        """
        directory.mkdir(parents=True, exist_ok=True)
        family = self.family
        tensors: dict[str, Tensor] = {}
        dense_modules = [family.head]
        in_fp32 = self.manifest.quantized_embedding
        for number in self.plan.kept:
            zeros = self._zeros(number) if number in self.lacking else {}
            for name, value in {**self.stored_layer(number), **zeros}.items():
                local = local_name(family, self.plan.kept, f"layers.{number}.{name}")
                if isinstance(value, NF4Tensor) and not name.endswith(".weight"):
                    tensors[local] = self.layer(number)[name]
                    in_fp32 = True
                elif isinstance(value, NF4Tensor):
                    tensors |= _as_bitsandbytes(local, value)
                else:
                    tensors[local] = value
                    if value.ndim == 2:
                        dense_modules.append(local.removesuffix(".weight"))
        tensors[f"{family.embedding}.weight"] = self.embedding()
        tensors |= {f"{family.norm}.{name}": value for name, value in self.norm().items()}
        if not self.fields.get("tie_word_embeddings"):
            tensors[f"{family.head}.weight"] = self.head()
        config = build_config(family, self.fields, self.plan.kept)
        config.architectures = [family.model_class.__name__]
        config.dtype = "float32" if in_fp32 else self.manifest.dtype
        config.quantization_config = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": dense_modules,
        }
        config.save_pretrained(directory)
        write_durably(directory / "model.safetensors", save(dict(sorted(tensors.items())), {"format": "pt"}))
        for file in self.manifest.files:
            if file.name.startswith(("tokenizer", "special_tokens", "chat_template")):
                shutil.copyfile(self.path(file.name), directory / file.name)
        self._write_lora(directory / "lora")

    def _zeros(self, number: int) -> dict[str, Tensor]:
        """In the place of the half that a layer lacks."""
        layer = layer_on_meta(self.family, self.fields, number)
        pruned = branch(layer, self.lacking[number])
        shapes = {name: shape for name, shape in _shapes_of(layer).items() if name.partition(".")[0] in pruned}
        return {name: torch.zeros(shape, dtype=self.dtype) for name, shape in shapes.items()}

    def _write_lora(self, directory: Path) -> None:
        spec = self.manifest.lora
        tensors, modules = {}, set()
        for name, tensor in {**self.emulator_lora(), **self.adapter_lora()}.items():
            if name.startswith(border_map.PREFIX):
                continue
            local = local_name(self.family, self.plan.kept, name)
            modules.add(local.rpartition(".")[0])
            tensors[f"base_model.model.{local}.weight"] = tensor
        write_durably_json(directory / "adapter_config.json", peft_config(spec, sorted(modules), None))
        write_durably(directory / "adapter_model.safetensors", save(dict(sorted(tensors.items()))))


@contextmanager
def _no_shard(path: Path) -> Iterator[None]:
    """A file may have its digest and still be no shard: then whoever prepared the bundle made it so."""
    try:
        yield
    except (SafetensorError, KeyError, ValueError) as error:
        raise BlobCorrupt(
            f"{path} has its digest but is no shard of this bundle ({error}); ask the hub's owner to prepare it anew"
        ) from error


def _check_shapes(found: Mapping[str, Tensor | NF4Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError unless the shard holds exactly these tensors."""
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    for name, shape in wanted.items():
        if (
            len(shape) == 3
            and isinstance(found.get(name), NF4Tensor)
            and shapes[name] == (shape[0] * shape[1], shape[2])
        ):
            shapes[name] = shape  # a stack of experts is quantized as one tall matrix
    if shapes != wanted:
        different = sorted(name for name in shapes.keys() | wanted if shapes.get(name) != wanted.get(name))[0]
        raise ValueError(f"{different} is {shapes.get(different)}, not {wanted.get(different)}")


def peft_config(spec: LoRASpec, modules: Sequence[str], base: str | None) -> dict[str, Any]:
    """PEFT's adapter_config.json with full dotted target modules, which hit exactly those (facts: house.md 4)."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": list(modules),
    }


def write_durably_json(path: Path, value: Any) -> None:
    write_durably(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def _as_bitsandbytes(name: str, tensor: NF4Tensor) -> dict[str, Tensor]:
    """A matrix in the form `Linear4bit` saves and loads."""
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float32",
        "shape": list(tensor.shape),
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": float(tensor.offset),
    }
    return {
        name: tensor.codes.reshape(-1, 1),
        f"{name}.absmax": tensor.absmax,
        f"{name}.quant_map": torch.tensor(CODEBOOK),
        f"{name}.nested_absmax": tensor.nested_absmax,
        f"{name}.nested_quant_map": dynamic_map().clone(),
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
