"""Decide where a file of the bundle is asked for: at the run's mirrors, as long as they are good, and then at the hub.

What comes is verified by its digest, so a mirror need not be trusted. Fetching is left to `download.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Protocol

from fedsoda_edge.errors import BlobCorrupt
from fedsoda_edge.events import EventSink, Notice
from fedsoda_edge.join.pace import TooSlow
from fedsoda_edge.join.witness import HubWitness
from fedsoda_edge.protocol.mirrors import MAX_MIRRORS, is_mirror

MAX_FAILURES = 3  # in a row, after which a mirror is left out of a join


class FileSource(Protocol):
    """A place with files of the bundle: the hub's `Transport`, or a mirror. url: its address, for people."""

    @property
    def url(self) -> str: ...
    def fetch(self, digest: str, offset: int) -> AsyncIterator[bytes]:
        """Yield the bytes of a file from `offset` on. Raises HubUnreachable, RefusedByHub."""
        ...

    async def close(self) -> None: ...


OpenMirror = Callable[[str], FileSource]  # by its URL; raises UsageProblem where this device's proxy is not one


class Sources:
    """The hub and the mirrors of one join.

    Args:
        witness: knows which mirrors the hub signed, and notes where files are asked for.
        open_mirror: None: files come from the hub alone.
    """

    def __init__(
        self, hub: FileSource, say: EventSink, witness: HubWitness | None, open_mirror: OpenMirror | None
    ) -> None:
        self.hub = hub
        self._say = say
        self._witness = witness
        self._open = open_mirror
        self._opened: dict[str, FileSource] = {}
        self._failures: dict[str, int] = {}  # in a row
        self._left_out: set[str] = set()
        self._asked: set[str] = set()

    @classmethod
    def only(cls, hub: FileSource) -> Sources:
        """Return a hub without mirrors."""
        return cls(hub, lambda _: None, None, None)

    def mirrors(self) -> list[FileSource]:
        """Return the mirrors to ask before the hub, in its order."""
        statement = None if self._witness is None else self._witness.trust.statement
        if statement is None or self._open is None:
            return []
        urls = [url for url in dict.fromkeys(statement.mirrors[:MAX_MIRRORS]) if is_mirror(url)]
        for url in urls:
            if url not in self._opened:
                self._opened[url] = self._open(url)
        return [self._opened[url] for url in urls if url not in self._left_out]

    def ask(self, source: FileSource) -> None:
        """Note that a file is asked for here, the first time in this join."""
        if self._witness is not None and source.url not in self._asked:
            self._asked.add(source.url)
            self._witness.asks(source.url)

    def worked(self, source: FileSource) -> None:
        """Note that a whole file is here which this source completed."""
        self._failures.pop(source.url, None)

    def failed(self, mirror: FileSource, error: Exception) -> None:
        """Note that a mirror did not give a file, and say what follows.

        A mirror whose bytes are not the file's, or come too slowly, is left out at once, any other after some failures.
        """
        url = mirror.url
        self._failures[url] = self._failures.get(url, 0) + 1
        is_out = isinstance(error, BlobCorrupt | TooSlow) or self._failures[url] >= MAX_FAILURES
        if is_out:
            self._left_out.add(url)
        so = "this join asks it no more; " if is_out else ""
        self._say(Notice(f"the mirror {url} failed ({error}); {so}the file is taken from elsewhere"))

    async def close(self) -> None:
        """Close the mirrors; the hub's transport is its owner's."""
        for mirror in self._opened.values():
            await mirror.close()
        self._opened.clear()
