"""List the allowed Transformers families, and in one place where each keeps its decoder layers and modules.

Weights, layer plans and LoRA tensors are left to the files beside this one.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.manifest import Half

# Config fields that may travel: numbers, flags and tables, never names of code.
_COMMON = (
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "vocab_size",
)
_SIZES = (
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_experts",
    "num_key_value_heads",
    "vocab_size",
)
# One entry per layer, read by position: a pruned model needs them permuted, docs/methods.md (m14-families).
_PER_LAYER = ("layer_types", "no_rope_layers")
_NONE_MEANS_OFF = ("sliding_window",)  # where it is left out, the config class would set a window of its own


@dataclass(frozen=True)
class Family:
    """A model family: its classes, and where it keeps things, as dotted paths from the CausalLM.

    config_name, model_name: classes of Transformers. extra_fields: config fields beside those of every family.
    fused: for LoRA targets that people know from llama, the module that holds them in this family.
    """

    model_type: str
    config_name: str
    model_name: str
    extra_fields: tuple[str, ...] = ()
    fused: Mapping[str, str] = field(default_factory=dict)
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"

    @property
    def config_class(self) -> Any:
        """The config class of Transformers."""
        return getattr(transformers, self.config_name)

    @property
    def model_class(self) -> Any:
        """The CausalLM class of Transformers."""
        return getattr(transformers, self.model_name)

    @property
    def ends(self) -> dict[str, str]:
        """The dotted paths of the modules around the layers, by their role in a bundle."""
        return {"embedding": self.embedding, "norm": self.norm, "head": self.head}

    @property
    def fields(self) -> tuple[str, ...]:
        """The config fields that a manifest may carry."""
        return (*_COMMON, *self.extra_fields)

    @property
    def sizes(self) -> tuple[str, ...]:
        """The config fields that are sizes of tensors."""
        return tuple(name for name in _SIZES if name in self.fields)


_WINDOW = ("layer_types", "sliding_window", "use_sliding_window")

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaConfig", "LlamaForCausalLM", ("attention_bias", "hidden_act", "mlp_bias")),
        Family("mistral", "MistralConfig", "MistralForCausalLM", ("hidden_act", "sliding_window")),
        Family("qwen2", "Qwen2Config", "Qwen2ForCausalLM", ("hidden_act", *_WINDOW)),
        Family("qwen3", "Qwen3Config", "Qwen3ForCausalLM", ("attention_bias", "hidden_act", *_WINDOW)),
        Family(
            "gemma3_text",
            "Gemma3TextConfig",
            "Gemma3ForCausalLM",
            (
                "attention_bias",
                "hidden_activation",
                "layer_types",
                "query_pre_attn_scalar",
                "sliding_window",
            ),
        ),
        Family(
            "phi3",
            "Phi3Config",
            "Phi3ForCausalLM",
            ("hidden_act", "original_max_position_embeddings", "sliding_window"),
            fused={
                "q_proj": "self_attn.qkv_proj",
                "k_proj": "self_attn.qkv_proj",
                "v_proj": "self_attn.qkv_proj",
                "gate_proj": "mlp.gate_up_proj",
                "up_proj": "mlp.gate_up_proj",
            },
        ),
        Family("olmo2", "Olmo2Config", "Olmo2ForCausalLM", ("attention_bias", "hidden_act")),
        Family(
            "smollm3",
            "SmolLM3Config",
            "SmolLM3ForCausalLM",
            ("attention_bias", "hidden_act", "mlp_bias", "no_rope_layers", *_WINDOW),
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeConfig",
            "Qwen3MoeForCausalLM",
            (
                "attention_bias",
                "decoder_sparse_step",
                "hidden_act",
                "mlp_only_layers",
                "moe_intermediate_size",
                "norm_topk_prob",
                "num_experts",
                "num_experts_per_tok",
                "sliding_window",
                "use_sliding_window",
            ),
        ),
    )
}

# Not computed here: a head is a matrix, attention looks back only and runs through SDPA, which caps nothing.
_REFUSED = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")


def family_of(model_type: str) -> Family:
    """Find the family of a config's `model_type`.

    Raises:
        UsageProblem: the family is not supported; names those that are.
    """
    try:
        return FAMILIES[model_type]
    except KeyError:
        raise UsageProblem(
            f"the model family {model_type!r} is not supported; choose a model of {', '.join(sorted(FAMILIES))}"
        ) from None


def allowed_fields(family: Family, config: Any) -> dict[str, Any]:
    """Select the part of a config that a manifest carries.

    Raises:
        UsageProblem: the config asks for something that is not computed here.
    """
    for name in _REFUSED:
        if hasattr(family.config_class, name) and getattr(config, name, None):
            raise UsageProblem(
                f"the model's config sets {name} = {getattr(config, name)}, which is not supported; choose another model"
            )
    values = {name: getattr(config, name, None) for name in sorted(family.fields)}
    return {name: value for name, value in values.items() if value is not None or name in _NONE_MEANS_OFF}


def build_config(family: Family, fields: dict[str, Any], layers: Sequence[int] | None = None) -> Any:
    """Build a config of the family's own class from allowed fields, for the given full-LLM layers.

    Everything that a config says about single layers is permuted to `layers`: Transformers reads it by position.

    Args:
        layers: full-LLM numbers of the layers that the model will hold; None: all of them.

    Raises:
        UsageProblem: a field is not in the allow-list.
    """
    unknown = sorted(set(fields) - set(family.fields))
    if unknown:
        raise UsageProblem(
            f"the config field {unknown[0]!r} is not allowed for {family.model_type}; these are: {', '.join(family.fields)}"
        )
    chosen = dict(fields)
    if layers is not None:
        for name in _PER_LAYER:
            if fields.get(name) is not None:
                chosen[name] = [fields[name][layer] for layer in layers]
        if "decoder_sparse_step" in fields:
            # Which layers have experts follows from their numbers: written out, since numbers change here.
            step, dense = fields["decoder_sparse_step"], fields.get("mlp_only_layers") or []
            chosen["mlp_only_layers"] = [at for at, n in enumerate(layers) if n in dense or (n + 1) % step]
            chosen["decoder_sparse_step"] = 1
        chosen["num_hidden_layers"] = len(layers)
    config = family.config_class(**chosen)
    config._attn_implementation = "sdpa"
    return config


def skeleton(family: Family, config: Any) -> Any:
    """Make the family's CausalLM in eval mode: weights on the meta device, tables that follow from the config real."""
    with torch.device("meta"):
        model = family.model_class(config).eval()
    for module in model.modules():
        # Rotary tables and embedding scales are in no checkpoint: meta ones would never be filled.
        empty = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in empty:
            buffer = torch.empty_like(module.get_buffer(name), device="cpu")
            module.register_buffer(name, buffer, persistent=False)
        if empty:
            model._init_weights(module)  # how Transformers itself fills them after loading on meta
    return model.requires_grad_(False)


def branch(layer: Any, half: Half) -> tuple[str, ...]:
    """Name a decoder layer's modules that make up f(norm(x)) of h = x + f(norm(x)), in the order in which they run."""
    names: dict[Half, tuple[str, ...]]
    if hasattr(layer, "post_feedforward_layernorm"):  # gemma3, olmo2: a norm behind each f
        names = {
            "attention": ("input_layernorm", "self_attn", "post_attention_layernorm"),
            "mlp": ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
        }
    else:
        names = {"attention": ("input_layernorm", "self_attn"), "mlp": ("post_attention_layernorm", "mlp")}
    return tuple(name for name in names[half] if hasattr(layer, name))  # olmo2 has no norm before f


class _NoAttention(torch.nn.Module):
    """A module in the place of a pruned attention, which adds 0 to the stream and has no weights."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Return 0, in the form in which attention returns its output."""
        return hidden_states.new_zeros(()), None


class _NoMLP(torch.nn.Module):
    """A module in the place of a pruned MLP, which adds 0 to the stream and has no weights."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return 0."""
        return hidden_states.new_zeros(())


def prune_half(layer: Any, half: Half | None) -> None:
    """Turn a decoder layer's h = x + f(norm(x)) into h = x: f and its norms go, with all their weights.

    Args:
        half: which f goes; None: neither.
    """
    stand_ins = {"self_attn": _NoAttention, "mlp": _NoMLP}
    for name in branch(layer, half) if half is not None else ():
        setattr(layer, name, stand_ins.get(name, torch.nn.Identity)())


def layer_on_meta(family: Family, fields: dict[str, Any], number: int, lacks: Half | None = None) -> Any:
    """Make one full-LLM layer's module with its weights on the meta device: shapes and module names at no cost.

    Args:
        lacks: the half that is pruned; None: neither.
    """
    return _layer_on_meta(family.model_type, json.dumps(fields, sort_keys=True), number, lacks)


@functools.lru_cache(maxsize=512)
def _layer_on_meta(model_type: str, fields: str, number: int, lacks: Half | None) -> Any:
    family = FAMILIES[model_type]
    model = skeleton(family, build_config(family, json.loads(fields), (number,)))
    layer = model.get_submodule(f"{family.layers}.0")
    prune_half(layer, lacks)
    return layer


def linear_modules(layer: Any) -> dict[str, torch.nn.Linear]:
    """List the linear modules of a decoder layer by dotted name: what is quantized, and where LoRA can sit."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}


def parameter_shapes(module: Any) -> dict[str, tuple[int, ...]]:
    """List the shapes of a module's parameters by name within it."""
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def lora_modules(
    family: Family, fields: dict[str, Any], number: int, targets: Sequence[str], lacks: Half | None = None
) -> dict[str, tuple[int, int]]:
    """Find the modules of layer `number` that these LoRA targets mean: dotted names and their (out, in) features.

    A target is a module's last name or dotted name; names known from llama are translated where a family fuses
    them, so two targets may mean one module. A half that the layer lacks has no modules.

    Raises:
        UsageProblem: a target matches no module of the whole layer; names those there are.
    """
    modules = linear_modules(layer_on_meta(family, fields, number))
    kept = linear_modules(layer_on_meta(family, fields, number, lacks))
    found: dict[str, tuple[int, int]] = {}
    for target in targets:
        wanted = family.fused.get(target, target)
        names = [name for name in modules if name == wanted or name.endswith(f".{wanted}")]
        if not names:
            raise UsageProblem(
                f"[lora] targets names {target!r}, which matches no module in layer {number} of this "
                f"{family.model_type} model; choose from {', '.join(name.rpartition('.')[2] for name in modules)}"
            )
        found |= {name: (modules[name].out_features, modules[name].in_features) for name in names if name in kept}
    return found


_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")


def merge_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack the experts' matrices of a layer, which checkpoints hold one by one, as the modules hold them.

    `experts.3.gate_proj.weight` (F, C) and `up_proj` go into `experts.gate_up_proj` (E, 2F, C), `down_proj` into
    (E, C, F).
    """
    experts: dict[str, dict[int, dict[str, Tensor]]] = {}
    merged = {}
    for name, tensor in tensors.items():
        match = _EXPERT.fullmatch(name)
        if match is None:
            merged[name] = tensor
        else:
            experts.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = tensor
    for path, parts in experts.items():
        ordered = [parts[number] for number in sorted(parts)]
        merged[f"{path}.gate_up_proj"] = torch.stack([torch.cat([p["gate_proj"], p["up_proj"]]) for p in ordered])
        merged[f"{path}.down_proj"] = torch.stack([p["down_proj"] for p in ordered])
    return merged
