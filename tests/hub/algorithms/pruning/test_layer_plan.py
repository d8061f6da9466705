"""Groups are chosen exactly, ties are settled, and what cannot fit is refused with what would."""

from __future__ import annotations

import itertools
import random

import msgspec
import pytest

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.manifest import LayerPlan, check_plan
from fedsoda_hub.algorithms.pruning.layer_plan import choose_groups, drop_layers, make_plan


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
    with pytest.raises(UsageProblem, match=r"need 16 layers below the adapter, the model has 13 .*\(3, 3\)"):
        choose_groups([[0.0] * 13] * 13, 16, 3, n=3, p=4)


def test_a_plan_says_every_layer_by_its_full_number() -> None:
    distances = [[1.0] * (21 - layer) for layer in range(21)]
    for start in (4, 9, 13, 17):
        distances[start][2] = 0.1
    plan = make_plan(24, 3, choose_groups(distances, 24, 3, 3, 4), distances)
    assert plan.retained == (4, 9, 13, 17)
    assert plan.kept == (0, 1, 2, 3, 4, 8, 9, 13, 17, 21, 22, 23)
    assert plan.mapping == ((4, 4), (9, 6), (13, 7), (17, 8))
    assert plan.sub_emulator == (0, 1, 2, 3, 4, 8, 9, 13, 17)


def test_the_border_lies_below_the_first_layer_that_trains() -> None:
    plan = drop_layers(8, (1, 6, 7), (0, 2, 4))
    assert plan.kept == (0, 1, 2, 4, 6, 7)
    assert [(group.start, group.removed) for group in plan.groups] == [(2, (3,)), (4, (5,))]
    assert plan.mapping == ((2, 2), (4, 3))
    assert (plan.emulator, plan.sub_emulator) == ((0, 2, 3, 4, 5), (0, 2, 4))
    assert (plan.border, plan.swept, plan.resident) == (1, (0,), (1, 2, 4, 6, 7))
    around = drop_layers(8, (3, 6, 7), (0, 2, 5))  # what goes lies on both sides of a layer that trains
    assert [(group.start, group.removed) for group in around.groups] == [(0, (1,)), (3, (4,))]
    assert (around.swept, around.resident) == ((0, 2), (3, 5, 6, 7))


def test_all_that_is_kept_may_train() -> None:
    plan = drop_layers(8, (0, 3, 4), ())
    assert plan.kept == plan.adapter == plan.resident == (0, 3, 4)
    assert [(group.start, group.removed) for group in plan.groups] == [(0, (1, 2)), (4, (5, 6, 7))]
    assert (plan.emulator, plan.sub_emulator, plan.swept) == ((1, 2, 5, 6, 7), (), ())
    with pytest.raises(UsageProblem, match="breaks a rule"):
        check_plan(msgspec.structs.replace(plan, adapter=(0, 1, 3, 4)))  # layer 1 is removed


@pytest.mark.parametrize(
    "change",
    [
        {"kept": (0, 1, 2, 6, 7)},
        {"adapter": (5, 6)},
        {"mapping": ((2, 3),)},
        {"num_layers": 9},
        {"adapter": ()},
        {"adapter": (7, 6)},
        {"adapter": (6, 8)},
        {"adapter": (6, 6, 7)},
    ],
)
def test_a_plan_from_the_network_is_checked(change: dict[str, object]) -> None:
    distances = [[0.5] * 6 for _ in range(6)]
    good = make_plan(8, 2, choose_groups(distances, 8, 2, 2, 1), distances)
    fields = {name: getattr(good, name) for name in LayerPlan.__struct_fields__} | change
    with pytest.raises(UsageProblem, match="breaks a rule"):
        check_plan(LayerPlan(**fields))
