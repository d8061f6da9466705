"""Make a checkpoint of random weights, layer by layer, and its bundle: what the benches beside this file run on.

The weights are the same every time on one kind of device; at most one layer, or embedding or head, is in memory. What is
measured with them is the benches' matter.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from fedsoda_edge.model import lora
from fedsoda_edge.model.bundle_writer import BundleSettings, write_bundle
from fedsoda_edge.model.families import allowed_fields, build_config, family_of, layer_on_meta, skeleton
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.protocol.manifest import LayerPlan, LoRASpec

RANK, ALPHA = 8, 16.0


@dataclass(frozen=True)
class Shape:
    """The sizes of a model. head: channels of a head. mlp None: 11/4 of the width. key_heads None: as many as heads."""

    width: int
    layers: int
    vocab: int
    length: int
    model_type: str = "llama"
    mlp: int | None = None
    head: int = 64
    key_heads: int | None = None

    @property
    def config(self) -> Any:
        """The Transformers config of a model of these sizes."""
        return family_of(self.model_type).config_class(
            vocab_size=self.vocab,
            hidden_size=self.width,
            intermediate_size=self.mlp or self.width * 11 // 4,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // self.head,
            num_key_value_heads=self.key_heads or self.width // self.head,
            max_position_embeddings=self.length,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        )


def make(
    directory: Path, shape: Shape, plan: LayerPlan, targets: Sequence[str], *, quantize_embedding: bool, device: str
) -> None:
    """Make the checkpoint `directory/full` and its bundle `directory/bundle`, unless they exist.

    Args:
        device: where random numbers are drawn.
    """
    if (directory / "bundle").exists():  # it is written last, and as a whole
        return
    shutil.rmtree(directory, ignore_errors=True)
    write_checkpoint(directory / "full", shape, device)
    source = Checkpoint.open(str(directory / "full"))
    spec = lora_spec(shape, plan, targets)
    write_bundle(
        directory / "bundle",
        source,
        plan,
        BundleSettings(spec, "nf4", quantize_embedding),
        name="random",
        revision="0",
        adapter_lora=lora.initial(spec.adapter, 0),
        emulator_lora=lora.initial(spec.emulator, 0),
        tokenizer_files=source.tokenizer_files,
    )


def lora_spec(shape: Shape, plan: LayerPlan, targets: Sequence[str]) -> LoRASpec:
    """Lay out the LoRA of adapter and retained layers."""
    family = family_of(shape.model_type)
    fields = allowed_fields(family, shape.config)
    adapter, emulator = (lora.specs(family, fields, on, targets, RANK) for on in (plan.adapter, plan.retained))
    return LoRASpec(rank=RANK, alpha=ALPHA, targets=tuple(targets), adapter=adapter, emulator=emulator)


def write_checkpoint(directory: Path, shape: Shape, device: str) -> None:
    """Write a checkpoint in bf16, a file for each layer, embedding, norm and head, with a tokenizer of words w0, w1, ..."""
    family, config = family_of(shape.model_type), shape.config
    fields = allowed_fields(family, config)
    ends = skeleton(family, build_config(family, fields, (0,)))
    modules = {f"{family.layers}.{number}": layer_on_meta(family, fields, number) for number in range(shape.layers)}
    modules |= {path: ends.get_submodule(path) for path in (family.embedding, family.norm, family.head)}
    directory.mkdir(parents=True)
    files: dict[str, str] = {}
    for path, module in modules.items():
        draw = torch.Generator(device).manual_seed(zlib.crc32(path.encode()))
        tensors = {f"{path}.{name}": _random(name, weight, draw) for name, weight in module.named_parameters()}
        save_file(tensors, directory / f"{path}.safetensors", {"format": "pt"})
        files |= dict.fromkeys(tensors, f"{path}.safetensors")
    config.architectures, config.dtype = [family.model_name], "bfloat16"
    config.save_pretrained(directory)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape.vocab)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text("{}")


def _random(name: str, like: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Draw a weight as Transformers initialises it: matrices from N(0, 0.02), norms 1, biases 0."""
    if like.ndim == 1:
        return torch.full(like.shape, float(not name.endswith("bias")), dtype=torch.bfloat16)
    return torch.empty(like.shape, dtype=torch.bfloat16, device=draw.device).normal_(0.0, 0.02, generator=draw).cpu()
