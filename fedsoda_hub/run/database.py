"""Run statements on the run's one SQLite file, from any thread, durable when they return.

Writes, scans and look-ups have a connection each, so that a look-up on an event loop waits neither for a disk that syncs
nor for a scan. What the rows mean is `ledger.py`'s, `tokens.py`'s and `devices.py`'s.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedsoda_edge.errors import DiskFull, UsageProblem, WayOut
from fedsoda_edge.ports import installer

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
# The version of the file, its `user_version`: 0 as the first release wrote it, 1 with a number of its own. A release that
# writes what this one cannot read adds one, and brings older files forward when it opens them.
SCHEMA_VERSION = 1
# What runs that were made by an older release do not have yet. Who only reads such a run finds it empty.
_LATER = {
    "devices": """
CREATE TABLE devices (
    edge TEXT PRIMARY KEY, invitation BLOB NOT NULL UNIQUE, expires REAL NOT NULL, key BLOB, bound REAL, former BLOB,
    revoked INTEGER NOT NULL DEFAULT 0);
CREATE INDEX devices_by_key ON devices (key);
CREATE INDEX devices_by_former ON devices (former);
""",
    "seen": "CREATE TABLE seen (edge TEXT PRIMARY KEY, first REAL NOT NULL, last REAL NOT NULL);",
}


class Damaged(UsageProblem):
    """A ledger that no longer says what was written to it."""

    code = "damaged"

    def way_out(self) -> WayOut:
        return WayOut("fix-machine", "fedsoda-hub reset")


class OfNewerRelease(UsageProblem):
    """A ledger that a newer release has written, whose records this one may not know."""

    def way_out(self) -> WayOut:
        return WayOut("fix-machine", installer.found().update)


class _Connected:
    """A connection that one thread uses at a time."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        self.lock = threading.Lock()


class Database:
    """The connections to the file.

    Args:
        path: None: in memory, for tests.
        is_read_only: whether to leave the file as it is, so that it may lie where this process cannot write.

    Raises:
        Damaged: the file is cut, or is not that of a run.
        OfNewerRelease: the file is left as it is.
        UsageProblem: the file cannot be opened by this user, or not on this file system.
        DiskFull: the disk has no space left.
    """

    def __init__(self, path: Path | None, *, is_read_only: bool = False) -> None:
        self._path = path
        with self._in_words():
            if path is not None:
                _refuse_cut(path)
                if not is_read_only:
                    path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = _Connected(_connected(path, is_read_only))
            try:
                version = self._known_version()
                if is_read_only:
                    self._writer.db.execute("SELECT 1 FROM log, tokens, traffic LIMIT 1")
                    self._writer.db.execute("PRAGMA temp_store = MEMORY")
                else:
                    self._writer.db.execute("PRAGMA journal_mode = WAL")
                    self._writer.db.execute("PRAGMA synchronous = FULL")  # NORMAL may lose acknowledged commits
                    self._writer.db.executescript(_SCHEMA)
                self._add_later_tables("TEMP " if is_read_only else "")
                if version < SCHEMA_VERSION and not is_read_only:
                    self._writer.db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            except BaseException:
                self._writer.db.close()
                raise
            is_one = path is None or is_read_only
            self._reader = self._writer if is_one else _Connected(_connected(path, is_read_only))
            self._finder = self._writer if is_one else _Connected(_connected(path, is_read_only))

    def _known_version(self) -> int:
        """Return the version of the file.

        Raises:
            OfNewerRelease: this release does not know it.
        """
        version = int(self._writer.db.execute("PRAGMA user_version").fetchone()[0])
        if version > SCHEMA_VERSION:
            raise OfNewerRelease(
                f"{self._path} was written by a newer fedsoda: its version is {version}, and this release knows those up to "
                f"{SCHEMA_VERSION}; bring this machine a newer release: {installer.found().update}"
            )
        return version

    def _add_later_tables(self, kind: str) -> None:
        db = self._writer.db
        there = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        for name, statements in _LATER.items():
            if name not in there:
                made = statements.replace("CREATE TABLE ", f"CREATE {kind}TABLE IF NOT EXISTS ")
                db.executescript(made.replace("CREATE INDEX ", f"CREATE INDEX IF NOT EXISTS {'temp.' if kind else ''}"))

    def changes_of_others(self) -> int:
        """Return a number that changes whenever another process has written to the file."""
        with self._writer.lock, self._in_words():  # any other connection would count this process's own writes too
            return int(self._writer.db.execute("PRAGMA data_version").fetchone()[0])

    def close(self) -> None:
        """Close the file as soon as no statement runs."""
        for connected in (self._finder, self._reader, self._writer):
            with connected.lock:  # a thread may be in the middle of an append
                connected.db.close()

    def write(self, *statements: tuple[str, Sequence[Any]]) -> None:
        """Run statements together, all or none; they are durable when this returns.

        Raises:
            DiskFull: the disk has no space left; nothing was written.
            Damaged, UsageProblem: the file cannot be written to; nothing was written.
        """
        db = self._writer.db
        with self._writer.lock, self._in_words():
            if len(statements) == 1:
                db.execute(*statements[0])
                return
            db.execute("BEGIN IMMEDIATE")
            try:
                for statement, values in statements:
                    db.execute(statement, values)
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def read(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return all rows of a query, which may be a scan: not for an event loop.

        Raises:
            Damaged, UsageProblem: the file cannot be read.
        """
        with self._reader.lock, self._in_words():
            return self._reader.db.execute(statement, values).fetchall()

    def find(self, statement: str, values: Sequence[Any]) -> tuple[Any, ...] | None:
        """Return the one row that an index finds; None: there is none. It waits for no write and no scan.

        Raises:
            Damaged, UsageProblem: the file cannot be read.
        """
        with self._finder.lock, self._in_words():
            row: tuple[Any, ...] | None = self._finder.db.execute(statement, values).fetchone()
            return row

    def damaged(self, what: object) -> Damaged:
        """Make the error of a file that does not hold what was written to it."""
        return Damaged(
            f"{self._path} is damaged ({what}): it was cut or changed by a disk or another program; put it back from a copy, "
            f"or begin the run again with `fedsoda-hub reset`"
        )

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        """Turn what SQLite and the disk say into sentences with the path and what to do."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise self._sentence(error) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(f"the ledger's disk is full ({error}); free some space there") from error
            raise UsageProblem(
                f"{self._path} cannot be made ({error.strerror}); run this as the user whom the directory belongs to, or "
                "move the RUN.toml to a directory that you may write to"
            ) from error

    def _sentence(self, error: sqlite3.DatabaseError) -> Exception:
        match getattr(error, "sqlite_errorcode", 0) & 0xFF:
            case sqlite3.SQLITE_FULL:
                return DiskFull(f"the ledger's disk is full ({error}); free some space there")
            # No statement of ours is wrong: where one does not suit the tables, they are not a ledger's.
            case sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_ERROR | sqlite3.SQLITE_CONSTRAINT:
                return self.damaged(error)
            case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
                return UsageProblem(
                    f"{self._path} cannot be written to by this user ({error}); run this as the user whom the run's "
                    "directory belongs to, or make directory and file writable"
                )
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                return UsageProblem(
                    f"{self._path} was locked by another program for 5 s ({error}); end that program, then try again"
                )
            case sqlite3.SQLITE_IOERR | sqlite3.SQLITE_PROTOCOL | sqlite3.SQLITE_NOLFS:
                return UsageProblem(
                    f"{self._path} cannot be used ({error}): the disk failed, or the file system has no locks, as some "
                    "network file systems; move the RUN.toml and its directory to a local disk"
                )
        return error


def _refuse_cut(path: Path) -> None:
    """Refuse a file without a byte beside what only a prepared run has: a new one would forget every token and round."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size == 0 and (path.parent / "blobs").is_dir():
            raise Damaged(
                f"{path} is empty, but the run was prepared: the file was cut; put it back from a copy, or begin the run "
                "again with `fedsoda-hub reset`"
            )


def _connected(path: Path | None, is_read_only: bool) -> sqlite3.Connection:
    connect = partial(sqlite3.connect, check_same_thread=False, isolation_level=None, timeout=5.0)
    if path is None or not is_read_only:
        return connect(path or ":memory:")
    address = path.absolute().as_uri()
    log = path.with_name(f"{path.name}-wal")
    has_log = log.exists() and log.stat().st_size > 0
    # SQLite makes files beside a database with a write-ahead log even to read it, and cannot where nobody may write.
    if not has_log and not os.access(path.parent, os.W_OK):
        return connect(f"{address}?immutable=1", uri=True)
    return connect(f"{address}?mode=ro", uri=True)
