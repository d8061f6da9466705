"""Encrypt the hub's port: TLS 1.3 with a key that devices pin, and certificates that are renewed while the hub serves.

A handshake is a stranger's, bounded as all that strangers do (`strangers.py`). Keys and certificates are
`certificates.py`'s, which requests may come then `listener.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import ssl
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from fedsoda_edge.errors import DiskFull, UsageProblem
from fedsoda_edge.network.tls import pin_text
from fedsoda_edge.ports.disk import write_durably
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.serving import certificates
from fedsoda_hub.serving.certificates import HubCertificate
from fedsoda_hub.serving.guarded import Guarded
from fedsoda_hub.settings.listening import split_url
from fedsoda_hub.settings.run import RunSettings

LOOK_SECONDS = 60.0  # between looks at dates and files
HANDSHAKE_SECONDS = 10
CLOSING_SECONDS = 5  # for the other side's end of TLS, after the hub's own
SOON = timedelta(days=7)  # before its end, from which on an owner's certificate that was not renewed is complained of
READ_BYTES = 4 << 10  # at a time
PLAIN_HTTP = re.compile(rb"(GET|HEAD|POST|PUT|OPTIONS|CONNECT|DELETE|PATCH) ")
WRONG_PROTOCOL = b"This hub speaks TLS: write https:// instead of http://.\n"
WRONG_PROTOCOL_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n"
    + f"Content-Length: {len(WRONG_PROTOCOL)}\r\n\r\n".encode()
    + WRONG_PROTOCOL
)

_log = logging.getLogger("fedsoda_hub.serving")


class Encryption:
    """The certificate that new connections are shown. context: what encrypts them, which `refresh` renews.

    Raises:
        UsageProblem: the owner's certificate or key cannot be used; it says why.
        DiskFull: the disk has no space left.
    """

    context: ssl.SSLContext

    def __init__(self, settings: RunSettings) -> None:
        self._directory = RunDirectory(settings.run_dir)
        self._files = settings.own_certificate
        self._names = _names(settings)
        self._shown: HubCertificate | None = None
        self._complaint = ""
        self._load(datetime.now(UTC))

    @classmethod
    def of(cls, settings: RunSettings) -> Encryption | None:
        """Return what a run's settings ask for; None: the hub speaks plain HTTP.

        Raises:
            UsageProblem, DiskFull: as on construction.
        """
        return cls(settings) if settings.speaks_tls else None

    @property
    def shown(self) -> HubCertificate:
        """The certificate in force and its key."""
        assert self._shown is not None, "the constructor loads it"
        return self._shown

    async def keep(self) -> None:
        """Renew what is shown whenever it is time, or its files have changed; without end."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await asyncio.to_thread(self.refresh, datetime.now(UTC))

    def refresh(self, now: datetime) -> None:
        """Renew what is shown if it is time. What cannot be used is told once, and the certificate in force stays."""
        try:
            self._load(now)
            complaint = ""
            if self._files is not None and self.shown.valid_until - now < SOON:
                complaint = f"{self._files[0]} ends at {self.shown.valid_until:%Y-%m-%d %H:%M} UTC; renew it"
        except (UsageProblem, DiskFull) as problem:
            complaint = f"{problem}; the hub keeps its certificate until {self.shown.valid_until:%Y-%m-%d %H:%M} UTC"
        if complaint and complaint != self._complaint:
            _log.warning("TLS: %s", complaint)
        self._complaint = complaint

    def _load(self, now: datetime) -> None:
        """Load what is to be shown now, if it is another one.

        Raises:
            UsageProblem, DiskFull: as on construction.
        """
        if self._files is not None:
            found = certificates.read_certificate(*self._files, now)
            files = self._files
        else:
            if self._shown is not None and self._is_fresh(self._shown, now):
                return
            files = self._directory.tls_certificate, self._directory.tls_key
            found = certificates.write_certificate(files[1], files[0], self._names, now)
        if self._shown is not None and found.content == self._shown.content:
            return
        context = _context(*files)
        write_durably(self._directory.tls_pin, f"{pin_text(found.pin)}\n".encode())
        self._shown, self.context = found, context

    def _is_fresh(self, one: HubCertificate, now: datetime) -> bool:
        return one.leaf.not_valid_before_utc <= now < one.valid_until - certificates.RENEWED


def _context(certificate_file: Path, key_file: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # an edge stays connected for a run; nothing is resumed
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate_file, key_file, password=lambda: b"")  # never asks at the terminal
    except (ssl.SSLError, OSError) as error:
        raise UsageProblem(
            f"{certificate_file} and {key_file} cannot be used for TLS ({error}); name the PEM files of a certificate and its "
            "key"
        ) from error
    return context


_COMES = memoryview(bytearray(READ_BYTES))  # what a socket has read, of all connections


# --- one connection --------------------------------------------------------------------------------------------------


class Handshake(SSLProtocol):
    """The TLS of one connection. Until its handshake is over it waits among the strangers; then what it carries does."""

    max_size = 0  # of the buffer that asyncio makes for each connection: 256 KiB where it chooses

    def __init__(self, within: Guarded, context: ssl.SSLContext) -> None:
        super().__init__(
            asyncio.get_running_loop(),
            within,
            context,
            None,  # type: ignore[arg-type]
            server_side=True,
            ssl_handshake_timeout=HANDSHAKE_SECONDS,
            ssl_shutdown_timeout=CLOSING_SECONDS,
        )
        self.max_size = READ_BYTES  # type: ignore[misc]
        self.address = ""
        self._strangers, self._turns = within.strangers, within.turns
        self._connections: set[Any] = within.connections
        self._raw: asyncio.Transport | None = None
        self._has_spoken = False
        self._is_over = False

    def connection_made(self, transport: Any) -> None:
        self._raw = transport
        self.address = str((transport.get_extra_info("peername") or ("",))[0])
        self._connections.add(self)
        if self._strangers.may_connect(self.address):
            self._strangers.come(self, len(self._connections))
        else:
            self.end()
        super().connection_made(transport)

    def over(self) -> None:
        """Leave the strangers: both sides speak TLS."""
        self._is_over = True
        self._forget()

    def end(self) -> None:
        """End the connection at once."""
        if self._raw is not None:
            self._raw.abort()

    shutdown = end  # as uvicorn calls it of each connection when the hub ends

    def get_buffer(self, n: int) -> Any:
        return _COMES  # what is read is handed over before anything else is read

    def buffer_updated(self, nbytes: int) -> None:
        data = bytes(_COMES[:nbytes])
        if not self._has_spoken:
            self._has_spoken = True
            if PLAIN_HTTP.match(data) and self._raw is not None:
                self._strangers.complaints.add("plain HTTP instead of TLS")
                self._is_over = True
                self._raw.write(WRONG_PROTOCOL_ANSWER)
                self._raw.close()
                return
        if self._is_over or self._raw is None:
            self._decrypt(data)
        else:  # a handshake costs as much as a request
            self._turns.take(self._raw, partial(self._decrypt, data))

    def _decrypt(self, data: bytes) -> None:
        super().get_buffer(len(data))[: len(data)] = data
        super().buffer_updated(len(data))

    def connection_lost(self, exc: BaseException | None) -> None:
        if not self._is_over:
            self._strangers.complaints.add("gone without a TLS handshake")
        self._forget()
        super().connection_lost(exc)

    def _forget(self) -> None:
        self._strangers.known(self)
        self._connections.discard(self)


def encrypted(kind: type[Guarded], encryption: Encryption) -> Callable[..., asyncio.BaseProtocol]:
    """Return what makes a server's connections: TLS of the context in force, and this protocol within it."""

    class Within(kind):  # type: ignore[valid-type, misc]
        handshake: Handshake

        def connection_made(self, transport: asyncio.Transport) -> None:
            self.handshake.over()
            super().connection_made(transport)

        def may_come(self) -> bool:
            return True  # the handshake was counted

    def make(**given: Any) -> Handshake:
        within = Within(**given)
        within.handshake = Handshake(within, encryption.context)
        return within.handshake

    return make


# --- where edges reach the hub ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WayIn:
    """The way in which a device reaches a hub and knows its TLS.

    addresses: HOST[:PORT][/prefix], the first one first. tls_pin: the pin of the key that it shows; None: an authority
    vouches for what answers, or nothing is encrypted. is_plain: it is reached by plain HTTP. is_guess: nobody said where.
    """

    addresses: tuple[str, ...]
    tls_pin: bytes | None
    is_plain: bool
    is_guess: bool

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses as URLs."""
        return tuple(f"http{'' if self.is_plain else 's'}://{address}" for address in self.addresses)


def way_in(settings: RunSettings, port: int | None = None) -> WayIn:
    """Find how devices reach a run's hub, whether it serves or not; its TLS key is made if it is not there yet.

    Args:
        port: at which it serves; None: the one of [listen], or where that is 0, of the hub that serves now.

    Raises:
        UsageProblem: only a proxy's owner knows where, or the port is known once the hub serves, or the certificate or key
            cannot be used.
        DiskFull: the disk has no space left.
    """
    listen, pin = settings.listen, _pin_of(settings)
    if listen.public_url is not None:
        scheme, address = split_url(listen.public_url, Path(settings.path).name)
        return WayIn((address,), pin, scheme == "http", is_guess=False)
    if is_behind_proxy(settings):
        raise UsageProblem(
            '[tls] mode = "off" says that a proxy is in front of the hub, and nothing says where; write the proxy\'s address as '
            "[listen] public_url"
        )
    port = port or listen.port or _served_port(RunDirectory(settings.run_dir))
    if not port:
        raise UsageProblem(
            "[listen] port = 0 is known once the hub serves; start it first, or write [listen] port or public_url"
        )
    host = _outward(listen.host)
    return WayIn((f"{_bracketed(host)}:{port}",), pin, not settings.speaks_tls, is_guess=host != listen.host)


def is_behind_proxy(settings: RunSettings) -> bool:
    """Tell whether the hub speaks plain HTTP beyond its own machine, so that a proxy must be in front of it."""
    return not settings.speaks_tls and not settings.listen.is_loopback


def _pin_of(settings: RunSettings) -> bytes | None:
    if not settings.speaks_tls:
        return None
    if settings.own_certificate is None:
        directory = RunDirectory(settings.run_dir)
        directory.path.mkdir(parents=True, exist_ok=True)
        return certificates.own_pin(directory.tls_key)
    found = certificates.read_certificate(*settings.own_certificate, datetime.now(UTC))
    # Who renews a certificate of an authority makes a new key as a rule, so only what vouches for itself is pinned.
    return found.pin if found.vouches_for_itself else None


def _served_port(directory: RunDirectory) -> int:
    try:
        return int(directory.address.read_text(errors="replace").rpartition(":")[2])
    except (OSError, ValueError):
        return 0


def _names(settings: RunSettings) -> list[str]:
    """List the hosts that a certificate of the hub's own is for."""
    names = ["localhost", "127.0.0.1", "::1"]
    if settings.listen.public_url is not None:
        address = split_url(settings.listen.public_url, Path(settings.path).name)[1]
        names.insert(0, re.sub(r":\d+$", "", address.partition("/")[0]))
    return [*names, settings.listen.host, _outward(settings.listen.host)]


def _outward(host: str) -> str:
    """Return this machine's own address on the way out where a host means all of its addresses; else the host.

    Nothing is sent: connecting a datagram socket only chooses the way.
    """
    ways = {"0.0.0.0": [(socket.AF_INET, "192.0.2.1")]}
    ways["::"] = [*ways["0.0.0.0"], (socket.AF_INET6, "2001:db8::1")]  # addresses of RFC 5737 and RFC 3849, nobody's
    for family, somewhere in ways.get(host, []):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as chosen:
            chosen.connect((somewhere, 9))
            return str(chosen.getsockname()[0])
    return socket.gethostname() if host in ways else host


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
