"""FedPruner (arXiv 2508.17209): a sub-LLM of the layers that stand for the others, LoRA on all that it keeps.

One sub-LLM for all edges, chosen once by the hub on public text; the paper has every device choose anew each round,
for which it would need the full LLM (method.md 5). Nothing is aligned. What to compare the choice with at equal
memory, since the sub-LLM has as many layers: "uniform", "random", and "top", which drops the topmost layers.

All but "top" keep the first and the last layer, which no other layer stands for.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.layer_plan import drop_layers
from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.algorithms.fedot import evenly

if TYPE_CHECKING:
    from fedsoda_hub.algorithms.methods import FullLLM
    from fedsoda_hub.config import Method

USES: tuple[str, ...] = ("[method] drop_layers", "[method] layer_choice")
DEFAULTS: dict[str, Any] = {
    "[method] drop_layers": 12,  # as the other methods do where FedSODA compares them
    "[method] adapter_base": "bf16",
}


def plan(full_llm: FullLLM, settings: Method, seed: int) -> LayerPlan:
    num_layers, choice = full_llm.num_layers, settings.layer_choice
    count = num_layers - settings.drop_layers
    if count < 2:
        raise UsageProblem(
            f"[method] drop_layers = {settings.drop_layers}, the model has {num_layers} layers and fedpruner keeps two "
            f"at least, the first and the last; write at most {num_layers - 2}"
        )
    if choice == "uniform":
        kept = evenly(num_layers, count)
    elif choice == "random":
        kept = sorted({0, num_layers - 1, *random.Random(seed).sample(range(1, num_layers - 1), count - 2)})
    elif choice == "top":
        kept = list(range(count))
    else:
        kept = list(full_llm.representatives(count, choice))
    return drop_layers(num_layers, kept, ())


def aligned(plan: LayerPlan) -> tuple[int, ...]:
    return ()


def held_against(plan: LayerPlan) -> dict[int, int]:
    return {}
