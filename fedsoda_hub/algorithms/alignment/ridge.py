"""Fit the border map: ridge regression from the sub-emulator's border states to the full emulator's.

    minimise  sum_t |h*_t + h*_t D + b - h_t|^2  +  w |D|^2        over public positions t, the first ones left out

h* (C,) is the sub-emulator's state and h the full emulator's. b is not penalised. The weight w is the one of
`WEIGHTS` with the least error on samples that the fit did not see; the map returned is fitted on all samples. With
rank K < C it is the best of that rank (reduced-rank regression, Izenman 1975): D_K = D V V^T with V the first K
eigenvectors of D^T G D, where G is the Gram matrix with the weight on its diagonal.

What the map is and where a model applies it is `fedsoda_edge/model/border.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsoda_edge.model.border import FULL, LEFT, RIGHT, SHIFT

WEIGHTS = tuple(10.0**power for power in range(-6, 3))  # times the mean of the Gram matrix's diagonal
HELD_OUT = 5  # every fifth sample


@dataclass(frozen=True)
class FittedMap:
    """A border map, fp32, with its errors.

    weight: the w that was chosen. Errors are mean |difference|^2 / mean |h|^2 on held-out samples: without a map, with D
    of full rank, and with D of the rank that is kept.
    """

    tensors: dict[str, Tensor]
    weight: float
    error_before: float
    error_whole: float
    error: float


class PositionSums:
    """Sums over positions in float64, from which any fit and any error follows."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.x, self.r = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        self.gram, self.cross = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
        self.residual = self.wanted = 0.0

    def add(self, student: Tensor, teacher: Tensor) -> None:
        """Add the states of one sample, (T, C) each; position 0 is left out."""
        x, wanted = student[1:].double(), teacher[1:].double()
        r = wanted - x
        self.count += len(x)
        self.x += x.sum(dim=0)
        self.r += r.sum(dim=0)
        self.gram += x.T @ x
        self.cross += x.T @ r
        self.residual += float(r.square().sum())
        self.wanted += float(wanted.square().sum())

    def __add__(self, other: PositionSums) -> PositionSums:
        both = PositionSums(len(self.x))
        for name, value in vars(self).items():
            setattr(both, name, value + getattr(other, name))
        return both

    def solve(self, weight: float, rank: int) -> tuple[Tensor, Tensor]:
        """Solve for D as (left (C, K), right (K, C)), K = min(rank, C); at full rank right is the identity."""
        gram = self.gram - torch.outer(self.x, self.x) / self.count
        gram.diagonal().add_(weight * gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
        d = torch.linalg.solve(gram, self.cross - torch.outer(self.x, self.r) / self.count)
        if rank >= len(d):
            return d, torch.eye(len(d), dtype=d.dtype)
        right = torch.linalg.eigh(d.T @ gram @ d).eigenvectors[:, -rank:].flip(1).T
        return d @ right.T, right

    def shift(self, d: Tensor) -> Tensor:
        """Compute the best b (C,) for this D (C, C)."""
        return (self.r - self.x @ d) / self.count

    def error(self, d: Tensor, b: Tensor) -> float:
        """Compute the relative squared error of these positions with the map D (C, C), b (C,)."""
        # |x D + b - r|^2, multiplied out
        total = (d * (self.gram @ d)).sum() - 2 * (d * self.cross).sum() + self.residual
        total += 2 * b @ (self.x @ d - self.r) + self.count * b @ b
        return float(total.clamp(min=0)) / self.wanted


def fit(pairs: Iterable[tuple[Tensor, Tensor]], width: int, rank: int) -> FittedMap:
    """Fit a map of at most this rank.

    Args:
        pairs: states (T, C) of student and teacher, sample by sample.
        width: C.

    Raises:
        ValueError: there are fewer samples than a fit and its check need.
    """
    seen, unseen = PositionSums(width), PositionSums(width)
    for number, (student, teacher) in enumerate(pairs):
        (unseen if number % HELD_OUT == HELD_OUT - 1 else seen).add(student, teacher)
    if not unseen.count:
        raise ValueError(f"there are fewer than {HELD_OUT} samples; a border map needs as many, of at least 2 ids each")
    none = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)

    def error(weight: float, rank: int) -> float:
        left, right = seen.solve(weight, rank)
        return unseen.error(left @ right, seen.shift(left @ right))

    error_whole, weight = min((error(each, width), each) for each in WEIGHTS)
    everything = seen + unseen
    left, right = everything.solve(weight, rank)
    tensors = {SHIFT: everything.shift(left @ right).float()[None]}
    tensors |= (
        {FULL: left.float().contiguous()}
        if rank >= width
        else {LEFT: left.float().contiguous(), RIGHT: right.float().contiguous()}
    )
    return FittedMap(tensors, weight, unseen.error(*none), error_whole, error(weight, rank))
