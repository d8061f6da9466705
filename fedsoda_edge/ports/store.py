"""Bundle files by digest on disk: resume a download, verify before use. The network is the transport's."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fedsoda_edge.errors import BlobCorrupt, DiskFull, ProtocolViolation
from fedsoda_edge.ports import Transport
from fedsoda_edge.ports.disk import BlobStore, sha256_file
from fedsoda_edge.ports.system import sync_directory

ARRIVAL_SECONDS = 0.02  # so often a reader looks whether its file is here


def when_here(path: Path, coming: Path) -> Path:
    """Wait for a file of a store as long as the file `coming` says that a download is under way."""
    while not path.exists() and coming.exists():
        time.sleep(ARRIVAL_SECONDS)
    return path


class FileStore(BlobStore):
    """A BlobStore that fetches what it lacks. A file gets its name when it is whole and verified, not before."""

    def held_bytes(self, files: list[tuple[str, int]]) -> int:
        """How many bytes of these (digest, size) files are here already, parts of downloads included."""
        total = 0
        for digest, size in files:
            for path in (self.path(digest), self._part(digest)):
                if path.exists():
                    total += min(size, path.stat().st_size)
        return total

    def verified(self, digests: Sequence[str]) -> set[str]:
        """Those that are here and whole. What the disk or another program changed is taken away."""
        found = set()
        for digest in digests:
            path = self.path(digest)
            if path.exists():
                if sha256_file(path) == digest:
                    found.add(digest)
                else:
                    path.unlink()
        return found

    def coming(self, digest: str) -> Path:
        """The file that is there while the bundle of this manifest is fetched, for `when_here`."""
        return self.path(digest).with_suffix(".coming")

    def _part(self, digest: str) -> Path:
        return self.path(digest).with_suffix(".part")

    async def fetch(
        self, transport: Transport, digest: str, size: int, progress: Callable[[int], None] = lambda _: None
    ) -> Path:
        """The verified file. A cut download goes on where it stopped; a corrupt one is fetched once more.

        Args:
            progress: called with the number of bytes that came.

        Raises:
            BlobCorrupt: two downloads in a row do not have the digest.
            DiskFull: no space; what came so far stays and is used next time.
            ProtocolViolation: the hub named something that is no digest.
        """
        try:
            path, part = self.path(digest), self._part(digest)
        except ValueError as error:
            raise ProtocolViolation(
                f"the hub names a file {digest[:80]!r}, which is no sha256; upgrade the hub"
            ) from error
        if await asyncio.to_thread(self.verified, [digest]):
            progress(size)
            return path
        self.directory.mkdir(parents=True, exist_ok=True)
        found = ""
        for _ in range(2):
            await self._download(transport, digest, size, part, progress)
            found = await asyncio.to_thread(sha256_file, part)
            if found == digest:
                os.replace(part, path)
                sync_directory(self.directory)
                return path
            part.unlink()
        raise BlobCorrupt(
            f"a file of the bundle came twice with digest {found[:12]} instead of {digest[:12]}; "
            "ask the hub's owner to check the run's bundle directory"
        )

    async def _download(
        self, transport: Transport, digest: str, size: int, part: Path, progress: Callable[[int], None]
    ) -> None:
        have = part.stat().st_size if part.exists() else 0
        if have > size:
            part.unlink()
            have = 0
        progress(have)
        if have == size:
            return
        try:
            with part.open("ab") as file:
                async for piece in transport.fetch(digest, have):
                    have += len(piece)
                    if have > size:
                        raise BlobCorrupt(
                            f"the hub sends more than the {size} bytes that {digest[:12]} has; "
                            "ask the hub's owner to check the run's bundle directory"
                        )
                    file.write(piece)
                    progress(len(piece))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(f"the disk is full at {have} of {size} bytes; free space, then join again") from error
            raise
