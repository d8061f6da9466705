"""Bound what those may hold who have not said who they are, so that they can neither fill the hub nor its log.

A connection is a stranger's until a whole request has come, and again after its answer; a websocket is one until its first
message, and again once it is said goodbye to. Strangers that stay silent are ended; where there are too many, the one that
has waited longest makes room, so that who comes next is heard. How connections are held is `guarded.py`'s, what a request
may ask for `listener.py`'s.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

SILENT_SECONDS = 20.0
LOG_SECONDS = 60.0
MAX_CONNECTIONS = 10_000  # where the system sets no limit
MAX_OF_ADDRESS = 64  # strangers of one address; edges behind one proxy are strangers for an instant each
HANDSHAKES_A_SECOND = 32.0  # of one address, in the long run
HANDSHAKES_AT_ONCE = 256  # of one address: 50 edges behind one router, each with a few connections
AWAY_SECONDS = 20.0  # without a handshake, for an address that has flooded the hub
MAX_ADDRESSES = 16_384  # that are remembered; the one that was quiet longest is forgotten
RESERVED_DESCRIPTORS = 24  # for the ledger, blobs, the compute child, logs
MAX_BACKLOG = 32  # each costs 0.1 ms, in which nobody else has a turn
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

    def handle(self, loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        """Count a connection that no descriptor was left for, as the loop's handler of errors; pass on all others."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in OUT_OF_DESCRIPTORS:
            self.add(f"not accepted: {error.strerror}; raise the limit of open files (ulimit -n)")
        else:
            loop.default_exception_handler(context)


def network_of(host: str) -> str:
    """Return what counts as one address: an IPv4 address however it is written, of IPv6 the /64 that a site has."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return f"{ipaddress.IPv6Address(int(address) >> 64 << 64)}/64"


class Handshakes:
    """The bound of handshakes of one address: a bucket of tokens each, which fills again as time passes.

    Args:
        now: the time in seconds, from any start.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and when they were counted

    def may(self, host: str) -> bool:
        """Tell whether an address may make one more, which counts then."""
        network, now = network_of(host), self._now()
        left, at = self._buckets.pop(network, (float(HANDSHAKES_AT_ONCE), now))
        left = min(float(HANDSHAKES_AT_ONCE), left + (now - at) * HANDSHAKES_A_SECOND)
        is_right = left >= 1
        self._keep(network, left - 1 if is_right else left)
        return is_right

    def keep_away(self, host: str) -> None:
        """Refuse an address's handshakes for some time."""
        self._buckets.pop(network := network_of(host), None)
        self._keep(network, -AWAY_SECONDS * HANDSHAKES_A_SECOND)

    def _keep(self, network: str, left: float) -> None:
        self._buckets[network] = (left, self._now())
        if len(self._buckets) > MAX_ADDRESSES:
            self._buckets.popitem(last=False)


class Stranger(Protocol):
    """A connection that can be ended."""

    @property
    def address(self) -> str:
        """The IP address of the other side."""
        ...

    def end(self) -> None:
        """End the connection at once: who is not heard is not answered either."""
        ...


class Strangers:
    """The connections on which no request is under way, the one that has waited longest first.

    Args:
        counts_loopback: whether the bound of handshakes holds on this machine too, where proxies come from.
    """

    def __init__(
        self, limits: ConnectionLimits, complaints: Complaints, handshakes: Handshakes, *, counts_loopback: bool = False
    ) -> None:
        self.limits = limits
        self.complaints = complaints
        self._handshakes = handshakes
        self._counts_loopback = counts_loopback
        self._waiting: OrderedDict[Stranger, asyncio.TimerHandle] = OrderedDict()
        self._of_address: dict[str, OrderedDict[Stranger, None]] = {}

    def may_connect(self, host: str) -> bool:
        """Tell whether an address may connect once more; those of a proxy on this machine are counted by request."""
        if not self._counts_loopback and is_loopback(host):
            return True
        if self._handshakes.may(host):
            return True
        self.complaints.add(f"refused: more than {HANDSHAKES_A_SECOND:.0f} connections a second of one address")
        return False

    def keep_away(self, host: str) -> None:
        """Refuse connections of an address that floods, for some time; of this machine, where the bound is for it too."""
        if self._counts_loopback or not is_loopback(host):
            self._handshakes.keep_away(host)

    def come(self, connection: Stranger, num_connections: int) -> None:
        """Take a connection that has to say something; end another one, or this one, where there are too many."""
        self.known(connection)
        loop = asyncio.get_running_loop()
        if num_connections > self.limits.all and not self._make_room(self._waiting):
            self.complaints.add(
                f"refused: {self.limits.all} others are open; raise the limit of open files (ulimit -n)"
            )
            connection.end()
            return
        network = network_of(connection.address)
        theirs = self._of_address.get(network)
        if theirs is not None and len(theirs) >= self.limits.of_address:
            self._make_room(theirs)
        elif len(self._waiting) >= self.limits.strangers:
            self._make_room(self._waiting)
        self._of_address.setdefault(network, OrderedDict())[connection] = None
        self._waiting[connection] = loop.call_later(SILENT_SECONDS, self._silent, connection)

    def known(self, connection: Stranger) -> None:
        """Note that a request has come on a connection, or that it is gone."""
        if (timer := self._waiting.pop(connection, None)) is not None:
            timer.cancel()
            network = network_of(connection.address)
            theirs = self._of_address[network]
            del theirs[connection]
            if not theirs:
                del self._of_address[network]

    def _make_room(self, candidates: OrderedDict[Stranger, Any]) -> bool:
        oldest = next(iter(candidates), None)
        if oldest is None:
            return False
        self.complaints.add("ended to make room for another")
        self.known(oldest)
        oldest.end()
        return True

    def _silent(self, connection: Stranger) -> None:
        self.complaints.add(f"ended after {SILENT_SECONDS:.0f} s without a request")
        self.known(connection)
        connection.end()


def is_loopback(host: str) -> bool:
    """Tell whether an address is this machine's own, in any spelling."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback  # ::ffff:127.0.0.1 where the port is for both
