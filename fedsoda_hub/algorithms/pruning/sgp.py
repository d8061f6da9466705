"""Similarity group pruning, measured: the angular distance between the outputs of every two layers.

FedSODA (arXiv 2508.12727) eq. 5 and Algorithm 1; the metric is Gromov et al. (arXiv 2403.17887) on layer
outputs. Which groups go is `fedsoda_edge.model.layer_plan.choose_groups`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedsoda_edge.model.source import LayerSource
from fedsoda_edge.model.streaming import stream


def angular_distances(last_tokens: Tensor) -> list[list[float]]:
    """All d(l, l+m) = mean over samples of arccos(cos(x_l, x_(l+m))) / pi, products in float64.

    Args:
        last_tokens: (L, N, C), the output of each layer at the last token of each sample.

    Returns:
        distances[l][m-1] for 0 <= l < l+m < L, in units of pi (0..1).
    """
    unit = last_tokens.double()
    unit = unit / unit.norm(dim=-1, keepdim=True)
    rows = []
    for lower in range(len(unit)):
        cosines = torch.einsum("nc,mnc->mn", unit[lower], unit[lower + 1 :]).clamp(-1.0, 1.0)
        rows.append((cosines.arccos() / torch.pi).mean(dim=1).tolist())
    return rows


def measure(
    source: LayerSource,
    blocks: Sequence[Tensor],
    num_emulator_layers: int,
    *,
    compute_dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[list[float]]:
    """One streamed pass over the public blocks; every (n, p) is chosen from its result.

    Hidden states are rounded to the checkpoint's dtype from layer to layer (contract.md, Public text).

    Returns:
        distances as in `angular_distances`, over the layers below the adapter.
    """
    last: list[Tensor] = []

    def keep_last(_: int, hidden: list[Tensor]) -> None:
        last.append(torch.stack([sample[-1] for sample in hidden]))

    stream(
        source,
        range(num_emulator_layers),
        blocks,
        compute_dtype=compute_dtype,
        store_dtype=source.dtype,
        device=device,
        visit=keep_last,
        progress=progress,
    )
    return angular_distances(torch.stack(last))
