"""Keep the append-only log of a run and its traffic, in one SQLite file beside the blobs.

Append durably, then act, then acknowledge. What records mean is `federation/state.py`'s, who may join is `edges.py`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.messages import EdgeId
from fedsoda_hub.federation.records import AnyRecord
from fedsoda_hub.federation.state import LedgerState
from fedsoda_hub.run.database import Database
from fedsoda_hub.run.devices import Devices
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.edges import Edges
from fedsoda_hub.run.tokens import Tokens

_RECORD = msgspec.json.Decoder(AnyRecord)
_STATE = msgspec.json.Decoder(LedgerState)


class RoundTraffic(NamedTuple):
    """The bytes of one edge in one round, websocket payload and framing."""

    edge: str
    round: int
    up: int
    down: int


class Ledger:
    """The records, snapshots, tokens, devices and traffic of a run, for any thread.

    Args:
        path: None: in memory, for tests.
        is_read_only: whether only to read it.

    Raises:
        Damaged, UsageProblem, DiskFull: as `Database`.
    """

    def __init__(self, path: Path | None, *, is_read_only: bool = False) -> None:
        self.database = Database(path, is_read_only=is_read_only)
        self.tokens = Tokens(self.database)
        self.devices = Devices(self.database)
        self.edges = Edges(self.database, self.tokens, self.devices)

    def close(self) -> None:
        """Close the file."""
        self.database.close()

    def append(self, record: AnyRecord) -> None:
        """Append one record durably.

        Raises:
            DiskFull: the disk has no space left; nothing was written.
        """
        self.database.write(("INSERT INTO log (record) VALUES (?)", (msgspec.json.encode(record),)))

    def snapshot(self, state: LedgerState) -> None:
        """Save the state after the last record, to bound replay, in place of the one before.

        Raises:
            DiskFull: the disk has no space left; nothing was written.
        """
        self.database.write(
            ("DELETE FROM snapshot", ()),
            (
                "INSERT INTO snapshot (seq, state) SELECT COALESCE(MAX(seq), 0), ? FROM log",
                (msgspec.json.encode(state),),
            ),
        )

    def history(self) -> list[tuple[float, AnyRecord]]:
        """Return every record with the time of its writing, seconds since 1970; times are for people, not for replay."""
        rows = self.database.read("SELECT at, record FROM log ORDER BY seq")
        return [(at, self._record(record)) for at, record in rows]

    def since(self, last: int, most: int) -> list[tuple[int, float, AnyRecord]]:
        """Return the records after the one with the number `last`, each with its number and the time of its writing.

        Args:
            most: how many at once.
        """
        rows = self.database.read("SELECT seq, at, record FROM log WHERE seq > ? ORDER BY seq LIMIT ?", (last, most))
        return [(seq, at, self._record(record)) for seq, at, record in rows]

    def forget(self) -> None:
        """Delete all but who may join, in one step: the run has not begun then.

        Raises:
            DiskFull: nothing was deleted.
        """
        self.database.write(*((f"DELETE FROM {table}", ()) for table in ("log", "snapshot", "traffic")))

    def _record(self, data: bytes) -> AnyRecord:
        try:
            return _RECORD.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self.database.damaged(error) from error

    def records(self) -> list[AnyRecord]:
        """Return every record, in order."""
        return [record for _, record in self.history()]

    def replay(self) -> LedgerState:
        """Fold the records after the last snapshot into it; all records where the snapshot is of another release."""
        seq, state = 0, LedgerState()
        for number, data in self.database.read("SELECT seq, state FROM snapshot ORDER BY seq DESC LIMIT 1"):
            with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):  # the log alone says as much
                seq, state = number, _STATE.decode(data)
        for (data,) in self.database.read("SELECT record FROM log WHERE seq > ? ORDER BY seq", (seq,)):
            record = self._record(data)
            try:
                state.apply(record)
            except (LookupError, ValueError, ArithmeticError) as error:  # of records that never follow each other
                raise self.database.damaged(f"{type(record).__name__} where it cannot be") from error
        return state

    # --- traffic: telemetry, not part of replay ------------------------------------------------------------

    def add_traffic(self, edge: EdgeId, round_number: int, up: int, down: int) -> None:
        """Add bytes of websocket payload and framing to an edge's count in a round.

        Raises:
            DiskFull: the disk has no space left; nothing was written.
        """
        self.add_all_traffic([RoundTraffic(edge, round_number, up, down)])

    def add_all_traffic(self, rows: Iterable[RoundTraffic]) -> None:
        """Add several counts, all or none of them.

        Raises:
            DiskFull: the disk has no space left; nothing was written.
        """
        statement = (
            "INSERT INTO traffic VALUES (?, ?, ?, ?) ON CONFLICT (edge, round) "
            "DO UPDATE SET up = up + excluded.up, down = down + excluded.down"
        )
        self.database.write(*((statement, row) for row in rows))

    def travelled(self) -> tuple[int, int]:
        """Return the bytes up and down of all edges and rounds."""
        [(up, down)] = self.database.read("SELECT COALESCE(SUM(up), 0), COALESCE(SUM(down), 0) FROM traffic")
        return up, down

    def traffic_by_edge(self) -> dict[str, tuple[int, int]]:
        """Return the bytes up and down of each edge, over all rounds."""
        rows = self.database.read("SELECT edge, SUM(up), SUM(down) FROM traffic GROUP BY edge")
        return {edge: (up, down) for edge, up, down in rows}

    def traffic_by_round(self) -> dict[int, tuple[int, int]]:
        """Return the bytes up and down of each round, over all edges."""
        rows = self.database.read("SELECT round, SUM(up), SUM(down) FROM traffic GROUP BY round")
        return {number: (up, down) for number, up, down in rows}

    def traffic(self) -> list[RoundTraffic]:
        """Return the bytes of each edge and round, ascending by edge and round."""
        rows = self.database.read("SELECT edge, round, up, down FROM traffic ORDER BY edge, round")
        return [RoundTraffic(*row) for row in rows]


@contextlib.contextmanager
def opened(directory: RunDirectory) -> Iterator[Ledger]:
    """Open the ledger of a run, whether a hub serves it or not, and close it after the block.

    Raises:
        Damaged, UsageProblem, DiskFull: as `Database`.
    """
    with contextlib.closing(Ledger(directory.ledger)) as ledger:
        yield ledger


@contextlib.contextmanager
def opened_to_read(directory: RunDirectory) -> Iterator[Ledger]:
    """Open the ledger of a run as `opened` does, and leave it as it is: it may lie where this user cannot write.

    Raises:
        Damaged, UsageProblem: as `Database`.
    """
    with contextlib.closing(Ledger(directory.ledger, is_read_only=True)) as ledger:
        yield ledger


def not_started(run_file: str | Path) -> UsageProblem:
    """Make the error of every command that needs a run which has not been started yet."""
    return UsageProblem(f"{Path(run_file).name} has not been started; run `fedsoda-hub serve {run_file}`")
