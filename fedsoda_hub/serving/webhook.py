"""Post notices to a URL: signed, in a bounded time, tried again where that can help, and nowhere else.

The signature is made as Stripe makes it: HMAC-SHA256 over time and body, so that neither can be changed and an old notice
cannot be sent again later. Which notices there are is `notices.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import random
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from fedsoda_edge.errors import UsageProblem
from fedsoda_hub.serving.notices import HubNotice
from fedsoda_hub.serving.notify import NotDelivered
from fedsoda_hub.settings.tables import is_loopback_name

PAUSES = (1.0, 4.0, 15.0, 60.0, 240.0)  # seconds between two tries, at least half of each
MAX_PAUSE = 600.0  # seconds that a server's Retry-After is heeded
AGAIN = frozenset((408, 425, 429, 500, 502, 503, 504))  # statuses after which another try can help
logging.getLogger("httpx").setLevel(logging.WARNING)  # its lines hold the whole address, which may be a secret
NO_PROXIES: dict[str, httpx.AsyncBaseTransport | None] = dict.fromkeys(("http://", "https://", "all://"))
MAX_SECRET_BYTES, LEAST_SECRET_BYTES = 4096, 16


def signature(secret: bytes, at: int, body: bytes) -> str:
    """Write the header that proves who sent a body, and when."""
    signed = hmac.new(secret, f"{at}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={at},v1={signed}"


def read_secret(path: Path) -> bytes:
    """Read the secret of the webhook, without white space around it.

    Raises:
        UsageProblem: the file cannot be read, or holds too little or too much.
    """
    try:
        with path.open("rb") as file:
            secret = file.read(MAX_SECRET_BYTES + 1).strip()
    except OSError as error:
        raise UsageProblem(f"[notify] secret: {path} cannot be read ({error.strerror}); correct the path") from error
    if not LEAST_SECRET_BYTES <= len(secret) <= MAX_SECRET_BYTES:
        raise UsageProblem(
            f"[notify] secret: {path} holds {len(secret)} bytes, and must hold {LEAST_SECRET_BYTES} to {MAX_SECRET_BYTES}; "
            "write what the receiver has into it, or delete the key, so that the hub makes one"
        )
    return secret


@dataclass(frozen=True)
class Webhook:
    """The way to a URL. now: seconds since 1970."""

    url: str
    secret: bytes
    now: Callable[[], float]
    seconds: float
    pauses: Sequence[float] = PAUSES
    name: str = "webhook"

    async def deliver(self, notice: HubNotice, body: bytes) -> None:
        """Post one notice, and try again where that can help.

        Raises:
            NotDelivered: the server refused it, or the last try failed.
        """
        for number in range(len(self.pauses) + 1):
            why, pause = await self._try(notice, body)
            if why is None:
                return
            if number == len(self.pauses):
                raise NotDelivered(f"{why}, at the last of {number + 1} tries")
            wanted = self.pauses[number] * random.uniform(0.5, 1.0)
            await asyncio.sleep(min(max(wanted, pause), MAX_PAUSE))

    async def _try(self, notice: HubNotice, body: bytes) -> tuple[str | None, float]:
        """Post once: (None, 0) where it arrived, else why not and how many seconds the server asks to wait.

        Raises:
            NotDelivered: another try cannot help.
        """
        try:
            async with asyncio.timeout(self.seconds), self._answer(notice, body) as answer:
                status, headers = answer.status_code, answer.headers
        except TimeoutError:
            return f"no answer came within {self.seconds:g} s", 0.0
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            return f"{type(error).__name__}: {str(error)[:200]}", 0.0
        if 200 <= status < 300:
            return None, 0.0
        if status == 410:
            raise NotDelivered(
                "the server answers 410 Gone; nothing more is sent until the hub starts again", is_final=True
            )
        if 300 <= status < 400:
            raise NotDelivered(f"the server redirects ({status}), which is not followed; write the address itself")
        if status not in AGAIN:
            raise NotDelivered(f"the server answers {status}")
        return f"the server answers {status}", _seconds(headers.get("retry-after", ""))

    @contextlib.asynccontextmanager
    async def _answer(self, notice: HubNotice, body: bytes) -> AsyncIterator[httpx.Response]:
        """Give the head of the answer; its body is not read. A new client each time heeds proxies as they are now."""
        at = int(self.now())
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "fedsoda",
            "FedSODA-Event": notice.kind,
            "FedSODA-Id": notice.id,
            "FedSODA-Signature": signature(self.secret, at, body),
        }
        is_here = is_loopback_name(urlsplit(self.url).hostname or "")  # a proxy would look on its own machine
        client: Any = httpx.AsyncClient(
            follow_redirects=False, trust_env=True, timeout=self.seconds, mounts=NO_PROXIES if is_here else None
        )
        async with client, client.stream("POST", self.url, content=body, headers=headers) as answer:
            yield answer


def _seconds(retry_after: str) -> float:
    """Read a Retry-After in seconds; a date, or nothing, asks for none."""
    return float(retry_after) if re.fullmatch("[0-9]{1,9}", retry_after) else 0.0
