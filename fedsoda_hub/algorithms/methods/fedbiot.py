"""FedBiOT (arXiv 2406.17706): adapter on top, layers dropped uniformly below it, LoRA on all that are left of the
emulator, aligned before every round; everything in 16 bits.

Which layers: those of the reference code (`pruning/uniform.py`). Otherwise than there: the proximal term of that code's
clients has no gradient, docs/methods.md (m2-fedbiot); `[local] proximal_mu` is the paper's. Only LoRA is aligned, never
whole layers. The paper's and the code's loss is one on the emulator's output and KL, whose weight in the code's files is
0 to 0.9: `[align] kl_weight`.
"""

from __future__ import annotations

from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.algorithms.methods.interface import FullLLM
from fedsoda_hub.algorithms.pruning.layer_plan import check_adapter, drop_layers
from fedsoda_hub.algorithms.pruning.uniform import evenly_rounded_down, num_kept
from fedsoda_hub.settings.tables import Method


def plans(full_llm: FullLLM, settings: Method, seed: int) -> tuple[LayerPlan, ...]:
    num_layers = full_llm.num_layers
    check_adapter(num_layers, settings.adapter_layers)
    emulator = num_layers - settings.adapter_layers
    kept = evenly_rounded_down(emulator, num_kept(emulator, settings.drop_layers))
    return (drop_layers(num_layers, range(emulator, num_layers), kept),)


def aligned(plan: LayerPlan) -> tuple[int, ...]:
    return plan.sub_emulator


def held_against(plan: LayerPlan) -> dict[int, int]:
    return {}
