"""Write GGUFs of tiny checkpoints, as llama.cpp's converter does: its names, its order of rotary halves, Gemma's norms + 1."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from fedsoda_edge.model.source import Checkpoint


def write_gguf(
    model: Path,
    file: Path,
    architecture: str = "llama",
    *,
    quantization: Any = None,
    extra: Mapping[str, str | int | float] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write the GGUF of a model's directory.

    Args:
        quantization: of the matrices, such as gguf.GGMLQuantizationType.Q8_0; None: all is fp32.
        extra: more metadata; a str, int or float for a key.
        tensors: more tensors by name.
    """
    source = Checkpoint.open(str(model))
    config = json.loads((model / "config.json").read_text())
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, source.num_layers)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(source.num_layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope.get("rope_theta") or rope["full_attention"]["rope_theta"])
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    if (experts := config.get("num_experts") or config.get("num_local_experts")) is not None:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    for key, value in (extra or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_float32(key, value)
    _add_vocabulary(writer, model)

    def add(name: str, tensor: torch.Tensor) -> None:
        stem, _, leaf = name.rpartition(".")
        stem, suffix = (stem, f".{leaf}") if leaf in ("weight", "bias") else (name, ".weight")
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = config["num_attention_heads" if stem.endswith("q_proj") else "num_key_value_heads"]
            tensor = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        if architecture == "gemma3" and "norm" in stem:
            tensor = tensor.float() + 1
        data = np.ascontiguousarray(tensor.float().numpy())
        if stem.endswith("experts.gate_up_proj"):
            experts = stem.removesuffix(".gate_up_proj")
            for part, half in zip(("gate", "up"), np.split(data, 2, axis=1), strict=True):
                writer.add_tensor(f"blk.{experts.split('.')[2]}.ffn_{part}_exps.weight", np.ascontiguousarray(half))
            return
        if stem.endswith("experts.down_proj"):
            writer.add_tensor(f"blk.{stem.split('.')[2]}.ffn_down_exps.weight", data)
            return
        if quantization is not None and data.ndim == 2:
            quantized = gguf.quantize(data, quantization)
            writer.add_tensor(f"{names.get_name(stem)}{suffix}", quantized, raw_dtype=quantization)
        else:
            writer.add_tensor(f"{names.get_name(stem)}{suffix}", data)

    add("model.embed_tokens.weight", source.embedding())
    for number in range(source.num_layers):
        for name, tensor in source.layer(number).items():
            add(f"model.layers.{number}.{name}", tensor)
    add("model.norm.weight", source.norm()["weight"])
    if not source.fields.get("tie_word_embeddings"):
        add("lm_head.weight", source.head())
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_vocabulary(writer: Any, model: Path) -> None:
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]
    tokens = sorted(vocabulary["vocab"], key=lambda token: vocabulary["vocab"][token])
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    unused = [f"[unused{number}]" for number in range(size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*tokens, *unused])
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3), *[5] * len(unused)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in vocabulary["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
