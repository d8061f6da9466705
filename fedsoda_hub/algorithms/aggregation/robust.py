"""Merge a round's updates so that a few edges that send anything cannot move the model far (docs/methods.md (m10-robust)).

Four kinds of rules, one for each thing that an attacker can choose:

    clip            the length of an update (norm bounding, Sun et al. 2019, arXiv 1911.07963)
    median, trimmed its single values (Yin et al. 2018, arXiv 1803.01498)
    krum            where it lies (Multi-Krum, Blanchard et al. 2017, arXiv 1703.02757)
    centered-clip   how far it lies from where the others are (Karimireddy et al. 2021, arXiv 2012.10333)

`num_examples` is an edge's own claim. So it never decides what is cut, bounded or chosen; it weighs what is left, as in
the mean. Order of arrival changes nothing. How an owner learns who was far from the others is `standing.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsoda_edge.model.delta import decode
from fedsoda_hub.algorithms.aggregation import gram
from fedsoda_hub.algorithms.aggregation.products import Pair
from fedsoda_hub.algorithms.aggregation.weighted_mean import CodedUpdate, weighed, weighted_mean
from fedsoda_hub.settings.tables import Aggregation, Robust

ITERATIONS = 20  # of centered-clip; they cost no pass, and 10 come within 1 % of the end
ROUNDING = 1e-12  # of squared lengths, below which a squared distance is what float64 lost
LEAST_FOR_KRUM = 5  # updates: n > 2 f + 2 with f = 1


@dataclass(frozen=True)
class Kept:
    """The share of each update that a rule keeps, by edge.

    counts: how many times its weight in the mean an update counts: 1, it is in the mean as it is; 0, it is left out.
    kept: the share of the update that is not clipped or cut, for people. gram: <u_i, u_j>, where the rule needed it.
    """

    counts: dict[str, float]
    kept: dict[str, float]
    gram: Tensor | None = None


@dataclass(frozen=True)
class Merged:
    """The result of a round. mean: as `weighted_mean` returns it. kept: as in `Kept`; empty of the median."""

    mean: dict[str, Tensor]
    kept: dict[str, float]


def rule_for(settings: Aggregation, num_updates: int) -> Robust:
    """Choose the rule for this number of updates: krum needs 5, so that one of them may be an attacker's; below that it is clip."""
    return "clip" if settings.robust == "krum" and num_updates < LEAST_FOR_KRUM else settings.robust


def attackers(share: float, num_updates: int, most: int) -> int:
    """Count the attackers that are expected among this number of updates: the share, rounded up, and at most `most`."""
    return max(0, min(math.ceil(share * num_updates - 1e-9), most))


def merge(updates: Sequence[CodedUpdate], codec: str, max_weight: float, settings: Aggregation) -> Merged:
    """Merge the decoded deltas, A and B apart, as [aggregation] robust says.

    In memory is one update with none and clip; with median and trimmed all edges' values of a few tensors, with krum and
    centered-clip too, and K x K inner products (`gram.together`). Each rule reads an update once or twice.

    Returns:
        the mean; fp32 CPU tensors. A tensor that no update holds is missing.

    Raises:
        ValueError: `updates` is empty.
    """
    rule = rule_for(settings, len(updates))
    if rule in ("median", "trimmed"):
        return _by_value(updates, codec, max_weight, settings.robust_share if rule == "trimmed" else None)
    found = kept(updates, codec, max_weight, settings)
    return Merged(weighted_mean(updates, codec, max_weight, found.counts), found.kept)


def kept(
    updates: Sequence[CodedUpdate], codec: str, max_weight: float, settings: Aggregation, of: gram.Gram = gram.of_deltas
) -> Kept:
    """Decide how much of each update counts, for the rules that take updates as a whole.

    Args:
        of: measures the inner products of what is averaged.
    """
    ordered = weighed(updates, max_weight)
    edges, rule = [update.edge for update, _ in ordered], rule_for(settings, len(ordered))
    everything = dict.fromkeys(edges, 1.0)
    if rule == "none" or not ordered:
        return Kept(everything, everything)
    if rule == "clip" and of is gram.of_deltas:
        factors = clip_factors(_lengths([update for update, _ in ordered], codec))
        found = dict(zip(edges, factors.tolist(), strict=True))
        return Kept(found, found)
    inner = of([update for update, _ in ordered], codec)
    shares = torch.tensor([weight for _, weight in ordered], dtype=torch.float64)
    shares /= shares.sum()
    match rule:
        case "clip":
            counts = clip_factors(inner.diagonal().clamp(min=0).sqrt())
            whole = counts
        case "krum":
            whole = krum_chosen(inner, attackers(settings.robust_share, len(edges), (len(edges) - 3) // 2)).double()
            counts = whole / (shares * whole).sum()
        case "centered-clip":
            coefficients, whole = centered_clip(inner, shares)
            counts = coefficients / shares
        case _:
            raise AssertionError("combine.py refuses rules by value where products are averaged")
    return Kept(dict(zip(edges, counts.tolist(), strict=True)), dict(zip(edges, whole.tolist(), strict=True)), inner)


# --- rules on whole updates ----------------------------------------------------------------------------------


def _lengths(updates: Iterable[CodedUpdate], codec: str) -> Tensor:
    """Measure each update's root mean square value; that is its length where all hold the same tensors, but for a factor.

    An edge that holds fewer layers is so compared with the others by how much it moves those.
    """
    found = []
    for update in updates:
        values = decode(update.read(), update.layout, codec).values()
        square = sum(float(value.double().square().sum()) for value in values)
        found.append(math.sqrt(square / max(1, sum(value.numel() for value in values))))
    return torch.tensor(found, dtype=torch.float64)


def clip_factors(lengths: Tensor) -> Tensor:
    """Compute what brings each length to the median length at most: min(1, median / length).

    Args:
        lengths: (K,), float64. Of an even number the lower of the two in the middle is the median.
    """
    bound = lengths.median()
    return torch.where(lengths > bound, bound / lengths, torch.ones_like(lengths))


def distances(inner: Tensor) -> Tensor:
    """Compute |u_i - u_j|^2 from <u_i, u_j>, (K, K); 0 on the diagonal."""
    squares = inner.diagonal()
    found = (squares[:, None] + squares[None, :] - 2 * inner).clamp(min=0)
    return found.fill_diagonal_(0)


def krum_chosen(inner: Tensor, num_attackers: int) -> Tensor:
    """Choose the n - f updates whose n - f - 2 nearest others are nearest; of equal ones the first (Multi-Krum, m = n - f).

    Args:
        inner: (n, n). num_attackers: f, with n > 2 f + 2.

    Returns:
        bool, (n,).
    """
    count = len(inner)
    near = distances(inner).fill_diagonal_(math.inf).sort(dim=1).values[:, : count - num_attackers - 2]
    order = near.sum(dim=1).argsort(stable=True)
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[order[: count - num_attackers]] = True
    return chosen


def centered_clip(inner: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Find the centre v = sum_k c_k u_k of v <- v + sum_k p_k (u_k - v) min(1, radius / |u_k - v|), from v = 0.

    radius: the median of all |u_k - v|, in each iteration (the paper's is a constant, which LoRA deltas, shorter from
    round to round, do not have). Every |u_k - v|^2 follows from the inner products, so an iteration needs no update.

    Args:
        inner: <u_i, u_j>, (K, K). shares: p, (K,), of sum 1. Both float64.

    Returns:
        (c, the last min(1, radius / |u_k - v|)), each (K,).
    """
    c = torch.zeros_like(shares)
    squares, factors = inner.diagonal(), torch.ones_like(shares)
    for _ in range(ITERATIONS):
        towards = inner @ c
        of_centre = c @ towards
        apart = squares - 2 * towards + of_centre
        apart = torch.where(apart > ROUNDING * (squares + of_centre), apart, torch.zeros_like(apart))
        factors = clip_factors(apart.sqrt())
        pulls = shares * factors
        c = c * (1 - pulls.sum()) + pulls
    return c, factors


# --- rules on single values ----------------------------------------------------------------------------------


def _by_value(updates: Sequence[CodedUpdate], codec: str, max_weight: float, share: float | None) -> Merged:
    """Merge each value by itself, over the edges that hold it. share: that of attackers, for trimmed; None: the median."""
    ordered = weighed(updates, max_weight)
    weights = {update.edge: weight for update, weight in ordered}
    mean: dict[str, Tensor] = {}
    used, held = dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 0)
    for name, holders, values in gram.together([update for update, _ in ordered], codec):
        shape = next(spec.shape for spec in holders[0].layout if spec.name == name)
        if share is None:
            mean[name] = median(values).reshape(shape)
            continue
        trim = attackers(share, len(holders), (len(holders) - 1) // 2)
        merged, numbers = trimmed(values, torch.tensor([weights[holder.edge] for holder in holders]), trim)
        mean[name] = merged.reshape(shape)
        for holder, number in zip(holders, numbers.tolist(), strict=True):
            used[holder.edge] += number
            held[holder.edge] += values.shape[1]
    return Merged(mean, {} if share is None else {edge: used[edge] / max(1, held[edge]) for edge in weights})


def median(values: Tensor) -> Tensor:
    """Take the median of each column of (K, n), fp32; of an even number the mean of the two in the middle."""
    merged, _ = trimmed(values, torch.ones(len(values)), (len(values) - 1) // 2)
    return merged


def trimmed(values: Tensor, weights: Tensor, trim: int) -> tuple[Tensor, Tensor]:
    """Average each column without its `trim` least and greatest values, by the weights of the rest.

    Args:
        values: (K, n), fp32. weights: (K,). trim: below K / 2. Of equal values those of the first rows count as less.

    Returns:
        ((n,), how many values of each row were averaged, (K,)).
    """
    order = values.argsort(dim=0, stable=True)[trim : len(values) - trim]
    of_values = weights.float()[order]
    merged = (values.gather(0, order) * of_values).sum(dim=0) / of_values.sum(dim=0)
    return merged, torch.bincount(order.flatten(), minlength=len(values))


# --- products ------------------------------------------------------------------------------------------------


def counted(
    modules: Iterable[tuple[str, Sequence[Pair]]], updates: Sequence[CodedUpdate], counts: Mapping[str, float]
) -> Iterator[tuple[str, list[Pair]]]:
    """Yield the pairs whose mean product is that of the rule: of an update that counts s times, B A stands for
    s B A + (1 - s) B_0 A_0 with the pair of its view.

    Args:
        modules: as `products.pairs_by_module` yields them for these updates.
    """
    ordered = sorted(updates, key=lambda update: update.edge)
    for module, pairs in modules:
        holders = [update for update in ordered if f"{module}.lora_A" in update.view]
        made: list[Pair] = []
        rest: dict[int, Pair] = {}  # by view, since many edges share one
        for update, pair in zip(holders, pairs, strict=True):
            factor = counts[update.edge]
            made.append(Pair(pair.share * factor, pair.b, pair.a))
            b, a = (update.view[f"{module}.lora_{which}"].double() for which in "BA")
            before = rest.get(id(update.view), Pair(0.0, b, a))
            rest[id(update.view)] = Pair(before.share + pair.share * (1 - factor), b, a)
        yield module, made + [pair for pair in rest.values() if pair.share]
