"""What is written is there whole or not at all; a blob is what its name says, and no other name reaches the disk."""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path

import pytest

from fedsoda_edge.errors import BlobCorrupt, DiskFull
from fedsoda_edge.ports.disk import BlobStore, sha256, sha256_file, write_durably


def test_a_file_is_replaced_whole_and_nothing_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "made" / "state"
    write_durably(path, b"old")
    write_durably(path, memoryview(b"new"))
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="file modes are POSIX")
def test_a_secret_is_its_owners_from_the_first_byte_on(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_durably(tmp_path / "key", b"secret", 0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_a_full_disk_leaves_the_old_bytes_and_says_what_did_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    write_durably(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull) as failure:
        write_durably(path, b"newer")
    assert str(failure.value).startswith(f"the disk is full: 5 bytes for {path} did not fit; free space there")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_another_fault_of_the_disk_stays_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"exists|directory"):
        write_durably(tmp_path / "file" / "below", b"x")


def test_a_blob_comes_back_by_its_digest(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path / "blobs")
    digest = blobs.put(b"tensors")
    assert (digest, blobs.has(digest), blobs.get(digest)) == (sha256(b"tensors"), True, b"tensors")
    assert blobs.put(b"tensors") == digest
    assert sha256_file(blobs.path(digest)) == digest
    with pytest.raises(BlobCorrupt, match=r"is missing.*fedsoda-hub reset"):
        blobs.get("0" * 64)


def test_a_blob_that_was_changed_is_told_with_both_digests(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    digest = blobs.put(b"tensors")
    blobs.path(digest).write_bytes(b"others")
    with pytest.raises(BlobCorrupt, match=f"has digest {sha256(b'others')[:12]}, its name says {digest[:12]}"):
        blobs.get(digest)


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "0" * 63, "0" * 65, "A" * 64, "0" * 63 + "/"])
def test_what_is_not_a_digest_names_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not a sha256 digest"):
        BlobStore(tmp_path).path(name)
