"""FedBiOT (arXiv 2406.17706): adapter on top, layers dropped uniformly below it, LoRA on all emulator layers that are
left, aligned before every round; everything in 16 bits.

The layers are those of the reference code (`pruning/uniform.py`). Two things differ from it. The proximal term of that
code's edges has no gradient (docs/methods.md (m2-fedbiot)); `[local] proximal_mu` is the paper's. And only LoRA is
aligned, never whole layers. The loss of paper and code is one on the emulator's output and KL, whose weight in the code's
files is 0 to 0.9: `[align] kl_weight`. Its keys and defaults are in `settings/methods.py`.
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
