"""FedBiOT (arXiv 2406.17706): adapter on top, layers dropped uniformly below it, LoRA on all that are left of the
emulator, aligned before every round; everything in 16 bits.

Which layers: those of the reference code (HarliWu/FedBiOT, emu_l = 0), index int(i * stride), in whole numbers, so that
the emulator's last layer is never lost to a float. Not as in that code: its clients' proximal term has no gradient
(method.md 3); `[local] proximal_mu` is the paper's. Only LoRA is aligned, never whole layers. The paper's and the
code's loss is one on the emulator's output and KL, whose weight in the code's files is 0 to 0.9: `[align] kl_weight`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.algorithms.methods.exact import check_adapter
from fedsoda_hub.algorithms.pruning.layer_plan import drop_layers

if TYPE_CHECKING:
    from fedsoda_hub.algorithms.methods.interface import FullLLM
    from fedsoda_hub.settings.run import Method

USES: tuple[str, ...] = (
    *("[method] adapter_layers", "[method] drop_layers", "[method] realign_every", "[method] emulator_base"),
    *("[align] steps", "[align] realign_steps", "[align] border_map"),
)
DEFAULTS: dict[str, Any] = {
    "[method] drop_layers": 12,  # of 32 or 28, as FedSODA compares
    "[method] realign_every": 1,
    "[method] adapter_base": "bf16",
    "[method] emulator_base": "bf16",
    "[align] steps": 500,  # initial_update_rounds x local_update_steps, then local_update_steps
    "[align] realign_steps": 10,
    "[align] border_map": "none",  # the paper has none
}


def plans(full_llm: FullLLM, settings: Method, seed: int) -> tuple[LayerPlan, ...]:
    num_layers = full_llm.num_layers
    check_adapter(num_layers, settings.adapter_layers)
    emulator = num_layers - settings.adapter_layers
    count = num_kept(emulator, settings.drop_layers)
    kept = [place * (emulator - 1) // (count - 1) for place in range(count)]
    return (drop_layers(num_layers, range(emulator, num_layers), kept),)


def num_kept(emulator_layers: int, dropped: int) -> int:
    """Of an emulator that keeps its first and its last layer.

    Raises:
        UsageProblem: fewer than two would be left.
    """
    if emulator_layers < 2:
        raise UsageProblem(
            f"[method] adapter_layers leaves {emulator_layers} layers of this model to the emulator, which keeps its "
            'first and its last one; lower it, or write name = "exact"'
        )
    if emulator_layers - dropped < 2:
        raise UsageProblem(
            f"[method] drop_layers = {dropped}, the emulator has {emulator_layers} layers and keeps its first and its "
            f"last one; write at most {emulator_layers - 2}"
        )
    return emulator_layers - dropped


def aligned(plan: LayerPlan) -> tuple[int, ...]:
    return plan.sub_emulator


def held_against(plan: LayerPlan) -> dict[int, int]:
    return {}
