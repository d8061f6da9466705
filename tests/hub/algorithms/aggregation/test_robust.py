"""Every robust rule against brute force on whole matrices in numpy, and against attackers that know the others' updates.

The oracles flatten all updates into one matrix, loop over edges and know nothing of streams, codecs or inner products.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsoda_edge.model import delta
from fedsoda_edge.protocol.coded import of_factor
from fedsoda_edge.protocol.manifest import TensorSpec
from fedsoda_hub.algorithms.aggregation import flexlora, gram, products, robust, standing
from fedsoda_hub.algorithms.aggregation.products import pairs_by_module, stacked
from fedsoda_hub.algorithms.aggregation.weighted_mean import CodedUpdate, weighted_mean
from fedsoda_hub.settings.tables import Aggregation, Robust

RANK, OUT, IN = 4, 18, 33
MODULES = ("layers.6.q", "layers.7.v")
LAYOUT = tuple(
    TensorSpec(f"{module}.lora_{factor}", shape)
    for module in MODULES
    for factor, shape in (("A", (RANK, IN)), ("B", (OUT, RANK)))
)
RULES: tuple[Robust, ...] = get_args(Robust)
WHOLE: tuple[Robust, ...] = ("clip", "krum", "centered-clip")
Matrix = NDArray[np.float64]


def tensors(seed: int, scale: float, layout: Sequence[TensorSpec] = LAYOUT) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {spec.name: torch.randn(spec.shape, generator=generator) * scale for spec in layout}


VIEW = tensors(0, 0.3)


def update(edge: str, step: dict[str, Tensor], num_examples: int = 10, codec: str = "bf16") -> CodedUpdate:
    layout = delta.layout_of(step)
    return CodedUpdate(edge, num_examples, partial(bytes, delta.encode(step, codec)), VIEW, layout)


def a_round(count: int, codec: str = "bf16", layout: Sequence[TensorSpec] = LAYOUT) -> list[CodedUpdate]:
    """Edges that agree somewhat, of other lengths and other numbers of examples; every fifth points elsewhere, far off."""
    made, common = [], tensors(99, 0.1, layout)
    for at in range(count):
        own, far = tensors(at + 1, 0.1, layout), at % 5 == 4
        step = {name: (-8 if far else 1) * common[name] + (0.5 + at / count) * own[name] for name in common}
        made.append(update(f"edge-{at:02d}", step, 10 + 7 * (at % 4), codec))
    return made


def matrix(updates: Sequence[CodedUpdate], codec: str = "bf16") -> Matrix:
    """All decoded deltas as rows, in ascending edge id."""
    rows = []
    for one in sorted(updates, key=lambda one: one.edge):
        values = delta.decode(one.read(), one.layout, codec)
        rows.append(np.concatenate([values[name].double().numpy().ravel() for name in sorted(values)]))
    return np.array(rows)


def flat(mean: dict[str, Tensor]) -> Matrix:
    return np.concatenate([mean[name].double().numpy().ravel() for name in sorted(mean)])


def shares(updates: Sequence[CodedUpdate], max_weight: float = 3.0) -> Matrix:
    counts = np.array([one.num_examples for one in sorted(updates, key=lambda one: one.edge)], dtype=float)
    counts = np.minimum(counts, max_weight * np.median(counts))
    return np.asarray(counts / counts.sum())


# --- oracles --------------------------------------------------------------------------------------------------------


def lower_median(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]


def clip_oracle(rows: Matrix, p: Matrix, _: float) -> Matrix:
    lengths = [math.sqrt(sum(float(v) ** 2 for v in row)) for row in rows]
    bound = lower_median(lengths)
    return np.asarray(sum(w * row * min(1.0, bound / length) for w, row, length in zip(p, rows, lengths, strict=True)))


def median_oracle(rows: Matrix, p: Matrix, _: float) -> Matrix:
    return np.asarray(np.median(rows, axis=0))


def trimmed_oracle(rows: Matrix, p: Matrix, share: float) -> Matrix:
    f = min(math.ceil(share * len(rows)), (len(rows) - 1) // 2)
    found = []
    for column in rows.T:
        kept = sorted(range(len(rows)), key=lambda at: column[at])[f : len(rows) - f]
        found.append(sum(p[at] * column[at] for at in kept) / sum(p[at] for at in kept))
    return np.array(found)


def krum_oracle(rows: Matrix, p: Matrix, share: float) -> Matrix:
    n = len(rows)
    if n < 5:
        return clip_oracle(rows, p, share)
    f = min(math.ceil(share * n), (n - 3) // 2)
    assert n > 2 * f + 2
    scores = []
    for i in range(n):
        far = sorted(float(((rows[i] - rows[j]) ** 2).sum()) for j in range(n) if j != i)
        scores.append(sum(far[: n - f - 2]))
    kept = sorted(range(n), key=lambda at: scores[at])[: n - f]
    return np.asarray(sum(p[at] * rows[at] for at in kept) / sum(p[at] for at in kept))


def centered_clip_oracle(rows: Matrix, p: Matrix, _: float) -> Matrix:
    v = np.zeros(rows.shape[1])
    for _iteration in range(20):
        lengths = [float(np.linalg.norm(row - v)) for row in rows]
        radius = lower_median(lengths)
        v = v + sum(
            w * (row - v) * (min(1.0, radius / length) if length else 1.0)
            for w, row, length in zip(p, rows, lengths, strict=True)
        )
    return np.asarray(v)


def mean_oracle(rows: Matrix, p: Matrix, _: float) -> Matrix:
    return np.asarray(p @ rows)


ORACLES: dict[Robust, Callable[[Matrix, Matrix, float], Matrix]] = {
    "none": mean_oracle,
    "clip": clip_oracle,
    "median": median_oracle,
    "trimmed": trimmed_oracle,
    "krum": krum_oracle,
    "centered-clip": centered_clip_oracle,
}


def merged(rule: Robust, updates: Sequence[CodedUpdate], codec: str = "bf16", share: float = 0.2) -> dict[str, Tensor]:
    return robust.merge(updates, codec, 3.0, Aggregation(robust=rule, robust_share=share)).mean


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 10, 11])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.45])
def test_every_rule_is_that_of_the_whole_matrix(rule: Robust, count: int, share: float) -> None:
    updates = a_round(count)
    expected = ORACLES[rule](matrix(updates), shares(updates), share)
    np.testing.assert_allclose(flat(merged(rule, updates, share=share)), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("codec", ["nf4", "int8", "klt", "klt-fine"])
@pytest.mark.parametrize("rule", RULES)
def test_every_codec_and_a_single_factor(rule: Robust, codec: str) -> None:
    for factor in ("A", "B", "both"):
        updates = a_round(7, codec, of_factor(LAYOUT, factor))
        expected = ORACLES[rule](matrix(updates, codec), shares(updates), 0.2)
        np.testing.assert_allclose(flat(merged(rule, updates, codec)), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rule", RULES)
def test_arrival_changes_no_bit(rule: Robust) -> None:
    updates = a_round(6)
    first = robust.merge(updates, "bf16", 3.0, Aggregation(robust=rule))
    for order in itertools.islice(itertools.permutations(updates), 0, 720, 103):
        again = robust.merge(order, "bf16", 3.0, Aggregation(robust=rule))
        assert again.kept == first.kept
        assert all(torch.equal(again.mean[name], first.mean[name]) for name in first.mean)


@pytest.mark.parametrize("rule", RULES)
def test_few_values_in_memory_give_the_same_bits(rule: Robust, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = a_round(6)
    expected = merged(rule, updates)
    monkeypatch.setattr(products, "HELD_BYTES", 1)  # a tensor at a time
    reads = 0

    def counting(read: Callable[[], bytes]) -> bytes:
        nonlocal reads
        reads += 1
        return read()

    counted = [replace(one, read=partial(counting, one.read)) for one in updates]
    found = merged(rule, counted)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # none and clip hold one update whatever there is; the others read each update once for each tensor, and no oftener.
    passes = {"none": 1, "clip": 2, "median": len(LAYOUT), "trimmed": len(LAYOUT)}
    assert reads <= len(updates) * passes.get(rule, len(LAYOUT) + 1)


def test_what_is_held_does_not_grow_with_the_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 edges clip holds one update; the others all edges' values of a group of tensors within HELD_BYTES."""
    updates = a_round(40)
    largest = max(spec.shape[0] * spec.shape[1] for spec in LAYOUT)
    monkeypatch.setattr(products, "HELD_BYTES", 2 * 40 * 4 * largest)
    for _, holders, values in gram.together(sorted(updates, key=lambda one: one.edge), "bf16"):
        assert values.shape[0] == len(holders) == 40
        assert 2 * values.numel() * 4 <= products.HELD_BYTES
    monkeypatch.setattr(gram, "together", None)  # clip never asks for it
    merged("clip", updates)


# --- what attackers can do ------------------------------------------------------------------------------------------


def honest_and(attack: Callable[[Matrix], Matrix], num_attackers: int = 2, num_examples: int = 10) -> list[CodedUpdate]:
    """Eight edges around a common step, and attackers that send what the attack makes of the matrix of honest rows."""
    common = tensors(99, 0.1)
    steps = [{name: common[name] + tensors(at + 1, 0.05)[name] for name in common} for at in range(8)]
    updates = [update(f"edge-{at}", step) for at, step in enumerate(steps)]
    bad, at = attack(matrix(updates)), 0
    step = {}
    for spec in sorted(LAYOUT, key=lambda spec: spec.name):
        size = spec.shape[0] * spec.shape[1]
        step[spec.name] = torch.tensor(bad[at : at + size], dtype=torch.float32).reshape(spec.shape)
        at += size
    return updates + [update(f"edge-{8 + at}", step, num_examples) for at in range(num_attackers)]


ATTACKS: dict[str, Callable[[Matrix], Matrix]] = {
    "sign flip": lambda rows: -rows[0],
    "scaled": lambda rows: -1000 * rows[0],
    "huge": lambda rows: -(2.0**100) * np.sign(rows[0]),
    "noise": lambda rows: np.asarray(np.random.default_rng(0).normal(size=rows.shape[1])),
    "a little": lambda rows: rows.mean(axis=0) - 1.5 * rows.std(axis=0),
    "inner product": lambda rows: -8 * rows.mean(axis=0),
    "nothing": lambda rows: 0 * rows[0],
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("rule", RULES[1:])
def test_two_of_ten_cannot_turn_the_result_whatever_they_send(rule: Robust, attack: str) -> None:
    updates = honest_and(ATTACKS[attack])
    honest = matrix(updates)[:8].mean(axis=0)
    found = flat(merged(rule, updates, "bf16"))
    length = float(np.linalg.norm(honest))
    assert found @ honest / length / np.linalg.norm(found) > 0.9
    assert np.linalg.norm(found - honest) < 0.55 * length


@pytest.mark.parametrize("attack", ["scaled", "huge", "noise", "inner product"])
def test_without_a_rule_two_of_ten_do_turn_it(attack: str) -> None:
    updates = honest_and(ATTACKS[attack])
    honest = matrix(updates)[:8].mean(axis=0)
    assert np.linalg.norm(flat(merged("none", updates)) - honest) > 0.9 * np.linalg.norm(honest)


@pytest.mark.parametrize("rule", ["median", "trimmed", "krum"])
def test_a_boast_of_examples_buys_no_place(rule: Robust) -> None:
    """What is cut or chosen does not ask for num_examples, so an attacker that claims 2^31 is cut as before."""
    modest, boastful = (honest_and(ATTACKS["scaled"], num_examples=n) for n in (10, 2**31))
    assert all(torch.equal(merged(rule, modest)[name], merged(rule, boastful)[name]) for name in VIEW)


def test_the_longest_and_the_farthest_are_told_by_what_was_kept() -> None:
    updates = honest_and(ATTACKS["scaled"])
    for rule in WHOLE:
        kept = robust.merge(updates, "bf16", 3.0, Aggregation(robust=rule)).kept
        assert max(kept["edge-8"], kept["edge-9"]) < 0.01 < 0.5 < min(kept[f"edge-{at}"] for at in range(8)), rule
    kept = robust.merge(updates, "bf16", 3.0, Aggregation(robust="trimmed")).kept
    assert max(kept["edge-8"], kept["edge-9"]) < 0.1 < 0.5 < min(kept[f"edge-{at}"] for at in range(8))
    assert robust.merge(updates, "bf16", 3.0, Aggregation(robust="median")).kept == {}


@pytest.mark.parametrize("rule", RULES)
def test_equal_updates_are_the_result_and_none_is_touched(rule: Robust) -> None:
    step = tensors(1, 0.1)
    updates = [update(f"edge-{at}", step, 10 + at) for at in range(7)]
    found = robust.merge(updates, "bf16", 3.0, Aggregation(robust=rule))
    expected = delta.decode(updates[0].read(), LAYOUT, "bf16")
    for name, value in expected.items():
        torch.testing.assert_close(found.mean[name], value, rtol=1e-6, atol=1e-8)
    if rule in ("none", "clip", "centered-clip"):
        assert all(share == pytest.approx(1.0) for share in found.kept.values())


@pytest.mark.parametrize("rule", RULES)
def test_updates_of_nothing_give_nothing(rule: Robust) -> None:
    nothing = {name: torch.zeros_like(value) for name, value in VIEW.items()}
    found = robust.merge([update(f"e{at}", nothing) for at in range(6)], "bf16", 3.0, Aggregation(robust=rule))
    assert all(not value.any() for value in found.mean.values())
    assert all(torch.isfinite(value).all() for value in found.mean.values())


def test_none_is_the_weighted_mean_to_the_bit() -> None:
    updates = a_round(5, "nf4")
    expected = weighted_mean(updates, "nf4", 3.0)
    assert all(torch.equal(value, expected[name]) for name, value in merged("none", updates, "nf4").items())


@pytest.mark.parametrize("rule", ["none", "clip", "median", "trimmed"])
def test_edges_with_other_layers_count_where_they_hold_them(rule: Robust) -> None:
    """FedPruner's classes: a tensor is merged over its holders, and a small edge's length is not taken for a short one."""
    few = [spec for spec in LAYOUT if spec.name.startswith(MODULES[0])]
    whole = [update(f"a{at}", tensors(at + 1, 0.1)) for at in range(3)]
    small = [update(f"b{at}", tensors(at + 9, 0.1, few)) for at in range(4)]
    found = robust.merge(whole + small, "bf16", 3.0, Aggregation(robust=rule, robust_share=0.2))
    assert set(found.mean) == {spec.name for spec in LAYOUT}
    alone = ORACLES[rule](matrix(whole), shares(whole), 0.2)
    if rule in ("median", "trimmed"):
        held = np.array([spec.name.startswith(MODULES[1]) for spec in sorted(LAYOUT, key=lambda s: s.name)])
        sizes = [spec.shape[0] * spec.shape[1] for spec in sorted(LAYOUT, key=lambda s: s.name)]
        np.testing.assert_allclose(flat(found.mean)[np.repeat(held, sizes)], alone[np.repeat(held, sizes)], atol=1e-6)
    if rule == "clip":
        assert min(found.kept.values()) > 0.9  # all values are of one size


# --- products -------------------------------------------------------------------------------------------------------


def dense(updates: Sequence[CodedUpdate]) -> Matrix:
    """What each update adds to B A, all modules as one row, by a dense product."""
    rows = []
    for one in sorted(updates, key=lambda one: one.edge):
        after = delta.advance(one.view, one.read(), one.layout, "bf16")
        row = []
        for module in MODULES:
            b, a, b0, a0 = (
                values[f"{module}.lora_{factor}"].double().numpy() for values in (after, one.view) for factor in "BA"
            )
            row.append((b @ a - b0 @ a0).ravel() / len(a))
        rows.append(np.concatenate(row))
    return np.array(rows)


def test_inner_products_of_products_are_those_of_the_dense_ones() -> None:
    updates = a_round(6)
    rows = dense(updates)
    np.testing.assert_allclose(gram.of_products(updates, "bf16").numpy(), rows @ rows.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", WHOLE)
def test_where_products_are_averaged_the_rule_is_that_of_the_products(rule: Robust) -> None:
    updates = a_round(7)
    how = Aggregation(robust=rule, rule="flexlora")
    found = robust.kept(updates, "bf16", 3.0, how, gram.of_products)
    expected = ORACLES[rule](dense(updates), shares(updates), 0.2)
    pairs = dict(robust.counted(pairs_by_module(updates, "bf16", 3.0), updates, found.counts))
    made = []
    for module in MODULES:
        left, right = stacked(pairs[module])
        before = VIEW[f"{module}.lora_B"].double() @ VIEW[f"{module}.lora_A"].double()
        made.append(((left @ right - before) / RANK).numpy().ravel())
    np.testing.assert_allclose(np.concatenate(made), expected, atol=1e-9)
    master = flexlora.merge(pairs.items(), VIEW)
    assert {name: value.shape for name, value in master.items()} == {spec.name: spec.shape for spec in LAYOUT}
    where = standing.in_products(updates, 3.0, found.counts, gram.of_products(updates, "bf16"))
    for one, row in zip(updates, dense(updates), strict=True):
        cosine = row @ expected / np.linalg.norm(row) / np.linalg.norm(expected)
        assert where[one.edge].norm == pytest.approx(np.linalg.norm(row))
        assert where[one.edge].cosine == pytest.approx(cosine, abs=1e-9)


def test_with_no_rule_products_are_averaged_as_before() -> None:
    updates = a_round(5)
    found = robust.kept(updates, "bf16", 3.0, Aggregation(rule="flexlora"), gram.of_products)
    plain = flexlora.merge(pairs_by_module(updates, "bf16", 3.0), VIEW)
    counted = flexlora.merge(robust.counted(pairs_by_module(updates, "bf16", 3.0), updates, found.counts), VIEW)
    assert all(torch.equal(plain[name], counted[name]) for name in plain)


def test_a_product_that_does_not_move_is_no_short_update_where_a_and_b_are_averaged_apart() -> None:
    """(c B, A / c) adds nothing to the edge's own product and ruins the means: factors are what is measured there."""
    step = {}
    for name, value in VIEW.items():
        step[name] = (49.0 if name.endswith("B") else 1 / 50 - 1) * value
    updates = [*a_round(4), update("edge-99", step)]
    lengths = gram.of_products(updates, "bf16").diagonal().sqrt()
    assert lengths[-1] < lengths[:-1].min() / 5  # in the products it hides
    kept = robust.merge(updates, "bf16", 3.0, Aggregation(robust="clip")).kept
    assert kept["edge-99"] < 0.1


# --- where updates lie ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["bf16", "nf4", "nf4-weight"])
def test_norm_and_cosine_are_those_of_the_whole_vectors(codec: str) -> None:
    steps = [tensors(at + 1, 0.1) for at in range(4)]
    updates = [
        CodedUpdate(
            f"e{at}", 10, partial(bytes, delta.encode_with_feedback(s, None, VIEW, LAYOUT, codec)[0]), VIEW, LAYOUT
        )
        for at, s in enumerate(steps)
    ]
    mean = weighted_mean(updates, codec, 3.0)
    start = flat(VIEW) if codec == "nf4-weight" else 0.0
    rows, target = matrix(updates, codec) - start, flat(mean) - start
    for edge, row in zip(("e0", "e1", "e2", "e3"), rows, strict=True):
        found = standing.to_mean(updates, codec, mean)[edge]
        assert found.norm == pytest.approx(np.linalg.norm(row))
        assert found.cosine == pytest.approx(row @ target / np.linalg.norm(row) / np.linalg.norm(target))


def test_an_update_of_nothing_has_no_direction() -> None:
    nothing = {name: torch.zeros_like(value) for name, value in VIEW.items()}
    updates = [update("a", nothing), update("b", tensors(1, 0.1))]
    found = standing.to_mean(updates, "bf16", merged("none", updates))
    assert found["a"] == standing.ToMean(0.0, None)
    assert found["b"].cosine == pytest.approx(1.0)
