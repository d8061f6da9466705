"""Every set of `scripts/bench_compare` is a comparison that `fedsoda-hub compare` accepts, on the real rows."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from fedsoda_hub.compare.settings import read_comparison
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def bench() -> Any:
    sys.path.insert(0, str(ROOT / "scripts"))
    import bench_compare

    return bench_compare


@pytest.mark.parametrize("is_quick", [False, True])
@pytest.mark.parametrize("task", ["sst2", "dolly", "boolq"])
def test_each_set_is_accepted(bench: Any, tmp_path: Path, shared: Path, task: str, is_quick: bool) -> None:
    for name, variants in bench.SETS.items():
        options = argparse.Namespace(
            task=task,
            set=name,
            quick=is_quick,
            seeds=[],
            splits=[],
            variants=[],
            shared=str(shared),
            planted_defect=False,
        )
        comparison = read_comparison(bench.write(tmp_path / task, options))
        assert tuple(comparison.settings) == variants
        assert len(comparison.compare.seeds) == (1 if is_quick else 3)


def test_no_row_of_boolq_is_both_dealt_and_judged(bench: Any, tmp_path: Path, shared: Path) -> None:
    [dealt], judged = bench.write_boolq(tmp_path, shared / "data")
    kinds = [(tmp_path / name).read_text().splitlines() for name in (dealt, judged, bench.LIKE_TASK)]
    assert [len(rows) for rows in kinds[1:]] == [300, 150]
    assert len(kinds[0]) > 450
    assert not set(kinds[0]).intersection(kinds[1])


def test_users_of_dolly_hold_few_categories_and_no_judged_row(bench: Any, tmp_path: Path, shared: Path) -> None:
    files, judged = bench.write_dolly(tmp_path, shared / "data")
    held = [(tmp_path / file).read_text().splitlines() for file in files]
    asked = set((tmp_path / judged).read_text().splitlines())
    assert len(held) == 4
    assert len(asked) == 400
    assert all(rows and not asked.intersection(rows) for rows in held)
