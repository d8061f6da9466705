"""Carry bytes to a hub and back: websockets (control, updates) and httpx (bundles). No other edge file uses the network.

It cannot import the room that reads private text (tests/test_architecture.py). Both libraries honour the proxies of the
environment. What the bytes mean is left to `protocol`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from fedsoda_edge.errors import HubUnreachable, RefusedByHub, UsageProblem
from fedsoda_edge.protocol.codec import MAX_FRAME_BYTES, wire_bytes

OPEN_SECONDS = 20.0
PIECE_BYTES = 64 << 10  # of a download; a piece that a cut connection leaves unfinished is fetched again
IDLE_SECONDS = 2.0  # for which a connection is kept to be used again; servers close theirs after five or more


@dataclass(frozen=True)
class Certificate:
    """A hub's TLS certificate. valid_until: as `ssl` writes it, such as "Jun  1 12:00:00 2027 GMT"."""

    valid_until: str


class HubTransport:
    """The way to one hub at one URL. up, down: bytes of websocket payload and framing.

    Raises:
        UsageProblem: on construction, when the URL is not one of a hub.
    """

    def __init__(self, url: str, token: str) -> None:
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port above 65535 or without digits, an open bracket
            is_address = False
        if not is_address:
            raise UsageProblem(f"{url!r} is not the address of a hub; write http://host:port or https://host")
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._parts = parts
        self._headers = {"Authorization": f"Bearer {token}"}
        self._socket: Any = None
        self._http: Any = None  # one for all files: on a slow link each new connection costs round trips
        self.up = 0
        self.down = 0

    async def connect(self) -> None:
        """Open the websocket.

        Raises:
            HubUnreachable: names the first step that failed: DNS, TCP, TLS, HTTP.
            RefusedByHub: the hub does not accept the token.
        """
        from websockets.asyncio.client import connect
        from websockets.exceptions import InvalidStatus, WebSocketException

        await self._hang_up()
        address = f"{'wss' if self._parts.scheme == 'https' else 'ws'}://{self._parts.netloc}/v1/session"
        try:
            self._socket = await connect(
                address,
                additional_headers=self._headers,
                compression=None,  # deflate costs 40 x throughput and gains nothing on codes
                max_size=MAX_FRAME_BYTES,
                open_timeout=OPEN_SECONDS,
                user_agent_header=None,
            )
        except InvalidStatus as error:
            raise self._bad_status(error.response.status_code, bytes(error.response.body or b"")) from error
        except (OSError, UnicodeError, WebSocketException, TimeoutError) as error:
            raise await self._diagnosis(error) from error

    def _bad_status(self, status: int, body: bytes) -> HubUnreachable | RefusedByHub:
        reason = ""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            reason = str(json.loads(body)["reason"])
        if status in (401, 403):
            return RefusedByHub(f"the hub {self.url} refused: {reason or 'the token was not accepted'}")
        if reason:  # a hub's answer has one
            return HubUnreachable(
                f"{self.url} answers HTTP {status}: {reason}; try again later, or ask the hub's owner", "HTTP"
            )
        return HubUnreachable(
            f"{self.url} answers HTTP {status}, which no hub does; check the address, and the proxy if there is one",
            "HTTP",
        )

    async def _diagnosis(self, cause: Exception) -> HubUnreachable:
        """Go through DNS, TCP, TLS and HTTP once, and return the error of the first step that fails."""
        for check in (self.check_dns, self.check_tcp, self.check_tls):
            try:
                await check()
            except HubUnreachable as error:
                return error
        return HubUnreachable(
            f"HTTP: {self.url} answers, but not as a hub does ({cause}); check address and port", "HTTP"
        )

    @property
    def _address(self) -> tuple[str, int]:
        return self._parts.hostname or "", self._parts.port or (443 if self._parts.scheme == "https" else 80)

    @property
    def proxy(self) -> str | None:
        """The environment's proxy for this hub, which both libraries use; None: there is none."""
        scheme, host = self._parts.scheme, self._address[0]
        return None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(scheme)

    async def check_dns(self) -> str:
        """Return the host's addresses, separated by commas.

        Raises:
            HubUnreachable: the name has no address.
        """
        host, port = self._address
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:  # UnicodeError: no name can be spelt like this
            raise HubUnreachable(
                f"DNS: the name {host!r} has no address ({error}); check its spelling and the network", "DNS"
            ) from error
        return ", ".join(dict.fromkeys(str(entry[4][0]) for entry in found))

    async def check_tcp(self) -> float:
        """Measure the seconds until the port answers.

        Raises:
            HubUnreachable: nothing answers at the port.
        """
        host, port = self._address
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                _, writer = await asyncio.open_connection(host, port)
        except (OSError, TimeoutError) as error:
            raise HubUnreachable(
                f"TCP: nothing answers at {host}:{port} ({str(error) or 'timeout'}); check that the hub runs and that the "
                "port is open",
                "TCP",
            ) from error
        writer.close()
        return loop.time() - started

    async def check_tls(self) -> Certificate | None:
        """Return the hub's certificate; None for http://, which has no TLS.

        Raises:
            HubUnreachable: the port has no valid certificate.
        """
        if self._parts.scheme != "https":
            return None
        host, port = self._address
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                _, writer = await asyncio.open_connection(host, port, ssl=ssl.create_default_context())
        except (OSError, TimeoutError) as error:
            raise HubUnreachable(
                f"TLS: {host}:{port} answers, but not with a valid certificate ({str(error) or 'timeout'}); "
                "check port and certificate, or write http:// if the hub has no TLS",
                "TLS",
            ) from error
        found = writer.get_extra_info("peercert")  # verified, so it is there
        writer.close()
        return Certificate(str(found["notAfter"]))

    async def check_http(self) -> datetime | None:
        """Return the time of the hub's clock, from its answer to /healthz; None where the answer has no date.

        Raises:
            HubUnreachable: there is no answer, or it is not that of a hub.
        """
        import httpx

        try:
            async with httpx.AsyncClient(timeout=OPEN_SECONDS) as client:
                answer = await client.get(f"{self.url}/healthz")
        except httpx.HTTPError as error:
            raise HubUnreachable(
                f"HTTP: {self.url} does not answer ({error!r}); check the proxy if there is one", "HTTP"
            ) from error
        if answer.status_code != 200:
            raise self._bad_status(answer.status_code, answer.content[:4096])
        with contextlib.suppress(KeyError, ValueError, TypeError):
            return parsedate_to_datetime(answer.headers["date"])
        return None

    async def send(self, frame: bytes) -> None:
        """Send a frame.

        Raises:
            HubUnreachable: the connection ended, or was never made.
        """
        from websockets.exceptions import ConnectionClosed

        if self._socket is None:
            raise HubUnreachable(f"there is no connection to {self.url}; join again", "TCP")
        try:
            await self._socket.send(frame)
        except ConnectionClosed as error:
            raise HubUnreachable(f"the connection to {self.url} ended ({error}); join again", "TCP") from error
        self.up += wire_bytes(frame, masked=True)

    async def frames(self) -> AsyncIterator[bytes]:
        """Yield frames until the connection ends, orderly or not."""
        from websockets.exceptions import ConnectionClosed

        with contextlib.suppress(ConnectionClosed):
            async for frame in self._socket:
                data = frame.encode() if isinstance(frame, str) else frame
                self.down += wire_bytes(data, masked=False)
                yield data

    async def close(self) -> None:
        """End the connection, and downloads that run."""
        await self._hang_up()
        if self._http is not None:
            await self._http.aclose()
            self._http = None

    async def _hang_up(self) -> None:
        """Close the websocket; a download continues."""
        if self._socket is not None:
            await self._socket.close()
            self._socket = None

    async def fetch(self, digest: str, offset: int) -> AsyncIterator[bytes]:
        """Yield the bytes of a bundle's file from `offset` on, by HTTP range.

        Raises:
            HubUnreachable: the transfer broke off; what came was yielded.
            RefusedByHub: the hub does not accept the token.
        """
        import httpx

        headers = {**self._headers, "Accept-Encoding": "identity"}  # the digest is that of the bytes as they are
        if offset:
            headers["Range"] = f"bytes={offset}-"
        if self._http is None:
            self._http = httpx.AsyncClient(
                timeout=httpx.Timeout(OPEN_SECONDS, read=60.0), limits=httpx.Limits(keepalive_expiry=IDLE_SECONDS)
            )
        try:
            async with self._http.stream("GET", f"{self.url}/v1/blobs/{digest}", headers=headers) as response:
                if response.status_code not in (200, 206):
                    raise self._bad_status(response.status_code, await response.aread())
                skip = offset if response.status_code == 200 else 0  # a proxy that drops Range sends it all
                async for piece in response.aiter_raw(PIECE_BYTES):
                    if skip:
                        skip, piece = max(0, skip - len(piece)), piece[skip:]
                    if piece:
                        yield piece
        except httpx.HTTPError as error:
            raise HubUnreachable(
                f"the download from {self.url} broke off ({error!r}); join again, which continues it", "HTTP"
            ) from error
