"""Keep the bytes of uploads under way in files, so that memory holds one chunk of each, and bound how many bytes those are.

What is announced counts from its start until it is kept or dropped. What a killed hub left is deleted by the next one.
Which upload is kept is `uploads.py`'s.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import mmap
import shutil
import threading
import time
from io import FileIO
from pathlib import Path

from fedsoda_edge.errors import DiskFull
from fedsoda_edge.ports.disk import BlobStore
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.units import human_bytes

ROOM_BYTES = 1 << 30  # of uploads under way, of all edges together
LEAST_UPLOADS = 64  # that find room at once, however large they are


class NoRoom(Exception):
    """Too many bytes are under way already; the same update may come later."""


class Useless(Exception):
    """The update cannot be accepted whatever its bytes are; says why."""


class Spools:
    """The uploads under way of a run.

    Args:
        directory: theirs alone.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # pieces are written, and spools dropped, in threads
        self._bytes = 0

    @property
    def num_bytes(self) -> int:
        """The bytes that the uploads under way were announced with."""
        return self._bytes

    def clear(self) -> None:
        """Delete what a hub left that was killed."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def open(self, start: ms.UpdateStart, most_bytes: int, why_useless: str | None) -> Spool:
        """Make the place for an announced upload; where it is useless or has no room, its bytes go nowhere.

        Args:
            most_bytes: those of the largest update of this run.
        """
        room = max(ROOM_BYTES, LEAST_UPLOADS * most_bytes)
        with self._lock:
            problem: Exception | None = None
            if why_useless is not None:
                problem = Useless(why_useless)
            elif self._bytes + start.bytes > room:
                problem = NoRoom(
                    f"uploads of {human_bytes(self._bytes)} are under way, and the hub has room for {human_bytes(room)}; "
                    "the update is sent again later"
                )
            else:
                self._bytes += start.bytes
            return Spool(self, self._directory / str(next(self._numbers)), start, problem)

    def release(self, num_bytes: int) -> None:
        """Note that an upload is under way no more."""
        with self._lock:
            self._bytes -= num_bytes


class Spool:
    """A `Gathered` in a file. problem: why the bytes were not kept; None: they were.

    Its methods may be called from any thread, one after the other.
    """

    def __init__(self, spools: Spools, path: Path, start: ms.UpdateStart, problem: Exception | None) -> None:
        self.size = 0
        self.problem = problem
        self._spools = spools
        self._path = path
        self._start = start
        self._held = start.bytes if problem is None else 0
        self._hash = hashlib.sha256()
        self._file: FileIO | None = None
        self._lock = threading.Lock()  # a write may be under way while its connection ends
        self._began_at = time.monotonic()

    @property
    def seconds(self) -> float:
        """The seconds since the upload was announced."""
        return time.monotonic() - self._began_at

    def add(self, payload: bytes) -> None:
        """Write a chunk; where the disk is full, remember that, and let the rest go."""
        with self._lock:
            self.size += len(payload)
            if self._held == 0:
                return
            try:
                if self._file is None:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    self._file = FileIO(self._path, "w+")
                view = memoryview(payload)
                while view:
                    view = view[self._file.write(view) :]
            except OSError as error:
                self._forget()
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                self.problem = DiskFull(
                    f"the disk is full: {self._start.bytes} bytes of an update did not fit; free space there, then try again"
                )
            self._hash.update(payload)

    def digest(self) -> str:
        """Return the sha256 of all that was added; where it was not kept, the one that was announced."""
        return self._start.digest if self.problem is not None else self._hash.hexdigest()

    def whole(self) -> memoryview:
        """Return all that was added, in pages of the file; nothing where it was not kept."""
        with self._lock:
            if self._file is None:
                return memoryview(b"")
            return memoryview(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))

    def keep(self, blobs: BlobStore) -> None:
        """Move the file into a store, durably.

        Raises:
            DiskFull: it is not kept.
        """
        with self._lock:
            assert self._file is not None, "only what is whole is kept"
            try:
                blobs.adopt(self._path, self._start.digest)
            finally:
                self._forget()

    def drop(self) -> None:
        """Delete the file."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._path.unlink(missing_ok=True)
        self._spools.release(self._held)
        self._held = 0
