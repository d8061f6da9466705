"""Exact: adapter on top of the whole emulator, swept layer by layer (method.md 8b). No paper's method but their oracle:
LoRA on the last layers of the full LLM, where nothing is lost but what storing the emulator in NF4 loses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.algorithms.pruning.layer_plan import make_plan

if TYPE_CHECKING:
    from fedsoda_hub.algorithms.methods.interface import FullLLM
    from fedsoda_hub.settings.run import Method

USES: tuple[str, ...] = ("[method] adapter_layers", "[method] emulator_base")
DEFAULTS: dict[str, Any] = {"[method] emulator": "full"}


def check_adapter(num_layers: int, adapter_layers: int) -> None:
    """Raises UsageProblem unless something lies below an adapter of so many last layers."""
    if adapter_layers >= num_layers:
        raise UsageProblem(
            f"[method] adapter_layers = {adapter_layers}, the model has {num_layers} layers; "
            f"write at most {num_layers - 1}"
        )


def plans(full_llm: FullLLM, settings: Method, seed: int) -> tuple[LayerPlan, ...]:
    check_adapter(full_llm.num_layers, settings.adapter_layers)
    return (make_plan(full_llm.num_layers, settings.adapter_layers, ()),)


def aligned(plan: LayerPlan) -> tuple[int, ...]:
    return ()


def held_against(plan: LayerPlan) -> dict[int, int]:
    return {}
