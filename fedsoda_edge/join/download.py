"""A bundle comes in the order in which a join needs it, over breaks and pauses; each file is used as soon as it is whole.

Bytes and digests are `store.py`'s, which also lets a reader wait for a file; what is read when is the worker's.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from fedsoda_edge.errors import HubUnreachable
from fedsoda_edge.ports import Transport
from fedsoda_edge.ports.store import FileStore
from fedsoda_edge.protocol.manifest import TOKENIZER_FILES, BundleManifest, File

MAX_BACKOFF_SECONDS = 30.0
TELL_SECONDS = 0.25  # at most so often, but for the end of a file

Run = Callable[[Callable[[], Coroutine[Any, Any, Any]]], Awaitable[Any]]


def in_order(manifest: BundleManifest) -> list[File]:
    """The tokenizer reads the data, the sub-emulator sweeps it from its first layer on, the adapter trains last."""
    layers = [f"layers.{number}" for number in sorted(manifest.plan.kept)]
    roles = ["emulator_lora", "embedding", *layers, "adapter_lora", "norm", "head"]
    names = [*TOKENIZER_FILES, *(f"{role}.safetensors" for role in roles)]
    return sorted(manifest.files, key=lambda file: names.index(file.name))


class Download:
    """One join's.

    Args:
        run: does a piece of work, and again where a pause broke it off.
        keep_trying: also while nothing comes; else a transfer that has moved since the last try is tried again.
    """

    def __init__(
        self,
        transport: Transport,
        store: FileStore,
        *,
        run: Run,
        say: Callable[[dict[str, Any]], None],
        keep_trying: bool,
    ) -> None:
        self._transport = transport
        self._store = store
        self._run = run
        self._say = say
        self._keep_trying = keep_trying
        self._done = self._total = 0
        self._told = float("-inf")

    @contextlib.asynccontextmanager
    async def bundle(
        self, manifest: BundleManifest, digest: str
    ) -> AsyncIterator[Callable[[], Coroutine[Any, Any, None]]]:
        """Between the two ends each file of the bundle is whole, or coming, or not to be had; fetches what is missing.

        Args:
            digest: the manifest's.
        """
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
            self._tell(0)

    async def file(self, digest: str, size: int) -> Path:
        """One file.

        Raises:
            HubUnreachable: it broke off, and did not move at the next try. And what `FileStore.fetch` raises.
        """
        attempt = 0
        while True:
            held = self._store.held_bytes([(digest, size)])
            try:
                path: Path = await self._run(lambda: self._once(digest, size))
                return path
            except HubUnreachable as error:
                has_moved = self._store.held_bytes([(digest, size)]) > held
                if not (has_moved or self._keep_trying):
                    raise
                attempt = 0 if has_moved else attempt + 1
                if attempt < 2:  # not at every try in vain
                    self._say({"event": "reconnecting", "message": str(error)})
                await asyncio.sleep(backoff_seconds(attempt))

    async def _once(self, digest: str, size: int) -> Path:
        came = 0

        def progress(count: int) -> None:
            nonlocal came
            came += count
            now = asyncio.get_running_loop().time()
            if self._total and now - self._told >= TELL_SECONDS:
                self._told = now
                self._tell(came)

        return await self._store.fetch(self._transport, digest, size, progress)

    def _tell(self, came: int) -> None:
        self._say({"event": "download", "done": self._done + came, "total": self._total})


def backoff_seconds(attempt: int) -> float:
    """Longer each time, and not the same for all edges."""
    return min(MAX_BACKOFF_SECONDS, 0.5 * 2.0 ** min(attempt, 10)) * random.uniform(0.5, 1.0)
