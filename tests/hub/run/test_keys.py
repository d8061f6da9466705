"""A hub's key stays the same, is its own user's alone, and a damaged one is not replaced in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsoda_edge.errors import UsageProblem
from fedsoda_hub.run.keys import signing_key


def test_the_key_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "hub.key"
    first = signing_key(path)
    assert signing_key(path).public == first.public
    assert path.stat().st_mode & 0o777 == 0o600
    assert signing_key(tmp_path / "other.key").public != first.public


def test_a_cut_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hub.key"
    signing_key(path)
    path.write_bytes(path.read_bytes()[:31])
    with pytest.raises(UsageProblem, match="has 31 bytes instead of 32"):
        signing_key(path)
