"""Run statements on the run's one SQLite file, from any thread, one at a time, durable when they return.

What the rows mean is `ledger.py`'s and `tokens.py`'s.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsoda_edge.errors import DiskFull

_SCHEMA = """
CREATE TABLE IF NOT EXISTS log (
    seq INTEGER PRIMARY KEY, record BLOB NOT NULL,
    at REAL NOT NULL DEFAULT ((julianday('now') - 2440587.5) * 86400.0));
CREATE TABLE IF NOT EXISTS snapshot (seq INTEGER PRIMARY KEY, state BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS tokens (
    edge TEXT PRIMARY KEY, sha256 TEXT NOT NULL UNIQUE, device TEXT, revoked INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS traffic (
    edge TEXT NOT NULL, round INTEGER NOT NULL, up INTEGER NOT NULL, down INTEGER NOT NULL,
    PRIMARY KEY (edge, round));
"""


class Database:
    """One connection to the file. path None: in memory, for tests."""

    def __init__(self, path: Path | None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path or ":memory:", check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # NORMAL may lose acknowledged commits on power loss
        self._db.execute("PRAGMA busy_timeout = 5000")
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file as soon as no statement runs."""
        with self._lock:  # a thread may be in the middle of an append
            self._db.close()

    def write(self, statement: str, values: Sequence[Any] = ()) -> None:
        """Run one statement; it is durable when this returns.

        Raises:
            DiskFull: the disk has no space left; nothing was written.
        """
        with self._lock:
            try:
                self._db.execute(statement, values)
            except sqlite3.OperationalError as error:
                if "full" in str(error):
                    raise DiskFull(f"the ledger's disk is full ({error}); free some space there") from error
                raise

    def read(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return all rows of a query."""
        with self._lock:
            return self._db.execute(statement, values).fetchall()
