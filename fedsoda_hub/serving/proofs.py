"""Let devices that came by a join link in: check their proofs, bind invitations, give out tickets.

What is signed is `protocol/proof.py`'s, which invitations and keys there are `run/devices.py`'s. Proofs are checked in one
thread, one after the other, since a binding waits for the disk; a ticket is found in memory.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from fedsoda_edge.errors import DiskFull
from fedsoda_edge.protocol import proof
from fedsoda_edge.protocol.messages import EdgeId
from fedsoda_edge.protocol.signatures import SigningKey, as_text, fingerprint
from fedsoda_hub.run.devices import Device, Devices, at_words
from fedsoda_hub.run.edges import REBOUND, REVOKED
from fedsoda_hub.run.tokens import Token

NONCE_SECONDS = 60.0  # from a challenge to its answer
PROOFS_OF_DEVICE = 60  # within NONCE_SECONDS, whose nonces are remembered until they are too old to be used again
TICKET_SECONDS = 3600.0
TICKETS_OF_EDGE = 4  # a join, and what is asked beside it: plan, doctor
MAX_WAITING = 512  # proofs that wait for their turn

_log = logging.getLogger("fedsoda_hub.serving")

Reply = tuple[int, bytes]  # HTTP status and JSON


class Nonces:
    """The hub's nonces: made without being remembered, each good for one device nonce, a minute and one proof of a device.

    A nonce is the time of its making in ms (8 bytes), 8 random bytes, and 16 of an HMAC of both and the device's nonce.

    Args:
        now: monotonic seconds, which nobody can set back.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._key = secrets.token_bytes(32)  # of this process: nonces end with it
        self._used: dict[bytes, deque[tuple[bytes, float]]] = {}  # by the public key of the device

    def make(self, theirs: bytes) -> bytes:
        """Make a nonce for this device nonce."""
        head = int(self._now() * 1000).to_bytes(8, "big") + secrets.token_bytes(8)
        return head + self._mac(head, theirs)

    def check(self, nonce: bytes, theirs: bytes) -> None:
        """Refuse a nonce that this hub did not make for this device nonce, or that is too old.

        Raises:
            NotProven: it is one of these.
        """
        if not hmac.compare_digest(nonce[16:], self._mac(nonce[:16], theirs)):
            raise proof.NotProven("the hub did not make this nonce, or has restarted since; join again")
        if self._now() - int.from_bytes(nonce[:8], "big") / 1000 > NONCE_SECONDS:
            raise proof.NotProven(f"the nonce is older than {NONCE_SECONDS:.0f} s; join again")

    def burn(self, nonce: bytes, device: bytes) -> bool:
        """Let this device not use a nonce again; return False where it has proven itself too often to remember one more.

        Raises:
            NotProven: the device has used it before.
        """
        used = self._used.setdefault(device, deque())
        while used and used[0][1] < self._now() - NONCE_SECONDS - 1.0:
            used.popleft()
        if any(nonce == one for one, _ in used):
            raise proof.NotProven("this proof was used already; join again")
        if len(used) >= PROOFS_OF_DEVICE:
            return False
        used.append((nonce, self._now()))
        return True

    def _mac(self, head: bytes, theirs: bytes) -> bytes:
        return hmac.digest(self._key, head + theirs, "sha256")[:16]


class Tickets:
    """The bearers of devices that have proven themselves: in memory, at most TICKETS_OF_EDGE of each edge, for an hour.

    Args:
        now: monotonic seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._lock = threading.Lock()  # they are given out in a thread
        self._given: dict[bytes, tuple[Token, float]] = {}  # by the ticket's sha256
        self._of_edge: dict[EdgeId, deque[bytes]] = {}

    def give(self, edge: EdgeId, key: bytes) -> str:
        """Make a ticket for the device with this public key; the edge's oldest one ends where it has too many."""
        ticket = proof.TICKET_PREFIX + as_text(secrets.token_bytes(32))
        name = _sha256(ticket)
        with self._lock:
            theirs = self._of_edge.setdefault(edge, deque())
            theirs.append(name)
            self._given[name] = Token(edge, None, False, key=key), self._now() + TICKET_SECONDS
            if len(theirs) > TICKETS_OF_EDGE:
                self._given.pop(theirs.popleft(), None)
        return ticket

    def find(self, ticket: str) -> Token | None:
        """Return what a ticket stands for; None: it never was one, or has ended."""
        token, until = self._given.get(_sha256(ticket), (None, 0.0))
        return token if self._now() < until else None

    def held(self) -> list[Token]:
        """Return what all tickets stand for, one of each edge and key."""
        with self._lock:
            return list({(token.edge, token.key): token for token, _ in self._given.values()}.values())

    def end(self, edge: EdgeId, key: bytes | None) -> None:
        """End the tickets of this device."""
        with self._lock:
            theirs = self._of_edge.pop(edge, deque())
            for name in theirs:
                if self._given[name][0].key == key:
                    del self._given[name]
                else:
                    self._of_edge.setdefault(edge, deque()).append(name)


def _sha256(ticket: str) -> bytes:
    return hashlib.sha256(ticket.encode()).digest()


class Proofs:
    """The hub's side of proofs.

    Args:
        key: the hub's. run_id: returns that of the run which is served. now: monotonic seconds. wall: seconds since 1970,
            to which invitations last.
    """

    def __init__(
        self,
        key: SigningKey,
        devices: Devices,
        run_id: Callable[[], str],
        now: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self.tickets = Tickets(now)
        self._key = key
        self._devices = devices
        self._run_id = run_id
        self._wall = wall
        self._nonces = Nonces(now)
        self._thread = ThreadPoolExecutor(1, "checks proofs")
        self._num_waiting = 0

    async def reply(self, request: bytes) -> Reply:
        """Answer the body of a request to /v1/proof."""
        if self._num_waiting >= MAX_WAITING:
            return _refusal(503, "too many devices prove themselves at once")
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self.answer, request)
        finally:
            self._num_waiting -= 1

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def answer(self, request: bytes) -> Reply:
        """Answer the body of a request to /v1/proof, and wait for the disk where that binds an invitation."""
        try:
            message = proof.read(request)
            theirs = proof.device_nonce(message)
            if isinstance(message, proof.Opening):
                return 200, proof.challenge(self._key, self._run_id(), theirs, self._nonces.make(theirs))
            nonce = proof.hub_nonce(message)
            self._nonces.check(nonce, theirs)
            proven = proof.check(message, self._key.public, self._run_id())
            edge, why = self._admitted(proven)
            if edge is None:
                return _refusal(403, why)
            if not self._nonces.burn(nonce, proven.device):
                return _refusal(503, f"{edge} has proven itself {PROOFS_OF_DEVICE} times within a minute")
        except proof.NotProven as error:
            return _refusal(403, str(error))
        except DiskFull as error:
            return _refusal(503, f"the hub could not note this device ({error})")
        return 200, proof.ticket_for(proven, self._key, edge, self.tickets.give(edge, proven.device))

    def _admitted(self, proven: proof.Proven) -> tuple[EdgeId | None, str]:
        """Return (edge, "") for a device that may join, else (None, why not)."""
        known = self._devices.with_key(proven.device)
        if known is not None and not known.is_revoked:
            return known.edge, ""
        invited = None if proven.invited is None else self._devices.invited(proven.invited)
        if invited is not None and invited.key is None and not invited.is_revoked and proven.invited is not None:
            invited = self._devices.bind(proven.invited, proven.device, self._wall())
            if invited is not None and invited.key == proven.device:
                _log.debug("= %s belongs to device=%s", invited.edge, invited.fingerprint)
                return invited.edge, ""
        return None, self._why_not(proven.device, known, invited)

    def _why_not(self, key: bytes, known: Device | None, invited: Device | None) -> str:
        if invited is None or invited.key == key:
            if known is not None:
                return REVOKED.format(known.edge)
            if (before := self._devices.once_with_key(key)) is not None:
                return (REVOKED if before.is_revoked else REBOUND).format(before.edge)
            return (
                "the hub does not know this join link, nor this device: the link was replaced by a later one, or is for "
                "another run; ask the hub's owner for a new one"
            )
        if invited.key is not None:
            return (
                f"the join link of {invited.edge} was used on {at_words(invited.bound or 0.0)} by the device "
                f"{invited.fingerprint}, and this one is {fingerprint(key)}; a link is for one device, so ask the hub's owner "
                f"for another one. If you do not know {invited.fingerprint}, somebody else had the link: say so, and the "
                f"owner ends it with `fedsoda-hub revoke RUN.toml {invited.edge}`. If it is this device before it lost its "
                f"FEDSODA_HOME, ask for `fedsoda-hub rebind RUN.toml {invited.edge}`"
            )
        if invited.is_revoked:
            return f"the join link of {invited.edge} was revoked before it was used; ask the hub's owner for a new one"
        return (
            f"the join link of {invited.edge} could be used until {at_words(invited.expires)}, by the hub's clock; ask the "
            "hub's owner for a new one"
        )


def _refusal(status: int, reason: str) -> Reply:
    return status, msgspec.json.encode({"reason": reason})
