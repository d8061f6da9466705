"""Sealed records in one file: read by name with the key alone, cut where they are torn, and never read where damaged."""

from __future__ import annotations

import errno
import os
import stat
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsoda_edge.ports import disk
from fedsoda_edge.worker.record_file import RecordFile, from_record, row_bytes, to_record

KEY, WIDTH = bytes(range(32)), 64
MARK, HEAD, TAG = 48, 32, 16  # bytes of a file's beginning, of a record's head and of its tag
LARGE = 1 << 30


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


# -- a record -------------------------------------------------------------------------------------------


@pytest.fixture
def state() -> torch.Tensor:
    """(5, 64), rows of very different size, one of them zero."""
    sizes = torch.tensor([1e-6, 1.0, 0.0, 300.0, 7e4])
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0)) * sizes[:, None]


def test_a_bf16_record_is_the_state_rounded_to_bf16(state: torch.Tensor) -> None:
    record = to_record(state, "bf16")
    assert len(record) == 5 * row_bytes(WIDTH, "bf16") == 5 * 2 * WIDTH
    assert torch.equal(from_record(record, WIDTH, "bf16"), state.to(torch.bfloat16))


def test_an_int8_record_is_within_half_a_step_of_each_rows_largest_magnitude(state: torch.Tensor) -> None:
    record = to_record(state, "int8")
    assert len(record) == 5 * row_bytes(WIDTH, "int8") == 5 * (WIDTH + 4)
    back = from_record(record, WIDTH, "int8")
    for row, got in zip(state.double(), back.double(), strict=True):
        step = max(abs(float(value)) for value in row) / 127
        assert float((row - got).abs().max()) <= step / 2 * (1 + 1e-5)
    assert not back[2].any()


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_record_of_a_record_is_itself(state: torch.Tensor, dtype: str) -> None:
    once = from_record(to_record(state, dtype), WIDTH, dtype)
    again = from_record(to_record(once, dtype), WIDTH, dtype)
    torch.testing.assert_close(again, once, rtol=1e-6, atol=0)


# -- a file of records ----------------------------------------------------------------------------------


def three_records(path: Path) -> RecordFile:
    """Names a, b, c of 2, 3 and 2 rows of 8 bytes."""
    file = RecordFile(path, KEY, "purpose", 8, LARGE)
    for letter, rows in ((b"a", 2), (b"b", 3), (b"c", 2)):
        assert file.put(letter * 16, rows, letter * 8 * rows)
    return file


A, B, C = b"a" * 16, b"b" * 16, b"c" * 16
AT_B = MARK + HEAD + 16 + TAG
AT_C = AT_B + HEAD + 24 + TAG


def test_records_are_found_by_name_now_and_after_opening_again(tmp_path: Path) -> None:
    file = three_records(tmp_path / "f")
    assert file.num_bytes == (tmp_path / "f").stat().st_size == AT_C + HEAD + 16 + TAG
    file.close()
    for _ in range(2):
        file = RecordFile(tmp_path / "f", KEY, "purpose", 8, LARGE)
        assert (file.get(A), file.get(B), file.get(C)) == (b"a" * 16, b"b" * 24, b"c" * 16)
        assert file.get(b"d" * 16) is None
        assert file.damaged == 0
        file.close()


def test_only_its_owner_reads_the_file(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        three_records(tmp_path / "f").close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o600


@pytest.mark.parametrize("change", [{"key": bytes(32)}, {"purpose": "another"}])
def test_a_file_of_another_key_or_purpose_is_emptied(tmp_path: Path, change: dict[str, Any]) -> None:
    three_records(tmp_path / "f").close()
    file = RecordFile(tmp_path / "f", **({"key": KEY, "purpose": "purpose"} | change), row_bytes=8, max_bytes=LARGE)
    assert [name in file for name in (A, B, C)] == [False] * 3
    assert file.damaged == 0
    assert (tmp_path / "f").stat().st_size == MARK
    file.close()


@pytest.mark.parametrize(
    "offset", [0, HEAD - 12, HEAD, HEAD + 23, HEAD + 24 + TAG - 1], ids=["head", "nonce", "first", "last", "tag"]
)
def test_a_flipped_bit_is_noticed_once_and_the_record_may_be_written_again(tmp_path: Path, offset: int) -> None:
    file = three_records(tmp_path / "f")
    flip(tmp_path / "f", AT_B + offset)
    assert file.get(B) is None
    assert B not in file
    assert file.get(B) is None
    assert file.damaged == 1
    assert file.put(B, 3, b"B" * 24)
    file.close()
    file = RecordFile(tmp_path / "f", KEY, "purpose", 8, LARGE)
    assert (file.get(A), file.get(B), file.get(C)) == (b"a" * 16, b"B" * 24, b"c" * 16)
    file.close()


@pytest.mark.parametrize("cut", [1, TAG, TAG + 16 + 5, TAG + 16 + HEAD - 1])
def test_a_file_cut_off_in_a_record_keeps_those_before_and_grows_after_them(tmp_path: Path, cut: int) -> None:
    three_records(tmp_path / "f").close()
    whole = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(whole[:-cut])
    file = RecordFile(tmp_path / "f", KEY, "purpose", 8, LARGE)
    assert (file.get(A), file.get(B), file.get(C)) == (b"a" * 16, b"b" * 24, None)
    assert file.num_bytes == (tmp_path / "f").stat().st_size == AT_C  # nothing of the torn one stays behind the next
    assert file.put(C, 1, b"c" * 8)
    file.close()
    file = RecordFile(tmp_path / "f", KEY, "purpose", 8, LARGE)
    assert (file.get(A), file.get(B), file.get(C)) == (b"a" * 16, b"b" * 24, b"c" * 8)
    assert file.damaged == 0
    file.close()


@pytest.mark.parametrize("begin", [0, HEAD - 12], ids=["whole", "under the other's name"])
def test_a_record_in_anothers_place_is_refused(tmp_path: Path, begin: int) -> None:
    file = three_records(tmp_path / "f")
    data = bytearray((tmp_path / "f").read_bytes())
    length = HEAD + 16 + TAG
    one, other = slice(MARK + begin, MARK + length), slice(AT_C + begin, AT_C + length)
    data[one], data[other] = data[other], data[one]
    (tmp_path / "f").write_bytes(data)
    assert (file.get(A), file.get(C)) == (None, None)
    assert file.damaged == 2
    assert file.get(B) == b"b" * 24
    file.close()


def test_a_file_grows_no_larger_than_it_may_and_shrinks_when_it_may_less(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "f", KEY, "purpose", 8, AT_B + 10)
    assert file.put(A, 2, b"a" * 16)
    assert file.room == 10
    assert not file.put(B, 3, b"b" * 24)
    assert file.num_bytes == AT_B
    file.close()
    three_records(tmp_path / "g").close()
    file = RecordFile(tmp_path / "g", KEY, "purpose", 8, AT_C + 10)
    assert (file.get(A), file.get(B), file.get(C)) == (b"a" * 16, b"b" * 24, None)
    assert (tmp_path / "g").stat().st_size == AT_C
    file.close()


class FullDisk:
    """A disk that takes `takes` bytes more, then half of a write, and fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, takes: int, number: int = errno.ENOSPC) -> None:
        plain = disk.write_at

        def write(file: FileIO, offset: int, *parts: bytes) -> None:
            data = b"".join(parts)
            if len(data) > self.left:
                plain(file, offset, data[: len(data) // 2])
                raise OSError(number, os.strerror(number))
            self.left -= len(data)
            plain(file, offset, data)

        self.left = takes
        monkeypatch.setattr(disk, "write_at", write)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_what_is_whole_and_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    full = FullDisk(monkeypatch, AT_B, number)
    file = RecordFile(tmp_path / "f", KEY, "purpose", 8, LARGE)
    assert file.put(A, 2, b"a" * 16)
    assert not file.put(B, 3, b"b" * 24)
    assert (tmp_path / "f").stat().st_size == AT_B
    full.left = LARGE
    assert not file.put(C, 2, b"c" * 16)
    assert file.get(A) == b"a" * 16
    file.close()


def test_a_broken_disk_is_not_a_full_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FullDisk(monkeypatch, MARK, errno.EIO)
    file = RecordFile(tmp_path / "f", KEY, "purpose", 8, LARGE)
    with pytest.raises(OSError, match="Input/output error"):
        file.put(A, 2, b"a" * 16)
    file.close()
