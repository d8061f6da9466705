"""Invitations in the run's database: ledgers of older releases open, and only who may join is kept of a reset."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from fedsoda_edge.protocol.messages import EdgeId
from fedsoda_hub.run.ledger import Ledger

# What the release before devices made, statement by statement.
OLDER = """
CREATE TABLE log (seq INTEGER PRIMARY KEY, record BLOB NOT NULL,
    at REAL NOT NULL DEFAULT ((julianday('now') - 2440587.5) * 86400.0));
CREATE TABLE snapshot (seq INTEGER PRIMARY KEY, state BLOB NOT NULL);
CREATE TABLE tokens (edge TEXT PRIMARY KEY, sha256 TEXT NOT NULL UNIQUE, device TEXT, revoked INTEGER NOT NULL DEFAULT 0);
CREATE TABLE traffic (edge TEXT NOT NULL, round INTEGER NOT NULL, up INTEGER NOT NULL, down INTEGER NOT NULL,
    PRIMARY KEY (edge, round));
INSERT INTO tokens VALUES ('clinic-1', 'abc', 'laptop', 0);
"""


@pytest.fixture
def older(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.sqlite"
    made = sqlite3.connect(path)
    made.executescript(OLDER)
    made.close()
    return path


def names(path: Path) -> set[str]:
    with sqlite3.connect(path) as found:
        return {name for (name,) in found.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def test_an_older_ledger_is_read_as_it_is_and_gets_its_tables_when_it_is_written_to(older: Path) -> None:
    before = names(older)
    reading = Ledger(older, is_read_only=True)
    [edge] = reading.edges.all()
    assert (edge.edge, edge.kind, edge.used, edge.first_seen) == ("clinic-1", "token", True, None)
    assert reading.devices.all() == []
    reading.close()
    assert names(older) == before
    writing = Ledger(older)
    writing.devices.invite("clinic-2", b"i" * 32, 2e9)
    writing.edges.note_seen({EdgeId("clinic-1"): 1e9})
    writing.edges.note_seen({EdgeId("clinic-1"): 1e9 + 5})
    writing.close()
    again = Ledger(older, is_read_only=True)
    assert [(edge.edge, edge.kind, edge.first_seen, edge.last_seen) for edge in again.edges.all()] == [
        ("clinic-1", "token", 1e9, 1e9 + 5),
        ("clinic-2", "link", None, None),
    ]
    again.close()


def test_who_may_join_outlives_a_reset(tmp_path: Path) -> None:
    ledger = Ledger(None)
    ledger.devices.invite("a", b"i" * 32, 2e9)
    ledger.devices.bind(b"i" * 32, b"k" * 32, 1e9)
    ledger.forget()
    [device] = ledger.devices.all()
    assert (device.key, device.bound) == (b"k" * 32, 1e9)


def test_when_a_device_was_first_seen_is_its_own_and_not_that_of_the_one_before(tmp_path: Path) -> None:
    ledger = Ledger(None)
    ledger.devices.invite("a", b"i" * 32, 2e9)
    ledger.devices.bind(b"i" * 32, b"k" * 32, 1e9)
    ledger.edges.note_seen({EdgeId("a"): 1e9})
    ledger.devices.rebind("a", b"j" * 32, 2e9)
    ledger.devices.bind(b"j" * 32, b"l" * 32, 1.1e9)
    ledger.edges.note_seen({EdgeId("a"): 1.2e9})
    [edge] = ledger.edges.all()
    assert edge.first_seen == 1.2e9
    ledger.devices.bind(b"j" * 32, b"m" * 32, 1.3e9)  # another one that comes late changes nothing
    assert ledger.edges.all() == [edge]


def test_an_invitation_is_found_by_an_index_however_many_there_are() -> None:
    ledger = Ledger(None)
    for where in ("invitation = ?", "key = ? ORDER BY revoked", "former = ?", "edge = ?"):
        plan = ledger.database.read(f"EXPLAIN QUERY PLAN SELECT edge FROM devices WHERE {where}", (b"x",))
        assert not any(row[3].startswith("SCAN") for row in plan)


def test_a_change_by_another_process_is_noticed_and_ones_own_is_not(tmp_path: Path) -> None:
    ours, theirs = Ledger(tmp_path / "ledger.sqlite"), Ledger(tmp_path / "ledger.sqlite")
    before = ours.database.changes_of_others()
    ours.tokens.create("a")
    assert ours.database.changes_of_others() == before
    theirs.tokens.create("b")
    assert ours.database.changes_of_others() != before
    ours.close()
    theirs.close()
