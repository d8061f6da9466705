"""FedPruner+ (arXiv 2508.17209): FedPruner for attention and MLP blocks, each kept or removed by itself.

A kept layer may lack one half: h = x + f(norm(x)) is h = x there. The budget is the bytes of as many whole layers as
`drop_layers` leaves, so that it compares with FedPruner at equal memory; attention, which is often the more redundant
half (FinerCut, arXiv 2405.18218), is the smaller one too. LoRA is on all blocks that are kept, and nothing is aligned.
Measuring and choosing are `pruning/representatives.py`'s.
"""

from __future__ import annotations

import msgspec

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.algorithms.methods.interface import FullLLM
from fedsoda_hub.algorithms.pruning.layer_plan import drop_layers
from fedsoda_hub.settings.tables import Method


def plans(full_llm: FullLLM, settings: Method, seed: int) -> tuple[LayerPlan, ...]:
    num_layers = full_llm.num_layers
    count = num_layers - settings.drop_layers
    if count < 2:
        raise UsageProblem(
            f"[method] drop_layers = {settings.drop_layers}, but the model has {num_layers} layers and fedpruner+ keeps "
            f"at least two whole, the first and the last; write at most {num_layers - 2}"
        )
    attention, mlp = full_llm.components(count, settings.layer_choice)
    layers = sorted({*attention, *mlp})
    plan = msgspec.structs.replace(
        drop_layers(num_layers, layers, ()),
        without_attention=tuple(layer for layer in layers if layer not in attention),
        without_mlp=tuple(layer for layer in layers if layer not in mlp),
    )
    return (plan,)


def aligned(plan: LayerPlan) -> tuple[int, ...]:
    return ()


def held_against(plan: LayerPlan) -> dict[int, int]:
    return {}
