"""Measure the inner products of a round's updates, of all pairs of edges, in one pass: of what a rule averages.

Where A and B are averaged apart that is the decoded deltas, where products are averaged what an update adds to B @ A.
A short product can be made of long factors: (B + (c - 1) B, A + (1 / c - 1) A) adds nothing to B @ A, and spoils the means
of A and B. What follows from the inner products is `robust.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fedsoda_edge.model.delta import decode
from fedsoda_hub.algorithms.aggregation import products
from fedsoda_hub.algorithms.aggregation.products import pairs_by_module
from fedsoda_hub.algorithms.aggregation.weighted_mean import CodedUpdate

Gram = Callable[[Sequence[CodedUpdate], str], Tensor]  # (updates in ascending edge id, codec) -> (K, K)


def together(updates: Sequence[CodedUpdate], codec: str) -> Iterator[tuple[str, list[CodedUpdate], Tensor]]:
    """Yield each tensor with the edges that hold it and their decoded values, (K, values), fp32.

    In memory are one update, and all edges' values of as many tensors as `products.HELD_BYTES` has room for, at least
    one; each update is read once for all of these.

    Args:
        updates: in ascending edge id.
    """
    sizes = {spec.name: spec.shape[0] * spec.shape[1] for update in updates for spec in update.layout}
    for names in _groups(sizes, len(updates)):
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        for update in updates:
            held = [spec.name for spec in update.layout if spec.name in found]
            for name, value in decode(update.read(), update.layout, codec, only=held).items() if held else ():
                found[name].append(value.flatten())
        for name in names:
            holders = [update for update in updates if any(spec.name == name for spec in update.layout)]
            yield name, holders, torch.stack(found.pop(name))


def _groups(sizes: dict[str, int], num_edges: int) -> Iterator[list[str]]:
    group: list[str] = []
    held = 0
    for name, size in sorted(sizes.items()):
        taken = 2 * size * num_edges * torch.float32.itemsize  # the values, and their stack
        if group and held + taken > products.HELD_BYTES:
            yield group
            group, held = [], 0
        group.append(name)
        held += taken
    if group:
        yield group


def of_deltas(updates: Sequence[CodedUpdate], codec: str) -> Tensor:
    """Compute <u_i, u_j> over all tensors of the decoded deltas, (K, K), float64.

    Args:
        updates: in ascending edge id; all hold the same tensors.
    """
    total = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for _, holders, values in together(updates, codec):
        assert len(holders) == len(updates), "combine.py refuses this where edges hold different layers"
        total += _inner(values)
    return total


def _inner(values: Tensor) -> Tensor:
    """Compute values @ values.T in float64, piece by piece, so that no whole copy in float64 is made."""
    pieces = (piece.double() for piece in values.split(1 << 16, dim=1))
    return torch.stack([piece @ piece.T for piece in pieces]).sum(dim=0)


def of_products(updates: Sequence[CodedUpdate], codec: str) -> Tensor:
    """Compute <D_i, D_j> over all modules, D_k = B_k A_k - B_0 A_0 with the pair of the view that k started from; each
    scaled by 1 / rank, as LoRA is added.

    D_k = [B_k, -B_0] [A_k; A_0], so <D_i, D_j> comes from two Gram matrices of factors, and no D_k is formed.

    Args:
        updates: in ascending edge id. A module counts among the edges that hold it.

    Returns:
        (K, K), float64.
    """
    total = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for module, pairs in pairs_by_module(updates, codec, max_weight=1.0):
        holders = [at for at, update in enumerate(updates) if f"{module}.lora_A" in update.view]
        left, right, owner = [], [], []
        for at, pair in zip(holders, pairs, strict=True):
            b, a = (updates[at].view[f"{module}.lora_{factor}"].double() for factor in "BA")
            left.append(torch.cat([pair.b, -b], dim=1) / len(pair.a))
            right.append(torch.cat([pair.a, a], dim=0))
            owner += [at] * len(right[-1])
        lefts, rights = torch.cat(left, dim=1), torch.cat(right, dim=0)
        inner = (lefts.T @ lefts) * (rights @ rights.T)
        whose = torch.nn.functional.one_hot(torch.tensor(owner), len(updates)).double()
        total += whose.T @ inner @ whose
    return total
