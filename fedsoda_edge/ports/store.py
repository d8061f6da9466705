"""Keep files of bundles on disk by digest, whole or in part. How they are fetched is left to `join/download.py`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from fedsoda_edge.ports.disk import BlobStore, sha256_file
from fedsoda_edge.ports.system import sync_directory

ARRIVAL_SECONDS = 0.02  # between two looks of a reader, in another process, whether its file is here


def when_here(path: Path, coming: Path) -> Path:
    """Wait for a file of a store while the file `coming` shows that a download is under way; return its path.

    The file may still be missing then: the download ended without it.
    """
    while not path.exists() and coming.exists():
        time.sleep(ARRIVAL_SECONDS)
    return path


class FileStore(BlobStore):
    """A BlobStore of files that come in parts. A file gets its name when it is whole and verified."""

    def held_bytes(self, files: list[tuple[str, int]]) -> int:
        """Count the bytes of these (digest, size) files that are here already, parts of downloads included."""
        total = 0
        for digest, size in files:
            for path in (self.path(digest), self.part(digest)):
                if path.exists():
                    total += min(size, path.stat().st_size)
        return total

    def verified(self, digests: Sequence[str]) -> set[str]:
        """Select the files that are here and whole. A file that the disk or another program changed is deleted."""
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
        """Return the file that exists while the bundle of this manifest is fetched, for `when_here`.

        Raises:
            ValueError: `digest` is not 64 hex digits.
        """
        return self.path(digest).with_suffix(".coming")

    def part(self, digest: str) -> Path:
        """Return the file that holds what has come so far.

        Raises:
            ValueError: `digest` is not 64 hex digits.
        """
        return self.path(digest).with_suffix(".part")

    def keep(self, digest: str) -> Path:
        """Give a part that is whole and verified its name; return its path."""
        path = self.path(digest)
        os.replace(self.part(digest), path)
        sync_directory(self.directory)
        return path
