"""Programs of the real world that tests start: proxies, on a port of this machine."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence

SECONDS = 30.0


@contextlib.contextmanager
def runs_on_port(command: Sequence[str], port: int, env: Mapping[str, str] | None = None) -> Iterator[None]:
    """Run a program until the end of the block, and begin once it listens there.

    Raises:
        AssertionError: it ended; the sentence is what it wrote to stderr.
    """
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=env)
    try:
        until = time.monotonic() + SECONDS
        while process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.02)
        if process.poll() is not None:
            _, said = process.communicate()
            raise AssertionError(said.decode())
        yield
    finally:
        process.terminate()
        process.communicate(timeout=20)
