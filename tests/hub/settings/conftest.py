from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a RUN.toml lies that names public.txt and eval.jsonl."""
    (tmp_path / "public.txt").write_text("public")
    (tmp_path / "eval.jsonl").write_text("{}")
    return tmp_path
