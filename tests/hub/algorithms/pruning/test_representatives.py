"""Grouping is the best there is, measures are those of Transformers' own states, and means are over holders only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.model.sub_llm import build
from fedsoda_hub.algorithms.pruning.representatives import (
    Components,
    Groups,
    Measured,
    branch_ends,
    contiguous,
    linear_cka,
    measure_components,
    measure_layers,
    select_components,
    select_layers,
    spectral,
)
from tests.tiny import FAMILY_CONFIGS, make_tiny


def random_similarity(layers: int, seed: int) -> Tensor:
    half = torch.rand(layers, layers, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((half + half.T) / 2).fill_diagonal_(1.0)


def blocks_of(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 260, (size,), generator=generator) for size in sizes]


# -- measuring ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "width"), [(7, 12), (12, 7), (9, 9)])
def test_cka_is_the_hsic_of_centred_grams(tokens: int, width: int) -> None:
    outputs = [torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)) + seed for seed in range(4)]
    made = linear_cka(outputs)
    centre = torch.eye(tokens, dtype=torch.float64) - 1 / tokens

    def hsic(x: Tensor, y: Tensor) -> Tensor:
        x, y = x.double(), y.double()
        return torch.trace(x @ x.T @ centre @ y @ y.T @ centre)

    for i, x in enumerate(outputs):
        for j, y in enumerate(outputs):
            assert made[i, j].item() == pytest.approx((hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()).item())
    rotation = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    assert linear_cka([outputs[0], 3 * outputs[0].double() @ rotation + 5])[0, 1].item() == pytest.approx(1.0)
    assert linear_cka([outputs[0], torch.ones(tokens, width)]).tolist() == [[pytest.approx(1.0), 0.0], [0.0, 0.0]]


def test_layers_are_measured_on_the_models_own_hidden_states(tiny_llama: Path) -> None:
    blocks = blocks_of(24, 17, 24)
    made = measure_layers(Checkpoint.open(str(tiny_llama)), blocks, seed=0)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    layers: list[list[Tensor]] = [[] for _ in range(9)]
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: layers[8].append(args[0][0, 1:]))
    with torch.no_grad():
        for block in blocks:
            for number, states in enumerate(model(block[None], output_hidden_states=True).hidden_states[:8]):
                layers[number].append(states[0, 1:])
    handle.remove()
    streams = [torch.cat(parts) for parts in layers]
    for layer in range(8):
        x, y = streams[layer], streams[layer + 1]
        expected = 1 - sum(float(a @ b / (a.norm() * b.norm())) for a, b in zip(x, y, strict=True)) / len(x)
        assert made.importance[layer] == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(made.similarity, linear_cka(streams[1:]), rtol=1e-4, atol=1e-6)


def test_few_tokens_of_many_are_looked_at_the_same_ones_every_time(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, blocks = Checkpoint.open(str(tiny_llama)), blocks_of(*[30] * 10)
    whole = measure_layers(source, blocks, seed=0)
    monkeypatch.setattr("fedsoda_hub.algorithms.pruning.representatives.SAMPLED_TOKENS", 60)
    some, again, others = (measure_layers(source, blocks, seed=seed) for seed in (0, 0, 1))
    assert some.importance == again.importance
    assert torch.equal(some.similarity, again.similarity)
    assert some.importance != others.importance
    assert some.importance == pytest.approx(whole.importance, rel=0.2)


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
def test_what_components_add_sums_up_to_the_layer(tmp_path: Path, family: str) -> None:
    source = Checkpoint.open(str(make_tiny(tmp_path / family, family)))
    layer = build(source, range(8), embedding=True)
    added: dict[Any, Tensor] = {}
    streams: list[tuple[Tensor, Tensor]] = []

    def keep(module: Any, _: Any, out: Any) -> None:
        added[module] = out[0] if isinstance(out, tuple) else out

    def both(_: Any, args: Any, kwargs: Any, out: Any) -> None:
        streams.append((args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out))

    for number in range(8):
        layer.layer(number).register_forward_hook(both, with_kwargs=True)
        for end in branch_ends(layer.layer(number)):
            end.register_forward_hook(keep)
    with torch.no_grad():
        layer.hidden(ids=torch.stack(blocks_of(20)))
    for number, (before, after) in enumerate(streams):
        attention, mlp = (added[end] for end in branch_ends(layer.layer(number)))
        torch.testing.assert_close(before + attention + mlp, after)


def test_components_are_measured_where_they_join_the_stream(tiny_llama: Path) -> None:
    source, blocks = Checkpoint.open(str(tiny_llama)), blocks_of(24, 17, 24)
    attention, mlp = measure_components(source, blocks, seed=0)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    found: dict[tuple[int, str], list[Tensor]] = {}

    def note(number: int, name: str, states: Tensor) -> None:
        found.setdefault((number, name), []).append(states[0, 1:])

    for number, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_pre_hook(lambda _, args, n=number: note(n, "below", args[0]))
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args, n=number: note(n, "between", args[0]))
        layer.register_forward_hook(lambda _, __, out, n=number: note(n, "above", out))
    with torch.no_grad():
        for block in blocks:
            model(block[None])
    at = {key: torch.cat(parts).double() for key, parts in found.items()}
    for kind, begin, end in ((attention, "below", "between"), (mlp, "between", "above")):
        added = [at[number, end] - at[number, begin] for number in range(8)]
        torch.testing.assert_close(kind.similarity, linear_cka(added), rtol=1e-3, atol=1e-5)
        for number in range(8):
            x, y = at[number, begin], at[number, end]
            expected = 1 - ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean().item()
            assert kind.importance[number] == pytest.approx(expected, rel=1e-4)


# -- grouping -------------------------------------------------------------------------------------------


def value(groups: Groups, similarity: Tensor) -> float:
    pairs = [sum(2 * float(similarity[a, b]) for a, b in combinations(group, 2)) / len(group) ** 2 for group in groups]
    return sum(pairs)


@given(layers=st.integers(1, 9), seed=st.integers(0, 10_000), data=st.data())
def test_contiguous_groups_are_the_best_of_all_cuts(layers: int, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, layers))
    similarity = random_similarity(layers, seed)
    groups = contiguous(similarity, count)
    assert [layer for group in groups for layer in group] == list(range(layers))
    every = [
        [tuple(range(a, b)) for a, b in zip((0, *cuts), (*cuts, layers), strict=True)]
        for cuts in combinations(range(1, layers), count - 1)
    ]
    assert len(groups) == count
    assert value(groups, similarity) == pytest.approx(max(value(one, similarity) for one in every), abs=1e-9)


def test_equal_layers_are_divided_evenly_and_ties_leave_the_last_group_larger() -> None:
    assert contiguous(torch.full((8, 8), 0.5), 2) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert contiguous(torch.full((5, 5), 0.5), 2) == [(0, 1), (2, 3, 4)]
    assert contiguous(torch.eye(4), 2) == [(0,), (1, 2, 3)]


def test_spectral_groups_find_alike_layers_wherever_they_lie() -> None:
    planted = [(0, 3, 5, 9), (1, 2, 8), (4, 6, 7, 10, 11)]
    similarity = 0.1 * random_similarity(12, 3)
    for group in planted:
        for a in group:
            for b in group:
                similarity[a, b] = similarity[b, a] = 0.8 + 0.1 * similarity[a, b]
    for seed in range(5):
        assert spectral(similarity, 3, seed=seed) == planted
    assert spectral(similarity, 12, seed=0) == [(layer,) for layer in range(12)]


@pytest.mark.parametrize("similarity", [torch.ones(9, 9), torch.eye(9), random_similarity(9, 4)])
@pytest.mark.parametrize("count", [1, 4, 8, 9])
def test_spectral_groups_are_never_empty(similarity: Tensor, count: int) -> None:
    groups = spectral(similarity, count, seed=0)
    assert len(groups) == count
    assert all(groups)
    assert sorted(layer for group in groups for layer in group) == list(range(9))
    assert groups == spectral(similarity, count, seed=0)


@pytest.mark.parametrize("partition", [contiguous, partial(spectral, seed=0)])
def test_more_groups_than_layers_are_refused(partition: Any) -> None:
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"{count} groups of 4 layers are wanted; there can be 1 to 4"):
            partition(torch.eye(4), count)


# -- choosing -------------------------------------------------------------------------------------------


IMPORTANCE = (0.1, 0.4, 0.3, 0.9, 0.2, 0.2, 0.7, 0.0)
ALIKE = Measured(torch.full((8, 8), 0.5), IMPORTANCE)  # groups (0, 1), (2, 3), (4, 5), (6, 7) where there are four


def test_the_most_important_layer_of_each_group_is_kept() -> None:
    assert select_layers(ALIKE, 4) == (1, 3, 4, 6)
    assert select_layers(ALIKE, 8) == tuple(range(8))
    assert select_layers(ALIKE, 5, keep_ends=True) == (0, 1, 3, 6, 7)  # groups (1, 2), (3, 4), (5, 6) between them
    assert select_layers(ALIKE, 2, keep_ends=True) == (0, 7)
    with pytest.raises(ValueError, match="-1 groups of 6 layers"):
        select_layers(ALIKE, 1, keep_ends=True)


def shares(importance: Sequence[float], draws: int = 600) -> list[float]:
    """Draw one group of all these layers many times; how often each layer is chosen."""
    measured, generator = Measured(torch.ones(len(importance), len(importance)), tuple(importance)), seeded(0)
    drawn = [select_layers(measured, 1, generator=generator) for _ in range(draws)]
    return [drawn.count((layer,)) / draws for layer in range(len(importance))]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def softmax_over_the_mean(importance: Sequence[float]) -> list[float]:
    mean = sum(importance) / len(importance)
    powers = [math.exp(one / mean / 0.5) for one in importance]
    return [power / sum(powers) for power in powers]


def test_layers_are_drawn_by_the_softmax_of_their_importance_over_the_groups_mean() -> None:
    generator = seeded(0)
    drawn = [select_layers(ALIKE, 4, generator=generator) for _ in range(600)]
    assert all(len({layer // 2 for layer in kept}) == 4 for kept in drawn)
    for layer in range(8):
        even = layer - layer % 2
        expected = softmax_over_the_mean(IMPORTANCE[even : even + 2])[layer % 2]
        assert sum(layer in kept for kept in drawn) / 600 == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("others", [1, 2, 5])
@pytest.mark.parametrize("unit", [0.003, 1.0])  # Block Influences of a real LLM are small
def test_a_layer_of_twice_the_importance_is_drawn_clearly_more_often(unit: float, others: int) -> None:
    importance = [2 * unit, *[unit] * others]
    exact = softmax_over_the_mean(importance)
    assert exact[0] > 3.5 * exact[1]
    assert shares(importance) == pytest.approx(exact, abs=0.06)


@pytest.mark.parametrize(
    "importance", [[0.01] * 4, [0.0] * 4, [-1e-17, 0.0, 0.0, -2e-17]], ids=["equal", "none", "noise"]
)
def test_layers_of_equal_importance_are_drawn_equally_often(importance: list[float]) -> None:
    assert shares(importance) == pytest.approx([0.25] * 4, abs=0.06)


def test_a_layer_that_differs_hardly_is_drawn_hardly_more_often() -> None:
    """What standardising by the spread would not give: of two layers it makes 98 to 2, whatever lies between them."""
    assert shares([0.0101, 0.01]) == pytest.approx([0.505, 0.495], abs=0.06)


def test_a_group_of_one_layer_keeps_it() -> None:
    assert shares([0.02], draws=5) == shares([0.0], draws=5) == [1.0]


def test_the_draw_does_not_depend_on_the_scale_of_importance_and_does_on_its_zero() -> None:
    group = [0.003, 0.02, 0.006, 0.01]
    assert shares([16 * one for one in group]) == shares(group)
    assert shares([1 + one for one in group]) == pytest.approx(
        [0.25] * 4, abs=0.06
    )  # all of them do much: as good as equal


@pytest.mark.parametrize("budget", [11, 13, 19, 21, 30, 40])
def test_components_have_the_greatest_importance_that_fits(budget: int) -> None:
    kinds = [Measured(random_similarity(6, seed), tuple(random_similarity(6, seed)[0].tolist())) for seed in (1, 2)]
    sizes = [1] * 6, [4, 3, 6, 2, 4, 4]
    made = select_components(kinds[0], kinds[1], *sizes, budget)
    found = []
    for a in range(2, 7):
        for m in range(2, 7):
            kept = [select_layers(kind, count, keep_ends=True) for kind, count in zip(kinds, (a, m), strict=True)]
            if sum(size[n] for size, some in zip(sizes, kept, strict=True) for n in some) <= budget:
                worth = sum(kind.importance[n] for kind, some in zip(kinds, kept, strict=True) for n in some)
                found.append((worth, Components(*kept)))
    assert made == max(found, key=lambda one: one[0])[1]
    assert {0, 5} <= {*made.attention} & {*made.mlp}


def test_components_of_no_importance_are_not_paid_for() -> None:
    idle = Measured(torch.full((8, 8), 0.5), (0.5, *[0.0] * 7))
    assert select_components(ALIKE, idle, [1] * 8, [4] * 8, 1000) == Components((0, 1, 2, 3, 4, 5, 6, 7), (0, 7))
    with pytest.raises(
        UsageProblem,
        match=r"the first and the last layer, which are always kept, take 10.0 MB, .* leaves room for 9.0 MB; lower drop_layers",
    ):
        select_components(ALIKE, idle, [10**6] * 8, [4 * 10**6] * 8, 9 * 10**6)
