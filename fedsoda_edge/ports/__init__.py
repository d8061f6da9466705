"""The seams to the outer world as small Protocols: Clock, Disk, Transport, TorchPort. The real ones stand beside."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from fedsoda_edge.protocol.calls import Call, ProgressT, ResultT


class Clock(Protocol):
    """Two clocks: durations come from `monotonic`, which no one can set back."""

    def monotonic(self) -> float:
        """Seconds since some fixed point."""
        ...

    def wall(self) -> float:
        """Seconds since 1970, for people and for deadlines that outlive a process."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return when that many seconds of `monotonic` have passed."""
        ...


class SystemClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Disk(Protocol):
    """Durable blobs by digest (`disk.BlobStore` on a real disk, a dict in tests)."""

    def put(self, data: bytes) -> str:
        """Store durably, return the sha256. Raises DiskFull; then nothing half-written stays."""
        ...

    def get(self, digest: str) -> bytes:
        """Raises BlobCorrupt when the bytes do not have that digest, KeyError when there are none."""
        ...

    def has(self, digest: str) -> bool: ...


class Transport(Protocol):
    """One conversation with a hub in whole frames (`protocol.codec`), and its blobs over HTTP."""

    @property
    def url(self) -> str:
        """Which hub it is, for people."""
        ...

    @property
    def up(self) -> int:
        """Bytes of the conversation that were sent."""
        ...

    @property
    def down(self) -> int:
        """Bytes of the conversation that came."""
        ...

    async def connect(self) -> None:
        """Raises HubUnreachable (with the step), RefusedByHub."""
        ...

    async def send(self, frame: bytes) -> None: ...

    def frames(self) -> AsyncIterator[bytes]:
        """Yield frames until the connection ends, orderly or not."""
        ...

    async def close(self) -> None: ...

    def fetch(self, digest: str, offset: int) -> AsyncIterator[bytes]:
        """Yield the bytes of a bundle file from `offset` on."""
        ...


class TorchPort(Protocol):
    """Calls to a process that owns torch: `child.Child` starts one for them."""

    @property
    def pid(self) -> int | None:
        """The process's number, another one after each start; None where nothing runs that takes the next call."""
        ...

    @property
    def rss_bytes(self) -> int | None:
        """Bytes that the process holds now; None where nothing runs."""
        ...

    @property
    def peak_rss_bytes(self) -> int:
        """Bytes that any of its processes held at most, as far as they have answered."""
        ...

    async def start(self) -> None: ...

    async def call(
        self, call: Call[ResultT, ProgressT], on_progress: Callable[[ProgressT], None] | None = None
    ) -> ResultT:
        """Run one call and return its result.

        Raises:
            FedSODAError: what the call raised; WorkerFailed where the process ended, or raised something else.
        """
        ...

    async def close(self) -> None:
        """End the process, by force where it does not end by itself in a few seconds."""
        ...
