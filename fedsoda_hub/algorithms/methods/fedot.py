"""FedOT: offsite-tuning (arXiv 2302.04870) run federated (FederatedScope-LLM, arXiv 2309.00363). Adapter at both ends,
layers dropped uniformly between them, one distillation before round 1, no realignment; everything in 16 bits.

The layers are those of mit-han-lab/offsite-tuning (`pruning/uniform.py`). As FedSODA compares it: 1 layer below, 2 above,
12 dropped, and LoRA where the papers train whole layers, in the distillation too. The lowest layer trains, so an edge
holds the whole emulator and sends gradients through it: there is nothing to sweep. Its keys and defaults are in
`settings/methods.py`.
"""

from __future__ import annotations

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.algorithms.methods.interface import FullLLM
from fedsoda_hub.algorithms.pruning.layer_plan import drop_layers
from fedsoda_hub.algorithms.pruning.uniform import evenly, num_kept
from fedsoda_hub.settings.tables import Method


def plans(full_llm: FullLLM, settings: Method, seed: int) -> tuple[LayerPlan, ...]:
    num_layers, bottom, top = full_llm.num_layers, settings.bottom_layers, settings.adapter_layers
    emulator = num_layers - bottom - top
    if bottom == 0 or emulator < 2:
        raise UsageProblem(
            f"[method] bottom_layers = {bottom} and adapter_layers = {top}, but the model has {num_layers} layers; "
            "fedot trains layers at both ends and needs at least two between them: lower the larger one, or write "
            "bottom_layers = 1"
        )
    count = num_kept(emulator, settings.drop_layers)
    kept = [bottom + place for place in evenly(emulator, count)]
    return (drop_layers(num_layers, [*range(bottom), *range(num_layers - top, num_layers)], kept),)


def aligned(plan: LayerPlan) -> tuple[int, ...]:
    return plan.sub_emulator


def held_against(plan: LayerPlan) -> dict[int, int]:
    return {}
