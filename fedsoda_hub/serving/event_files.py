"""Write a run's figures as TensorBoard reads them: live while a hub serves, and from the ledger for `fedsoda-hub report`.

A file is a row of TFRecords, each a protobuf of tensorflow/core/util/event.proto (fields 1 wall_time, 2 step, 3 file_version,
5 summary) with the scalars of summary.proto (1 tag, 2 simple_value). Both formats are fixed; writing them takes a page,
while a library would bring numpy into the process that holds the socket. Both ways write the same scalars in the same
order, so that a file is continued where an earlier hub, or a crash, left it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsoda_edge.errors import UsageProblem
from fedsoda_hub import events
from fedsoda_hub.federation import records as rec
from fedsoda_hub.federation.state import LedgerState
from fedsoda_hub.run.ledger import Ledger

_log = logging.getLogger("fedsoda_hub.serving")


@dataclass(frozen=True)
class Scalar:
    """One figure. step: the round. at: seconds since 1970."""

    tag: str
    step: int
    value: float
    at: float


# --- which figures ---------------------------------------------------------------------------------------------------


def scalars_of(event: events.HubEvent, at: float, seconds: float | None) -> list[Scalar]:
    """List the figures of an event; their number and tags follow from the event alone.

    Args:
        seconds: how long the round was open that the event closes; None: it is not known.
    """
    match event:
        case events.RunPrepared(public_kl=found):
            step, values = 0, {f"public_kl/{stage}": kl for stage, kl in found.items()}
        case events.RoundClosed():
            step = event.round
            values = {
                "train/loss": event.loss,
                "round/updates": event.updates,
                "round/seconds": math.nan if seconds is None else seconds,
                "bytes/up": event.bytes_up,
                "bytes/down": event.bytes_down,
            }
            if event.cross_term is not None:
                values["updates/cross_term"] = event.cross_term
            if event.standings:
                values["updates/norm"] = sum(one.norm for one in event.standings) / len(event.standings)
            cosines = [one.cosine for one in event.standings if one.cosine is not None]
            if cosines:
                values["updates/cosine"] = sum(cosines) / len(cosines)
        case events.Realigned():
            step, values = event.round, {"public_kl/before": event.kl_before, "public_kl/realigned": event.kl_after}
        case events.Probed():
            step, values = event.round, {"drift/public_kl": event.kl, "drift/cosine": event.cosine}
        case events.Evaluated(result=result):
            step = event.round
            values = {f"accuracy/{model}": value for model, value in result.accuracy.items()}
            for name, by_model in (("loss", result.loss), ("auc", result.auc), ("mean_rank", result.mean_rank)):
                values |= {f"{name}/{model}": value for model, value in by_model.items() if value is not None}
        case _:
            return []
    return [Scalar(tag, step, value, at) for tag, value in values.items()]


def scalars_of_run(ledger: Ledger, rounds: int) -> Iterator[Scalar]:
    """List the figures of all that a run did, in order.

    Args:
        rounds: [rounds] count.
    """
    traffic: dict[int, tuple[int, int]] = {}
    for row in ledger.traffic():
        up, down = traffic.get(row.round, (0, 0))
        traffic[row.round] = (up + row.up, down + row.down)
    state, opened_at = LedgerState(), 0.0
    for at, record in ledger.history():
        state.apply(record)
        if isinstance(record, rec.RoundOpened):
            opened_at = at
        if not isinstance(record, rec.RunPrepared | rec.RoundClosed | rec.Realigned | rec.Probed | rec.Evaluated):
            continue
        until = [both for number, both in traffic.items() if number <= state.round]
        travelled = sum(up for up, _ in until), sum(down for _, down in until)
        event = events.event_of_record(record, rounds, state, travelled, None)
        if event is not None:
            yield from scalars_of(event, at, at - opened_at)


# --- the file --------------------------------------------------------------------------------------------------------


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC = _crc_table()


def masked_crc(data: bytes) -> int:
    """Return the masked CRC-32C of a TFRecord (tensorflow/core/lib/hash/crc32c.h)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def record_of(data: bytes) -> bytes:
    """Frame one record."""
    head = struct.pack("<Q", len(data))
    return head + struct.pack("<I", masked_crc(head)) + data + struct.pack("<I", masked_crc(data))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _bytes_field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _wall_time(at: float) -> bytes:
    return b"\x09" + struct.pack("<d", at)


def beginning(at: float) -> bytes:
    """Make the record that a file begins with."""
    return record_of(_wall_time(at) + _bytes_field(3, b"brain.Event:2"))


def record_of_scalar(scalar: Scalar) -> bytes:
    """Make the record of one figure, as float32."""
    try:
        value = struct.pack("<f", scalar.value)
    except OverflowError:  # beyond float32
        value = struct.pack("<f", math.copysign(math.inf, scalar.value))
    summary = _bytes_field(1, _bytes_field(1, scalar.tag.encode()) + b"\x15" + value)
    step = b"\x10" + _varint(scalar.step) if scalar.step else b""
    return record_of(_wall_time(scalar.at) + step + _bytes_field(5, summary))


def whole_records(data: bytes) -> tuple[int, int]:
    """Count the whole records at the beginning, and the bytes that they take; what a crash cut does not count."""
    count = place = 0
    while place + 12 <= len(data):
        [size] = struct.unpack_from("<Q", data, place)
        end = place + 12 + size + 4
        if end > len(data) or struct.unpack_from("<I", data, end - 4)[0] != masked_crc(data[place + 12 : end - 4]):
            break
        count, place = count + 1, end
    return count, place


def path_of(directory: Path, name: str, run_id: str) -> Path:
    """Return the file of a run; TensorBoard shows each directory as one run, by its name."""
    return directory / f"{name}-{run_id[:8]}" / "events.out.tfevents.0.fedsoda"


def last_opened(ledger: Ledger) -> tuple[int, float] | None:
    """Return the round that was opened last, and when, in seconds since 1970; None: none was."""
    found = [(record.round, at) for at, record in ledger.history() if isinstance(record, rec.RoundOpened)]
    return found[-1] if found else None


def write_run(directory: Path, name: str, ledger: Ledger, rounds: int) -> tuple[Path, int]:
    """Write the figures of a run, or those that its file lacks; return the file and how many figures it has.

    Raises:
        UsageProblem: the directory cannot be written.
    """
    path = path_of(directory, name, ledger.replay().run_id)
    wanted = list(scalars_of_run(ledger, rounds))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        count, size = whole_records(path.read_bytes()) if path.exists() else (0, 0)
        if count > 1 + len(wanted):
            count = size = 0
        began_at = wanted[0].at if wanted else 0.0
        missing = [beginning(began_at)] if count == 0 else []
        missing += [record_of_scalar(scalar) for scalar in wanted[max(0, count - 1) :]]
        with path.open("r+b" if path.exists() else "w+b") as file:
            file.truncate(size)
            file.seek(size)
            file.write(b"".join(missing))
    except OSError as error:
        raise UsageProblem(
            f"{path} cannot be written ({error.strerror}); name a directory that you may write to"
        ) from error
    return path, len(wanted)


class EventFile:
    """The file of a run that is served. `hear` takes the daemon's events; nothing is written on the event loop.

    Where the disk is full a figure is lost here until the next start, which writes what the file lacks.

    Args:
        opened: the round that was opened last, and when, in seconds since 1970; None: none was.
    """

    def __init__(self, path: Path, opened: tuple[int, float] | None = None) -> None:
        self._path = path
        self._waiting: list[Scalar] = []
        self._has_some = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None
        self._opened = opened

    def hear(self, event: events.HubEvent, at: float) -> None:
        """Keep the figures of an event to be written. at: seconds since 1970."""
        if isinstance(event, events.RoundOpened):
            self._opened = (event.round, at)
        is_timed = isinstance(event, events.RoundClosed) and self._opened is not None and self._opened[0] == event.round
        seconds = max(0.0, at - self._opened[1]) if is_timed and self._opened is not None else None
        found = scalars_of(event, at, seconds)
        if found:
            self._waiting += found
            self._has_some.set()

    async def run(self) -> None:
        """Write what waits until cancelled."""
        while True:
            await self._has_some.wait()
            self._has_some.clear()
            await self._flush()

    async def close(self) -> None:
        """Write what waits, after what was being written when `run` was cancelled."""
        if self._writing is not None:
            await self._writing
        await self._flush()

    async def _flush(self) -> None:
        now, self._waiting = self._waiting, []
        if now:
            self._writing = asyncio.create_task(asyncio.to_thread(self._append, now))
            await asyncio.shield(self._writing)

    def _append(self, scalars: Sequence[Scalar]) -> None:
        try:
            with self._path.open("ab") as file:
                file.write(b"".join(map(record_of_scalar, scalars)))
        except OSError as error:
            _log.warning("[report] tensorboard: %s cannot be written (%s)", self._path, error.strerror)
