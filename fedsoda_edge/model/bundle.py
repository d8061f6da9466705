"""Read the sub-LLM as verified, content-addressed files: one safetensors shard per layer, and manifest.json.

The hub writes a bundle once (`bundle_writer.py`); an edge reads the same files from its store by digest. Fetching them
is left to the room `join`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fedsoda_edge.errors import BlobCorrupt, UsageProblem
from fedsoda_edge.model import border, lora
from fedsoda_edge.model.families import (
    FAMILIES,
    branch,
    build_config,
    family_of,
    layer_on_meta,
    parameter_shapes,
    skeleton,
)
from fedsoda_edge.model.nf4 import BLOCK, CODEBOOK, NF4Tensor, dequantize, dequantize_rows, dynamic_map, unpacked
from fedsoda_edge.model.source import read_rows
from fedsoda_edge.model.sub_llm import local_name
from fedsoda_edge.ports.disk import sha256_file, write_durably, write_durably_json
from fedsoda_edge.protocol.manifest import (
    MAX_SIZE,
    BundleManifest,
    File,
    Half,
    LoRASpec,
    TensorSpec,
    check_plan,
    file_of,
    parse_manifest,
)
from fedsoda_edge.units import one_line

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def read_manifest(data: bytes) -> BundleManifest:
    """Parse and check a manifest, which may come from the network, before memory for its sizes is allocated.

    Raises:
        BlobCorrupt: the data is not a manifest, has another format, or describes what no bundle can be.
    """
    manifest = parse_manifest(data)
    plan, spec = manifest.plan, manifest.lora
    if manifest.dtype not in DTYPES:
        raise BlobCorrupt(
            f"the manifest names the dtype {manifest.dtype[:20]!r}, this program knows {', '.join(DTYPES)}; "
            "ask the hub's owner"
        )
    try:
        family = family_of(manifest.family)
        check_plan(plan)
        for size in family.sizes:
            if not 0 < int(manifest.config.get(size, 1)) <= MAX_SIZE:
                raise ValueError(f"{size} is {manifest.config[size]}")
        if not 0 < int(manifest.config["max_position_embeddings"]) <= MAX_SIZE:
            raise ValueError(f"max_position_embeddings is {manifest.config['max_position_embeddings']}")
        # One layer on the meta device: finds unknown activations, rotary types and shapes at no cost.
        skeleton(family, build_config(family, manifest.config, plan.adapter[:1]))
        if not set(spec.aligned) <= set(plan.sub_emulator):
            raise ValueError(f"its emulator LoRA lies on the layers {spec.aligned}")
        adapter, emulator = (
            lora.specs(family, manifest.config, on, spec.targets, spec.rank, plan.lacking)
            for on in (plan.adapter, spec.aligned)
        )
        of_map = border.map_specs_like(spec.emulator, int(manifest.config["hidden_size"]))
        if (adapter, (*of_map, *emulator)) != (spec.adapter, spec.emulator):
            raise ValueError("its LoRA tensors are not those of its plan, targets and rank")
    except Exception as error:  # a config class raises whatever its validation likes
        raise BlobCorrupt(
            f"the manifest is not one of a bundle: {one_line(str(error))}; fetch the bundle again or ask the hub's owner"
        ) from error
    return manifest


class Bundle:
    """A bundle's files as a `LayerSource`. Each file is verified against its digest when it is first used.

    Args:
        manifest: one that `read_manifest` has checked.
        path_of: returns where a file lies; it may wait until the file has arrived.
    """

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
        """Open a bundle in a directory, as prepare writes it.

        Args:
            size_class: which sub-LLM of the directory: 0 for the largest, then 1, 2, ...

        Raises:
            UsageProblem: the directory holds no such bundle.
            BlobCorrupt: its manifest is not one of a bundle.
        """
        name = file_of("manifest.json", size_class)
        try:
            manifest = read_manifest((directory / name).read_bytes())
        except FileNotFoundError:
            raise UsageProblem(
                f"{directory} has no {name}, so it does not hold this bundle; run `fedsoda-hub prepare`, or name the "
                "bundle's directory"
            ) from None

        def path_of(file: File) -> Path:
            own = directory / file_of(file.name, size_class)
            return own if own.exists() else directory / file.name

        return cls(manifest, path_of)

    def path(self, name: str) -> Path:
        """Return where a file of the bundle lies; it is verified once.

        Raises:
            KeyError: the bundle has no file of that name.
            BlobCorrupt: its bytes are not those that the manifest names.
        """
        file = self.manifest.file(name)
        path = self._path_of(file)
        if name not in self._verified:
            actual = sha256_file(path)
            if actual != file.sha256:
                raise BlobCorrupt(
                    f"{path} has digest {actual[:12]}, the manifest says {file.sha256[:12]}; delete the file, so that it is "
                    "fetched again"
                )
            self._verified.add(name)
        return path

    def embedding(self) -> Tensor:
        """Read the embedding, dense: (V, C)."""
        return self._dense("embedding")["weight"]

    def embedding_rows(self, ids: Tensor) -> Tensor:
        """Read the rows `ids` (M,) int64 of the embedding: (M, C). The other rows are not read."""
        [(vocab, width)] = self._shapes("embedding").values()
        path = self.path("embedding.safetensors")
        with _no_shard(path), safe_open(path, framework="pt") as file:
            if "weight" in file.keys():  # noqa: SIM118  the file is not a mapping
                table = file.get_slice("weight")
                if tuple(table.get_shape()) != (vocab, width):
                    raise ValueError(f"weight is {tuple(table.get_shape())}, not {(vocab, width)}")
                return read_rows(table, ids)
            if width % BLOCK:  # blocks cross the ends of rows
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
        """Read the final norm's tensors, by name within the norm."""
        return self._dense("norm")

    def head(self) -> Tensor:
        """Read the head, dense: (V, C). A tied head is the embedding."""
        return self._dense("embedding" if self.fields.get("tie_word_embeddings") else "head")["weight"]

    def stored_head(self) -> Tensor | NF4Tensor:
        """Read the head (V, C) in the form in which it is stored."""
        return self._stored("embedding" if self.fields.get("tie_word_embeddings") else "head")["weight"]

    def layer(self, number: int) -> dict[str, Tensor]:
        """Read one full-LLM layer's tensors, dense, by name within the layer."""
        return self._dense(f"layers.{number}")

    def stored_layer(self, number: int) -> dict[str, Tensor | NF4Tensor]:
        """Read one full-LLM layer's tensors: matrices in NF4, or dense where the base is bf16."""
        return self._stored(f"layers.{number}")

    def adapter_lora(self) -> dict[str, Tensor]:
        """Read the first view of the adapter LoRA, fp32."""
        return self._lora("adapter_lora", self.manifest.lora.adapter)

    def emulator_lora(self) -> dict[str, Tensor]:
        """Read the first view of the emulator: its LoRA after pre-alignment and its border map, fp32."""
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
        with _no_shard(path):
            stored = unpacked(load_file(path))
            _check_shapes(stored, self._shapes(role))
        return stored

    def _shapes(self, role: str) -> dict[str, tuple[int, ...]]:
        """List the shapes that the shard must hold, from the family's own modules on the meta device."""
        if role in self._shape_of:
            return self._shape_of[role]
        family = self.family
        if role.startswith("layers."):
            number = int(role.removeprefix("layers."))
            module = layer_on_meta(family, self.fields, number, self.lacking.get(number))
        else:
            model = skeleton(family, build_config(family, self.fields, self.plan.adapter[:1]))
            module = model.get_submodule(family.ends[role])
        self._shape_of[role] = parameter_shapes(module)
        return self._shape_of[role]

    def materialize(self, directory: Path) -> None:
        """Write a checkpoint that plain Transformers with bitsandbytes loads, with the same logits.

        Layers have local positions there, as in any Transformers checkpoint; LoRA is written as a PEFT adapter to `lora/`.
        A quantized embedding and stacks of experts are written dense in fp32: bitsandbytes has no 4-bit form for them.
        The half that a layer lacks is written as zeros, which add nothing. A border map has no place in such a
        checkpoint and is left out.
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
        """Make the tensors that stand in the place of the half that a layer lacks."""
        layer = layer_on_meta(self.family, self.fields, number)
        pruned = branch(layer, self.lacking[number])
        shapes = {name: shape for name, shape in parameter_shapes(layer).items() if name.partition(".")[0] in pruned}
        return {name: torch.zeros(shape, dtype=self.dtype) for name, shape in shapes.items()}

    def _write_lora(self, directory: Path) -> None:
        spec = self.manifest.lora
        tensors, modules = {}, set()
        for name, tensor in {**self.emulator_lora(), **self.adapter_lora()}.items():
            if name.startswith(border.PREFIX):
                continue
            local = local_name(self.family, self.plan.kept, name)
            modules.add(local.rpartition(".")[0])
            tensors[f"base_model.model.{local}.weight"] = tensor
        write_durably_json(directory / "adapter_config.json", peft_config(spec, sorted(modules), None))
        write_durably(directory / "adapter_model.safetensors", save(dict(sorted(tensors.items()))))


@contextmanager
def _no_shard(path: Path) -> Iterator[None]:
    """Turn what safetensors and torch raise into BlobCorrupt: a file may have its digest and still not be a shard.

    Then the hub prepared it like this.
    """
    try:
        yield
    except (SafetensorError, KeyError, ValueError) as error:
        raise BlobCorrupt(
            f"{path} has its digest, but is not a shard of this bundle ({one_line(str(error))}); ask the hub's owner to prepare it again"
        ) from error


def _check_shapes(found: Mapping[str, Tensor | NF4Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless the shard holds exactly these tensors."""
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
    """Make PEFT's adapter_config.json, whose full dotted target modules match exactly these modules.

    docs/methods.md (m4-lora) says why.

    Args:
        modules: dotted names in the base model.
        base: the base model's name or path; None: not named.
    """
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


def _as_bitsandbytes(name: str, tensor: NF4Tensor) -> dict[str, Tensor]:
    """Make the tensors of a matrix as bitsandbytes' `Linear4bit` saves and loads it."""
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
