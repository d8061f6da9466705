"""Exact: adapter on top of the whole emulator, swept layer by layer: docs/methods.md (m2-exact).

Not a method of a paper but their oracle: LoRA on the last layers of the full LLM, where nothing is lost but what storing
the emulator in NF4 loses.
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
