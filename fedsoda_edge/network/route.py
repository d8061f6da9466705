"""Decide the way to one address, once for all that talk to it: path, proxy, and what the hub must show.

The websocket, the downloads and `doctor` all ask a Route; neither library reads the environment for itself. Contexts of TLS
are `tls.py`'s; whether anything answers on that way is left to `checks.py`.
"""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from urllib.parse import quote, unquote, urlsplit

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.network import tls
from fedsoda_edge.network.tls import Trust

PORTS = {"http": 80, "https": 443, "socks5h": 1080}
# What tools write into all_proxy for a SOCKS 5 proxy. The proxy resolves names in each case: with one rule both libraries
# reach the same host, also one that only the proxy knows.
SOCKS_5 = ("socks", "socks5", "socks5h")
HOW_TO_WRITE = "write http://host:port or https://host"


@dataclass(frozen=True)
class Proxy:
    """A proxy between this device and an address.

    variable: the name of what asks for it. scheme: "http", "https" or "socks5h". userinfo: as a URL has it.
    """

    variable: str
    scheme: str
    host: str
    port: int
    userinfo: str = field(default="", repr=False)

    @property
    def url(self) -> str:
        """The URL for libraries, with user and password: never for people."""
        at = f"{self.userinfo}@" if self.userinfo else ""
        return f"{self.scheme}://{at}{bracketed(self.host)}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{bracketed(self.host)}:{self.port} ({self.variable})"


@dataclass(frozen=True)
class Route:
    """The way to a hub; `Route.to` decides it.

    address: host and port as they were written. prefix: the path below which the hub answers; "" or "/...".
    around: the entry of no_proxy that keeps this address from a proxy; "": none does.
    """

    scheme: str
    address: str
    host: str
    port: int
    prefix: str
    proxy: Proxy | None
    around: str
    environment: Mapping[str, str] = field(repr=False)
    trust: Trust = field(default_factory=Trust)

    @classmethod
    def to(cls, url: str, environment: Mapping[str, str] | None = None, trust: Trust = Trust()) -> Route:
        """Decide the way to a hub. An address without a scheme is https://, or http:// on this machine.

        Args:
            environment: None: this process's.

        Raises:
            UsageProblem: the URL is not one of a hub, a variable does not name a proxy, or plain HTTP would leave this
                machine and may not.
        """
        environment = os.environ if environment is None else environment
        url = url.strip()
        shown = _without_secrets(url)
        try:
            parts = urlsplit(url if "://" in url else f"https://{url}")
            scheme, host, port = parts.scheme, parts.hostname or "", parts.port
            if "://" not in url and trust.pin is None and is_loopback(host):
                scheme = "http"
            is_address = scheme in ("http", "https") and re.fullmatch(r"[^\s\x00-\x1f]+", host) and port != 0
        except ValueError:  # a port above 65535 or without digits, an open bracket
            is_address = False
        if "@" in re.split(r"[?#]", url, maxsplit=1)[0]:
            raise UsageProblem(
                f"the address {shown!r} was given with a user or password, which a hub does not ask for; "
                f"{HOW_TO_WRITE}, and name the token's file with token_file"
            )
        if not is_address:
            raise UsageProblem(f"{shown!r} is not the address of a hub; {HOW_TO_WRITE}")
        if "?" in url or "#" in url:
            raise UsageProblem(
                f"the address {shown!r} was given with a query or fragment (from ? or # on), which a hub does not read; "
                "leave it out"
            )
        port = port or PORTS[scheme]
        prefix = quote(parts.path.rstrip("/"), safe="/%:@!$&'()*+,;=~-._")
        proxy, around = choose_proxy(scheme, host, port, environment)
        if scheme == "http":
            _check_plain(shown, host, proxy, trust)
        return cls(scheme, parts.netloc, host, port, prefix, proxy, around, environment, trust)

    @property
    def url(self) -> str:
        """The hub's address, for people too."""
        return f"{self.scheme}://{self.address}{self.prefix}"

    @property
    def websocket_url(self) -> str:
        """The address of the conversation."""
        return f"{'wss' if self.scheme == 'https' else 'ws'}://{self.address}{self.prefix}/v1/session"

    @property
    def first_hop(self) -> tuple[str, int]:
        """Host and port to which this device itself connects."""
        return (self.host, self.port) if self.proxy is None else (self.proxy.host, self.proxy.port)

    @property
    def via(self) -> str:
        """The words that say which way this is, for people."""
        if self.proxy is not None:
            return str(self.proxy)
        if self.around:
            return f"none: no_proxy has {self.around!r}"
        other = "https" if self.scheme == "http" else "http"
        unused = _variable(f"{other}_proxy", self.environment)
        return f"none for {self.scheme}://" + (f" ({unused[0]} is for {other}:// alone)" if unused else "")

    @cached_property
    def tls(self) -> ssl.SSLContext | None:
        """The context for the hub; None for http://, which has no TLS.

        Raises:
            UsageProblem: a variable names certificates that cannot be read.
        """
        if self.scheme != "https":
            return None
        return tls.pinned(self.trust.pin) if self.trust.pin is not None else tls.trusted(self.environment)

    @cached_property
    def tls_of_proxy(self) -> ssl.SSLContext | None:
        """The context for a proxy that speaks TLS itself, which no pin is of; None: there is none.

        Raises:
            UsageProblem: as `tls`.
        """
        return tls.trusted(self.environment) if self.proxy is not None and self.proxy.scheme == "https" else None


def _check_plain(shown: str, host: str, proxy: Proxy | None, trust: Trust) -> None:
    """Check that plain HTTP stays on this machine, or may leave it.

    Raises:
        UsageProblem: it leaves it and may not, or a key is pinned, which plain HTTP does not show.
    """
    if trust.pin is not None:
        raise UsageProblem(
            f"{shown} is plain HTTP, which shows no key, but the key {tls.shortened(trust.pin)} is pinned; write https://"
        )
    if trust.insecure_http or (is_loopback(host) and (proxy is None or is_loopback(proxy.host))):
        return
    way = "" if proxy is None else f" through the proxy {proxy}"
    readable = "whoever is on the way could read this device's token and its updates, and change what the hub sends"
    if is_loopback(host):
        raise UsageProblem(
            f"{shown} would leave this machine as plain HTTP{way}: {readable}; add {host} to no_proxy, or allow it with "
            "insecure_http"
        )
    raise UsageProblem(
        f"{shown} is plain HTTP to another machine{way}: {readable}; write https:// (a hub that listens beyond its own "
        "machine speaks TLS, and prints at its start the pin='sha256/...' to give with it), or allow it with insecure_http "
        "where the network is yours alone"
    )


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine, whatever its resolver says."""
    address = _ip(host)
    if address is None:
        return host.lower() == "localhost"
    return address.is_loopback or address.is_unspecified  # to 0.0.0.0 systems connect as to 127.0.0.1


def bracketed(host: str) -> str:
    """Return a host as URLs have it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def _without_secrets(url: str) -> str:
    """Return a URL without what may be a user, a password or a token."""
    scheme, mark, rest = url.rpartition("://")
    return scheme + mark + re.split(r"[?#]", rest.rpartition("@")[2], maxsplit=1)[0]


# --- proxies ---------------------------------------------------------------------------------------------------------


def _variable(name: str, environment: Mapping[str, str]) -> tuple[str, str] | None:
    """Find a variable: its name and value; None where it is not set, or empty. Lower case counts before upper case."""
    for spelling in (name, name.upper()):
        if (value := environment.get(spelling)) is not None:
            value = value.strip().strip("'\"").strip()  # files of variables for containers keep quotes
            return (spelling, value) if value else None
    return None


def choose_proxy(scheme: str, host: str, port: int, environment: Mapping[str, str]) -> tuple[Proxy | None, str]:
    """Choose the proxy for an address: (proxy or None, the entry of no_proxy that keeps it from one or "").

    Raises:
        UsageProblem: the variable that counts does not name a proxy.
    """
    found = _variable(f"{scheme}_proxy", environment) or _variable("all_proxy", environment)
    if found is None and environment is os.environ:  # Windows and macOS have settings beside the environment
        given = urllib.request.getproxies().get(scheme)
        if given and not urllib.request.proxy_bypass(host):
            found = ("the system's settings", given)
    if found is None:
        return None, ""
    spared = _variable("no_proxy", environment)
    if spared is not None and (entry := sparing(host, port, spared[1])):
        return None, entry
    return read_proxy(*found), ""


def read_proxy(variable: str, value: str) -> Proxy:
    """Read a proxy as people and tools write it: with or without scheme, user and password, a slash at the end.

    Raises:
        UsageProblem: it is not a proxy, or one of a kind that cannot be used.
    """
    scheme, mark, rest = value.rpartition("://") if "://" in value else ("http", "", value)
    userinfo, at, address = rest.rpartition("@")
    scheme = "socks5h" if scheme.lower() in SOCKS_5 else scheme.lower()
    shown = f"{scheme}://{address}" if mark else address
    if scheme in ("socks4", "socks4a"):
        raise UsageProblem(
            f"{variable} names {shown}, and SOCKS 4 cannot be used; if the proxy speaks SOCKS 5 too, write socks5h://"
        )
    try:
        parts = urlsplit(f"//{address}")
        port = PORTS[scheme] if parts.port is None else parts.port
        is_proxy = re.fullmatch(r"[^\s\x00-\x1f]+", parts.hostname or "") and port and parts.path in ("", "/")
        is_proxy = is_proxy and not (parts.query or parts.fragment)
    except (KeyError, ValueError):
        is_proxy = False
    if not is_proxy:
        raise UsageProblem(
            f"{variable} is {shown!r}, which is not the address of a proxy; write http://host:port or socks5h://host:port"
        )
    if at:
        user, _, password = userinfo.partition(":")  # a password may hold @ and #, though a URL would have them as %XX
        userinfo = f"{quote(unquote(user), safe='')}:{quote(unquote(password), safe='')}"
    return Proxy(variable, scheme, parts.hostname or "", port, userinfo)


def sparing(host: str, port: int, no_proxy: str) -> str:
    """Return the entry of no_proxy that keeps an address from a proxy; "": none does.

    Entries stand between commas or blanks: `*`, a name (itself and all below it, with or without a leading dot or `*.`),
    an IP address, a network such as 10.0.0.0/8; each may end in :port.
    """
    name = host.lower().rstrip(".")
    for entry in re.split(r"[\s,;]+", no_proxy.strip()):
        pattern, its_port = _entry(entry.lower())
        if its_port in (None, port) and _covers(pattern, name):
            return entry
    return ""


def _entry(entry: str) -> tuple[str, int | None]:
    """Split an entry of no_proxy into what stands for the host and the port; None: every port."""
    found = re.fullmatch(r"(\[[^]]*\]|[^:]*):(\d{1,5})", entry)  # two colons outside brackets: an IPv6 address alone
    pattern, port = (found[1], int(found[2])) if found else (entry, None)
    return re.sub(r"^\[([^]]*)\]", r"\1", pattern), port


def _covers(pattern: str, name: str) -> bool:
    if pattern == "*":
        return True
    address = _ip(name)
    if address is not None:
        try:
            return address in ipaddress.ip_network(pattern, strict=False)
        except (ValueError, TypeError):  # a name, or a network of the other family
            return False
    pattern = pattern.removeprefix("*").strip(".")
    return bool(pattern) and (name == pattern or name.endswith(f".{pattern}"))


def _ip(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
