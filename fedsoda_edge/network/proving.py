"""Prove this device to a hub over HTTP, for a ticket: two requests to /v1/proof.

What is said is `protocol/proof.py`'s, who the device is the caller's.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedsoda_edge.network import answers, checks
from fedsoda_edge.network.route import Route
from fedsoda_edge.network.tls import Trust
from fedsoda_edge.protocol.join_link import JoinLink
from fedsoda_edge.protocol.proof import MAX_PROOF_BYTES, NONCE_BYTES, DeviceProof
from fedsoda_edge.protocol.signatures import SigningKey


@dataclass(frozen=True)
class LinkedDevice:
    """A device that has a join link.

    key: the device's own. urls: the hub's, in the order in which they are to be tried. insecure_http: whether plain HTTP may
    leave this machine. worked: is told the one on which the hub let this device in.
    """

    link: JoinLink
    key: SigningKey
    urls: Sequence[str]
    insecure_http: bool
    worked: Callable[[str], None] = field(repr=False)

    @property
    def trust(self) -> Trust:
        """The proof that the hub must give first: of the TLS key that the link names, if it names one."""
        return Trust(self.link.tls_pin, self.insecure_http)

    def routes(self) -> tuple[Route, ...]:
        """Decide the way to each address.

        Raises:
            UsageProblem: the environment's proxy is not one, or plain HTTP would leave this machine and may not.
        """
        return tuple(Route.to(url, trust=self.trust) for url in self.urls)


async def prove(device: LinkedDevice, route: Route) -> str:
    """Prove the device to the hub at the end of this way, and return the ticket.

    Raises:
        HubUnreachable: nothing answers, or what answers is not the hub that the link names: then nothing was told to it.
        RefusedByHub: the hub does not let this device in.
    """
    proof = DeviceProof(device.link, device.key, secrets.token_bytes(NONCE_BYTES), route.url)
    async with checks.http_client(route, timeout=checks.OPEN_SECONDS) as client:
        answer = proof.answer(await _post(client, route, proof.ask()))
        return proof.ticket(await _post(client, route, answer)).ticket


async def _post(client: Any, route: Route, body: bytes) -> bytes:
    import httpx

    address = f"{route.url}/v1/proof"
    try:
        async with client.stream("POST", address, content=body, headers={"Content-Type": "application/json"}) as answer:
            said = await checks.first_bytes(answer, MAX_PROOF_BYTES)
            if answer.status_code != 200 or answers.PAGE.match(said):
                raise answers.refused(route, answer.status_code, answer.headers, said, address)
            return said
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        found: Exception = await checks.first_failure(route) or await checks.not_answered(route, error)
        raise found from error
