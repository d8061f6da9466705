"""Distances are those of Transformers' own hidden states, from one streamed pass; groups are chosen exactly, ties are
settled, and what cannot fit is refused with what would."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.model.streaming import stream
from fedsoda_hub.algorithms.pruning.sgp import angular_distances, choose_groups, measure
from fedsoda_hub.preparation.public_text import read_blocks


def test_distances_are_those_of_the_models_own_hidden_states(tiny_llama: Path) -> None:
    blocks = list(torch.randint(3, 260, (6, 24), generator=torch.Generator().manual_seed(1)))
    ours = measure(Checkpoint.open(str(tiny_llama)), blocks, 6)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        states = model(torch.stack(blocks), output_hidden_states=True).hidden_states
    for lower in range(6):
        for upper in range(lower + 1, 6):
            # x^(l) is the output of layer l = hidden_states[l + 1]: docs/methods.md (m1-numbers).
            x, y = states[lower + 1][:, -1].double(), states[upper + 1][:, -1].double()
            expected = (torch.nn.functional.cosine_similarity(x, y).arccos() / torch.pi).mean().item()
            assert ours[lower][upper - lower - 1] == pytest.approx(expected, abs=2e-3)
    assert [len(row) for row in ours] == [5, 4, 3, 2, 1, 0]


def test_equal_states_are_at_distance_0_and_opposite_ones_at_1() -> None:
    x = torch.randn(5, 8)
    assert angular_distances(torch.stack([x, x, -x])) == [
        [pytest.approx(0.0, abs=1e-6), pytest.approx(1.0, abs=1e-6)],
        [pytest.approx(1.0, abs=1e-6)],
        [],
    ]


def test_streaming_gives_the_models_hidden_states_for_samples_of_any_length(tiny_llama: Path) -> None:
    source = Checkpoint.open(str(tiny_llama))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    samples = [torch.randint(3, 260, (size,), generator=generator) for size in (5, 17, 9, 1, 17)]
    streamed = stream(source, range(6), samples, batch_tokens=40)
    resumed = stream(source, range(3, 6), samples, start=stream(source, range(3), samples))
    for sample, ours, again in zip(samples, streamed, resumed, strict=True):
        with torch.no_grad():
            expected = model(sample[None], output_hidden_states=True).hidden_states[6][0]
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)


def test_public_text_is_cut_into_blocks_that_begin_with_bos(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "public.txt"
    text.write_text("abcdefg " * 20)
    used, held_out = read_blocks(text, tiny_llama / "tokenizer.json", 1, sequences=4, length=16)
    assert [len(block) for block in used + held_out] == [16] * (len(used) + len(held_out))
    assert all(int(block[0]) == 1 for block in used + held_out)
    assert len(used) == 4
    with pytest.raises(UsageProblem, match=r"sequences = 400 of length = 16 and one held-out block need 6015"):
        read_blocks(text, tiny_llama / "tokenizer.json", 1, sequences=400, length=16)


# --- the choice --------------------------------------------------------------------------------------------


def brute_force(distances: list[list[float]], emulator: int, n: int, p: int) -> tuple[float, tuple[int, ...]]:
    """Every set of starts; on ties the one that is larger, compared from the first start on."""
    best: tuple[float, tuple[int, ...]] = (float("inf"), ())
    for starts in itertools.combinations(range(emulator - n), p):
        if any(b - a < n + 1 for a, b in itertools.pairwise(starts)):
            continue
        cost = 0.0
        for start in reversed(starts):
            cost = distances[start][n - 1] + cost
        if cost < best[0] or (cost == best[0] and starts > best[1]):
            best = (cost, starts)
    return best


@pytest.mark.parametrize("integers", [False, True], ids=["random", "with ties"])
def test_the_choice_is_the_best_of_all_sets(integers: bool) -> None:
    chance = random.Random(0)
    cases = 0
    while cases < 300:
        emulator, n, p = chance.randint(3, 13), chance.randint(1, 4), chance.randint(1, 4)
        if p * (n + 1) > emulator:
            continue
        distances = [
            [float(chance.randint(0, 2)) if integers else chance.random() for _ in range(emulator - 1 - layer)]
            for layer in range(emulator)
        ]
        groups = choose_groups(distances, emulator + 2, 2, n, p)
        _, starts = brute_force(distances, emulator, n, p)
        assert tuple(group.start for group in groups) == starts
        assert all(
            group.removed == tuple(range(g, g + n)) for group, g in zip(groups, (s + 1 for s in starts), strict=True)
        )
        cases += 1


def test_groups_beside_others_are_the_best_of_those_around_them() -> None:
    chance, refused = random.Random(1), 0
    for _ in range(200):
        emulator, n, first, more = (
            chance.randint(4, 13),
            chance.randint(1, 3),
            chance.randint(1, 2),
            chance.randint(1, 3),
        )
        if first * (n + 1) > emulator or more * (n + 1) > emulator:
            continue
        distances = [[chance.random() for _ in range(emulator - 1 - layer)] for layer in range(emulator)]
        beside = choose_groups(distances, emulator + 2, 2, n, first)
        taken = {layer for group in beside for layer in range(group.start, group.start + n + 1)}
        free = [start for start in range(emulator - n) if not taken & {*range(start, start + n + 1)}]
        sets = [
            starts
            for starts in itertools.combinations(free, more)
            if all(b - a > n for a, b in itertools.pairwise(starts))
        ]
        if not sets:
            refused += 1
            with pytest.raises(UsageProblem, match=r"do not fit beside those that start at .* \[method\] classes"):
                choose_groups(distances, emulator + 2, 2, n, more, beside)
            continue
        found = choose_groups(distances, emulator + 2, 2, n, more, beside)
        best = min(sets, key=lambda starts: sum(distances[start][n - 1] for start in starts))
        assert tuple(group.start for group in found) == best
    assert refused > 10


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(UsageProblem, match=r"need 16 layers below the adapter, but the model has 13 .*\(3, 3\)"):
        choose_groups([[0.0] * 13] * 13, 16, 3, n=3, p=4)
