"""Take the products B @ A of a round's edges, module by module, and measure what averaging A and B apart loses.

A dense product is never formed: two stacks of factors represent it. What is made of the products is `flexlora.py`'s.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsoda_edge.model.delta import decode, moved
from fedsoda_hub.algorithms.aggregation.weighted_mean import CodedUpdate, weighed

HELD_BYTES = 512 << 20  # that the pairs may take while a round closes


@dataclass(frozen=True)
class Pair:
    """One edge's LoRA of one module after its training: b (out, rank), a (rank, in).

    share: the edge's weight over the weights of all edges that hold the module.
    """

    share: float
    b: Tensor
    a: Tensor


def pairs_by_module(updates: Sequence[CodedUpdate], codec: str, max_weight: float) -> Iterator[tuple[str, list[Pair]]]:
    """Decode each module's pairs in ascending edge id, float64: W_k = view_k + decode(u_k).

    In memory are one update, and all edges' pairs of as many modules as HELD_BYTES has room for, at least one; each
    update is read once for all of these. Where an update lacks a factor, the factor of its view is taken.

    Args:
        max_weight: as `weighted_mean.weighed` takes it.
    """
    ordered = weighed(updates, max_weight)
    for modules in _together(updates):
        found: dict[str, list[tuple[float, Tensor, Tensor]]] = {module: [] for module in modules}
        for update, weight in ordered:
            held = [module for module in modules if f"{module}.lora_A" in update.view]
            if not held:
                continue
            names = [f"{module}.lora_{factor}" for module in held for factor in "AB"]
            before = {name: update.view[name] for name in names}
            after = moved(before, decode(update.read(), update.layout, codec, only=names), codec)
            for module in held:
                a, b = (after[f"{module}.lora_{factor}"].double() for factor in "AB")
                found[module].append((weight, b, a))
        for module in modules:
            of_module = found.pop(module)
            whole = sum(weight for weight, _, _ in of_module)
            yield module, [Pair(weight / whole, b, a) for weight, b, a in of_module]


def _together(updates: Sequence[CodedUpdate]) -> Iterator[list[str]]:
    """Divide all modules, ascending, into groups whose pairs take at most HELD_BYTES; a module that takes more by itself
    is a group of its own.
    """
    sizes: defaultdict[str, int] = defaultdict(int)
    for update in updates:
        for name, tensor in update.view.items():
            sizes[name.rpartition(".lora_")[0]] += tensor.numel() * torch.float64.itemsize
    group: list[str] = []
    held = 0
    for module, size in sorted(sizes.items()):
        if group and held + size > HELD_BYTES:
            yield group
            group, held = [], 0
        group.append(module)
        held += size
    if group:
        yield group


def stacked(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Stack factors, (out, sum of ranks) and (sum of ranks, in): left @ right = sum_k share_k B_k A_k (FLoRA, arXiv
    2409.05976).
    """
    left = torch.cat([pair.share * pair.b for pair in pairs], dim=1)
    return left, torch.cat([pair.a for pair in pairs], dim=0)


class CrossTerm:
    """The cross term ||M_res||_F / ||M||_F over all modules seen: M = sum_k p_k B_k A_k, M_res = M - Bbar Abar.

    M_res = sum_k p_k (B_k - Bbar)(A_k - Abar), so it is exactly 0 where all edges have the same A, or the same B. Where
    M is 0 nothing can be lost, and the ratio is 0 too (docs/methods.md (m10-cross-term)).
    """

    def __init__(self) -> None:
        self._lost = self._whole = 0.0

    def watching(self, modules: Iterable[tuple[str, Sequence[Pair]]]) -> Iterator[tuple[str, Sequence[Pair]]]:
        """Yield the modules unchanged and count each, so that whoever merges them needs no second pass."""
        for module, pairs in modules:
            self._lost += _square(*stacked(_spread(pairs)))
            self._whole += _square(*stacked(pairs))
            yield module, pairs

    @property
    def value(self) -> float:
        """The ratio so far."""
        return math.sqrt(self._lost / self._whole) if self._whole else 0.0


def cross_term(modules: Iterable[tuple[str, Sequence[Pair]]]) -> float:
    """Compute the cross term of all modules: ||M_res||_F / ||M||_F, 0 where the mean product M is 0."""
    seen = CrossTerm()
    for _ in seen.watching(modules):
        pass
    return seen.value


def _spread(pairs: Sequence[Pair]) -> list[Pair]:
    """Subtract the means: B_k - Bbar, A_k - Abar.

    The first edge's factors are subtracted before that, so that equal factors leave exact zeros.
    """
    first = pairs[0]
    moves = [Pair(pair.share, pair.b - first.b, pair.a - first.a) for pair in pairs]
    mean_b = torch.stack([pair.share * pair.b for pair in moves]).sum(dim=0)
    mean_a = torch.stack([pair.share * pair.a for pair in moves]).sum(dim=0)
    return [Pair(pair.share, pair.b - mean_b, pair.a - mean_a) for pair in moves]


def _square(left: Tensor, right: Tensor) -> float:
    """Compute ||left @ right||_F^2 from two Gram matrices of the size of the rank."""
    return max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))
