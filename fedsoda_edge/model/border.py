"""The border map: H' = H + H D + b, between sub-emulator and adapter, at every position but the first.

The sub-emulator's states are not distributed as the full emulator's, and an adapter that learned on the ones is
plugged in above the others. D and b, fitted by the hub (`algorithms/ridge.py`), bring them near each other. They
are tensors of the emulator's view beside its LoRA, so they travel and change with an alignment as it does:

    border.D (C, C)                                   of a narrow model
    border.D.left (C, K), border.D.right (K, C)       D as a product of rank K
    border.b (1, C)

An edge applies the map once, in its sweep. Position 0 holds massive activations (arXiv 2402.17762) and stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedsoda_edge.protocol.manifest import TensorSpec

PREFIX = "border."
FULL, LEFT, RIGHT, SHIFT = "border.D", "border.D.left", "border.D.right", "border.b"


def specs(width: int, rank: int) -> tuple[TensorSpec, ...]:
    """Names and shapes of a map of that rank, ascending by name; none for rank 0, D whole from rank `width` on."""
    if not rank:
        return ()
    if rank >= width:
        return TensorSpec(FULL, (width, width)), TensorSpec(SHIFT, (1, width))
    return TensorSpec(LEFT, (width, rank)), TensorSpec(RIGHT, (rank, width)), TensorSpec(SHIFT, (1, width))


def specs_like(layout: Sequence[TensorSpec], width: int) -> tuple[TensorSpec, ...]:
    """The specs of the map that a view of this layout has, by its own word for the rank."""
    shapes = {spec.name: spec.shape for spec in layout}
    return specs(width, width if FULL in shapes else shapes.get(LEFT, (width, 0))[1])


def part(view: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The map's tensors of an emulator's view; empty where it has no map."""
    return {name: tensor for name, tensor in view.items() if name.startswith(PREFIX)}


def mapped(states: Tensor, view: Mapping[str, Tensor], positions: Tensor | None = None) -> Tensor:
    """The states (..., T, C) of samples as the map leaves them, of their dtype; as they are where `view` has no map.

    Args:
        positions: (..., T), where a sample does not begin at index 0.
    """
    if SHIFT not in view:
        return states
    h = states.float()
    d, shift = {name: view[name].to(states.device) for name in part(view)}, view[SHIFT].to(states.device)
    moved = h + (h @ d[FULL] if FULL in d else h @ d[LEFT] @ d[RIGHT]) + shift
    if positions is None:
        positions = torch.arange(states.shape[-2], device=states.device)
    return torch.where((positions == 0)[..., None], h, moved).to(states.dtype)


class BorderMap:
    """A map that stands before a decoder layer of a whole model: a hook, since Transformers has no place for it."""

    def __init__(self, layer: Any, view: Mapping[str, Tensor]) -> None:
        self.tensors = {name: tensor.clone() for name, tensor in part(view).items()}
        layer.register_forward_pre_hook(self._enter, with_kwargs=True)

    def _enter(self, _: Any, args: Any, kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        states = mapped(states, self.tensors, kwargs["position_ids"])
        return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})
