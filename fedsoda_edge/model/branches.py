"""Put sequences with one beginning into one row: what they share runs once, and each attends to it and to itself alone.

    trunk, branch of the first, branch of the second, ...

The choices by which a question is judged share its prompt, which is most of their ids. Positions continue from the trunk
in every branch, and a mask separates the branches ("tree attention", SpecInfer, arXiv 2305.09781): a causal model then
gives the hidden states that the sequences have when each runs alone. Running the rows is left to `streaming.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

import torch
from torch import Tensor


@dataclass(frozen=True)
class Branches:
    """The places of sequences in one row.

    forks: where each branch begins, ascending; the trunk ends at the first. length: the row's.
    """

    forks: tuple[int, ...]
    length: int

    def column(self, sequence: int, at: int) -> int:
        """Find where position `at` of a sequence lies in the row."""
        beyond = at - self.forks[0]
        return at if beyond < 0 else self.forks[sequence] + beyond

    def positions(self) -> Tensor:
        """List each id's position within its sequence: (length,) int64."""
        trunk = self.forks[0]
        lengths = [end - begin for begin, end in pairwise((*self.forks, self.length))]
        return torch.cat([torch.arange(trunk), *(torch.arange(trunk, trunk + length) for length in lengths)])


def joined(sequences: Sequence[Sequence[int]]) -> tuple[list[int], Branches]:
    """Join sequences into one row: its ids, and where in it the sequences lie."""
    ids = [same[0] for same in takewhile(lambda same: len(set(same)) == 1, zip(*sequences, strict=False))]
    trunk, forks = len(ids), []
    for sequence in sequences:
        forks.append(len(ids))
        ids += sequence[trunk:]
    return ids, Branches(tuple(forks), len(ids))


def attention(rows: Sequence[Branches], device: torch.device | str) -> tuple[Tensor | None, Tensor | None]:
    """Make what attention needs for a batch of rows that are padded on the right.

    Returns:
        Positions (B, T) int64, 0 at pads, and a mask (B, 1, T, T) bool of the keys that a query sees. (None, None) where
        no row has a second branch: plain causal attention does the same.
    """
    if all(len(row.forks) == 1 for row in rows):
        return None, None
    width = max(row.length for row in rows)
    positions = torch.zeros(len(rows), width, dtype=torch.int64)
    branch = torch.zeros(len(rows), width, dtype=torch.int64)  # 0: the trunk
    for at, row in enumerate(rows):
        positions[at, : row.length] = row.positions()
        for fork in row.forks:
            branch[at, fork:] += 1  # pads are in the last branch: a softmax over nothing would be NaN
    seen = (branch[:, :, None] == branch[:, None, :]) | (branch[:, None, :] == 0)
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    return positions.to(device), (seen & causal)[:, None].to(device)
