"""FedSODA (arXiv 2508.12727): adapter on top, similarity group pruning below it, LoRA on the retained layers aligned
before round 1 and again every few rounds.

Where this differs from what is printed, and why: docs/methods.md (m2-fedsoda, m15-readings). Beyond the paper, edges keep
the border's states on disk. Distances and groups are `pruning/sgp.py`'s.
"""

from __future__ import annotations

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.algorithms.methods.interface import FullLLM
from fedsoda_hub.algorithms.pruning.layer_plan import check_adapter, make_plan
from fedsoda_hub.algorithms.pruning.sgp import choose_groups
from fedsoda_hub.settings.tables import Method

SHORTLIST = 5  # shapes that are measured where [method] groups = "auto"


def plans(full_llm: FullLLM, settings: Method, seed: int) -> tuple[LayerPlan, ...]:
    """Choose by SGP: the groups with the least sum of distances, exactly. What a distance is, [method] distance says.

    A smaller sub-LLM removes all layers that the one before it removes, and more: docs/methods.md (m3-classes). So they
    share their shards; all have the same adapter.

    Raises:
        UsageProblem: the groups do not fit below the adapter, or those of a smaller sub-LLM not beside the others.
    """
    num_layers, adapter = full_llm.num_layers, settings.adapter_layers
    check_adapter(num_layers, adapter)
    emulator = num_layers - adapter
    # An infeasible (n, p) is refused before any work: no distance is needed to know that it does not fit.
    unmeasured = [[0.0] * (emulator - 1 - layer) for layer in range(emulator)]
    if isinstance(settings.groups, str):
        shapes = _shapes(full_llm, unmeasured, adapter)
    else:
        shapes = [(settings.layers_per_group, settings.groups)]
        choose_groups(unmeasured, num_layers, adapter, *shapes[0])
    if settings.distance == "healed":
        distances = full_llm.healed_distances(emulator, max(size for size, _ in shapes))
    else:
        distances = full_llm.distances(emulator)
    tried = [
        make_plan(num_layers, adapter, choose_groups(distances, num_layers, adapter, n, p), distances)
        for n, p in shapes
    ]
    tried.sort(key=lambda plan: sum(group.distance for group in plan.groups))
    found = [tried[0] if len(tried) == 1 else full_llm.nearest(tried[:SHORTLIST])]
    for groups in settings.classes:
        larger = found[-1].groups
        shape = num_layers, adapter, settings.layers_per_group, groups - len(larger)
        more = choose_groups(distances, *shape, beside=larger)
        together = sorted((*larger, *more), key=lambda group: group.start)
        found.append(make_plan(num_layers, adapter, together, distances))
    return tuple(found)


def _shapes(full_llm: FullLLM, unmeasured: list[list[float]], adapter: int) -> list[tuple[int, int]]:
    """Find for each group size n the least number of groups p whose sub-LLM is small enough: docs/methods.md (m3-auto).

    Raises:
        UsageProblem: none that fits below the adapter is small enough.
    """
    num_layers, emulator = full_llm.num_layers, len(unmeasured)

    def is_small_enough(n: int, p: int) -> bool:
        return full_llm.fits(make_plan(num_layers, adapter, choose_groups(unmeasured, num_layers, adapter, n, p)))

    if is_small_enough(0, 0):
        return [(0, 0)]
    least = (
        (n, next((p for p in range(1, emulator // (n + 1) + 1) if is_small_enough(n, p)), 0))
        for n in range(1, emulator)
    )
    shapes = [(n, p) for n, p in least if p]
    if not shapes:
        raise UsageProblem(
            "no sub-LLM of this model is within [method] bundle_bytes: even one of "
            f"{num_layers - emulator + 1} layers is larger; raise bundle_bytes, write quantize_embedding = true or "
            'adapter_base = "nf4", or lower adapter_layers'
        )
    return shapes


def aligned(plan: LayerPlan) -> tuple[int, ...]:
    return plan.retained


def held_against(plan: LayerPlan) -> dict[int, int]:
    """Pair the output of t_i with that of t_i + n (paper, eq. 6)."""
    return {group.start: group.removed[-1] for group in plan.groups}
