"""Tell the service manager how this process is, by systemd's notifications: ready, alive, what it does, stopping.

That it is alive is said by the event loop that does the work, so that a loop that hangs is heard of. What is said is left
to the two `cli` rooms, and files that start services to `service_files.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from fedsoda_edge.errors import FedSODAError
from fedsoda_edge.ports.system import reached_by

STATUS_SECONDS = 2.0  # between two looks at what there is to say
MAX_STATUS_BYTES = 1000  # a message above 4 KiB is dropped as a whole
_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
_LONGEST_ADDRESS = 107  # bytes of a socket's path, before the zero that ends it


class Supervisor:
    """The service manager that started this process. Where none did, nothing is sent.

    Args:
        address: NOTIFY_SOCKET: a path, or "@" and an abstract name. watchdog_seconds: after which silence is a hang;
            None: nobody listens for that.
    """

    def __init__(self, address: str | None, watchdog_seconds: float | None = None) -> None:
        self._address = address
        self._watchdog_seconds = watchdog_seconds
        self._is_ready = False

    @classmethod
    def taken(cls) -> Supervisor:
        """Take the manager's variables out of the environment, which children would inherit."""
        address, microseconds, pid = (os.environ.pop(name, "") for name in _VARIABLES)
        is_for_us = pid in ("", str(os.getpid()))
        watched = int(microseconds) / 1e6 if microseconds.isdecimal() and is_for_us else 0.0
        return cls(address if address[:1] in ("/", "@") and len(address) > 1 else None, watched or None)

    def ready(self) -> None:
        """Say, once, that the service is up."""
        if not self._is_ready:
            self._is_ready = True
            self._send("READY=1")

    def stopping(self) -> None:
        """Say that the service ends."""
        self._send("STOPPING=1")

    def does(self, sentence: str) -> None:
        """Say what the service does, for `systemctl status`."""
        line = " ".join(sentence.split()).encode("utf-8", "replace")[:MAX_STATUS_BYTES]
        self._send(f"STATUS={line.decode('utf-8', 'ignore')}")

    async def attend(self, sentence: Callable[[], Awaitable[str]]) -> None:
        """Say from this event loop that it lives, and what it does, until this is cancelled.

        Args:
            sentence: what the service does now; "": nothing is known. What the machine or the other side refuses it is
                left out, and asked again.
        """
        if self._address is None:
            return
        async with asyncio.TaskGroup() as group:
            group.create_task(self._tell(sentence))
            if self._watchdog_seconds is not None:
                group.create_task(self._live(self._watchdog_seconds / 2))

    async def _live(self, seconds: float) -> None:
        while True:
            self._send("WATCHDOG=1")
            await asyncio.sleep(seconds)

    async def _tell(self, sentence: Callable[[], Awaitable[str]]) -> None:
        said = ""
        while True:
            with contextlib.suppress(FedSODAError, OSError):
                now = await sentence()
                if now and now != said:
                    said = now
                    self.does(now)
            await asyncio.sleep(STATUS_SECONDS)

    def _send(self, message: str) -> None:
        """Send a message, or drop it where nobody takes it: a service works without its manager too."""
        if self._address is None:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            if self._address.startswith("@"):
                sender.sendto(message.encode(), b"\0" + os.fsencode(self._address[1:]))
            elif len(os.fsencode(self._address)) <= _LONGEST_ADDRESS:
                sender.sendto(message.encode(), self._address)
            else:
                path = Path(self._address)
                with reached_by(path.parent) as directory:
                    sender.sendto(message.encode(), f"{directory}/{path.name}")
