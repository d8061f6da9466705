"""Compute hidden states at the border: run samples through the layers below it, then apply the border map.

The border is the place below the first layer that trains (`LayerPlan.border`). What lies below is frozen between
alignments, so a sample's hidden states there are a constant, its border states: docs/methods.md (m6-border, m6-map).

The border map is H' = H + H D + b at every position except the first. The sub-emulator's states are not distributed
as the full emulator's are, and an adapter that was trained on the former is plugged in above the latter. The hub fits D
and b so that the two come near each other. They are tensors of the emulator's view, beside its LoRA, so they travel and
change with each alignment:

    border.D (C, C)                                   where the model is narrow
    border.D.left (C, K), border.D.right (K, C)       D as a product of rank K
    border.b (1, C)

Position 0 holds massive activations (arXiv 2402.17762) and stays as it is. Fitting the map is left to the hub
(`ridge.py`), keeping border states on disk to `border_cache.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedsoda_edge.model.branches import Branches
from fedsoda_edge.model.source import LayerSource
from fedsoda_edge.model.streaming import LayersDone, stream
from fedsoda_edge.protocol.manifest import TensorSpec

PREFIX = "border."
FULL, LEFT, RIGHT, SHIFT = "border.D", "border.D.left", "border.D.right", "border.b"


def border_states(
    source: LayerSource,
    layers: Sequence[int],
    ids: Sequence[Tensor],
    *,
    emulator: Mapping[str, Tensor],
    lora_scale: float,
    start: Sequence[Tensor] | None = None,
    branches: Sequence[Branches] | None = None,
    batches: Sequence[Sequence[int]] | None = None,
    compute_dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    dense: bool = True,
    progress: LayersDone | None = None,
) -> list[Tensor]:
    """Run samples through the layers below the border and apply the border map: the one way to border states.

    Args:
        layers: full-LLM numbers up to the border, all of them or, with `start`, the last ones.
        ids: one (T_i,) int64 tensor per sample.
        emulator: the emulator's view: its LoRA, and its border map if it has one.
        start: hidden states (T_i, C) below `layers`; None: the embeddings of `ids`.
        branches: one per sample, for samples that hold several sequences with one beginning: each begins at position 0.
        batches, compute_dtype, device, dense, progress: as in `stream`.

    Returns:
        One (T_i, C) CPU tensor of compute_dtype per sample, in the order of `ids`.
    """
    states = stream(
        source,
        layers,
        ids,
        start=start,
        branches=branches,
        batches=batches,
        lora=emulator,
        lora_scale=lora_scale,
        compute_dtype=compute_dtype,
        device=device,
        dense=dense,
        progress=progress,
    )
    if branches is None:
        return [apply_map(state, emulator) for state in states]
    return [apply_map(state, emulator, row.positions()) for state, row in zip(states, branches, strict=True)]


def map_specs(width: int, rank: int) -> tuple[TensorSpec, ...]:
    """List names and shapes of a border map of this rank, ascending by name.

    Args:
        width: C, features of a hidden state.
        rank: 0: there is no map; `width` or more: D is one whole matrix.
    """
    if not rank:
        return ()
    if rank >= width:
        return TensorSpec(FULL, (width, width)), TensorSpec(SHIFT, (1, width))
    return TensorSpec(LEFT, (width, rank)), TensorSpec(RIGHT, (rank, width)), TensorSpec(SHIFT, (1, width))


def map_specs_like(layout: Sequence[TensorSpec], width: int) -> tuple[TensorSpec, ...]:
    """List names and shapes of the border map in a view of this layout, with the rank that the layout shows."""
    shapes = {spec.name: spec.shape for spec in layout}
    return map_specs(width, width if FULL in shapes else shapes.get(LEFT, (width, 0))[1])


def map_tensors(view: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the border map's tensors from an emulator's view; {} where it has no map."""
    return {name: tensor for name, tensor in view.items() if name.startswith(PREFIX)}


def apply_map(states: Tensor, view: Mapping[str, Tensor], positions: Tensor | None = None) -> Tensor:
    """Apply the view's border map to hidden states (..., T, C), whose dtype stays; without a map nothing changes.

    Args:
        positions: (..., T), each id's position in its sample; None: every sample begins at index 0.
    """
    if SHIFT not in view:
        return states
    h = states.float()
    d = {name: view[name].to(states.device) for name in map_tensors(view)}
    moved = h + (h @ d[FULL] if FULL in d else h @ d[LEFT] @ d[RIGHT]) + d[SHIFT]
    if positions is None:
        positions = torch.arange(states.shape[-2], device=states.device)
    return torch.where((positions == 0)[..., None], h, moved).to(states.dtype)


class BorderMap:
    """A border map before a decoder layer of a whole model: a hook, since Transformers has no place for it."""

    def __init__(self, layer: Any, view: Mapping[str, Tensor]) -> None:
        self.tensors = {name: tensor.clone() for name, tensor in map_tensors(view).items()}
        layer.register_forward_pre_hook(self._enter, with_kwargs=True)

    def _enter(self, _: Any, args: Any, kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        states = apply_map(states, self.tensors, kwargs["position_ids"])
        return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})
