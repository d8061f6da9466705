"""Plans say what stays, what goes and where the border lies; one that breaks a rule is refused."""

from __future__ import annotations

import msgspec
import pytest

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.manifest import LayerPlan, check_plan
from fedsoda_hub.algorithms.pruning.layer_plan import drop_layers, make_plan
from fedsoda_hub.algorithms.pruning.sgp import choose_groups


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
    with pytest.raises(UsageProblem, match="breaks the rule"):
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
    with pytest.raises(UsageProblem, match="breaks the rule"):
        check_plan(LayerPlan(**fields))
