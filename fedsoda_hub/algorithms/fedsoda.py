"""FedSODA (arXiv 2508.12727): adapter on top, similarity group pruning below it, LoRA on the retained layers aligned
before round 1 and again every few rounds.

What is read otherwise than printed, and why: method.md 1. Beyond the paper, edges keep the border's states on disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedsoda_edge.model.layer_plan import choose_groups, make_plan
from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.algorithms.exact import check_adapter

if TYPE_CHECKING:
    from fedsoda_hub.algorithms.methods import FullLLM
    from fedsoda_hub.config import Method

USES: tuple[str, ...] = (
    *("[method] emulator", "[method] adapter_layers", "[method] layers_per_group", "[method] groups"),
    *("[method] realign_every", "[method] emulator_base", "[align] steps", "[align] realign_steps"),
    *("[align] border_map", "[align] closed_form", "[method] classes"),
)
DEFAULTS: dict[str, Any] = {}


def plans(full_llm: FullLLM, settings: Method, seed: int) -> tuple[LayerPlan, ...]:
    """SGP: the groups with the least sum of distances, chosen exactly.

    A smaller sub-LLM removes all that the one before it does, and more (method.md 8d), so they share their shards; all
    have the same adapter.

    Raises:
        UsageProblem: also: the further groups do not fit around the others.
    """
    num_layers = full_llm.num_layers
    check_adapter(num_layers, settings.adapter_layers)
    emulator = num_layers - settings.adapter_layers
    shape = num_layers, settings.adapter_layers, settings.layers_per_group, settings.groups
    # An infeasible (n, p) is refused before any work: distances do not matter for that.
    choose_groups([[0.0] * (emulator - 1 - layer) for layer in range(emulator)], *shape)
    distances = full_llm.distances(emulator)
    found = [make_plan(num_layers, settings.adapter_layers, choose_groups(distances, *shape), distances)]
    for groups in settings.classes:
        larger = found[-1].groups
        more = choose_groups(distances, *shape[:3], groups - len(larger), beside=larger)
        together = sorted((*larger, *more), key=lambda group: group.start)
        found.append(make_plan(num_layers, settings.adapter_layers, together, distances))
    return tuple(found)


def aligned(plan: LayerPlan) -> tuple[int, ...]:
    return plan.retained


def held_against(plan: LayerPlan) -> dict[int, int]:
    """The output of t_i against that of t_i + n (paper, eq. 6)."""
    return {group.start: group.removed[-1] for group in plan.groups}
