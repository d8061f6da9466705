"""Define the seams to the outer world as small Protocols: Clock, Disk, Transport, TorchPort.

What stands behind them is left to the files beside this one and, for the network, to `network/hub_transport.py`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from fedsoda_edge.protocol.calls import Call, ProgressT, ResultT


class Clock(Protocol):
    """A clock. Durations come from `monotonic`, which nobody can set back."""

    def monotonic(self) -> float:
        """Return seconds since some fixed point."""
        ...

    def wall(self) -> float:
        """Return seconds since 1970, for people and for deadlines that outlive a process."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after that many seconds of `monotonic`."""
        ...


class SystemClock:
    """The clock of this machine."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        import asyncio  # not above: it takes a tenth of the time of a command's --help

        await asyncio.sleep(seconds)


class Disk(Protocol):
    """A store of durable blobs by digest (`disk.BlobStore` on a real disk, a dict in tests)."""

    def put(self, data: bytes) -> str:
        """Store a blob durably; return its sha256.

        Raises:
            DiskFull: nothing half-written stays.
        """
        ...

    def get(self, digest: str) -> bytes:
        """Read a blob.

        Raises:
            BlobCorrupt: the bytes do not have that digest, or are gone.
        """
        ...

    def has(self, digest: str) -> bool:
        """Tell whether there is a blob of that digest."""
        ...


class Transport(Protocol):
    """A way to one hub: a conversation in whole frames (`protocol.codec`), and files over HTTP."""

    @property
    def url(self) -> str:
        """The hub's address, for people."""
        ...

    @property
    def up(self) -> int:
        """Bytes of the conversation that were sent."""
        ...

    @property
    def down(self) -> int:
        """Bytes of the conversation that were received."""
        ...

    async def connect(self) -> None:
        """Begin a connection; one that was open before ends.

        Raises:
            HubUnreachable: names the first step that failed.
            RefusedByHub: the hub does not accept the token.
        """
        ...

    async def send(self, frame: bytes) -> None:
        """Send a frame.

        Raises:
            HubUnreachable: the connection ended.
        """
        ...

    def frames(self) -> AsyncIterator[bytes]:
        """Yield frames until the connection ends, orderly or not."""
        ...

    async def close(self) -> None:
        """End the connection, and downloads that run."""
        ...

    def fetch(self, digest: str, offset: int) -> AsyncIterator[bytes]:
        """Yield the bytes of a bundle's file from `offset` on.

        Raises:
            HubUnreachable: the transfer broke off; what came was yielded. RefusedByHub.
        """
        ...


class TorchPort(Protocol):
    """A process that owns torch and answers calls (`child.Child` starts one)."""

    @property
    def pid(self) -> int | None:
        """The process's number, another one after each start; None where nothing runs that takes the next call."""
        ...

    @property
    def rss_bytes(self) -> int | None:
        """Bytes of memory that the process holds now; None while no process runs."""
        ...

    @property
    def peak_rss_bytes(self) -> int:
        """The most bytes of memory that one of its processes held, as far as they have answered."""
        ...

    async def start(self) -> None:
        """Start the process. `call` does it too; this one saves the time of its imports."""
        ...

    async def call(
        self, call: Call[ResultT, ProgressT], on_progress: Callable[[ProgressT], None] | None = None
    ) -> ResultT:
        """Run one call and return its result.

        Raises:
            FedSODAError: what the call raised; WorkerFailed where the process ended or has a defect.
        """
        ...

    async def close(self) -> None:
        """End the process, by force if it has not ended after a few seconds."""
        ...
