"""The append-only event log, who may join, and what travelled: one SQLite file per run.

Append durably, then act, then acknowledge. Blobs lie beside it by digest (`ports/disk.py`). What records mean
is `federation/rounds.py`'s business.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import secrets
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from fedsoda_edge.errors import DiskFull, UsageProblem
from fedsoda_edge.ports.disk import write_durably
from fedsoda_edge.protocol.messages import Digest, EdgeId
from fedsoda_hub.federation.events import AnyRecord
from fedsoda_hub.federation.rounds import RunState

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
_RECORD = msgspec.json.Decoder(AnyRecord)
_STATE = msgspec.json.Decoder(RunState)


@dataclass(frozen=True)
class Token:
    """One token is one edge. device: the device id it is bound to, made at its first Hello."""

    edge: EdgeId
    device: str | None
    revoked: bool


class Ledger:
    """One connection, used from any thread, one statement at a time. `path` None: in memory, for tests."""

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
        with self._lock:  # a thread may be in the middle of an append
            self._db.close()

    def _write(self, statement: str, values: Sequence[Any]) -> None:
        with self._lock:
            try:
                self._db.execute(statement, values)
            except sqlite3.OperationalError as error:
                if "full" in str(error):
                    raise DiskFull(f"the ledger's disk is full ({error}); free space there, then retry") from error
                raise

    # --- the log -----------------------------------------------------------------------------------------

    def append(self, record: AnyRecord) -> None:
        """One durable record.

        Raises:
            DiskFull: nothing was written.
        """
        self._write("INSERT INTO log (record) VALUES (?)", (msgspec.json.encode(record),))

    def snapshot(self, state: RunState) -> None:
        """Remember the state after the last record, to bound replay."""
        self._write(
            "INSERT OR REPLACE INTO snapshot (seq, state) SELECT COALESCE(MAX(seq), 0), ? FROM log",
            (msgspec.json.encode(state),),
        )

    def history(self) -> list[tuple[float, AnyRecord]]:
        """Every record and when it was written, in seconds since 1970; for people, replay does not read it."""
        with self._lock:
            rows = self._db.execute("SELECT at, record FROM log ORDER BY seq").fetchall()
        return [(at, _RECORD.decode(record)) for at, record in rows]

    def records(self) -> list[AnyRecord]:
        return [record for _, record in self.history()]

    def replay(self) -> RunState:
        """The state: the last snapshot and the records after it."""
        with self._lock:
            row = self._db.execute("SELECT seq, state FROM snapshot ORDER BY seq DESC LIMIT 1").fetchone()
            seq, state = (0, RunState()) if row is None else (row[0], _STATE.decode(row[1]))
            later = self._db.execute("SELECT record FROM log WHERE seq > ? ORDER BY seq", (seq,)).fetchall()
        for (data,) in later:
            state.apply(_RECORD.decode(data))
        return state

    # --- tokens ------------------------------------------------------------------------------------------

    def create_token(self, edge: str) -> str:
        """A new token for this edge id; only its sha256 is kept.

        Raises:
            UsageProblem: the name is in use, or not one that can stand in a file name.
        """
        if not edge or not all(c.isalnum() or c in "-_." for c in edge) or len(edge) > 64:
            raise UsageProblem(f"--name {edge!r} cannot be an edge's id; use up to 64 letters, digits, - _ .")
        if edge in {token.edge for token in self.tokens() if not token.revoked}:
            raise UsageProblem(f"there is a token for {edge!r} already; revoke it first, or choose another name")
        token = f"fs1-{secrets.token_urlsafe(32)}"
        self._write("INSERT OR REPLACE INTO tokens (edge, sha256) VALUES (?, ?)", (edge, _hash(token)))
        return token

    def tokens(self) -> list[Token]:
        with self._lock:
            rows = self._db.execute("SELECT edge, device, revoked FROM tokens ORDER BY edge").fetchall()
        return [Token(EdgeId(edge), device, bool(revoked)) for edge, device, revoked in rows]

    def find_token(self, token: str) -> Token | None:
        with self._lock:
            row = self._db.execute(
                "SELECT edge, device, revoked FROM tokens WHERE sha256 = ?", (_hash(token),)
            ).fetchone()
        return None if row is None else Token(EdgeId(row[0]), row[1], bool(row[2]))

    def revoke_token(self, edge: str) -> None:
        """Forget the token's right to join; the name may be given again after that."""
        if edge not in {token.edge for token in self.tokens()}:
            known = ", ".join(token.edge for token in self.tokens()) or "none"
            raise UsageProblem(f"there is no token for {edge!r}; there are: {known}")
        self._write("UPDATE tokens SET revoked = 1 WHERE edge = ?", (edge,))

    def bind_device(self, edge: EdgeId, device: str) -> bool:
        """Bind an unbound token to the device; whether the token belongs to that device."""
        self._write("UPDATE tokens SET device = ? WHERE edge = ? AND device IS NULL", (device, edge))
        return any(token.edge == edge and token.device == device for token in self.tokens())

    # --- traffic: telemetry, no part of replay -------------------------------------------------------------

    def add_traffic(self, edge: EdgeId, round_number: int, up: int, down: int) -> None:
        """Websocket payload and framing, bytes."""
        self._write(
            "INSERT INTO traffic VALUES (?, ?, ?, ?) ON CONFLICT (edge, round) "
            "DO UPDATE SET up = up + excluded.up, down = down + excluded.down",
            (edge, round_number, up, down),
        )

    def traffic(self) -> list[tuple[str, int, int, int]]:
        """(edge, round, up, down), ascending."""
        with self._lock:
            return self._db.execute("SELECT edge, round, up, down FROM traffic ORDER BY edge, round").fetchall()


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def write_secret(path: Path, secret: str) -> None:
    """A file of mode 0600 from the first byte on; one that was there is replaced, since others may have it open.

    Raises:
        UsageProblem: no file can be made there. DiskFull.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EEXIST, "it is there and is not a file")
        write_durably(path, secret.encode(), 0o600)
    except OSError as error:
        raise UsageProblem(
            f"{path} cannot be written ({error.strerror}); name a file where there is space for one"
        ) from error


@dataclass(frozen=True)
class Outcome:
    """What a run has reached: digests of w, of the largest sub-LLM's emulator view and of its manifest in force, closed
    rounds, the last evaluation."""

    master: Digest
    emulator_view: Digest
    manifest: Digest
    rounds: int
    evaluation: dict[str, Any] | None


def not_started(run_file: str | Path) -> UsageProblem:
    """Of a run whose settings are in this file: what all say that need a run."""
    return UsageProblem(f"{Path(run_file).name} has not been started; run `fedsoda-hub serve {run_file}`")


def read_outcome(run_dir: Path, run_file: str | Path = "RUN.toml") -> Outcome:
    """From the ledger of a run, live or not.

    Args:
        run_file: the run's settings, as they are named where there is no run.

    Raises:
        UsageProblem: there is no run, or no round has closed yet.
    """
    path = run_dir / "ledger.sqlite"
    if not path.exists():
        raise not_started(run_file)
    with contextlib.closing(Ledger(path)) as ledger:
        state = ledger.replay()
    if state.losses:
        return Outcome(state.master, state.emulator_view, state.manifest, len(state.losses), state.evaluation)
    if not state.run_id:  # there are tokens, and no more
        raise not_started(run_file)
    raise UsageProblem(f"no round of {run_dir.name} has closed yet (phase: {state.phase}); wait for the first")
