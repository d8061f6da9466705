"""Bound what those may hold who have not said who they are, so that they can neither fill the hub nor its log.

A connection is a stranger's until a whole request has come, and again after its answer. Strangers that stay silent are
ended; where there are too many, the one that has waited longest makes room, so that who comes next is heard. What a
request may ask for is `listener.py`'s.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from uvicorn.protocols.http.h11_impl import H11Protocol

SILENT_SECONDS = 20.0
LOG_SECONDS = 60.0
MAX_CONNECTIONS = 10_000  # where the system sets no limit
MAX_OF_ADDRESS = 64  # strangers of one address; edges behind one proxy are strangers for an instant each
RESERVED_DESCRIPTORS = 16  # for the ledger, blobs, the compute child, logs
MAX_BACKLOG = 128
OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

_log = logging.getLogger("fedsoda_hub.serving")


class ConnectionLimits:
    """The numbers of connections for which there is room.

    Args:
        descriptors: files and sockets that may still be opened; None: any number.

    all: connections; each may open a file besides. backlog: those that are accepted before any of them is looked at.
    """

    def __init__(self, descriptors: int | None) -> None:
        room = MAX_CONNECTIONS * 2 if descriptors is None else descriptors - RESERVED_DESCRIPTORS
        self.all = min(MAX_CONNECTIONS, max(4, room * 2 // 3))
        self.strangers = max(2, self.all // 2)
        self.of_address = min(MAX_OF_ADDRESS, self.strangers)
        self.backlog = min(MAX_BACKLOG, max(2, room - self.all))


class Complaints:
    """The deeds of strangers, counted, and told in one line of the log a minute."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._told_at = float("-inf")
        self._counts: Counter[str] = Counter()

    def add(self, what: str) -> None:
        """Count what happened; tell it, unless a line was written within the last minute."""
        self._counts[what] += 1
        if self._now() - self._told_at >= LOG_SECONDS:
            self.tell()

    def tell(self) -> None:
        """Write what was counted since the last line."""
        if self._counts:
            self._told_at = self._now()
            _log.warning("connections: %s", ", ".join(f"{what} ({count})" for what, count in self._counts.items()))
            self._counts.clear()

    def filter(self, record: logging.LogRecord) -> bool:
        """Count what uvicorn says of single requests, as a filter of its logger; let errors with a traceback through."""
        if record.levelno >= logging.WARNING and record.exc_info is None:
            self.add(record.getMessage().rstrip("."))
            return False
        return True

    def handle(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Count a connection that no descriptor was left for, as the loop's handler of errors; pass on all others."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in OUT_OF_DESCRIPTORS:
            self.add(f"not accepted: {error.strerror}; raise the limit of open files (ulimit -n)")
        else:
            loop.default_exception_handler(context)


class Stranger(Protocol):
    """A connection that has to say something yet."""

    @property
    def address(self) -> str:
        """The IP address of the other side."""

    def end(self) -> None:
        """End the connection at once: who is not heard is not answered either."""


class Strangers:
    """The connections on which no request is under way, the one that has waited longest first."""

    def __init__(self, limits: ConnectionLimits, complaints: Complaints) -> None:
        self.limits = limits
        self.complaints = complaints
        self._waiting: dict[Stranger, asyncio.TimerHandle] = {}

    def come(self, connection: Stranger, num_connections: int) -> None:
        """Take a connection that has to say something; end another one, or this one, where there are too many."""
        self.known(connection)
        loop = asyncio.get_running_loop()
        if num_connections > self.limits.all and not self._make_room(list(self._waiting)):
            self.complaints.add(
                f"refused: {self.limits.all} others are open; raise the limit of open files (ulimit -n)"
            )
            connection.end()
            return
        theirs = [one for one in self._waiting if one.address == connection.address]
        if len(theirs) >= self.limits.of_address:
            self._make_room(theirs)
        elif len(self._waiting) >= self.limits.strangers:
            self._make_room(list(self._waiting))
        self._waiting[connection] = loop.call_later(SILENT_SECONDS, self._silent, connection)

    def known(self, connection: Stranger) -> None:
        """Note that a request has come on a connection, or that it is gone."""
        if (timer := self._waiting.pop(connection, None)) is not None:
            timer.cancel()

    def _make_room(self, candidates: list[Stranger]) -> bool:
        for oldest in candidates[:1]:
            self.complaints.add("ended to make room for another")
            self.known(oldest)
            oldest.end()
        return bool(candidates)

    def _silent(self, connection: Stranger) -> None:
        self.complaints.add(f"ended after {SILENT_SECONDS:.0f} s without a request")
        self.known(connection)
        connection.end()


class Guarded(H11Protocol):
    """An HTTP connection that `Strangers` knows of."""

    strangers: Strangers  # set by `guarded`

    @property
    def address(self) -> str:
        return self.client[0] if self.client else ""

    def end(self) -> None:
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.strangers.come(self, len(self.connections))

    def connection_lost(self, exc: Exception | None) -> None:
        self.strangers.known(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before and not self.cycle.response_complete:
            self.strangers.known(self)

    def handle_websocket_upgrade(self, event: Any) -> None:
        self.strangers.known(self)
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing():
            self.strangers.come(self, len(self.connections))


def guarded(strangers: Strangers) -> type[Guarded]:
    """Return the class of a server's connections, all of which these strangers know of."""
    return type("Guarded", (Guarded,), {"strangers": strangers})
