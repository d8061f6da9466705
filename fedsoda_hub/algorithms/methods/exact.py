"""Exact: train the adapter on top of the whole emulator, which is swept layer by layer: docs/methods.md (m2-exact).

This is not a method of a paper but the oracle of them all: LoRA on the last layers of the full LLM, which loses only what
storing the emulator in NF4 loses. Healing, which makes good most of that, is the preparation's; pruning and alignment are
other methods' matter.
"""

from __future__ import annotations

from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.algorithms.methods.interface import FullLLM
from fedsoda_hub.algorithms.pruning.layer_plan import check_adapter, make_plan
from fedsoda_hub.settings.tables import Method


def plans(full_llm: FullLLM, settings: Method, seed: int) -> tuple[LayerPlan, ...]:
    check_adapter(full_llm.num_layers, settings.adapter_layers)
    return (make_plan(full_llm.num_layers, settings.adapter_layers, ()),)


def aligned(plan: LayerPlan) -> tuple[int, ...]:
    return ()


def held_against(plan: LayerPlan) -> dict[int, int]:
    return {}
