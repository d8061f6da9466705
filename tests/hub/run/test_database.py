"""The version of a ledger: an older one is brought forward, a newer one is refused and left as it is."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from fedsoda_hub.federation import records as rec
from fedsoda_hub.run.database import SCHEMA_VERSION, OfNewerRelease
from fedsoda_hub.run.ledger import Ledger


def version(path: Path, to: int | None = None) -> int:
    with closing(sqlite3.connect(path)) as db:
        if to is not None:
            db.execute(f"PRAGMA user_version = {to}")
        return int(db.execute("PRAGMA user_version").fetchone()[0])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.run" / "ledger.sqlite"
    with closing(Ledger(path)) as ledger:
        ledger.append(rec.RunStarted(run_id="1234", fixed={}))
        ledger.tokens.create("alice")
    return path


def test_a_new_ledger_has_the_version_of_this_release(path: Path) -> None:
    assert version(path) == SCHEMA_VERSION >= 1


def test_a_ledger_of_the_first_release_is_brought_forward_when_it_is_written_to(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:  # as that release left it
        db.executescript("DROP TABLE devices; DROP TABLE seen; PRAGMA user_version = 0;")
    with closing(Ledger(path, is_read_only=True)) as ledger:
        assert (ledger.replay().run_id, ledger.devices.all()) == ("1234", [])
    assert version(path) == 0
    with closing(Ledger(path)) as ledger:
        assert (ledger.replay().run_id, [one.edge for one in ledger.tokens.all()]) == ("1234", ["alice"])
        ledger.devices.invite("bob", bytes(32), 2e9)
    assert version(path) == SCHEMA_VERSION


@pytest.mark.parametrize("is_read_only", [False, True])
def test_a_ledger_of_a_newer_release_is_refused_and_left_as_it_is(path: Path, is_read_only: bool) -> None:
    version(path, SCHEMA_VERSION + 1)
    before = path.read_bytes()
    with pytest.raises(OfNewerRelease) as raised:
        Ledger(path, is_read_only=is_read_only)
    assert f"its version is {SCHEMA_VERSION + 1}, and this release knows those up to {SCHEMA_VERSION}" in str(
        raised.value
    )
    assert raised.value.way_out().recovery == "fix-machine"
    assert str(raised.value).endswith(raised.value.way_out().helps)
    assert path.read_bytes() == before
