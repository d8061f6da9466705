"""Every set of `scripts/bench_compare` is a comparison that `fedsoda-hub compare` accepts, on rows of the real shape.

The rows in `tests/data` are twenty a task, written for these tests; the script itself reads whole data sets.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_compare as bench
import bench_tasks as tasks
import bench_variants as of
import pytest

from fedsoda_hub.compare.settings import Comparison, read_comparison
from fedsoda_hub.settings.run import settings_for_plan
from tests.conftest import ROOT

DATA = ROOT / "tests" / "data"
BENCHES = [(model, task) for model, setup in of.SETUPS.items() for task in setup.tasks]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def is_apart(*parts: list[dict[str, Any]]) -> bool:
    """No row is in two of these."""
    texts = [json.dumps(row) for part in parts for row in part]
    return len(set(texts)) == len(texts)


@pytest.fixture
def written(tmp_path: Path, ref24: Path, monkeypatch: pytest.MonkeyPatch) -> Written:
    """SmolLM2's settings, with the demo's model in its place: it is not fetched for tests."""
    monkeypatch.setitem(of.SETUPS, "smollm2", replace(of.SMOLLM2, model=ref24))
    return Written(tmp_path)


class Written:
    """What the script writes, as `compare` reads it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __call__(self, model: str, task: str, **given: Any) -> Comparison:
        options = {"set": "methods", "quick": False, "seeds": [], "splits": [], "variants": [], "planted_defect": False}
        options |= {"model": model, "task": task, "shared": str(DATA.parent), **given}
        return read_comparison(bench.write(self._directory / model / task, argparse.Namespace(**options)))


@pytest.mark.parametrize("is_quick", [False, True])
@pytest.mark.parametrize(("model", "task"), BENCHES)
def test_each_set_is_accepted(written: Written, model: str, task: str, is_quick: bool) -> None:
    for name, variants in of.SETS.items():
        comparison = written(model, task, set=name, quick=is_quick)
        assert tuple(comparison.settings) == variants
        seeds = {"ref24": 3, "smollm2": 5}[model]  # fewer than five hold no claim
        assert len(comparison.compare.seeds) == (1 if is_quick else seeds)


def test_smollm2_is_compared_on_the_splits_of_its_results(written: Written) -> None:
    splits = {task: written("smollm2", task).compare.splits for task in of.SMOLLM2.tasks}
    both = ["iid", "dirichlet-0.5"]
    assert splits == {"sst2": both, "dolly": ["files"], "boolq": both, "gsm8k": ["iid"]}


def test_twelve_layers_are_removed_where_a_method_prunes(written: Written) -> None:
    settings = written("smollm2", "sst2").settings
    soda = [settings[name].method for name in ("ours", "published")]
    assert {(one.groups, one.layers_per_group, one.adapter_layers) for one in soda} == {(4, 3, 3)}
    assert {settings[name].method.drop_layers for name in ("fedbiot", "fedot")} == {12}


def test_ours_is_what_a_user_has_who_sets_nothing(written: Written) -> None:
    settings = written("smollm2", "sst2").settings["ours"]
    plain = settings_for_plan(settings.model)
    assert (settings.method, settings.align, settings.lora) == (plain.method, plain.align, plain.lora)


def test_published_has_the_alignment_of_the_paper_whatever_the_defaults(written: Written) -> None:
    settings = written("smollm2", "sst2").settings["published"]
    align, method = settings.align, settings.method
    assert (align.border_map, align.steps, align.realign_steps, method.realign_every) == ("none", 200, 30, 5)


def test_a_planted_defect_is_a_learning_rate_of_zero_for_all(written: Written) -> None:
    settings = written("smollm2", "sst2", planted_defect=True).settings
    assert {one.local.learning_rate for one in settings.values()} == {0.0}


def test_seeds_splits_and_variants_that_are_named_are_taken(written: Written) -> None:
    comparison = written("smollm2", "sst2", seeds=[7], splits=["iid"], variants=["exact", "ours"])
    assert (comparison.compare.seeds, comparison.compare.splits) == ([7], ["iid"])
    assert list(comparison.settings) == ["exact", "ours"]


def test_a_task_that_a_model_has_no_settings_for_is_refused(written: Written) -> None:
    with pytest.raises(SystemExit, match="gsm8k is not measured with ref24"):
        written("ref24", "gsm8k")


def test_a_comparison_that_was_stopped_is_said_and_leaves_the_earlier_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = '{"status": "ok", "stopped": "SIGTERM"}\n'
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, stopped))
    monkeypatch.setattr(sys, "argv", ["bench_compare", "--shared", str(DATA.parent), "--out", str(tmp_path)])
    earlier = tmp_path / "ref24" / "sst2" / "methods.json"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("{}")
    bench.main()
    assert capsys.readouterr().out == stopped
    assert earlier.read_text() == "{}"


def test_sst2_is_dealt_without_the_rows_that_are_like_the_task(tmp_path: Path) -> None:
    found = tasks.write_sst2(tmp_path, DATA, of.PROMPTS["sst2"]["prompt"], tasks.Sizes(like_task=5))
    [dealt], like = found.data, rows(tmp_path / tasks.LIKE_TASK)
    assert [len(rows(tmp_path / dealt)), len(like), len(rows(Path(found.eval_data)))] == [15, 5, 20]
    assert all(row.keys() == {"sentence"} for row in like)
    assert not {row["sentence"] for row in like} & {row["sentence"] for row in rows(tmp_path / dealt)}
    assert (tmp_path / "like_task.txt").read_text().startswith(f"Review: {like[0]['sentence']}\n")


def test_no_row_of_boolq_is_both_dealt_and_judged_and_long_passages_are_left_out(tmp_path: Path) -> None:
    sizes = tasks.Sizes(judged=6, like_task=4, length=400)
    found = tasks.write_boolq(tmp_path, DATA, of.PROMPTS["boolq"]["prompt"], sizes)
    kinds = [rows(tmp_path / name) for name in (*found.data, found.eval_data, tasks.LIKE_TASK)]
    assert [len(kind) for kind in kinds] == [10, 6, 4]
    assert is_apart(*kinds[:2])
    assert all(len(row["passage"]) <= 400 for kind in kinds for row in kind)
    assert all("answer" not in row for row in kinds[2])


def test_users_of_dolly_hold_few_categories_and_no_judged_row(tmp_path: Path) -> None:
    sizes = tasks.Sizes(judged=6, like_task=4)
    found = tasks.write_dolly(tmp_path, DATA, of.PROMPTS["dolly"]["prompt"], sizes)
    held, asked = [rows(tmp_path / file) for file in found.data], rows(tmp_path / found.eval_data)
    assert len(held) == tasks.DOLLY_USERS
    assert (sum(map(len, held)), len(asked)) == (10, 6)
    assert is_apart(*held, asked)
    assert all(len({row["category"] for row in user}) <= 2 for user in held)


def test_gsm8k_is_judged_on_its_test_rows_and_long_rows_are_left_out(tmp_path: Path) -> None:
    sizes = tasks.Sizes(like_task=3, length=105)
    found = tasks.write_gsm8k(tmp_path, DATA, of.PROMPTS["gsm8k"]["prompt"], sizes)
    kinds = [rows(tmp_path / name) for name in (*found.data, found.eval_data, tasks.LIKE_TASK)]
    assert [len(kind) for kind in kinds] == [3, 5, 3]  # 6 of 15 rows are short enough
    assert is_apart(*kinds[:2])
    assert all(row.keys() == {"question"} for row in kinds[2])
