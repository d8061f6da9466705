"""Stand in for a service manager: a real datagram socket that keeps what services say."""

from __future__ import annotations

import contextlib
import socket


class Manager:
    """The end that systemd has: it keeps what it hears, with the time."""

    def __init__(self, address: str | bytes) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.setblocking(False)

    def heard(self) -> list[str]:
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(self._socket.recv(4096).decode())
        return found

    def close(self) -> None:
        self._socket.close()
