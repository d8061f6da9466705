"""Give a notice to an owner's program on its stdin, in a bounded time. What it prints goes nowhere but for its last words."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsoda_edge.ports.system import group_of_its_own, kill_group
from fedsoda_hub.serving.notices import HubNotice
from fedsoda_hub.serving.notify import NotDelivered

LAST_BYTES = 2000  # of what a program writes to stderr
PIECE_BYTES = 1 << 16
_SECRETS = ("FEDSODA_TOKEN", "FEDSODA_LINK")


@dataclass(frozen=True)
class HookCommand:
    """The way to a program. directory: where it runs. It is killed with all that it started when its time is over."""

    arguments: Sequence[str]
    directory: Path
    seconds: float
    name: str = "command"

    async def deliver(self, notice: HubNotice, body: bytes) -> None:
        """Run the program once for this notice.

        Raises:
            NotDelivered: it cannot be started, failed, or did not end in time.
        """
        ours = {name: value for name, value in os.environ.items() if name not in _SECRETS}
        try:
            process = await asyncio.create_subprocess_exec(
                *self.arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                cwd=self.directory,
                env={**ours, "FEDSODA_EVENT": notice.kind},
                **group_of_its_own(),
            )
        except (OSError, ValueError) as error:
            raise NotDelivered(f"{self.arguments[0]} cannot be started ({error})") from error
        last = bytearray()
        reading = asyncio.create_task(_keep_last(process, last))
        try:
            async with asyncio.timeout(self.seconds):
                await _give(process, body + b"\n")
                await process.wait()
        except TimeoutError:
            raise NotDelivered(f"{self.arguments[0]} did not end within {self.seconds:g} s and was killed") from None
        finally:
            if process.returncode is None:
                kill_group(process.pid)
            status = await process.wait()
            with contextlib.suppress(TimeoutError):  # what it left behind may hold the pipe
                async with asyncio.timeout(1):
                    await reading
            process._transport.close()  # type: ignore[attr-defined]
        if status:
            said = bytes(last).decode(errors="replace").strip().splitlines()
            raise NotDelivered(
                f"{self.arguments[0]} ended with status {status}" + (f": {said[-1][:300]}" if said else "")
            )


async def _give(process: asyncio.subprocess.Process, data: bytes) -> None:
    """Write the program's stdin; one that does not read it is none the worse."""
    assert process.stdin is not None
    with contextlib.suppress(ConnectionError):
        process.stdin.write(data)
        await process.stdin.drain()
    with contextlib.suppress(ConnectionError):
        process.stdin.close()


async def _keep_last(process: asyncio.subprocess.Process, last: bytearray) -> None:
    assert process.stderr is not None
    while piece := await process.stderr.read(PIECE_BYTES):
        last += piece
        del last[:-LAST_BYTES]
