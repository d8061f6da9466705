"""Measure what healing would leave of each group's error, so that the groups are removed that can be healed best.

The angular distance of SGP (`sgp.py`) says how little a group of layers turns the stream; it does not see whether the
layer below it can do the group's work. Here the removed layers' work is predicted from what that layer's MLP adds anyway,
by ridge regression, and the distance is the error on texts that the regression did not see:

    d(l, l+m) = mean over positions of |h_(l+m) - b_l - M_m u_l|^2 / |h_border|^2

u_l (C,) is what the MLP of layer l adds to the stream, b_l the stream without it, h the outputs of layers. The stream
carries an error on to the border as it is, while itself grows: so an early group costs less than a late one of the same
relative error. M_m (C, C) is ReplaceMe's map (arXiv 2505.02819). `alignment/healing.py` then fits a wider map on the
healed layers' own states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedsoda_edge.model.families import branch
from fedsoda_edge.model.source import LayerSource
from fedsoda_edge.model.streaming import LayersDone, buckets, stream
from fedsoda_hub.algorithms.alignment.healing import HELD_OUT, MASSIVE

RIDGE = 1e-4  # of the mean of the Gram matrix's diagonal
BATCH_TOKENS = 4096


def distances(
    source: LayerSource,
    num_layers: int,
    size: int,
    texts: Sequence[Tensor],
    *,
    compute_dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    progress: LayersDone | None = None,
) -> list[list[float]]:
    """Measure the distances in one streamed pass; the states of size + 1 layers are in memory.

    Args:
        num_layers: the layers below the adapter.
        size: the largest m.
        texts: (T_i,) ids each, HELD_OUT or more.

    Returns:
        found[l][m-1] for 0 <= l < l+m < num_layers and m <= size.

    Raises:
        ValueError: there are too few texts.
    """
    if len(texts) < HELD_OUT:
        raise ValueError(f"there are {len(texts)} texts; at least {HELD_OUT} are needed")
    batches = buckets([len(text) for text in texts], BATCH_TOKENS)
    order = [sample for batch in batches for sample in batch]
    lengths = [len(texts[sample]) for sample in order]
    is_unseen = torch.cat([torch.full((len(texts[sample]),), sample % HELD_OUT == HELD_OUT - 1) for sample in order])
    is_first = torch.cat([torch.arange(length) == 0 for length in lengths])
    found: list[list[float]] = [[] for _ in range(num_layers)]
    below: dict[int, _Below] = {}

    def enter(number: int, layer: Any) -> None:
        module = getattr(layer, branch(layer, "mlp")[-1])
        parts: list[tuple[Tensor, Tensor]] = []
        made: list[Tensor] = []
        turns = iter(batches)

        def keep(_: Any, __: Any, out: Any) -> None:
            made[:] = [out[0] if isinstance(out, tuple) else out]

        def add(_: Any, __: Any, out: Any) -> None:
            output, batch = (out[0] if isinstance(out, tuple) else out), next(turns)
            sizes = [len(texts[sample]) for sample in batch]
            flat = (
                torch.cat([row[:length] for row, length in zip(x, sizes, strict=True)]).float()
                for x in (made[0], output - made[0])
            )
            parts.append((next(flat), next(flat)))

        module.register_forward_hook(keep)
        layer.register_forward_hook(add)
        below[number] = _Below(parts)

    size_of_border = 0.0

    def visit(number: int, hidden: list[Tensor]) -> None:
        nonlocal size_of_border
        wanted = torch.cat([hidden[sample] for sample in order]).float().to(device)
        squares = wanted.square().sum(dim=1)
        is_judged = (is_unseen & ~is_first).to(device) & (squares <= MASSIVE**2 * squares.median())
        size_of_border = float(squares[is_judged].mean())  # in the end that of the last layer
        for lower in range(max(0, number - size), number):
            found[lower].append(below[lower].left(wanted, ~is_unseen.to(device), is_judged))
        below.pop(number - size, None)

    stream(
        source,
        range(num_layers),
        texts,
        batches=batches,
        compute_dtype=compute_dtype,
        store_dtype=torch.float32,
        device=device,
        enter=enter,
        visit=visit,
        progress=progress,
    )
    return [[error / size_of_border for error in row] for row in found]


class _Below:
    """The two parts of a layer's outputs at each token: what its MLP adds (N, C), and the rest (N, C)."""

    def __init__(self, parts: list[tuple[Tensor, Tensor]]) -> None:
        self._parts = parts

    def left(self, wanted: Tensor, is_seen: Tensor, is_judged: Tensor) -> float:
        """Compute the mean squared error of predicting `wanted` (N, C) at the tokens that are judged, from those seen."""
        added, without = (torch.cat(part) for part in zip(*self._parts, strict=True))
        length = wanted.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        u, r = added / length, (wanted - without) / length
        gram, cross = (u[is_seen].T @ u[is_seen]).double(), (u[is_seen].T @ r[is_seen]).double()
        gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
        map_ = torch.cholesky_solve(cross, torch.linalg.cholesky(gram)).float()
        errors = (r[is_judged] - u[is_judged] @ map_) * length[is_judged]
        return float(errors.square().sum(dim=1).mean())
