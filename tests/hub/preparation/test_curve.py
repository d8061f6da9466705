"""The curve of quality against bytes: for each size the groups that cost least, the very bytes of a run of it, one advice."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.plan import measured_report
from fedsoda_hub.preparation import curve
from fedsoda_hub.preparation.full_llm import StreamedLLM
from fedsoda_hub.preparation.shapes import healed_errors
from fedsoda_hub.run.directory import RunDirectory
from tests.hub.preparation.test_shapes import healing_run
from tests.hub.runs import prepare


class FullLLM:
    """A model of so many layers, with distances by chance; asked for them once."""

    def __init__(self, num_layers: int, adapter: int) -> None:
        chance = random.Random(num_layers)
        self.num_layers = num_layers
        self.emulator = num_layers - adapter
        self.measured = [[chance.random() ** 3 for _ in range(self.emulator - 1 - t)] for t in range(self.emulator)]
        self.asked = 0

    def healed_distances(self, num_layers: int, size: int) -> list[list[float]]:
        assert num_layers == self.emulator
        self.asked += 1
        return [row[:size] for row in self.measured]

    def distances(self, num_layers: int) -> list[list[float]]:
        raise NotImplementedError

    def representatives(self, count: int, grouping: str, drawn_by: int | None = None) -> Sequence[int]:
        raise NotImplementedError

    def components(self, count: int, grouping: str) -> tuple[Sequence[int], Sequence[int]]:
        raise NotImplementedError

    def nearest(self, plans: Sequence[LayerPlan]) -> LayerPlan:
        raise NotImplementedError

    def fits(self, plan: LayerPlan) -> bool:
        raise NotImplementedError


def least(model: FullLLM, removed: int) -> float:
    """The least cost of removing so many layers in groups of one size, up to 4, by trying all."""
    found = [
        sum(model.measured[t][n - 1] for t in chosen)
        for n in range(1, 5)
        if removed % n == 0
        for chosen in combinations(range(model.emulator - n), removed // n)
        if all(b - a > n for a, b in pairwise(chosen))
    ]
    return min(found)


@pytest.mark.parametrize(
    ("layers", "adapter", "counts"), [(16, 3, [0, 2, 3, 5, 6, 8]), (8, 2, [0, 1, 2, 3, 4]), (3, 1, [0, 1])]
)
def test_sizes_are_spread_up_to_half_of_the_layers_and_each_has_the_groups_that_cost_least(
    layers: int, adapter: int, counts: list[int]
) -> None:
    model = FullLLM(layers, adapter)
    plans = curve.sizes(model, adapter)
    assert [layers - len(plan.kept) for plan in plans] == counts
    assert [curve.cost(plan) for plan in plans] == pytest.approx(
        [least(model, count) if count else 0 for count in counts]
    )
    assert model.asked == 1
    for plan in plans:
        assert len({len(group.removed) for group in plan.groups}) <= 1  # as [method] can say it


def test_a_model_that_has_nothing_to_remove_has_one_size() -> None:
    [whole] = curve.sizes(FullLLM(3, 2), 2)
    assert whole.kept == (0, 1, 2)


@pytest.mark.parametrize(
    ("errors", "budget", "best"),
    [
        ((0.02, 0.05, 0.09, 0.11), 0, 2),  # the smallest that is good
        ((0.02, 0.12, 0.09, 0.11), 0, 2),  # whatever a larger one has
        ((0.02, 0.05, 0.10, 0.11), 0, 2),  # at the bound
        ((0.12, 0.15, 0.19, 0.21), 0, 0),  # none is: the best there is
        ((0.02, 0.05, 0.09, 0.11), 25, 3),  # the only ones that fit are not good
        ((0.02, 0.05, 0.21, 0.20), 35, 3),
        ((0.02, 0.05, 0.09, 0.11), 45, 2),
        ((0.02, 0.05, 0.09, 0.11), 15, None),
    ],
)  # of 50, 40, 30 and 20 bytes
def test_the_smallest_that_is_good_is_recommended(errors: tuple[float, ...], budget: int, best: int | None) -> None:
    assert curve.recommended(errors, (50, 40, 30, 20), budget) == best


def test_a_point_has_the_bytes_of_a_run_of_it_and_its_error(tmp_path: Path, tiny_llama: Path) -> None:
    llm = StreamedLLM(healing_run(tmp_path / "measured", tiny_llama))
    points = curve.measure_curve(llm)
    assert [point.removed_layers for point in points] == [0, 1, 2, 3, 4]
    assert [point.bundle_bytes for point in points] == sorted({point.bundle_bytes for point in points}, reverse=True)
    point = points[3]
    shape = {"layers_per_group": point.layers_per_group, "groups": point.groups}
    settings = healing_run(tmp_path / "run", tiny_llama, method=shape)
    prepare(settings)
    bundle = Bundle.open(RunDirectory(settings.run_dir).bundle)
    assert point.bundle_bytes == sum(file.bytes for file in bundle.manifest.files)
    assert healed_errors(llm, [bundle.plan]) == [point.error]
    assert sum(point.is_recommended for point in points) == 1


def test_a_run_whose_groups_are_chosen_by_size_is_planned_with_the_point_within_its_bytes(
    tmp_path: Path, tiny_llama: Path
) -> None:
    auto = {"groups": "auto", "bundle_bytes": 263_000, "layers_per_group": None}
    report = measured_report(StreamedLLM(healing_run(tmp_path, tiny_llama, method=auto)))
    assert report.curve is not None
    [best] = [point for point in report.curve if point.is_recommended]
    assert best.bundle_bytes == report.ours.bundle_bytes <= 263_000
    assert min(point.error for point in report.curve if point.bundle_bytes <= 263_000) == best.error
