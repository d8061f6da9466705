"""FedPETuning (arXiv 2212.10025): LoRA on every layer of the full LLM, which every edge holds; the upper bound of what
adapters alone can reach.

Two things differ from the paper's code: updates are averaged by their number of examples (that code averages the sampled
edges evenly), and no classifier head is trained. FedSODA's comparison is in 16 bits; `[method] adapter_base = "nf4"` lets
smaller devices take part. Its keys and defaults are in `settings/methods.py`.
"""

from __future__ import annotations

from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.algorithms.methods.interface import FullLLM
from fedsoda_hub.algorithms.pruning.layer_plan import plan_around
from fedsoda_hub.settings.tables import Method


def plans(full_llm: FullLLM, settings: Method, seed: int) -> tuple[LayerPlan, ...]:
    return (plan_around(full_llm.num_layers, range(full_llm.num_layers), ()),)


def aligned(plan: LayerPlan) -> tuple[int, ...]:
    return ()


def held_against(plan: LayerPlan) -> dict[int, int]:
    return {}
