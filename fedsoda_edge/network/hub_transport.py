"""Carry bytes to a hub and back: websockets (control, updates) and httpx (bundles).

It cannot import the room that reads private text (tests/test_architecture.py). Which way both go is `route.py`'s, what
failed on it `checks.py`'s, what comes instead of a hub's answer `answers.py`'s; what the bytes mean is left to `protocol`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from typing import Any

from fedsoda_edge.errors import HubUnreachable, RefusedByHub
from fedsoda_edge.network import answers, checks
from fedsoda_edge.network.proving import LinkedDevice, prove
from fedsoda_edge.network.route import Route
from fedsoda_edge.network.tls import Trust, tls_failure
from fedsoda_edge.protocol.codec import MAX_FRAME_BYTES, wire_bytes

IDLE_SECONDS = 2.0  # for which a connection is kept to be used again; servers close theirs after five or more
READ_SECONDS = 60.0  # without a byte, after which a download is cut
# In which something between may send a file that was asked for as it is. Not zstd or brotli, nor one within another: a few
# kB of those become gigabytes before they can be counted.
CODINGS = ("identity", "gzip", "deflate")
SESSION_STATUSES = (200, 400, 404, 405, 426, 501)  # of a hub that got no Upgrade, and of much else


class HubTransport:
    """The way to one hub. up, down: bytes of websocket payload and framing. route: that of the address in use.

    Args:
        url: the hub's. token: the bearer of all requests. trust: what the hub must show first.

    Raises:
        UsageProblem: on construction, when the URL is not one of a hub, the environment's proxy is not one, or plain HTTP
            would leave this machine and may not.
    """

    def __init__(self, url: str, token: str, trust: Trust = Trust()) -> None:
        self.route = Route.to(url, trust=trust)
        self.routes: tuple[Route, ...] = (self.route,)
        self._bearer = token
        self._device: LinkedDevice | None = None
        self._socket: Any = None
        self._http: Any = None  # one for all files: on a slow link each new connection costs round trips
        self.up = 0
        self.down = 0

    @classmethod
    def by_link(cls, device: LinkedDevice) -> HubTransport:
        """Make the way of a device that has a join link: it proves itself for a ticket, at the first address that answers.

        Raises:
            UsageProblem: the environment's proxy is not one.
        """
        transport = cls(device.urls[0], "", device.trust)
        transport.routes = device.routes()
        transport.route = transport.routes[0]
        transport._device = device
        return transport

    @property
    def url(self) -> str:
        """The hub's address, for people."""
        return self.route.url

    async def connect(self) -> None:
        """Open the websocket, at the first of the hub's addresses that answers.

        Raises:
            HubUnreachable: names the first step that failed: DNS, TCP, TLS, proxy, HTTP, auth.
            RefusedByHub: the hub does not accept the token, or the device.
            UsageProblem: the environment names certificates that cannot be read.
        """
        failures: list[HubUnreachable] = []
        first = self.routes.index(self.route)
        for route in self.routes[first:] + self.routes[:first]:  # the one that worked last goes first
            await self._take(route)
            try:
                await self._open_as_known()
            except HubUnreachable as error:
                failures.append(error)
                continue
            if self._device is not None:
                self._device.worked(self.url)
            return
        await self._take(self.routes[first])
        if len(failures) == 1:
            raise failures[0]
        raise HubUnreachable(f"no address of the hub can be used: {'. '.join(map(str, failures))}", failures[0].step)

    async def _take(self, route: Route) -> None:
        if route is not self.route:
            self.route = route
            await self._end_downloads()

    async def _open_as_known(self) -> None:
        """Open the websocket with the token, or with a ticket: with a new one where the hub does not take the last."""
        if self._device is None:
            await self._open()
            return
        if self._bearer:
            try:
                await self._open()
                return
            except RefusedByHub:
                self._bearer = ""
        self._bearer = await prove(self._device, self.route)
        await self._open()

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._bearer}"}

    async def _open(self) -> None:
        from websockets.asyncio.client import ClientConnection, connect
        from websockets.exceptions import InvalidProxyStatus, InvalidStatus, ProxyError, WebSocketException

        class Straight(connect):
            """A connection that goes where it was asked to: a redirect is told, not followed."""

            def process_redirect(self, exc: Exception) -> Exception:
                return exc

        class Begun(ClientConnection):
            """A connection whose end counts once it has begun: where TLS fails behind a proxy, only the end is told."""

            def connection_lost(self, exc: Exception | None) -> None:
                if hasattr(self, "recv_messages"):
                    super().connection_lost(exc)

        await self._hang_up()
        route = self.route
        tls: dict[str, Any] = {}
        if route.scheme == "https":
            tls["ssl"] = route.tls
        if route.tls_of_proxy is not None:
            tls["proxy_ssl"] = route.tls_of_proxy
        try:
            self._socket = await Straight(
                route.websocket_url,
                create_connection=Begun,
                additional_headers=self._headers,
                compression=None,  # deflate costs 40 x throughput and gains nothing on codes
                max_size=MAX_FRAME_BYTES,
                open_timeout=checks.OPEN_SECONDS,
                user_agent_header=None,
                proxy=route.proxy.url if route.proxy is not None else None,
                **tls,
            )
        except InvalidStatus as error:
            answer = error.response
            raise await self._no_session(answer.status_code, answer.headers, bytes(answer.body or b"")) from error
        except InvalidProxyStatus as error:
            raise answers.no_connection(route, f"HTTP {error.response.status_code}") from error
        except ProxyError as error:
            raise answers.no_connection(route, str(error.__cause__ or error)) from error
        except (OSError, UnicodeError, WebSocketException, TimeoutError) as error:
            raise await checks.diagnosis(route, error) from error
        except (
            TypeError
        ) as error:  # of asyncio before Python 3.11.8, where a handshake within a proxy's TLS fails (gh-113214)
            if route.tls_of_proxy is None:
                raise
            raise await checks.diagnosis(route, error) from error

    async def _no_session(self, status: int, headers: Any, body: bytes) -> Exception:
        """Return why there is another answer than a websocket: a hub's may be there, and only its upgrade be lost."""
        found = answers.refused(self.route, status, headers, body, f"{self.url}/v1/session")
        if status in SESSION_STATUSES and not answers.reason_of(body):
            try:
                await checks.check_http(self.route)
            except HubUnreachable as why:
                return why if why.step == "TLS" else found  # TLS: the port speaks it, and the address is plain HTTP
            return answers.no_websockets(self.route, f"HTTP {status}")
        return found

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
        await self._end_downloads()

    async def _end_downloads(self) -> None:
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
            HubUnreachable: the transfer broke off, or something between answers; what came was yielded.
            RefusedByHub: the hub does not accept the token, or the device.
        """
        bearer = self._bearer
        try:
            async for piece in self._fetch(digest, offset):
                yield piece
            return
        except RefusedByHub:  # before the first byte
            if self._device is None:
                raise
        if self._bearer == bearer:  # a ticket lasts for a while; another request may have got the next one already
            self._bearer = await prove(self._device, self.route)
        async for piece in self._fetch(digest, offset):
            yield piece

    async def _fetch(self, digest: str, offset: int) -> AsyncIterator[bytes]:
        import httpx

        headers = {**self._headers, "Accept-Encoding": "identity"}  # the digest is that of the bytes as they are
        if offset:
            headers["Range"] = f"bytes={offset}-"
        if self._http is None:
            self._http = checks.http_client(
                self.route,
                timeout=httpx.Timeout(checks.OPEN_SECONDS, read=READ_SECONDS),
                limits=httpx.Limits(keepalive_expiry=IDLE_SECONDS),
            )
        address = f"{self.url}/v1/blobs/{digest}"
        try:
            async with self._http.stream("GET", address, headers=headers) as answer:
                if answer.status_code not in (200, 206):
                    raise answers.refused(
                        self.route, answer.status_code, answer.headers, await checks.first_bytes(answer), address
                    )
                skip = self._skipped(answer, offset)
                is_first = offset == 0
                # Decoded, since something between may compress in spite of what it was asked for. No piece is held back
                # until it is full: what came before a cut is kept.
                async for piece in answer.aiter_bytes():
                    if is_first and answers.PAGE.match(piece):
                        raise answers.no_hub(self.route, "a page of HTML instead of a file")
                    is_first = False
                    if skip:
                        skip, piece = max(0, skip - len(piece)), piece[skip:]
                    if piece:
                        yield piece
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            if isinstance(error, httpx.ProxyError) or tls_failure(error) is not None:
                raise await checks.not_answered(self.route, error) from error
            raise HubUnreachable(
                f"the download from {self.url} broke off ({error!r}); join again, which continues it", "HTTP"
            ) from error

    def _skipped(self, answer: Any, offset: int) -> int:
        """Return how many bytes of an answer come before the offset: a proxy that drops Range sends all.

        Raises:
            HubUnreachable: the answer is not the hub's, or not the part that was asked for.
        """
        kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in ("", "application/octet-stream", "binary/octet-stream"):
            raise answers.no_hub(self.route, f"{kind} instead of a file")
        coding = answer.headers.get("content-encoding", "identity").strip().lower()
        if coding not in CODINGS:
            raise answers.no_hub(self.route, f"a file coded as {coding[:40]}")
        if answer.status_code == 200:
            return offset
        found = re.match(r"bytes (\d+)-", answer.headers.get("content-range", ""))
        is_coded = coding != "identity"
        if is_coded or (found and int(found[1]) != offset):
            raise HubUnreachable(
                f"something between changes the files of {self.url} (from byte {offset} on was asked for, "
                f"{answer.headers.get('content-range', 'no range')} came); try again later, or ask the owner of "
                f"{answers.between(self.route)}",
                "HTTP",
            )
        return 0
