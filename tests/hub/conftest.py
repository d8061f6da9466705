"""One small prepared run for all tests of the hub that only read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsoda_hub.settings.run import RunSettings
from tests.hub.runs import make_run, prepare


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> RunSettings:
    """A prepared run of the tiny model: adapter 2, (1, 2)."""
    settings = make_run(tmp_path_factory.mktemp("prepared"), tiny_llama)
    prepare(settings)
    return settings
