"""Put LoRA on a model through PEFT, with tensors that are named by full-LLM layers.

    layers.29.self_attn.q_proj.lora_A (rank, in), layers.29.self_attn.q_proj.lora_B (out, rank)

Two sets of tensors share one mechanism: the emulator LoRA, which alignment trains, and the adapter LoRA, which edges
train. Training them is left to `oda.py` and `training.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from fedsoda_edge.model.border import PREFIX, BorderMap, map_tensors
from fedsoda_edge.model.delta import LoRATensors
from fedsoda_edge.model.families import Family, lora_modules
from fedsoda_edge.model.sub_llm import SubLLM
from fedsoda_edge.protocol.manifest import Half, LoRASpec, TensorSpec

TensorT = TypeVar("TensorT", bound=Tensor)


def specs(
    family: Family,
    fields: dict[str, Any],
    layers: Iterable[int],
    targets: Sequence[str],
    rank: int,
    lacking: Mapping[int, Half] = MappingProxyType({}),
) -> tuple[TensorSpec, ...]:
    """List names and shapes of the LoRA tensors on these full-LLM layers, ascending by name.

    Args:
        lacking: layers of which one half is pruned (`LayerPlan.lacking`).

    Raises:
        UsageProblem: a target matches no module of a layer.
    """
    found = []
    for layer in layers:
        for module, (rows, cols) in lora_modules(family, fields, layer, targets, lacking.get(layer)).items():
            found.append(TensorSpec(f"layers.{layer}.{module}.lora_A", (rank, cols)))
            found.append(TensorSpec(f"layers.{layer}.{module}.lora_B", (rows, rank)))
    return tuple(sorted(found, key=lambda spec: spec.name))


def initial(layout: Sequence[TensorSpec], seed: int) -> LoRATensors:
    """Draw A ~ N(0, 1 / rank^2) and set B = 0 (paper eq. 3; sigma as PEFT's "gaussian"), fp32.

    A border map in the layout is zero and changes nothing. Each tensor has a generator of its own, seeded by
    (seed, name), so that a tensor does not depend on the others.
    """
    tensors = {}
    for spec in layout:
        if not spec.name.endswith("lora_A"):
            tensors[spec.name] = torch.zeros(spec.shape)
            continue
        number = int.from_bytes(hashlib.sha256(f"{seed}/{spec.name}".encode()).digest()[:8], "big") >> 1
        generator = torch.Generator().manual_seed(number)
        tensors[spec.name] = torch.randn(spec.shape, generator=generator) / spec.shape[0]
    return tensors


def on(layers: Container[int], tensors: Mapping[str, TensorT]) -> dict[str, TensorT]:
    """Select the tensors that lie on these full-LLM layers; a border map lies on none."""
    lying = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}
    return {name: tensor for name, tensor in lying.items() if int(name.split(".")[1]) in layers}


class _Factor(nn.Linear):
    """A LoRA factor that multiplies in the dtype of its input, and trains in fp32: a step of 1e-4 is lost in bf16's 8 bits."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight.detach().float())

    def forward(self, input: Tensor) -> Tensor:
        """Compute input weight^T."""
        return functional.linear(input, self.weight.to(input.dtype))


def attach(sub_llm: SubLLM, spec: LoRASpec, tensors: LoRATensors) -> None:
    """Put LoRA on exactly the modules that `tensors` names, with these values, unmerged and frozen.

    A border map in `tensors` is put before the adapter's first layer.
    """
    modules = sorted({name.rpartition(".lora_")[0] for name in tensors if not name.startswith(PREFIX)})
    if map_tensors(tensors):
        sub_llm.border_map = BorderMap(sub_llm.layer(spec.border), tensors)
    if modules:
        config = LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,
            target_modules=[sub_llm.local_name(module) for module in modules],
            lora_dropout=0.0,
            bias="none",
        )
        inject_adapter_in_model(config, sub_llm.model)
        for layer in [module for module in sub_llm.model.modules() if isinstance(module, LoraLayer)]:
            layer.cast_input_dtype_enabled = False  # PEFT would keep an fp32 copy of every input
            for factors in (layer.lora_A, layer.lora_B):
                for name, factor in factors.items():
                    factors[name] = _Factor(factor.weight)
    sub_llm.model.requires_grad_(False)
    load(sub_llm, tensors)


def parameters(sub_llm: SubLLM) -> dict[str, torch.nn.Parameter]:
    """List the attached LoRA parameters by full-LLM name, ascending."""
    found = {}
    for name, parameter in sub_llm.model.named_parameters():
        head, mark, tail = name.partition(".lora_")
        if mark:
            found[f"{sub_llm.full_name(head)}.lora_{tail[0]}"] = parameter
    return dict(sorted(found.items()))


def load(sub_llm: SubLLM, tensors: LoRATensors) -> None:
    """Overwrite attached LoRA, and the border map, with `tensors`.

    Raises:
        KeyError: a tensor of that name is not attached.
    """
    attached: dict[str, Tensor] = dict(parameters(sub_llm))
    if sub_llm.border_map is not None:
        attached |= sub_llm.border_map.tensors
    with torch.no_grad():
        for name, tensor in tensors.items():
            attached[name].copy_(tensor)


def snapshot(sub_llm: SubLLM) -> LoRATensors:
    """Copy the attached LoRA as fp32 CPU tensors, by full-LLM name."""
    return {name: tensor.detach().float().cpu().clone() for name, tensor in parameters(sub_llm).items()}
