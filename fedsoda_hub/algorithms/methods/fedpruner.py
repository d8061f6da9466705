"""FedPruner (arXiv 2508.17209): a sub-LLM of the layers that represent the others, LoRA on all that it keeps.

Each size class keeps as many layers as its devices have room for, and the hub draws other layers every few rounds, so
that in time all layers are trained. In the paper every device draws each round for itself, for which it would need the
full LLM: docs/methods.md (m9-fedpruner). Here the hub measures once, on public text, since what it measures does not
change: the base is frozen. Nothing is aligned. To compare the choice at equal memory, with as many layers, there are
"uniform", "random", and "top", which drops the topmost layers.

All but "top" keep the first and the last layer, which no other layer can represent. Measuring and grouping are
`pruning/representatives.py`'s.
"""

from __future__ import annotations

import hashlib
import random

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.algorithms.methods.interface import FullLLM
from fedsoda_hub.algorithms.pruning.layer_plan import drop_layers
from fedsoda_hub.algorithms.pruning.uniform import evenly
from fedsoda_hub.settings.tables import Method


def plans(full_llm: FullLLM, settings: Method, seed: int) -> tuple[LayerPlan, ...]:
    """Choose the layers for round 1; where importance decides, the most important layer of each group."""
    return tuple(
        _plan(full_llm, settings, dropped, seed, None) for dropped in (settings.drop_layers, *settings.classes)
    )


def redrawn(full_llm: FullLLM, settings: Method, seed: int, round_number: int) -> tuple[LayerPlan, ...]:
    """Choose the layers for a later round; each size class is drawn by importance within each group."""
    return tuple(
        _plan(full_llm, settings, dropped, seed, _seed_of(seed, size_class, round_number))
        for size_class, dropped in enumerate((settings.drop_layers, *settings.classes))
    )


def _seed_of(seed: int, size_class: int, round_number: int) -> int:
    key = f"{seed}/{size_class}/{round_number}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


def _plan(full_llm: FullLLM, settings: Method, dropped: int, seed: int, drawn_by: int | None) -> LayerPlan:
    num_layers, choice = full_llm.num_layers, settings.layer_choice
    count = num_layers - dropped
    if count < 2:
        key = "drop_layers" if dropped == settings.drop_layers else "classes"
        raise UsageProblem(
            f"[method] {key} = {getattr(settings, key)}, but the model has {num_layers} layers and fedpruner keeps at "
            f"least two, the first and the last; write at most {num_layers - 2}"
        )
    if choice == "uniform":
        kept = evenly(num_layers, count)
    elif choice == "random":
        chance = random.Random(seed if drawn_by is None else drawn_by)
        kept = sorted({0, num_layers - 1, *chance.sample(range(1, num_layers - 1), count - 2)})
    elif choice == "top":
        kept = list(range(count))
    else:
        kept = list(full_llm.representatives(count, choice, drawn_by))
    return drop_layers(num_layers, kept, ())


def aligned(plan: LayerPlan) -> tuple[int, ...]:
    return ()


def held_against(plan: LayerPlan) -> dict[int, int]:
    return {}
