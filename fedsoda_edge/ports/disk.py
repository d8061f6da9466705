"""Write files so that a power cut leaves the old bytes or the new ones. What the bytes mean is left to the caller."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
from io import FileIO
from pathlib import Path
from typing import Any

from fedsoda_edge.errors import BlobCorrupt, DiskFull
from fedsoda_edge.ports.system import sync_directory

_DIGEST = re.compile(r"[0-9a-f]{64}")


def sha256(data: bytes | memoryview) -> str:
    """Compute the digest by which a blob is named: 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Compute a file's digest, without holding the file in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_durably(path: Path, data: bytes | memoryview, mode: int = 0o666) -> None:
    """Write a file by temporary file, fsync, rename and fsync of the directory, docs/protocol.md (p7-durable).

    Args:
        mode: the file's mode from its first byte on, less the umask; 0o600 for secrets.

    Raises:
        DiskFull: nothing half-written stays.
        OSError: the directory cannot be written to.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"the disk is full: {len(data)} bytes for {path} did not fit; free space there, then try again"
            ) from error
        raise


def write_once(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file as `write_durably` does, unless there is one by then: of several at once exactly one stays.

    Raises:
        DiskFull: nothing half-written stays.
        OSError: the directory cannot be written to.
    """
    mine = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    write_durably(mine, data, mode)
    try:
        os.link(mine, path)
        sync_directory(path.parent)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            os.replace(mine, path)
    finally:
        mine.unlink(missing_ok=True)


def write_durably_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON with sorted keys, as `write_durably` does."""
    write_durably(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def write_at(file: FileIO, offset: int, *parts: bytes) -> None:
    """Write all parts, one after the other, at an offset of an unbuffered file, which may take less at once.

    Raises:
        OSError: the disk is full or failed; a part of the bytes may be in the file.
    """
    file.seek(offset)
    for part in parts:
        view = memoryview(part)
        while view:
            view = view[file.write(view) :]


class BlobStore:
    """A directory of blobs, each named by its sha256. No other name ever reaches the file system."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, digest: str) -> Path:
        """Return where the blob is or would be.

        Raises:
            ValueError: `digest` is not 64 hex digits.
        """
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"not a sha256 digest: {digest[:80]!r}")
        return self.directory / digest

    def put(self, data: bytes) -> str:
        """Store a blob durably; return its sha256.

        Raises:
            DiskFull: nothing half-written stays.
        """
        digest = sha256(data)
        path = self.path(digest)
        if not path.exists():
            write_durably(path, data)
        return digest

    def adopt(self, path: Path, digest: str) -> None:
        """Move a file into the store durably; it has this digest, and is on the same file system.

        Raises:
            DiskFull: the store is as it was; the file may still be where it was.
        """
        target = self.path(digest)
        if target.exists():
            path.unlink()
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(path, target)
            sync_directory(self.directory)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(f"the disk is full: {target} did not fit; free space there, then try again") from error
            raise

    def get(self, digest: str) -> bytes:
        """Read a blob.

        Raises:
            BlobCorrupt: the bytes do not have that digest, or the file is gone.
        """
        try:
            data = self.path(digest).read_bytes()
        except FileNotFoundError:
            raise self._missing(digest) from None
        self._compare(digest, sha256(data))
        return data

    def verify(self, digest: str) -> None:
        """Compare a blob with its name, without holding it in memory.

        Raises:
            BlobCorrupt: the bytes do not have that digest, or the file is gone.
        """
        try:
            found = sha256_file(self.path(digest))
        except FileNotFoundError:
            raise self._missing(digest) from None
        self._compare(digest, found)

    def digests(self) -> list[str]:
        """Return the digests of all blobs there are, in any order."""
        try:
            return [name for name in os.listdir(self.directory) if _DIGEST.fullmatch(name)]
        except FileNotFoundError:
            return []

    def delete_unfinished(self) -> None:
        """Delete what writers left that were killed. Call it only while nobody writes."""
        for path in self.directory.glob("*.part"):
            path.unlink(missing_ok=True)

    def delete(self, digest: str) -> None:
        """Delete a blob, if there is one."""
        self.path(digest).unlink(missing_ok=True)

    def _missing(self, digest: str) -> BlobCorrupt:
        return BlobCorrupt(
            f"{self.path(digest)} is missing: the disk or another program deleted it; put it back from a copy, or begin "
            "a hub's run again with `fedsoda-hub reset`"
        )

    def _compare(self, digest: str, found: str) -> None:
        if found != digest:
            raise BlobCorrupt(
                f"{self.path(digest)} has digest {found[:12]}, its name says {digest[:12]}: the disk or another "
                "program changed it; put it back from a copy, or begin a hub's run again with `fedsoda-hub reset`"
            )

    def has(self, digest: str) -> bool:
        """Tell whether there is a blob of that digest."""
        return self.path(digest).exists()
