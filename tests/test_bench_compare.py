"""Every set of `scripts/bench_compare` is a comparison that `fedsoda-hub compare` accepts, on rows of the real shape.

The rows in `tests/data` are twenty a task, written for these tests; the script itself reads whole data sets.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import bench_compare as bench
import pytest

from fedsoda_hub.compare.settings import read_comparison
from tests.conftest import ROOT

DATA = ROOT / "tests" / "data"


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def is_apart(*parts: list[dict[str, Any]]) -> bool:
    """No row is in two of these."""
    texts = [json.dumps(row) for part in parts for row in part]
    return len(set(texts)) == len(texts)


@pytest.mark.parametrize("is_quick", [False, True])
@pytest.mark.parametrize("task", ["sst2", "dolly", "boolq"])
def test_each_set_is_accepted(tmp_path: Path, task: str, is_quick: bool) -> None:
    for name, variants in bench.SETS.items():
        options = argparse.Namespace(
            task=task,
            set=name,
            quick=is_quick,
            seeds=[],
            splits=[],
            variants=[],
            shared=str(DATA.parent),
            planted_defect=False,
        )
        comparison = read_comparison(bench.write(tmp_path / task, options))
        assert tuple(comparison.settings) == variants
        assert len(comparison.compare.seeds) == (1 if is_quick else 3)


def test_sst2_is_dealt_without_the_rows_that_are_like_the_task(tmp_path: Path) -> None:
    [dealt], judged = bench.write_sst2(tmp_path, DATA, like_task=5)
    like = rows(tmp_path / bench.LIKE_TASK)
    assert [len(rows(tmp_path / dealt)), len(like), len(rows(Path(judged)))] == [15, 5, 20]
    assert all(row.keys() == {"sentence"} for row in like)
    assert not {row["sentence"] for row in like} & {row["sentence"] for row in rows(tmp_path / dealt)}
    assert (tmp_path / "like_task.txt").read_text().startswith(f"Review: {like[0]['sentence']}\n")


def test_no_row_of_boolq_is_both_dealt_and_judged_and_long_passages_are_left_out(tmp_path: Path) -> None:
    [dealt], judged = bench.write_boolq(tmp_path, DATA, judged=6, like_task=4)
    kinds = [rows(tmp_path / name) for name in (dealt, judged, bench.LIKE_TASK)]
    assert [len(kind) for kind in kinds] == [10, 6, 4]
    assert is_apart(*kinds[:2])
    assert all(len(row["passage"]) <= bench.BOOLQ_LENGTH for kind in kinds for row in kind)
    assert all("answer" not in row for row in kinds[2])


def test_users_of_dolly_hold_few_categories_and_no_judged_row(tmp_path: Path) -> None:
    files, judged = bench.write_dolly(tmp_path, DATA, judged=6, like_task=4)
    held, asked = [rows(tmp_path / file) for file in files], rows(tmp_path / judged)
    assert len(held) == bench.DOLLY_USERS
    assert (sum(map(len, held)), len(asked)) == (10, 6)
    assert is_apart(*held, asked)
    assert all(len({row["category"] for row in user}) <= 2 for user in held)
