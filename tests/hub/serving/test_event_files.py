"""Event files are what TensorBoard's own writer makes, byte for byte, and hold each figure of a run once."""

from __future__ import annotations

import asyncio
import math
import struct
from pathlib import Path

import pytest

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol import messages as ms
from fedsoda_hub import events
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import Ledger, opened_to_read
from fedsoda_hub.serving.event_files import (
    EventFile,
    Scalar,
    beginning,
    masked_crc,
    path_of,
    record_of_scalar,
    scalars_of,
    scalars_of_run,
    whole_records,
    write_run,
)
from tests.hub.report.recorded import ANN, BOB, RECORDED
from tests.hub.serving import test_daemon
from tests.hub.serving.test_daemon import joined, serving, update

# What tensorboard 2.21.0 writes for these events: `RecordWriter(file).write(event_pb2.Event(wall_time=..., step=...,
# summary=Summary(value=[Summary.Value(tag=..., simple_value=...)])).SerializeToString())`, after one with file_version.
BEGAN_AT = 1700000000.5
SCALARS = [
    Scalar("train/loss", 1, 0.5, 1700000001.25),
    Scalar("public_kl/pruned", 0, 0.125, 1700000002.0),
    Scalar("accuracy/plug_in", 300, 1e300, 1700000003.0),  # beyond float32
    Scalar("x" * 9, 2**40, -1.5, 1.0),
]
GOLDEN = (
    "1800000000000000a37f4b220900002040fc54d9411a0d627261696e2e4576656e743a322b353110200000000000000029eda950090000"
    "5040fc54d94110012a130a110a0a747261696e2f6c6f7373150000003fc05e1b162400000000000000422b804d0900008040fc54d9412a"
    "190a170a107075626c69635f6b6c2f7072756e6564150000003edbf7c7802700000000000000bbe1b146090000c040fc54d94110ac022a"
    "190a170a1061636375726163792f706c75675f696e150000807ff34708572400000000000000422b804d09000000000000f03f10808080"
    "8080202a120a100a09787878787878787878150000c0bf0cc9ed90"
)


def test_a_file_is_what_tensorboard_itself_writes() -> None:
    assert (beginning(BEGAN_AT) + b"".join(map(record_of_scalar, SCALARS))).hex() == GOLDEN


def test_the_checksum_is_that_of_rfc_3720() -> None:
    """B.4: CRC-32C of 32 zeros, of 32 ones, of 0 to 31; masked as TFRecords mask it."""
    for data, crc in ((bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E)):
        assert masked_crc(data) == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def read(path: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of each figure, by an own reading of both formats."""
    data, found, place = path.read_bytes(), [], 0
    while place < len(data):
        [size] = struct.unpack_from("<Q", data, place)
        assert struct.unpack_from("<I", data, place + 8)[0] == masked_crc(data[place : place + 8])
        fields = dict(protobuf(data[place + 12 : place + 12 + size]))
        if 5 in fields:
            value = dict(protobuf(dict(protobuf(fields[5]))[1]))
            found.append((value[1].decode(), fields.get(2, 0), struct.unpack("<f", value[2])[0]))
        place += 12 + size + 4
    return found


def protobuf(data: bytes):  # type: ignore[no-untyped-def]
    """(field number, value) of a message: numbers of varints, bytes of all else."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or varint()
        yield key >> 3, data[place : place + size]
        place += size


def recorded(count: int = len(RECORDED)) -> Ledger:
    ledger = Ledger(None)
    for record in RECORDED[:count]:
        ledger.append(record)
    ledger.add_traffic(ANN, 1, 1000, 2000)
    ledger.add_traffic(BOB, 1, 3000, 4000)
    return ledger


def test_a_run_is_written_with_its_figures_by_round(tmp_path: Path) -> None:
    path, count = write_run(tmp_path, "triage", recorded(), 2)
    figures = {(tag, step): value for tag, step, value in read(path)}
    assert path.parent.name == "triage-1"
    assert len(figures) == count == len(read(path))
    assert figures["train/loss", 1] == 1.75
    assert figures["round/updates", 1] == 2
    assert (figures["bytes/up", 1], figures["bytes/down", 1]) == (4000, 6000)
    assert figures["updates/norm", 1] == 15.75
    assert figures["updates/cosine", 1] == 0.25
    assert figures["public_kl/pruned", 0] == 0.5
    assert figures["public_kl/realigned", 2] == 0.25
    assert figures["accuracy/plug_in", 1] == 0.5
    assert not any(tag.startswith("auc") for tag, _ in figures)  # there is none


def test_a_file_is_continued_and_never_written_twice(tmp_path: Path) -> None:
    path, early = write_run(tmp_path, "triage", recorded(4), 2)
    before = path.read_bytes()
    _, late = write_run(tmp_path, "triage", recorded(), 2)
    assert early < late
    assert path.read_bytes().startswith(before)
    after = path.read_bytes()
    write_run(tmp_path, "triage", recorded(), 2)
    assert path.read_bytes() == after


@pytest.mark.parametrize("cut", [1, 5, 11, 12, 20, 60])
def test_what_a_crash_cut_is_written_again(tmp_path: Path, cut: int) -> None:
    path, count = write_run(tmp_path, "triage", recorded(), 2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    write_run(tmp_path, "triage", recorded(), 2)
    assert [one[:2] for one in read(path)] == [one[:2] for one in read_of(whole, tmp_path)]
    assert whole_records(path.read_bytes()) == (count + 1, len(whole))


def read_of(data: bytes, directory: Path) -> list[tuple[str, int, float]]:
    (directory / "copy").write_bytes(data)
    return read(directory / "copy")


def test_a_damaged_middle_is_written_again_from_there(tmp_path: Path) -> None:
    path, count = write_run(tmp_path, "triage", recorded(), 2)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    write_run(tmp_path, "triage", recorded(), 2)
    assert len(read(path)) == count


def test_a_file_where_a_directory_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageProblem, match="name a directory that you may write to"):
        write_run(tmp_path / "file", "triage", recorded(), 2)


def test_a_round_whose_seconds_nobody_knows_has_as_many_figures() -> None:
    closed = events.RoundClosed(
        rounds=9, round=1, master=ms.Digest("a" * 64), view=ms.Digest("a" * 64), delta=ms.Digest("a" * 64), moments=None,
        cross_term=None, smaller=(), standings=(), loss=0.5, updates=1, bytes_up=1, bytes_down=1,
    )  # fmt: skip
    unknown, known = scalars_of(closed, 1.0, None), scalars_of(closed, 1.0, 3.0)
    assert [one.tag for one in unknown] == [one.tag for one in known]
    assert math.isnan(next(one.value for one in unknown if one.tag == "round/seconds"))


def test_a_hub_writes_live_what_its_ledger_would_give_and_a_restart_continues(tmp_path: Path) -> None:
    settings = test_daemon.write_run(tmp_path, report={"tensorboard": "board"}, rounds={"count": 2})

    async def rounds(*numbers: int) -> None:
        async with (
            serving(settings) as hub,
            joined(hub.url, tokens(hub, "a")) as a,
            joined(hub.url, tokens(hub, "b"), "phone") as b,
        ):
            for number in numbers:
                await a.upload(await a.hear(ms.RoundOffer), update(0.5 / number))
                await b.upload(await b.hear(ms.RoundOffer), update(0.25 / number))
                await hub.until("round_closed", round=number)

    def tokens(hub: test_daemon.Hub, name: str) -> str:
        return kept.setdefault(name, "") or kept.update({name: hub.token(name)}) or kept[name]

    kept: dict[str, str] = {}
    for number in (1, 2):
        asyncio.run(rounds(number))
    with opened_to_read(RunDirectory(settings.run_dir)) as ledger:
        wanted = [(one.tag, one.step) for one in scalars_of_run(ledger, 2)]
        path = path_of(tmp_path / "board", "small", ledger.replay().run_id)
    found = read(path)
    assert [(tag, step) for tag, step, _ in found] == wanted
    assert {step for tag, step, _ in found if tag == "train/loss"} == {1, 2}
    assert all(value >= 0 for tag, _, value in found if tag == "round/seconds")


def test_a_full_disk_holds_up_nothing(tmp_path: Path) -> None:
    async def talk() -> None:
        file = EventFile(tmp_path / "gone" / "file")
        file.hear(events.Probed(rounds=1, round=1, kl=0.5, cosine=0.5), 1.0)
        await file.close()

    asyncio.run(talk())
