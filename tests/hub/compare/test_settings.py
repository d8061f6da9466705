"""COMPARE.toml: everything that is wrong in it is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedsoda_edge.errors import UsageProblem
from fedsoda_hub.compare.settings import Cell, read_comparison
from fedsoda_hub.settings.methods import METHODS
from fedsoda_hub.settings.run import read_settings
from fedsoda_hub.settings.toml import write_toml
from tests.hub.compare.files import write_comparison


def test_a_variant_is_the_base_with_its_overrides_and_a_cell_is_one_of_each(tmp_path: Path) -> None:
    variants: dict[str, dict[str, Any]] = {
        "plain": {"align": {"steps": 5}},
        "coarse": {"wire": {"codec": "int8"}, "method": {"groups": 1}},
    }
    path = write_comparison(tmp_path, tmp_path / "model", variants, compare={"splits": ["iid", "dirichlet-0.5"]})
    comparison = read_comparison(path)
    plain, coarse = comparison.settings["plain"], comparison.settings["coarse"]
    assert (plain.align.steps, plain.wire.codec, plain.method.groups) == (5, "nf4", 2)
    assert (coarse.align.steps, coarse.wire.codec, coarse.method.groups) == (2, "int8", 1)
    assert coarse.method.layers_per_group == 1
    assert list(comparison.cells()) == [
        Cell(variant, split, 0) for split in ("iid", "dirichlet-0.5") for variant in ("plain", "coarse")
    ]


def test_without_variants_all_methods_are_compared(tmp_path: Path) -> None:
    comparison = read_comparison(write_comparison(tmp_path, tmp_path / "model"))
    assert {name: s.method.name for name, s in comparison.settings.items()} == {name: name for name in METHODS}


def test_the_settings_of_a_variant_are_a_run_file(tmp_path: Path) -> None:
    """To the letter, since what was made is found again by their digest: 16 is not 16.0 there."""
    other = tmp_path / "elsewhere.toml"
    for settings in read_comparison(write_comparison(tmp_path, tmp_path / "model")).settings.values():
        other.write_text(write_toml(settings))
        assert json.dumps(read_settings(other).fixed()) == json.dumps(settings.fixed())


@pytest.mark.parametrize(
    ("tables", "variants", "message"),
    [
        ({"compare": {"sed": [1]}}, None, "no key [compare] sed; the nearest is [compare] seeds"),
        ({"compare": {"edges": "two"}}, None, "[compare] edges = 'two' in compare.toml; it must be a whole number"),
        ({"compare": {"seeds": [0, 1.5]}}, None, "[compare] seeds[1] = 1.5 in compare.toml; it must be a whole number"),
        ({"compare": {"edges": 0}}, None, "[compare] edges = 0 in compare.toml; it must be at least 1"),
        (
            {"compare": {"seeds": [1, 1]}},
            None,
            "[compare] seeds = [1, 1] in compare.toml; it must be different numbers",
        ),
        ({"compare": {"splits": ["shards"]}}, None, "'shards' is not a split"),
        (
            {"compare": {"baselines": ["best"]}},
            None,
            "[compare] baselines[0] = 'best' in compare.toml; it must be one of untouched, alone, central",
        ),
        ({"compare": {"level_of": "fedavg"}}, None, "[compare] level_of = 'fedavg' in compare.toml; it must be one of"),
        ({"compare": {"data": ["gone.jsonl"]}}, None, "gone.jsonl is not there"),
        ({"alignment": {}}, None, "compare.toml has no key alignment; the nearest is align"),
        ({"rounds": {"quorum": 0.5}}, None, "[rounds] quorum, which a comparison sets itself; delete it"),
        ({"listen": {"port": 1}}, None, "listen, which a comparison sets itself; delete it"),
        ({}, {"a": {"metod": {"x": 1}}}, "variant a: compare.toml has no key metod; the nearest is method"),
        ({}, {"a": {"method": {"grups": 1}}}, "variant a: compare.toml has no key [method] grups; the nearest is"),
        ({}, {"a": {"method": {"name": "fedavg"}}}, "variant a: [method] name = 'fedavg'"),
        ({}, {"a": {"rounds": {"min_edges": 1}}}, "variant a: compare.toml has [rounds] min_edges, which a comparison"),
        (
            {},
            {"a": {"task": {"eval_data": "x"}}},
            "variant a: [task] eval_data is given here, but all variants answer the same questions",
        ),
        ({}, {"a b": {"align": {"steps": 1}}}, "letters, digits, -, _ and +"),
    ],
)
def test_what_is_wrong_is_refused(
    tmp_path: Path, tables: dict[str, dict[str, Any]], variants: dict[str, dict[str, Any]] | None, message: str
) -> None:
    path = write_comparison(tmp_path, tmp_path / "no-model", variants, **tables)
    if variants and "a b" in variants:
        path.write_text(path.read_text().replace("variants.a b.", 'variants."a b".'))
    with pytest.raises(UsageProblem) as refused:
        read_comparison(path)
    assert message in str(refused.value)
    assert refused.value.exit_status == 2
    assert not list(tmp_path.glob("*.compare"))


def test_a_file_that_is_not_there_is_asked_for_by_its_kind(tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match=r"gone\.toml is not there; write a COMPARE\.toml"):
        read_comparison(tmp_path / "gone.toml")
