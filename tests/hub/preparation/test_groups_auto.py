"""`groups = "auto"`: how many layers go is a matter of bytes, in which groups one of how near the sub-LLM stays."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.algorithms.methods import fedsoda
from fedsoda_hub.federation.jobs import JobProgress, Probe, ShapeHealed, ShapeMeasured
from fedsoda_hub.preparation.measured import KL_TIE
from fedsoda_hub.preparation.prepare import RunPreparation
from fedsoda_hub.preparation.realign import PreparedRun
from fedsoda_hub.preparation.shapes import healed_errors
from fedsoda_hub.settings.run import RunSettings
from fedsoda_hub.settings.tables import Method
from tests.hub.preparation.test_shapes import healing_run
from tests.hub.runs import make_run, prepare

AUTO = Method(groups="auto", bundle_bytes=1)


class FullLLM:
    """18 layers, 15 below the adapter; `nearest` takes the last and remembers what it was given."""

    num_layers = 18

    def __init__(self, fits: Callable[[LayerPlan], bool]) -> None:
        rng = random.Random(0)
        self.measured = [[rng.random() for _ in range(14 - layer)] for layer in range(15)]
        self.fits = fits
        self.given: list[LayerPlan] = []

    def distances(self, num_layers: int) -> list[list[float]]:
        assert num_layers == 15
        return self.measured

    def healed_distances(self, num_layers: int, size: int) -> list[list[float]]:
        return [row[:size] for row in self.distances(num_layers)]

    def representatives(self, count: int, grouping: str, drawn_by: int | None = None) -> Sequence[int]:
        raise NotImplementedError

    def components(self, count: int, grouping: str) -> tuple[Sequence[int], Sequence[int]]:
        raise NotImplementedError

    def nearest(self, plans: Sequence[LayerPlan]) -> LayerPlan:
        self.given = list(plans)
        return plans[-1]


def least_cost(distances: list[list[float]], n: int, p: int) -> float:
    """Of p groups of n below layer 15, by trying all."""
    starts = range(15 - n)
    return min(
        sum(distances[t][n - 1] for t in chosen)
        for chosen in combinations(starts, p)
        if all(b - a > n for a, b in pairwise(chosen))
    )


def test_of_each_group_size_the_fewest_groups_that_fit_and_the_five_that_change_least() -> None:
    model = FullLLM(lambda plan: len(plan.kept) <= 12)  # six layers must go
    [chosen] = fedsoda.plans(model, AUTO, seed=0)
    shapes = [(1, 6), (2, 3), (3, 2), (4, 2), (5, 2), (6, 1), *((n, 1) for n in range(7, 15))]
    wanted = sorted(least_cost(model.measured, n, p) for n, p in shapes)[:5]
    assert [sum(group.distance for group in plan.groups) for plan in model.given] == pytest.approx(wanted)
    assert chosen == model.given[-1]


def test_a_model_that_fits_whole_loses_nothing() -> None:
    model = FullLLM(lambda _: True)
    [whole] = fedsoda.plans(model, AUTO, seed=0)
    assert whole.kept == tuple(range(18))
    assert not model.given


def test_a_budget_that_no_sub_llm_meets_is_refused_before_anything_is_measured() -> None:
    model = FullLLM(lambda _: False)
    model.distances = None  # type: ignore[method-assign, assignment]
    with pytest.raises(
        UsageProblem, match=r"no sub-LLM of this model is within \[method\] bundle_bytes.*raise bundle_bytes"
    ):
        fedsoda.plans(model, AUTO, seed=0)


BUDGET = 263_000  # of the tiny model, which takes 294 kB whole: three groups of one layer must go, or one of more
NONE = {"border_map": None, "steps": None, "realign_steps": None}
TABLES: dict[str, Any] = {"align": {"steps": 0, "border_map": "none"}}


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[RunSettings, list[ShapeMeasured]]:
    """A prepared run and what it said of each shape that it tried."""
    auto = {"groups": "auto", "bundle_bytes": BUDGET, "layers_per_group": None}
    settings = make_run(tmp_path_factory.mktemp("auto"), tiny_llama, **TABLES, method=auto)
    said: list[JobProgress] = []
    RunPreparation(settings).run(said.append)
    return settings, [one for one in said if isinstance(one, ShapeMeasured)]


def bundle_bytes(settings: RunSettings) -> int:
    return sum(file.bytes for file in Bundle.open(settings.run_dir / "bundle").manifest.files)


def test_the_bundle_is_within_the_bytes_and_with_one_group_less_it_would_not_be(
    tmp_path: Path, chosen: tuple[RunSettings, list[ShapeMeasured]], tiny_llama: Path
) -> None:
    settings, _ = chosen
    groups = Bundle.open(settings.run_dir / "bundle").plan.groups
    assert bundle_bytes(settings) <= BUDGET
    larger = {"layers_per_group": len(groups[0].removed), "groups": len(groups) - 1}
    other = make_run(tmp_path, tiny_llama, **TABLES, method=larger)
    prepare(other)
    assert bundle_bytes(other) > BUDGET


def test_the_nearest_of_the_shapes_is_taken(chosen: tuple[RunSettings, list[ShapeMeasured]]) -> None:
    settings, tried = chosen
    assert len(tried) > 1
    least = min(one.kl for one in tried)
    best = max((one for one in tried if one.kl <= KL_TIE * least), key=lambda one: one.cosine)
    groups = Bundle.open(settings.run_dir / "bundle").plan.groups
    assert (len(groups[0].removed), len(groups)) == (best.layers_per_group, best.groups)
    assert len({one.kl for one in tried}) == len(tried)
    assert all(-1 < one.cosine < 1 for one in tried)


def test_a_shape_that_is_not_healed_is_measured_as_a_run_of_it_is(
    tmp_path: Path, chosen: tuple[RunSettings, list[ShapeMeasured]], tiny_llama: Path
) -> None:
    _, tried = chosen
    one = tried[-1]
    unquantized = {"adapter_base": "bf16", "emulator_base": "bf16"}
    shape = {"layers_per_group": one.layers_per_group, "groups": one.groups}
    settings = make_run(tmp_path, tiny_llama, **TABLES, method={**shape, **unquantized})
    preparation = RunPreparation(settings)
    prepared = preparation.run()
    [sub_llm] = prepared.sub_llms
    assert sub_llm.public_kl["pruned"] == pytest.approx(one.kl, rel=1e-4)
    job = Probe(master=prepared.master, emulator_view=sub_llm.emulator_view)
    probed = PreparedRun(preparation.llm).probe(job)
    assert (probed.kl, probed.cosine) == pytest.approx((one.kl, one.cosine), rel=1e-4)


def test_a_run_that_heals_takes_the_shape_that_healing_leaves_least_error_of(tmp_path: Path, tiny_llama: Path) -> None:
    auto = {"groups": "auto", "bundle_bytes": BUDGET, "layers_per_group": None}
    settings = healing_run(tmp_path, tiny_llama, method=auto)
    said: list[JobProgress] = []
    preparation = RunPreparation(settings)
    preparation.run(said.append)
    tried = [one for one in said if isinstance(one, ShapeHealed)]
    assert len(tried) > 1
    assert not [one for one in said if isinstance(one, ShapeMeasured)]
    plan = Bundle.open(settings.run_dir / "bundle").plan
    best = min(tried, key=lambda one: one.error)
    assert (len(plan.groups[0].removed), len(plan.groups)) == (best.layers_per_group, best.groups)
    assert healed_errors(preparation.llm, [plan]) == pytest.approx([best.error], rel=1e-6)
    assert bundle_bytes(settings) <= BUDGET


def test_no_more_teacher_targets_stay_on_disk_than_an_alignment_reads(
    chosen: tuple[RunSettings, list[ShapeMeasured]],
) -> None:
    settings, _ = chosen
    plan = Bundle.open(settings.run_dir / "bundle").plan
    held = {int(path.stem.split(".")[1]) for path in (settings.run_dir / "prepare").glob("teacher.*.safetensors")}
    assert held == {plan.emulator[-1], *(group.removed[-1] for group in plan.groups)}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"groups": "auto"}, r'groups = "auto" in RUN.toml without bundle_bytes: .* write the bytes'),
        ({"groups": "auto", "bundle_bytes": 10, "classes": [2]}, r'\[method\] classes = \[2\] beside groups = "auto"'),
        (
            {"groups": "auto", "bundle_bytes": 10, "layers_per_group": 2},
            r"layers_per_group = 2 beside .*delete layers_per_group",
        ),
        ({"groups": 2, "bundle_bytes": 10}, r'bundle_bytes = 10 beside groups = 2 .* write groups = "auto"'),
        ({"groups": "many", "bundle_bytes": 10}, r'groups = .many. .* at least 0, or "auto"'),
        ({"name": "fedot", "bundle_bytes": 10, "groups": None}, r"fedot does not read it"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    tmp_path: Path, tiny_llama: Path, method: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageProblem, match=message):
        make_run(tmp_path, tiny_llama, align=NONE, method={"layers_per_group": None, **method})
