"""Decide who is the hub's owner at a browser: a link that works once begins a session, and on the hub's own machine none is needed.

What a session may see and do is `page.py`'s. Secrets are kept as their sha256, and in memory alone: all ends with the hub.
"""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

LINK_SECONDS = 15 * 60.0  # in which a sign-in link can be used
IDLE_SECONDS = 12 * 3600.0  # after which a session that nobody used ends
MAX_LINKS = 16  # that nobody has used; one more ends the oldest
MAX_SESSIONS = 64
TRIES = 10  # wrong sign-ins of one address within TRY_SECONDS
TRY_SECONDS = 60.0
MAX_ADDRESSES = 1024  # whose wrong sign-ins are remembered


@dataclass
class Session:
    """An owner at a browser. csrf: what each change names, which no other site can read. used_at: in seconds of the clock."""

    csrf: str
    used_at: float


@dataclass(frozen=True)
class BegunSession:
    """A session that has just begun. secret: what its cookie holds, which is not kept."""

    secret: str
    session: Session


class TooManyTries(Exception):
    """An address tried too many wrong sign-ins within a minute."""


@dataclass
class SignIn:
    """The sign-in links and sessions of a hub.

    now: seconds from any start. own_names: the names by which a browser on the hub's own machine may call it; empty: the hub is
    reached through a proxy, so that a request from its own machine may be anybody's. origins: those of the page elsewhere.
    """

    now: Callable[[], float]
    own_names: frozenset[str]
    origins: frozenset[str] = frozenset()
    _links: OrderedDict[str, float] = field(default_factory=OrderedDict)
    _sessions: OrderedDict[str, Session] = field(default_factory=OrderedDict)
    _wrong: OrderedDict[str, list[float]] = field(default_factory=OrderedDict)

    def new_link(self) -> str:
        """Make the secret of a sign-in link, which works once, within LINK_SECONDS."""
        secret = secrets.token_urlsafe(32)
        self._links[_hash(secret)] = self.now() + LINK_SECONDS
        while len(self._links) > MAX_LINKS:
            self._links.popitem(last=False)
        return secret

    def use_link(self, secret: str, address: str) -> BegunSession | None:
        """Begin the session that this link allows, once; None: it was used, it is too old, or it never was one.

        Args:
            address: of the one who asks.

        Raises:
            TooManyTries: the address tried too many wrong ones.
        """
        now = self.now()
        wrong = [at for at in self._wrong.pop(address, ()) if now - at < TRY_SECONDS]
        if wrong:
            self._wrong[address] = wrong
        if len(wrong) >= TRIES:
            raise TooManyTries
        until = self._links.pop(_hash(secret), None)
        if until is not None and now <= until:
            return self.begin()
        self._wrong[address] = [*wrong, now]
        while len(self._wrong) > MAX_ADDRESSES:
            self._wrong.popitem(last=False)
        return None

    def begin(self) -> BegunSession:
        """Begin a session; where there are too many, the one that was idle longest ends."""
        secret = secrets.token_urlsafe(32)
        session = Session(secrets.token_urlsafe(32), self.now())
        self._sessions[_hash(secret)] = session
        while len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return BegunSession(secret, session)

    def find(self, secret: str | None) -> Session | None:
        """Return the session of a cookie, which is used now; None: there is none, or it was idle too long."""
        key = _hash(secret or "")
        session = self._sessions.get(key)
        if session is None:
            return None
        if not self.is_alive(session):
            del self._sessions[key]
            return None
        session.used_at = self.now()
        self._sessions.move_to_end(key)
        return session

    def is_alive(self, session: Session) -> bool:
        """Tell whether a session was used within IDLE_SECONDS, and nobody ended it."""
        return self.now() - session.used_at < IDLE_SECONDS and any(one is session for one in self._sessions.values())

    def end(self, secret: str | None) -> None:
        """End the session of a cookie."""
        self._sessions.pop(_hash(secret or ""), None)

    def needs_no_link(self, host: str) -> bool:
        """Tell whether a request from the hub's own machine needs no sign-in.

        Args:
            host: its Host header. A site whose name points to this machine (DNS rebinding) sends its own name there.
        """
        return host_name(host) in self.own_names

    def is_of_page(self, origin: str | None, host: str) -> bool:
        """Tell whether a change comes from this page, by the Origin that browsers add to it and the Host that it went to."""
        if not origin:
            return False
        return origin in self.origins or urlsplit(origin).netloc.lower() == host.lower() != ""


def host_name(host: str) -> str:
    """Return the name in a Host header, without port and brackets, in lower case."""
    name = host.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0]


def is_address_or_own_name(host: str) -> bool:
    """Tell whether a Host header is an IP address or localhost, which no site has for a name."""
    name = host_name(host)
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost"
    return True


def own_names(listen_host: str, public_url: str | None) -> frozenset[str]:
    """Return the names by which a browser on the hub's own machine may call it without a sign-in.

    A proxy on this machine passes on the requests of others as its own, not always with a header that says so; a hub that
    listens here alone and has an address elsewhere is behind one.

    Args:
        listen_host: [listen] host. public_url: [listen] public_url.
    """
    if public_url is not None and host_name(urlsplit(public_url).netloc) not in OWN_NAMES:
        return frozenset()
    try:
        is_here = ipaddress.ip_address(listen_host).is_loopback
    except ValueError:
        is_here = False
    return OWN_NAMES | ({listen_host.lower()} if is_here else set())


OWN_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
