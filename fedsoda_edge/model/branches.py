"""Sequences with one beginning as one row: what they share runs once, and each attends to it and to itself alone.

    trunk, branch of the first, branch of the second, ...

The answers that a question is judged by share its prompt, which is most of their ids. Positions go on from the trunk in
every branch and a mask parts the branches ("tree attention", SpecInfer, arXiv 2305.09781): a causal model then has the
hidden states of the sequences run apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

import torch
from torch import Tensor


@dataclass(frozen=True)
class Branches:
    """Of one row. forks: where each branch begins, ascending; the trunk ends at the first. length: of the row."""

    forks: tuple[int, ...]
    length: int

    def column(self, sequence: int, at: int) -> int:
        """Where position `at` of a sequence lies in the row."""
        beyond = at - self.forks[0]
        return at if beyond < 0 else self.forks[sequence] + beyond

    def positions(self) -> Tensor:
        """(length,) int64: of each id within its sequence."""
        trunk = self.forks[0]
        lengths = [end - begin for begin, end in pairwise((*self.forks, self.length))]
        return torch.cat([torch.arange(trunk), *(torch.arange(trunk, trunk + length) for length in lengths)])


def joined(sequences: Sequence[Sequence[int]]) -> tuple[list[int], Branches]:
    """The ids of one row, and where in it these sequences lie."""
    ids = [same[0] for same in takewhile(lambda same: len(set(same)) == 1, zip(*sequences, strict=False))]
    trunk, forks = len(ids), []
    for sequence in sequences:
        forks.append(len(ids))
        ids += sequence[trunk:]
    return ids, Branches(tuple(forks), len(ids))


def attention(rows: Sequence[Branches], device: torch.device | str) -> tuple[Tensor | None, Tensor | None]:
    """Of a batch padded on the right: positions (B, T) int64, 0 at pads; and mask (B, 1, T, T) bool, the keys that a query sees.

    Neither is needed where no row has a second branch: plain causal attention does the same.
    """
    if all(len(row.forks) == 1 for row in rows):
        return None, None
    width = max(row.length for row in rows)
    positions = torch.zeros(len(rows), width, dtype=torch.int64)
    branch = torch.zeros(len(rows), width, dtype=torch.int64)  # 0: the trunk
    for at, row in enumerate(rows):
        positions[at, : row.length] = row.positions()
        for fork in row.forks:
            branch[at, fork:] += 1  # a pad is in the last one: a softmax over nothing would be NaN
    seen = (branch[:, :, None] == branch[:, None, :]) | (branch[:, None, :] == 0)
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    return positions.to(device), (seen & causal)[:, None].to(device)
