"""Group layers that do similar things, and keep the most important one of each group.

FedPruner's choice (arXiv 2508.17209), read as in docs/methods.md (m9-fedpruner), since its text leaves the how open.
FedPruner+ keeps attention and MLP blocks each by themselves. Measuring is one streamed pass over the hub's blocks;
choosing is pure and cheap, so every size class gets its own choice from one measurement. What is made of the choice is
`methods/fedpruner.py`'s and `methods/fedpruner_plus.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize, pad

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.families import branch
from fedsoda_edge.model.source import LayerSource
from fedsoda_edge.model.streaming import LayersDone, buckets, stream

SAMPLED_TOKENS = 2048
BATCH_TOKENS = 2048
TEMPERATURE = 0.5  # tau of the selection probabilities
RESTARTS = 10  # of k-means
MAX_ITERATIONS = 100

Groups = list[tuple[int, ...]]  # full-LLM layers, each in one group, ascending
Partition = Callable[[Tensor, int], Groups]  # ((L, L) CKA, a number of groups) -> that many groups


@dataclass(frozen=True)
class Measured:
    """Measurements of all layers, or of all blocks of one kind.

    similarity: (L, L) CKA, float64. importance: by layer.
    """

    similarity: Tensor
    importance: tuple[float, ...]


class Components(NamedTuple):
    """The layers that keep their attention block, and those that keep their MLP block, ascending."""

    attention: tuple[int, ...]
    mlp: tuple[int, ...]


# -- measuring ------------------------------------------------------------------------------------------


def linear_cka(outputs: Sequence[Tensor]) -> Tensor:
    """Compute linear CKA of every two outputs: ||Z_i^T Z_j||_F^2 / (||Z_i^T Z_i||_F ||Z_j^T Z_j||_F), columns centred.

    Kornblith et al. (arXiv 1905.00414) eq. 5; where N < C through the Gram matrices Z Z^T, which give the same values.

    Args:
        outputs: (N, C) of each layer at the same N tokens.

    Returns:
        (L, L), float64; 0 for an output that is the same at every token.
    """
    centred = [output.double() - output.double().mean(dim=0) for output in outputs]
    tokens, width = centred[0].shape
    if tokens < width:
        grams = torch.stack([(output @ output.T).flatten() for output in centred])
        products = grams @ grams.T
    else:
        products = torch.zeros(len(centred), len(centred), dtype=torch.float64)
        for i, lower in enumerate(centred):
            for j, upper in enumerate(centred[: i + 1]):
                products[i, j] = products[j, i] = (lower.T @ upper).square().sum()
    norms = products.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return products / norms[:, None] / norms


def block_influence(before: Tensor, after: Tensor) -> float:
    """Compute 1 - mean cos(h_in, h_out): how much a block turns its stream (ShortGPT, arXiv 2403.03853).

    Args:
        before, after: (N, C) states at the same N tokens.
    """
    return float(1 - cosine_similarity(before.double(), after.double(), dim=-1).mean())


def measure_layers(
    source: LayerSource,
    blocks: Sequence[Tensor],
    *,
    seed: int,
    compute_dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    progress: LayersDone | None = None,
) -> Measured:
    """Measure CKA of all layers' outputs and their Block Influence in one streamed pass over the blocks.

    Both are taken at the same tokens, at most SAMPLED_TOKENS of all blocks; never at a block's first token, whose massive
    activations (arXiv 2402.17762) would be all that CKA sees.

    Args:
        blocks: (T_i,) ids each.
        seed: decides which tokens are sampled.
    """
    tokens = _sampled(blocks, seed)
    streams = [_at(tokens, stream(source, (), blocks))]
    stream(
        source,
        range(source.num_layers),
        blocks,
        compute_dtype=compute_dtype,
        device=device,
        visit=lambda _, hidden: streams.append(_at(tokens, hidden)),
        progress=progress,
    )
    influence = [block_influence(before, after) for before, after in pairwise(streams)]
    return Measured(linear_cka(streams[1:]), tuple(influence))


def measure_components(
    source: LayerSource,
    blocks: Sequence[Tensor],
    *,
    seed: int,
    compute_dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    progress: LayersDone | None = None,
) -> tuple[Measured, Measured]:
    """Measure attention and MLP blocks in one streamed pass, at the tokens of `measure_layers`.

    CKA is that of what a block adds to the stream; Block Influence is that of the stream before and after it.

    Returns:
        (attention blocks, MLP blocks).
    """
    tokens = _sampled(blocks, seed)
    batches = buckets([len(block) for block in blocks], BATCH_TOKENS)
    before = _at(tokens, stream(source, (), blocks))
    outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
    influence: tuple[list[float], list[float]] = ([], [])
    added: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})  # by one layer, by sample

    def enter(_: int, layer: Any) -> None:
        for module, made in zip(branch_ends(layer), added, strict=True):
            turns = iter(batches)

            def keep(_: Any, __: Any, out: Any, made: dict[int, Tensor] = made, turns: Any = turns) -> None:
                states = out[0] if isinstance(out, tuple) else out
                for row, sample in enumerate(next(turns)):
                    made[sample] = states[row, tokens[sample]].float().cpu()

            module.register_forward_hook(keep)

    def visit(_: int, __: list[Tensor]) -> None:
        nonlocal before
        for made, kept, influences in zip(added, outputs, influence, strict=True):
            kept.append(torch.cat([made[sample] for sample in range(len(blocks))]))
            after = before + kept[-1]
            influences.append(block_influence(before, after))
            before = after

    stream(
        source,
        range(source.num_layers),
        blocks,
        compute_dtype=compute_dtype,
        device=device,
        batches=batches,
        enter=enter,
        visit=visit,
        progress=progress,
    )
    attention, mlp = (Measured(linear_cka(o), tuple(i)) for o, i in zip(outputs, influence, strict=True))
    return attention, mlp


def branch_ends(layer: Any) -> tuple[Any, Any]:
    """Return the modules of a decoder layer whose outputs are added to the stream: the attention's and the MLP's."""
    return getattr(layer, branch(layer, "attention")[-1]), getattr(layer, branch(layer, "mlp")[-1])


def _sampled(blocks: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Sample the positions of each block to look at, ascending: at most SAMPLED_TOKENS in all, no block's first."""
    lengths = [len(block) - 1 for block in blocks]
    order = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(sum(lengths), dtype=torch.bool)
    chosen[order[:SAMPLED_TOKENS]] = True
    return [1 + of_block.nonzero()[:, 0] for of_block in chosen.split(lengths)]


def _at(tokens: Sequence[Tensor], hidden: Sequence[Tensor]) -> Tensor:
    """Collect the states at these positions of each block: (N, C), fp32."""
    return torch.cat([states[places].float() for places, states in zip(tokens, hidden, strict=True)])


# -- grouping -------------------------------------------------------------------------------------------


def _affinity(similarity: Tensor) -> Tensor:
    """Raise CKA to at least 0; no layer has affinity to itself, or a layer alone would look like the best group."""
    return similarity.double().clamp_min(0.0).fill_diagonal_(0.0)


def contiguous(similarity: Tensor, count: int) -> Groups:
    """Divide the layers into `count` runs of adjacent layers with the greatest sum of the groups' mean affinities.

    Exact, by dynamic programming over the cuts: O(count * L^2). A group's mean is over all s^2 entries of its block,
    so that it is (s - 1) / s of the mean CKA of its pairs. Ties go to the larger last group: deeper layers are more
    alike (Gromov et al., arXiv 2403.17887).

    Args:
        similarity: (L, L) CKA.
    """
    layers = len(similarity)
    _check_count(count, layers)
    sums = pad(_affinity(similarity).cumsum(0).cumsum(1), (1, 0, 1, 0)).tolist()  # sums[a][b]: of W[:a, :b]

    def mean(a: int, b: int) -> float:
        return (sums[b][b] - sums[a][b] - sums[b][a] + sums[a][a]) / (b - a) ** 2

    # best[k][end] = (value, -begin of the last group) of the layers below `end` in k groups.
    best = [[(-math.inf, 0)] * (layers + 1) for _ in range(count + 1)]
    best[0][0] = (0.0, 0)
    for k in range(1, count + 1):
        for end in range(k, layers + 1):
            best[k][end] = max((best[k - 1][a][0] + mean(a, end), -a) for a in range(k - 1, end))
    groups: Groups = []
    end = layers
    for k in range(count, 0, -1):
        begin = -best[k][end][1]
        groups.insert(0, tuple(range(begin, end)))
        end = begin
    return groups


def spectral(similarity: Tensor, count: int, *, seed: int) -> Groups:
    """Divide the layers into `count` groups of any layers: normalised Laplacian, its lowest eigenvectors, k-means.

    Ng, Jordan, Weiss (NIPS 2001), which is how docs/methods.md (m9-groups) reads "graph partitioning".

    Args:
        similarity: (L, L) CKA.
        seed: decides where k-means begins.

    Returns:
        Groups in the order of their first layers.
    """
    _check_count(count, len(similarity))
    affinity = _affinity(similarity)
    degree = affinity.sum(dim=1).clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    laplacian = torch.eye(len(affinity), dtype=torch.float64) - degree[:, None] * affinity * degree
    points = normalize(torch.linalg.eigh(laplacian).eigenvectors[:, :count], dim=1)
    labels = _k_means(points, count, torch.Generator().manual_seed(seed))
    return sorted(tuple((labels == group).nonzero()[:, 0].tolist()) for group in range(count))


def _k_means(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Assign each point to a cluster, none empty: (N,) of the best of RESTARTS runs of Lloyd's algorithm."""
    best, least = torch.arange(len(points)), math.inf
    for _ in range(RESTARTS):
        centres, labels = _spread(points, count, generator), torch.full((len(points),), -1)
        for _ in range(MAX_ITERATIONS):
            distances = torch.cdist(points, centres).square()
            nearest = distances.argmin(dim=1)
            for empty in set(range(count)) - set(nearest.tolist()):
                # It takes the worst placed point of a cluster that has more than one.
                shared = nearest.bincount(minlength=count)[nearest] > 1
                worst = distances.gather(1, nearest[:, None])[:, 0].where(shared, torch.tensor(-1.0)).argmax()
                nearest[worst] = empty
            if torch.equal(nearest, labels):
                break
            labels = nearest
            centres = torch.stack([points[labels == group].mean(dim=0) for group in range(count)])
        spread = float((points - centres[labels]).square().sum())
        if spread < least:
            best, least = labels, spread
    return best


def _spread(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw the points to begin with, each by its squared distance from those before it (k-means++)."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    while len(chosen) < count:
        weights = torch.cdist(points, points[chosen]).square().amin(dim=1) + 1e-12  # equal points: any of them
        weights[chosen] = 0.0
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return points[chosen]


def _check_count(count: int, layers: int) -> None:
    if not 1 <= count <= layers:
        raise ValueError(f"{count} groups of {layers} layers are wanted; there can be 1 to {layers}")


# -- choosing -------------------------------------------------------------------------------------------


def select_layers(
    measured: Measured,
    count: int,
    partition: Partition = contiguous,
    *,
    keep_ends: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[int, ...]:
    """Choose the layers to keep, ascending: one of each of `count` groups.

    Args:
        keep_ends: the first and the last layer are groups of their own.
        generator: draws within each group by `chances`, so that all layers are trained in the course of the rounds;
            None: the most important layer, the lowest of equals.
    """
    layers = len(measured.importance)
    _check_count(count, layers)
    ends = {0, layers - 1} if keep_ends else set()
    inner = [layer for layer in range(layers) if layer not in ends]
    groups = partition(measured.similarity[inner][:, inner], count - len(ends)) if count != len(ends) else []
    chosen = [_choose([inner[place] for place in group], measured.importance, generator) for group in groups]
    return tuple(sorted({*chosen, *ends}))


def _choose(group: Sequence[int], importance: Sequence[float], generator: torch.Generator | None) -> int:
    if generator is None:
        return max(group, key=lambda layer: (importance[layer], -layer))
    drawn = torch.multinomial(chances([importance[layer] for layer in group]), 1, generator=generator)
    return group[int(drawn)]


def chances(importance: Sequence[float]) -> Tensor:
    """Compute the chances of a group's layers to be drawn: softmax(importance / (TEMPERATURE * the group's mean)).

    Block Influences of .003 to .035 differ from each other by far less than TEMPERATURE; docs/methods.md (m9-draw) says
    why they are divided by their mean and not standardised.

    Args:
        importance: of each layer of the group; 0 is that of a layer that does nothing.

    Returns:
        (N,), float64; equal where no layer does anything.
    """
    values = torch.tensor(importance, dtype=torch.float64).clamp_min(0.0)  # rounding may leave 1 - cos below 0
    return (values / values.mean().clamp_min(torch.finfo(torch.float64).tiny) / TEMPERATURE).softmax(0)


def select_components(
    attention: Measured,
    mlp: Measured,
    attention_bytes: Sequence[int],
    mlp_bytes: Sequence[int],
    budget_bytes: int,
    partition: Partition = contiguous,
) -> Components:
    """Choose attention and MLP blocks apart, for the greatest sum of importance within the budget (FedPruner+).

    Each kind is grouped by itself and keeps the most important block of each group, and those of the first and the
    last layer, as `select_layers` does with `keep_ends`; all pairs of numbers of blocks that fit are compared, so the
    division of the bytes is exact. Of equals, the pair with fewer bytes is taken.

    Args:
        attention_bytes, mlp_bytes: what each layer's block of the kind takes.
        budget_bytes: what all kept blocks may take.

    Raises:
        UsageProblem: the blocks of the first and the last layer do not fit.
    """

    def size(kept: Components) -> int:
        return sum(attention_bytes[n] for n in kept.attention) + sum(mlp_bytes[n] for n in kept.mlp)

    def worth(kept: Components) -> float:
        return sum(attention.importance[n] for n in kept.attention) + sum(mlp.importance[n] for n in kept.mlp)

    of_attention, of_mlp = (
        [select_layers(measured, count, partition, keep_ends=True) for count in range(2, 1 + len(measured.importance))]
        for measured in (attention, mlp)
    )
    pairs = [Components(*pair) for pair in product(of_attention, of_mlp)]
    fitting = [kept for kept in pairs if size(kept) <= budget_bytes]
    if not fitting:
        raise UsageProblem(
            f"the first and the last layer, which are always kept, take {size(pairs[0]) / 1e6:.1f} MB, but [method] "
            f"drop_layers leaves room for {budget_bytes / 1e6:.1f} MB; lower drop_layers"
        )
    return max(fitting, key=lambda kept: (worth(kept), -size(kept)))
