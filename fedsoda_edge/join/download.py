"""Fetch a bundle in the order in which a join needs its files, over breaks and pauses; each is used as soon as it is whole.

Where files lie and how a reader waits for one is left to `ports/store.py`; when a file is read, to the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from fedsoda_edge.errors import BlobCorrupt, DiskFull, HubUnreachable, ProtocolViolation, RefusedByHub
from fedsoda_edge.events import Downloading, EventSink, Reconnecting
from fedsoda_edge.join.pace import TooSlow, paced
from fedsoda_edge.join.patience import Patience
from fedsoda_edge.join.sources import FileSource, Sources
from fedsoda_edge.ports import Clock
from fedsoda_edge.ports.disk import sha256_file
from fedsoda_edge.ports.store import FileStore
from fedsoda_edge.protocol.manifest import TOKENIZER_FILES, BundleManifest, File, check_manifest_size
from fedsoda_edge.protocol.messages import BlobRef

SAY_SECONDS = 0.25  # at least between two events, except at the end of a file
STALL_SECONDS = 60.0  # of a download that no Welcome goes before

Run = Callable[[Callable[[], Coroutine[Any, Any, Any]]], Awaitable[Any]]


def in_order(manifest: BundleManifest) -> list[File]:
    """Sort files by use: the tokenizer reads the data, the sub-emulator sweeps it layer by layer, the adapter trains."""
    layers = [f"layers.{number}" for number in sorted(manifest.plan.kept)]
    roles = ["emulator_lora", "embedding", *layers, "adapter_lora", "norm", "head"]
    names = [*TOKENIZER_FILES, *(f"{role}.safetensors" for role in roles)]
    return sorted(manifest.files, key=lambda file: names.index(file.name))


class Download:
    """The downloads of one join.

    Args:
        sources: where files may come from.
        run: does a piece of work, again after each pause that breaks it off.
        patience: how long to try for bytes that do not come; each byte is progress, but of a transfer that comes too slowly.
        stall_seconds: the window in which a transfer must come fast enough.
    """

    def __init__(
        self,
        sources: Sources,
        store: FileStore,
        *,
        run: Run,
        say: EventSink,
        patience: Patience,
        clock: Clock,
        stall_seconds: float,
    ) -> None:
        self._sources = sources
        self._stall_seconds = stall_seconds
        self._store = store
        self._run = run
        self._say = say
        self._patience = patience
        self._clock = clock
        self._done = self._total = 0
        self._said_at = float("-inf")

    @contextlib.asynccontextmanager
    async def bundle(
        self, manifest: BundleManifest, digest: str
    ) -> AsyncIterator[Callable[[], Coroutine[Any, Any, None]]]:
        """Give the coroutine that fetches what is missing. Within the block, readers wait for files that are not here yet.

        Args:
            digest: the manifest's.

        Raises:
            BlobCorrupt: its files take more than the disk that it says they need, for which this device had room.
        """
        total = sum(file.bytes for file in manifest.files)
        if total > manifest.needs.disk_bytes:
            raise BlobCorrupt(
                f"the bundle's files have {total} bytes, and its manifest says that {manifest.needs.disk_bytes} bytes of disk "
                "are enough; ask the hub's owner"
            )
        held = await asyncio.to_thread(self._store.verified, [file.sha256 for file in manifest.files])
        mark = self._store.coming(digest)
        mark.touch()
        try:
            yield lambda: self._fetch(in_order(manifest), held)
        finally:
            mark.unlink(missing_ok=True)

    async def _fetch(self, files: Sequence[File], held: set[str]) -> None:
        self._done, self._total = 0, sum(file.bytes for file in files)
        for file in files:
            if file.sha256 not in held:
                await self.file(file.sha256, file.bytes)
            self._done += file.bytes
            self._say_done(0)

    async def manifest(self, blob: BlobRef) -> Path:
        """Fetch a manifest as `file` does, if it has a manifest's size.

        Raises:
            BlobCorrupt: it has not.
        """
        check_manifest_size(blob.bytes)
        return await self.file(blob.digest, blob.bytes)

    async def file(self, digest: str, size: int) -> Path:
        """Fetch one file, over breaks; return its path.

        Raises:
            HubUnreachable: the transfer broke off, and nothing more came for as long as the patience lasts.
            BlobCorrupt, DiskFull, ProtocolViolation: as `fetch_file`.
        """
        while True:
            held = self._store.held_bytes([(digest, size)])
            try:
                path: Path = await self._run(lambda: self._once(digest, size))
            except HubUnreachable as error:
                if self._store.held_bytes([(digest, size)]) > held and not isinstance(error, TooSlow):
                    self._patience.progressed()
                if self._patience.is_new:  # not at every try that brings nothing
                    self._say(Reconnecting(str(error)))
                await self._patience.after(error)
            else:
                self._patience.progressed()
                return path

    async def _once(self, digest: str, size: int) -> Path:
        came = 0

        def progress(count: int) -> None:
            nonlocal came
            came = min(size, came + count)  # of a file that comes again, the bytes from before do not count
            now = self._clock.monotonic()
            if self._total and now - self._said_at >= SAY_SECONDS:
                self._said_at = now
                self._say_done(came)

        return await _fetch(self._store, self._sources, digest, size, self._stall_seconds, progress)

    def _say_done(self, came: int) -> None:
        self._say(Downloading(self._done + came, self._total))


async def fetch_manifest(store: FileStore, hub: FileSource, manifest: BlobRef) -> Path:
    """Fetch a manifest from the hub as `fetch_file` does, if it has a manifest's size.

    Raises:
        BlobCorrupt: it has not.
    """
    check_manifest_size(manifest.bytes)
    return await fetch_file(store, hub, manifest.digest, manifest.bytes)


async def fetch_file(
    store: FileStore, hub: FileSource, digest: str, size: int, progress: Callable[[int], None] = lambda _: None
) -> Path:
    """Fetch a file from the hub and return its path once it is verified. A cut download continues; a corrupt one begins
    again, once.

    Args:
        progress: called with the number of bytes that came.

    Raises:
        BlobCorrupt: two downloads in a row do not have the digest.
        DiskFull: there is no space; what came so far stays, and the next join continues from it.
        HubUnreachable: the transfer broke off, or ended early; what came stays too.
        ProtocolViolation: the hub named something that is not a digest.
    """
    return await _fetch(store, Sources.only(hub), digest, size, STALL_SECONDS, progress)


async def _fetch(
    store: FileStore,
    sources: Sources,
    digest: str,
    size: int,
    stall_seconds: float,
    progress: Callable[[int], None],
) -> Path:
    """Fetch a file as `fetch_file` does: from the mirrors, each of which is tried once, and then from the hub.

    Each source continues where the one before stopped. Where the whole has another digest, all that gave bytes of it are
    left out from then on, and it begins again.
    """
    try:
        part = store.part(digest)
    except ValueError as error:
        raise ProtocolViolation(
            f"the hub names a file {digest[:80]!r}, which is not a sha256 digest; ask the hub's owner to upgrade it"
        ) from error
    if await asyncio.to_thread(store.verified, [digest]):
        progress(size)
        return store.path(digest)
    store.directory.mkdir(parents=True, exist_ok=True)
    found, hub = "", sources.hub
    gave: list[FileSource] = []  # mirrors with bytes in the part
    for source in (*sources.mirrors(), hub, hub):
        sources.ask(source)
        try:
            await _fetch_part(source, source is hub, digest, size, part, stall_seconds, progress)
        except (HubUnreachable, RefusedByHub, BlobCorrupt) as error:
            if source is hub:
                raise
            sources.failed(source, error)
            if isinstance(error, BlobCorrupt):
                part.unlink(missing_ok=True)
                gave.clear()
            else:
                gave.append(source)
            continue
        gave += [source] if source is not hub else []
        found = await asyncio.to_thread(sha256_file, part)
        if found == digest:
            sources.worked(source)
            return store.keep(digest)
        part.unlink()
        wrong = BlobCorrupt(f"a file of the bundle came with digest {found[:12]} instead of {digest[:12]}")
        for mirror in gave:
            sources.failed(mirror, wrong)
        gave.clear()
    raise BlobCorrupt(
        f"a file of the bundle came twice with digest {found[:12]} instead of {digest[:12]}; "
        "ask the hub's owner to check the run's bundle directory"
    )


async def _fetch_part(
    source: FileSource,
    is_hub: bool,
    digest: str,
    size: int,
    part: Path,
    stall_seconds: float,
    progress: Callable[[int], None],
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
            async with contextlib.aclosing(paced(source.fetch(digest, have), source.url, stall_seconds)) as pieces:
                async for piece in pieces:
                    have += len(piece)
                    if have > size:
                        wrong = f"sends more than the {size} bytes that {digest[:12]} has"
                        ask = "ask the hub's owner to check the run's bundle directory"
                        raise BlobCorrupt(f"the hub {wrong}; {ask}" if is_hub else f"it {wrong}")
                    file.write(piece)
                    progress(len(piece))
            file.flush()
            os.fsync(file.fileno())
        if have < size:  # as a proxy that gives up may end a transfer
            raise HubUnreachable(
                f"the download from {source.url} ended after {have} of {size} bytes; join again, which continues it",
                "HTTP",
            )
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"the disk of {part.parent} is full: {have:,} of {size:,} bytes of a file of the bundle are here; free "
                f"{size - have:,} bytes and what the files after it need, then join again"
            ) from error
        raise
