"""Know, in one place, where each Transformers family keeps its decoder layers and modules; the allow-list.

Weights, layer plans and LoRA tensors are the business of the files beside this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedsoda_edge.errors import UsageProblem


@dataclass(frozen=True)
class Family:
    """Where a family keeps things: dotted paths from the CausalLM, module names within a decoder layer."""

    model_type: str
    config_class: Any
    model_class: Any
    modules: dict[str, str]  # LoRA target name -> dotted name within a layer
    fields: tuple[str, ...]  # config fields that may travel: numbers, flags and tables, never names of code
    sizes: tuple[str, ...]  # those of them that are sizes of tensors
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"


FAMILIES = {
    "llama": Family(
        model_type="llama",
        config_class=LlamaConfig,
        model_class=LlamaForCausalLM,
        modules={
            "q_proj": "self_attn.q_proj",
            "k_proj": "self_attn.k_proj",
            "v_proj": "self_attn.v_proj",
            "o_proj": "self_attn.o_proj",
            "gate_proj": "mlp.gate_proj",
            "up_proj": "mlp.up_proj",
            "down_proj": "mlp.down_proj",
        },
        fields=(
            "attention_bias",
            "bos_token_id",
            "eos_token_id",
            "head_dim",
            "hidden_act",
            "hidden_size",
            "intermediate_size",
            "max_position_embeddings",
            "mlp_bias",
            "num_attention_heads",
            "num_hidden_layers",
            "num_key_value_heads",
            "pad_token_id",
            "rms_norm_eps",
            "rope_parameters",
            "tie_word_embeddings",
            "vocab_size",
        ),
        sizes=(
            "head_dim",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "vocab_size",
        ),
    ),
}


def family_of(model_type: str) -> Family:
    """The family of a config's `model_type`.

    Raises:
        UsageProblem: it is not in the allow-list; names those that are.
    """
    try:
        return FAMILIES[model_type]
    except KeyError:
        raise UsageProblem(
            f"the model family {model_type!r} is not supported; these are: {', '.join(sorted(FAMILIES))}"
        ) from None


def allowed_fields(family: Family, config: Any) -> dict[str, Any]:
    """The part of a config that a manifest carries."""
    values = config.to_dict()
    return {name: values[name] for name in family.fields if values.get(name) is not None}


def build_config(family: Family, fields: dict[str, Any], layers: Sequence[int] | None = None) -> Any:
    """A config of the family's own class from allow-listed fields, for the given full-LLM layers.

    Every per-layer list is permuted to `layers`: transformers reads them by position (method.md 6).
    """
    unknown = sorted(set(fields) - set(family.fields))
    if unknown:
        raise UsageProblem(
            f"config field {unknown[0]!r} is not allowed for {family.model_type}; allowed: {family.fields}"
        )
    chosen = dict(fields)
    if layers is not None:
        total = int(fields["num_hidden_layers"])
        for name, value in fields.items():
            if isinstance(value, list) and len(value) == total:
                chosen[name] = [value[layer] for layer in layers]
        chosen["num_hidden_layers"] = len(layers)
    config = family.config_class(**chosen)
    config._attn_implementation = "sdpa"
    return config


def skeleton(family: Family, config: Any) -> Any:
    """The family's CausalLM in eval mode with weights on the meta device and real rotary tables."""
    with torch.device("meta"):
        model = family.model_class(config).eval()
    for module in model.modules():
        # Rotary tables are computed from the config, not stored: meta ones would stay empty for ever.
        if hasattr(module, "inv_freq"):
            fresh = type(module)(config=config)
            for name, buffer in fresh.named_buffers(recurse=False):
                module.register_buffer(name, buffer, persistent=False)
            module.original_inv_freq = module.inv_freq
    return model.requires_grad_(False)


def lora_modules(family: Family, targets: Sequence[str]) -> tuple[str, ...]:
    """Dotted module names within a layer for LoRA target names.

    Raises:
        UsageProblem: a target matches no module; names those there are.
    """
    for target in targets:
        if target not in family.modules:
            raise UsageProblem(
                f"[lora] targets names {target!r}, a {family.model_type} layer has: {', '.join(family.modules)}"
            )
    return tuple(family.modules[target] for target in targets)


def module_shape(family: Family, fields: dict[str, Any], target: str) -> tuple[int, int]:
    """(out, in) features of a target module, from the config alone."""
    hidden = int(fields["hidden_size"])
    heads = int(fields["num_attention_heads"])
    head_dim = int(fields.get("head_dim") or hidden // heads)
    kv = int(fields.get("num_key_value_heads") or heads) * head_dim
    width = int(fields["intermediate_size"])
    return {
        "q_proj": (heads * head_dim, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, heads * head_dim),
        "gate_proj": (width, hidden),
        "up_proj": (width, hidden),
        "down_proj": (hidden, width),
    }[target]
