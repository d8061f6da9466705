"""FlexLoRA: take the mean of the products B @ A, and bring it back to a rank by SVD, each size class's own (arXiv
2402.11505; docs/methods.md (m10-flexlora)).

The SVD is that of a small core between two QR factors (FLoRIST, arXiv 2506.09199). It turns the gauge of B and A, so
error feedback and moments of the round before mean nothing after it. The rank may collapse towards the smallest
edge's (arXiv 2602.13486). The pairs come from `products.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedsoda_hub.algorithms.aggregation.products import Pair, stacked


def merge(modules: Iterable[tuple[str, Sequence[Pair]]], view: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge a round's pairs into the next master.

    Args:
        modules: each module with its pairs, as `products.pairs_by_module` yields them.
        view: what the edges started from.

    Returns:
        fp32 lora_B (out, rank) and lora_A (rank, in) of each module, at the view's rank.
    """
    merged: dict[str, Tensor] = {}
    for module, pairs in modules:
        names = f"{module}.lora_B", f"{module}.lora_A"
        previous_b, previous_a = (view[name].double() for name in names)
        found = truncated(pairs, previous_b, previous_a)
        merged |= {name: factor.float() for name, factor in zip(names, found, strict=True)}
    return merged


def cut(master: Mapping[str, Tensor], view: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut from the master what a size class is to hold: the modules of its view, each at the view's rank.

    At the master's own rank that is the master's pair; at a lower rank its largest singular values.

    Returns:
        lora_B (out, rank) and lora_A (rank, in) with the names and shapes of the view.
    """
    held: dict[str, Tensor] = {}
    for module in sorted({name.rpartition(".lora_")[0] for name in view}):
        names = f"{module}.lora_B", f"{module}.lora_A"
        b, a = (master[name] for name in names)
        if a.shape != view[names[1]].shape:
            previous_b, previous_a = (view[name].double() for name in names)
            b, a = (factor.float() for factor in truncated([Pair(1.0, b.double(), a.double())], previous_b, previous_a))
        held |= dict(zip(names, (b, a), strict=True))
    return held


def truncated(pairs: Sequence[Pair], previous_b: Tensor, previous_a: Tensor) -> tuple[Tensor, Tensor]:
    """Find (b, a) of the previous pair's rank with (alpha / rank) b a nearest to M = sum_k p_k (alpha / r_k) B_k A_k.

    a's rows are orthogonal and as long as the previous rows' root mean square, so that no direction of a is lost where
    M has none. Of all such pairs it is the one nearest to the previous pair (orthogonal Procrustes): the proximal term
    and the coded step to the edges see what was learned, not a turned gauge.

    Args:
        pairs: those of one module; their ranks r_k may differ.
        previous_b, previous_a: (out, rank) and (rank, in), float64.

    Returns:
        float64 (out, rank) and (rank, in).
    """
    rank = len(previous_a)
    scaled = [Pair(pair.share * rank / len(pair.a), pair.b, pair.a) for pair in pairs]  # alpha / r_k over alpha / rank
    left, right = stacked(scaled)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, sigma, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    length = float(previous_a.square().sum(dim=1).mean().sqrt()) or 1.0
    b = q_left @ u[:, :rank] * (sigma[:rank] / length)
    a = length * vt[:rank] @ q_right.T
    missing = rank - len(a)  # a module smaller than the rank
    b, a = torch.nn.functional.pad(b, (0, missing)), torch.nn.functional.pad(a, (0, 0, 0, missing))
    x, _, yt = torch.linalg.svd(b.T @ previous_b + a @ previous_a.T)
    turn = x @ yt
    return b @ turn, turn.T @ a
