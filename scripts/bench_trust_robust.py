"""Measure that 2 attackers of 10 edges cannot move what the hub merges, whatever they send: part of `bench_trust`.

Honest updates are drawn around a common step, coded as edges code them, and merged by the product's rules. Tried are every
kind of `fedsoda_hub/compare/attacks.py`, a boast of 2^31 examples, values as large as the hub accepts, and no attack, by
every rule of [aggregation] robust, where A and B are averaged apart and, for the rules on whole updates, where products are.
Right is a result that is no farther from the honest mean than BOUND of its length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import get_args
from unittest import mock

import torch
from torch import Tensor

from fedsoda_edge.model import delta
from fedsoda_edge.protocol.manifest import TensorSpec
from fedsoda_hub.algorithms.aggregation import gram, robust, weighted_mean
from fedsoda_hub.algorithms.aggregation.products import pairs_by_module, stacked
from fedsoda_hub.algorithms.aggregation.weighted_mean import CodedUpdate
from fedsoda_hub.compare.attacks import attackers_among, forged
from fedsoda_hub.compare.settings import AttackKind
from fedsoda_hub.settings.tables import Aggregation, Robust

RANK, OUT, IN, CODEC, NUM_EDGES, SHARE, MAX_WEIGHT = 4, 24, 40, "int8", 10, 0.2, 3.0
MODULES = ("layers.7.self_attn.q_proj", "layers.7.mlp.up_proj")
LAYOUT = tuple(
    TensorSpec(f"{module}.lora_{factor}", (RANK, IN) if factor == "A" else (OUT, RANK))
    for module in MODULES
    for factor in "AB"
)
BOUND, BOUND_CLEAN = 0.6, 0.35  # of the honest mean's length
BOAST, LARGEST = 2**31, 2.0**100
RULES: tuple[Robust, ...] = tuple(rule for rule in get_args(Robust) if rule != "none")
ON_PRODUCTS: tuple[Robust, ...] = ("clip", "krum", "centered-clip")
KINDS: tuple[AttackKind, ...] = tuple(kind for kind in get_args(AttackKind) if kind != "label-flip")


@dataclass(frozen=True)
class Case:
    """A round that is merged. what: in words."""

    what: str
    updates: list[CodedUpdate]
    honest: list[CodedUpdate]
    bound: float


def _drawn(seed: int, scale: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {spec.name: scale * torch.randn(spec.shape, generator=generator) for spec in LAYOUT}


def _update(edge: str, step: dict[str, Tensor], view: dict[str, Tensor], num_examples: int) -> CodedUpdate:
    return CodedUpdate(edge, num_examples, partial(bytes, delta.encode(step, CODEC)), view, LAYOUT)


def cases(seed: int) -> Iterator[Case]:
    """Draw the rounds of one seed: without an attack, and with each."""
    view, common = _drawn(1000 * seed, 0.3), _drawn(1000 * seed + 1, 0.1)
    edges = [f"edge-{number}" for number in range(NUM_EDGES)]
    steps = {
        edge: {name: common[name] + own for name, own in _drawn(1000 * seed + 2 + at, 0.07).items()}
        for at, edge in enumerate(edges)
    }
    attackers = attackers_among(edges, SHARE)
    honest = [_update(edge, steps[edge], view, 80 + 10 * at) for at, edge in enumerate(edges[: -len(attackers)])]
    decoded = [delta.decode(one.read(), LAYOUT, CODEC) for one in honest]

    def attacked(made: Callable[[str, int], dict[str, Tensor]], num_examples: int = 100) -> list[CodedUpdate]:
        return honest + [_update(edge, made(edge, at), view, num_examples) for at, edge in enumerate(attackers)]

    yield Case("no attack", attacked(lambda edge, at: steps[edge]), attacked(lambda edge, at: steps[edge]), BOUND_CLEAN)
    for kind in KINDS:
        forging = partial(_forged, kind, steps, decoded, len(attackers), seed)
        yield Case(kind, attacked(forging), honest, BOUND)
    boasting = partial(_forged, "scaled", steps, decoded, len(attackers), seed)
    yield Case("scaled, with a boast of examples", attacked(boasting, BOAST), honest, BOUND + 0.5)
    huge = {name: -LARGEST * value.sign() for name, value in common.items()}
    yield Case("as large as the hub accepts", attacked(lambda edge, at: huge), honest, BOUND)


def _forged(
    kind: AttackKind,
    steps: dict[str, dict[str, Tensor]],
    honest: list[dict[str, Tensor]],
    num_attackers: int,
    seed: int,
    edge: str,
    at: int,
) -> dict[str, Tensor]:
    return forged(kind, steps[edge], honest, num_attackers, seed * 10 + at)


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def apart(case: Case, rule: Robust) -> float:
    """Measure how far a rule's result is from the honest mean, A and B averaged apart, in its lengths."""
    how = Aggregation(robust=rule, robust_share=SHARE)
    honest = torch.stack([_flat(delta.decode(one.read(), LAYOUT, CODEC)) for one in case.honest]).mean(dim=0)
    found = _flat(robust.merge(case.updates, CODEC, MAX_WEIGHT, how).mean)
    return float((found - honest).norm() / honest.norm())


def of_products(case: Case, rule: Robust) -> float:
    """Measure the same of the mean of products."""
    how = Aggregation(rule="flexlora", robust=rule, robust_share=SHARE)
    view = case.updates[0].view
    found = robust.kept(case.updates, CODEC, MAX_WEIGHT, how, gram.of_products)
    pairs = robust.counted(pairs_by_module(case.updates, CODEC, MAX_WEIGHT), case.updates, found.counts)
    square = whole = 0.0
    for module, of_module in pairs:
        b0, a0 = (view[f"{module}.lora_{factor}"].double() for factor in "BA")
        honest = torch.zeros(OUT, IN, dtype=torch.float64)
        for one in case.honest:
            after = delta.advance(one.view, one.read(), LAYOUT, CODEC)
            b, a = (after[f"{module}.lora_{factor}"].double() for factor in "BA")
            honest += (b @ a - b0 @ a0) / len(case.honest)
        left, right = stacked(of_module)
        square += float((left @ right - b0 @ a0 - honest).square().sum())
        whole += float(honest.square().sum())
    return math.sqrt(square / whole)


def measure(quick: bool) -> dict[str, object]:
    """Merge every round by every rule; count what stays near the honest mean.

    Returns:
        tried, right, wrong (at most 20 sentences), and the farthest result of each rule.
    """
    tried = right = 0
    wrong: list[str] = []
    farthest: dict[str, float] = {}
    for seed in range(2 if quick else 12):
        for case in cases(seed):
            ways = [(rule, apart, "A and B apart") for rule in RULES]
            ways += [(rule, of_products, "products") for rule in ON_PRODUCTS]
            for rule, way, where in ways:
                distance = way(case, rule)
                tried += 1
                name = f"{rule}, {where}"
                farthest[name] = max(farthest.get(name, 0.0), distance)
                if distance <= case.bound:  # not so of a distance that is not a number
                    right += 1
                else:
                    wrong.append(
                        f"{name}, {case.what}, seed {seed}: {distance:.2f} from the honest mean, {case.bound} allowed"
                    )
    shown = {name: round(value, 3) for name, value in farthest.items()}
    return {"tried": tried, "right": right, "wrong": wrong[:20], "farthest": shown}


def _mean_instead() -> AbstractContextManager[object]:
    return mock.patch.object(robust, "rule_for", return_value="none")


def _no_bound() -> AbstractContextManager[object]:
    return mock.patch.object(robust, "clip_factors", torch.ones_like)


def _nobody_expected() -> AbstractContextManager[object]:
    return mock.patch.object(robust, "attackers", return_value=0)


def _boasts_count() -> AbstractContextManager[object]:
    def uncapped(updates: list[CodedUpdate], max_weight: float) -> list[tuple[CodedUpdate, float]]:
        return [(one, float(one.num_examples)) for one in sorted(updates, key=lambda one: one.edge)]

    return mock.patch.object(weighted_mean, "weighed", uncapped)


DEFECTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "the rule is replaced by the mean": _mean_instead,
    "the bound of lengths is removed": _no_bound,
    "trimmed and krum expect no attacker": _nobody_expected,
    "a boast of examples counts in full": _boasts_count,
}
