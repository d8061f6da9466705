"""Fetch files of a bundle from a mirror: any HTTP server that has them under their digests.

A mirror gets what every reader of a public file sends: no token, no cookie, no header of ours. What comes is verified by
whoever asked, so plain http is allowed. Which mirrors are asked is left to `join/sources.py`.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from fedsoda_edge.errors import HubUnreachable, UsageProblem
from fedsoda_edge.network import answers, checks
from fedsoda_edge.network.route import Route
from fedsoda_edge.network.tls import Trust
from fedsoda_edge.protocol.mirrors import file_url

if TYPE_CHECKING:
    from httpx import AsyncClient

OPEN_SECONDS = 10.0
READ_SECONDS = 60.0  # without a byte
MAX_REDIRECTS = 5


class Mirror:
    """A mirror by its URL."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._clients: dict[str, AsyncClient] = {}  # by scheme, host and port: a redirect may lead elsewhere

    async def fetch(self, digest: str, offset: int) -> AsyncIterator[bytes]:
        """Yield the bytes of a file from `offset` on, by HTTP range.

        Raises:
            HubUnreachable: the mirror does not answer, or not with this part of the file; what came was yielded.
        """
        import httpx

        headers = {"Accept-Encoding": "identity"}  # httpx asks for compression otherwise, which would change the bytes
        if offset:
            headers["Range"] = f"bytes={offset}-"
        address = file_url(self.url, digest)
        try:
            for _ in range(MAX_REDIRECTS + 1):
                client = self._client(address)
                async with client.stream("GET", address, headers=headers) as answer:
                    client.cookies.clear()
                    if 300 <= answer.status_code < 400:
                        address = self._redirected(address, answer.headers.get("location", ""))
                        continue
                    skip = self._skipped(answer, offset)
                    is_first = offset == 0
                    async for piece in answer.aiter_raw():
                        if is_first and answers.PAGE.match(piece):
                            raise self._failed("it answers with a page instead of the file")
                        is_first = False
                        if skip:
                            skip, piece = max(0, skip - len(piece)), piece[skip:]
                        if piece:
                            yield piece
                    return
        except (httpx.HTTPError, httpx.InvalidURL, UsageProblem) as error:
            raise self._failed(str(error) or type(error).__name__) from error
        raise self._failed(f"it redirects more than {MAX_REDIRECTS} times")

    def _client(self, address: str) -> AsyncClient:
        """Return the client for the host of an address, which goes by the proxy that this device has for it."""
        import httpx

        parts = urlsplit(address)
        origin = f"{parts.scheme}://{parts.netloc}"
        if origin not in self._clients:
            self._clients[origin] = checks.http_client(
                Route.to(origin, trust=Trust(insecure_http=True)),  # nothing of ours goes there, and files have digests
                timeout=httpx.Timeout(OPEN_SECONDS, read=READ_SECONDS),
            )
        return self._clients[origin]

    def _redirected(self, address: str, location: str) -> str:
        target = urljoin(address, location)
        if not location or urlsplit(address).scheme != "https" or urlsplit(target).scheme != "https":
            shown = urlsplit(target)
            raise self._failed(
                f"it redirects to {shown.scheme}://{shown.hostname or ''}, and only redirects from https to https are followed"
            )
        return target

    def _skipped(self, answer: Any, offset: int) -> int:
        """Return how many bytes of an answer come before the offset: a server without ranges sends all.

        Raises:
            HubUnreachable: the answer is not the part that was asked for.
        """
        if answer.status_code not in (200, 206):
            raise self._failed(f"HTTP {answer.status_code}")
        if answer.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise self._failed(f"it sends the file coded as {answer.headers['content-encoding'][:40]}")
        if answer.status_code == 200:
            return offset
        found = re.match(r"bytes (\d+)-", answer.headers.get("content-range", ""))
        if found is None or int(found[1]) != offset:
            came = answer.headers.get("content-range", "no range")[:60]
            raise self._failed(f"from byte {offset} on was asked for, and {came} came")
        return 0

    def _failed(self, why: str) -> HubUnreachable:
        return HubUnreachable(why, "HTTP")

    async def close(self) -> None:
        """End all connections."""
        for client in self._clients.values():
            await client.aclose()
        self._clients.clear()
