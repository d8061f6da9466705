"""The bench of an edge runs as it would on a GPU: each of its geometries, shrunk, arm by arm on this CPU."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedsoda_edge.model.bundle import Bundle
from tests.conftest import ROOT

FAMILIES = {"llama3-8b": "llama", "qwen2-7b": "qwen2", "mistral-7b": "mistral"}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("bench_edge")


@pytest.mark.parametrize(("name", "parameters"), [("llama3-8b", 8.03e9), ("qwen2-7b", 7.62e9), ("mistral-7b", 7.24e9)])
def test_a_geometry_has_the_published_number_of_parameters(bench: Any, name: str, parameters: float) -> None:
    shape = bench.GEOMETRIES[name].shape
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config)
    assert sum(each.numel() for each in model.parameters()) == pytest.approx(parameters, rel=1e-3)
    assert len(bench.GEOMETRIES[name].plan.kept) == shape.layers - 12


@pytest.mark.parametrize("name", FAMILIES)
def test_a_geometry_of_a_gpu_is_refused_without_one_in_a_sentence(
    bench: Any, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench_edge", "--geometry", name])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert stopped.value.code == 2
    assert "use --geometry cpu, or --quick" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_arm_of_a_gpu_geometry_runs(
    bench: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        bench.edge_arms, "return_memory_at_once", lambda: None
    )  # it would stay so for every test after this one
    small = bench.GEOMETRIES[name].small
    shape = replace(small.shape, width=128, head=32, mlp=192, layers=8, vocab=300, length=32)
    geometry = replace(small, shape=shape, groups=1, samples=2, steps=1, device="cpu")
    bench.make(tmp_path, geometry)
    bundle = Bundle.open(tmp_path / "model" / "bundle")
    assert bundle.manifest.family == FAMILIES[name]
    assert bundle.manifest.quantized_embedding
    assert len(bundle.plan.kept) == 5
    plan = bench.way(bundle, geometry)
    bench.states_of(bundle, geometry, tmp_path / "cache", plan).sweep()
    for arm in bench.ARMS.values():
        tokens, seconds, _ = arm(tmp_path, geometry, False)
        assert tokens in (32, 64)
        assert seconds > 0
    assert bench.is_bit_identical(tmp_path, geometry)


def test_a_layers_random_weights_are_the_same_each_time(bench: Any, tmp_path: Path) -> None:
    shape = bench.random_bundle.Shape(64, 2, 40, 16)
    made = [tmp_path / "a", tmp_path / "b"]
    for directory in made:
        bench.random_bundle.write_checkpoint(directory, shape, "cpu")
    first, again = (load_file(directory / "model.layers.1.safetensors") for directory in made)
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = load_file(made[0] / "model.layers.0.safetensors")
    assert not torch.equal(other["model.layers.0.mlp.up_proj.weight"], first["model.layers.1.mlp.up_proj.weight"])
