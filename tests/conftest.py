"""Fixtures and rules for every test: tiny models, no network, one thread, no process left behind."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", FEDSODA_THREADS="1")

import psutil
import pytest
import torch

from fedsoda_edge.testing import make_bundle
from tests.tiny import make_tiny_llama

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run the slow tests")
    parser.addoption("--device", default="cpu", help="where tests marked cuda run: cpu or cuda")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        slow = pytest.mark.skip(reason="slow: runs with scripts/test --all")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(slow)


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Name a case of bytes by its place: archives hold the second of their making, and two workers must agree."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def _home_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSODA_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread_and_nothing_left() -> Iterator[None]:
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what the imports made stays: a collection, of which preparations make some, need not look at it again
    yield
    left = psutil.Process().children(recursive=True)
    _, alive = psutil.wait_procs(left, timeout=5)
    assert not alive, f"tests left processes behind: {[process.cmdline() for process in alive]}"


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The device of tests that are marked cuda, for which the CPU stands in where there is no GPU."""
    return str(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 layers, C 64, untied, bf16."""
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `ScriptedHub`, to read only: made once, where each hub would make its own."""
    directory = tmp_path_factory.mktemp("scripted") / "bundle"
    with torch.random.fork_rng():
        make_bundle(directory)
    return directory


@pytest.fixture(scope="session")
def ref24() -> Path:
    """The demo's embedded model: 24 layers, C 192."""
    return ROOT / "fedsoda_hub" / "demo" / "model"
