"""Go the way to a hub step by step, DNS, TCP, TLS, HTTP, and name the first one that fails.

`doctor` shows each step, and a join whose connection fails asks which one it was. Where a proxy stands on the way, DNS
and TCP are those to the proxy, and the proxy looks for the hub.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

from fedsoda_edge.errors import HubUnreachable
from fedsoda_edge.network import answers, tls
from fedsoda_edge.network.route import Route, bracketed

OPEN_SECONDS = 20.0
PROBE_SECONDS = 5.0  # of a look at which protocol a port speaks, after a failure


@dataclass(frozen=True)
class Certificate:
    """A hub's TLS certificate. valid_until: as `ssl` writes it, such as "Jun  1 12:00:00 2027 GMT". pin: of its key."""

    valid_until: str
    pin: bytes


def http_client(route: Route, **settings: Any) -> Any:
    """Make an HTTP client that goes this way, whatever the environment says. settings: those of `httpx.AsyncClient`."""
    import httpx

    proxy = None
    if route.proxy is not None:
        proxy = httpx.Proxy(route.proxy.url, ssl_context=route.tls_of_proxy)
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
        HubUnreachable: the port does not show what it must, or the proxy does not connect to it.
    """
    if route.scheme != "https":
        return None
    if route.proxy is not None:
        async with _healthz(route) as answer:
            return _certificate(answer.extensions["network_stream"].get_extra_info("ssl_object"))
    try:
        async with asyncio.timeout(OPEN_SECONDS):
            _, writer = await asyncio.open_connection(route.host, route.port, ssl=route.tls)
    except (OSError, TimeoutError) as error:
        raise await _no_tls(route, error) from error
    found = _certificate(writer.get_extra_info("ssl_object"))
    writer.close()
    return found


def _certificate(encrypted: Any) -> Certificate:
    """Take what is shown of a certificate that was accepted, so that it is there."""
    from cryptography.x509 import load_der_x509_certificate

    found = load_der_x509_certificate(encrypted.getpeercert(binary_form=True))
    until = found.not_valid_after_utc
    return Certificate(f"{until:%b} {until.day:2d} {until:%H:%M:%S %Y} GMT", tls.pin_of(found.public_key()))


async def _no_tls(route: Route, error: BaseException) -> HubUnreachable:
    """Return why a handshake failed, with what was awaited and what came."""
    where, pin = f"{bracketed(route.host)}:{route.port}", route.trust.pin
    failure = tls.tls_failure(error)
    why = str(failure or error) or ("timeout" if isinstance(error, TimeoutError) else type(error).__name__)
    if isinstance(failure, tls.WrongKey):
        found = "no key that can be pinned" if failure.found is None else f"the key {tls.shortened(failure.found)}"
        return HubUnreachable(
            f"TLS: {where} shows {found}, and {tls.shortened(failure.wanted)} is pinned, so it is not the hub that the pin is "
            "of, or that hub has lost its key; nothing was sent to it: try another network, and ask the hub's owner for the "
            "pin that the hub prints at its start",
            "TLS",
        )
    if failure is not None and "CERTIFICATE_VERIFY_FAILED" in why:
        return HubUnreachable(
            f"TLS: {where} answers, but not with a valid certificate ({why}); check the address and this device's clock; "
            "where the network has a sign-in page, sign in; where the hub made its certificate itself, join with the pin "
            "that it prints at its start (sha256/...); where a CA of your own signed it, name its certificates in "
            "SSL_CERT_FILE",
            "TLS",
        )
    if route.proxy is None and await _speaks_http(route) and not await _speaks_tls(route):
        fix = "check the port" if pin is not None else "check the port, or write http:// if that network is yours alone"
        return HubUnreachable(f"TLS: {where} answers in plain HTTP, not in TLS ({why}); {fix}", "TLS")
    is_older = any(word in why.upper() for word in ("PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL"))
    if pin is not None and (is_older or (route.proxy is None and await _speaks_tls(route, ssl.TLSVersion.TLSv1_2))):
        return HubUnreachable(
            f"TLS: {where} speaks an older TLS than 1.3, which a hub whose key is pinned speaks ({why}); check address and "
            "port: a server in front of the hub has a key of its own",
            "TLS",
        )
    return HubUnreachable(
        f"TLS: {where} answers, but a TLS handshake with it fails ({why}); check address and port", "TLS"
    )


async def _speaks_http(route: Route) -> bool:
    """Tell whether plain HTTP comes from the hub's port. The question holds nothing of this device."""
    question = f"GET {route.prefix}/healthz HTTP/1.0\r\nHost: {route.address}\r\n\r\n"
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(PROBE_SECONDS):
            reader, writer = await asyncio.open_connection(route.host, route.port)
            try:
                writer.write(question.encode("latin-1", "replace"))
                return (await reader.read(5)).startswith(b"HTTP/")
            finally:
                writer.close()
    return False


async def _speaks_tls(route: Route, newest: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED) -> bool:
    """Tell whether TLS of at most that version comes from the hub's port, whoever's it is: nothing is sent in it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = newest
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(PROBE_SECONDS):
            _, writer = await asyncio.open_connection(route.host, route.port, ssl=context)
            writer.transport.abort()
            return True
    return False


async def check_http(route: Route) -> datetime | None:
    """Return the time of the hub's clock, from its answer to /healthz; None where the answer has no date.

    Raises:
        HubUnreachable: there is no answer, it is not that of a hub, or the port speaks TLS.
    """
    try:
        return await _clock_of_hub(route)
    except HubUnreachable as error:
        if route.scheme == "http" and route.proxy is None and await _speaks_tls(route):
            raise HubUnreachable(
                f"TLS: {bracketed(route.host)}:{route.port} speaks TLS, and {route.url} is plain HTTP; write https:// instead "
                "of http://",
                "TLS",
            ) from error
        raise


async def _clock_of_hub(route: Route) -> datetime | None:
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
        raise await not_answered(route, error) from error


async def not_answered(route: Route, error: Exception) -> HubUnreachable:
    """Return the error for a request that had no answer, by what httpx says of it."""
    import httpx

    why = str(error) or ("timeout" if isinstance(error, httpx.TimeoutException) else type(error).__name__)
    if route.scheme == "https" and not isinstance(error, httpx.ProxyError) and tls.tls_failure(error) is not None:
        return await _no_tls(route, error)
    if isinstance(error, httpx.ProxyError):
        return answers.no_connection(route, why)
    if route.proxy is not None and isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return answers.no_connection(route, why)
    return HubUnreachable(f"HTTP: {route.url} answers, but not as a hub does ({why}); check address and port", "HTTP")
