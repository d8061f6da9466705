"""Go the way to a hub step by step, DNS, TCP, TLS, HTTP, and name the first one that fails.

`doctor` shows each step, and a join whose connection fails asks which one it was. Where a proxy stands on the way, DNS
and TCP are those to the proxy, and the proxy looks for the hub.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

from fedsoda_edge.errors import HubUnreachable
from fedsoda_edge.network import answers
from fedsoda_edge.network.route import Route, bracketed

OPEN_SECONDS = 20.0


@dataclass(frozen=True)
class Certificate:
    """A hub's TLS certificate. valid_until: as `ssl` writes it, such as "Jun  1 12:00:00 2027 GMT"."""

    valid_until: str


def http_client(route: Route, **settings: Any) -> Any:
    """Make an HTTP client that goes this way, whatever the environment says. settings: those of `httpx.AsyncClient`."""
    import httpx

    proxy = None
    if route.proxy is not None:
        proxy = httpx.Proxy(route.proxy.url, ssl_context=route.tls if route.proxy.scheme == "https" else None)
    return httpx.AsyncClient(verify=route.tls or False, proxy=proxy, trust_env=False, **settings)


async def diagnosis(route: Route, cause: Exception) -> HubUnreachable:
    """Return why a websocket could not be opened: the error of the first step that fails."""
    why = str(cause) or type(cause).__name__
    return await first_failure(route) or answers.no_websockets(route, why)


async def first_failure(route: Route) -> HubUnreachable | None:
    """Return the error of the first step that fails; None: a hub answers at the end of this way."""
    for check in (check_dns, check_tcp, check_tls, check_http):
        try:
            await check(route)
        except HubUnreachable as error:
            return error
    return None


def _of_proxy(route: Route) -> str:
    """Return what to do about a proxy that cannot be reached."""
    assert route.proxy is not None
    return f"check {route.proxy.variable}, or add {route.host} to no_proxy if it can be reached without"


async def check_dns(route: Route) -> str:
    """Return the addresses of the hub, or of the proxy on the way, separated by commas.

    Raises:
        HubUnreachable: the name has no address.
    """
    host, port = route.first_hop
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name can be spelt like this
        if route.proxy is not None:
            raise HubUnreachable(
                f"DNS: the name of the proxy {route.proxy} has no address ({error}); {_of_proxy(route)}", "DNS"
            ) from error
        raise HubUnreachable(
            f"DNS: the name {host!r} has no address ({error}); check its spelling and the network{_hint(route)}", "DNS"
        ) from error
    return ", ".join(dict.fromkeys(str(entry[4][0]) for entry in found))


def _hint(route: Route) -> str:
    """Return what to know about a proxy that the environment has for other addresses."""
    return f" (proxy: {route.via})" if route.via != f"none for {route.scheme}://" else ""


async def check_tcp(route: Route) -> float:
    """Measure the seconds until the port of the hub, or of the proxy on the way, answers.

    Raises:
        HubUnreachable: nothing answers at the port.
    """
    host, port = route.first_hop
    loop = asyncio.get_running_loop()
    started = loop.time()
    try:
        async with asyncio.timeout(OPEN_SECONDS):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError) as error:
        why = str(error) or "timeout"
        if route.proxy is not None:
            raise HubUnreachable(
                f"TCP: the proxy {route.proxy} does not answer ({why}); {_of_proxy(route)}", "TCP"
            ) from error
        raise HubUnreachable(
            f"TCP: nothing answers at {bracketed(host)}:{port} ({why}); check that the hub runs and that the port is open"
            + _hint(route),
            "TCP",
        ) from error
    writer.close()
    return loop.time() - started


async def check_tls(route: Route) -> Certificate | None:
    """Return the hub's certificate; None for http://, which has no TLS.

    Raises:
        HubUnreachable: the port has no valid certificate, or the proxy does not connect to it.
    """
    if route.scheme != "https":
        return None
    if route.proxy is not None:
        async with _healthz(route) as answer:
            encrypted = answer.extensions["network_stream"].get_extra_info("ssl_object")
            return Certificate(str(encrypted.getpeercert()["notAfter"]))
    try:
        async with asyncio.timeout(OPEN_SECONDS):
            _, writer = await asyncio.open_connection(route.host, route.port, ssl=route.tls)
    except (OSError, TimeoutError) as error:
        raise _no_tls(route, str(error) or "timeout") from error
    found = writer.get_extra_info("peercert")  # verified, so it is there
    writer.close()
    return Certificate(str(found["notAfter"]))


def _no_tls(route: Route, why: str) -> HubUnreachable:
    fix = "check port and certificate, or write http:// if the hub has no TLS"
    if "CERTIFICATE_VERIFY_FAILED" in why:
        fix = (
            "check the address and this device's clock; where the network has a sign-in page, sign in; where a CA of your "
            "own signed it, name its certificates in SSL_CERT_FILE"
        )
    return HubUnreachable(
        f"TLS: {bracketed(route.host)}:{route.port} answers, but not with a valid certificate ({why}); {fix}", "TLS"
    )


async def check_http(route: Route) -> datetime | None:
    """Return the time of the hub's clock, from its answer to /healthz; None where the answer has no date.

    Raises:
        HubUnreachable: there is no answer, or it is not that of a hub.
    """
    async with _healthz(route) as answer:
        body = await first_bytes(answer)
        if answer.status_code != 200:
            raise answers.refused(route, answer.status_code, answer.headers, body, f"{route.url}/healthz")
        if not answers.is_hub(body):
            kind = answer.headers.get("content-type", "no type").partition(";")[0]
            raise answers.no_hub(route, f"HTTP 200 with {kind} where a hub says who it is")
        with contextlib.suppress(KeyError, ValueError, TypeError):
            return parsedate_to_datetime(answer.headers["date"])
        return None


async def first_bytes(answer: Any, count: int = 4096) -> bytes:
    """Return the beginning of an answer, which may have no end."""
    body = b""
    async for piece in answer.aiter_bytes():
        body += piece
        if len(body) >= count:
            break
    return body[:count]


@contextlib.asynccontextmanager
async def _healthz(route: Route) -> AsyncIterator[Any]:
    """Ask for /healthz on this way.

    Raises:
        HubUnreachable: there is no answer.
    """
    import httpx

    try:
        async with (
            http_client(route, timeout=OPEN_SECONDS) as client,
            client.stream("GET", f"{route.url}/healthz") as it,
        ):
            yield it
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise not_answered(route, error) from error


def not_answered(route: Route, error: Exception) -> HubUnreachable:
    """Return the error for a request that had no answer, by what httpx says of it."""
    import httpx

    why = str(error) or ("timeout" if isinstance(error, httpx.TimeoutException) else type(error).__name__)
    if route.scheme == "https" and "CERTIFICATE_VERIFY_FAILED" in why:
        return _no_tls(route, why)
    if isinstance(error, httpx.ProxyError):
        return answers.no_connection(route, why)
    if route.proxy is not None and isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return answers.no_connection(route, why)
    return HubUnreachable(f"HTTP: {route.url} answers, but not as a hub does ({why}); check address and port", "HTTP")
