"""Let a device prove who it is to a hub that proves itself first: bytes in, bytes out, on either side.

    device                                       hub
    Opening(device nonce)                 ->
                                          <-     Challenge(hub key, hub nonce, run id, the hub's signature)
    Answer(device key, its signature,     ->
           the invitation's signature)
                                          <-     Ticket(edge, ticket, the hub's signature)

An invitation's secret is the seed of a key (Ed25519): the device signs with it and sends it to nobody, so that who listens,
or stands between, learns nothing that could be used, and who reads the hub's disk neither. Each signature has a purpose of
its own, so that none that comes back proves anything, and what device and invitation sign names both nonces, both keys and
the run. Which nonces are fresh is the hub's `serving/proofs.py`'s, which keys it knows `run/devices.py`'s. docs/protocol.md
(p12-proof) says the bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgspec

from fedsoda_edge.errors import HubUnreachable
from fedsoda_edge.protocol.join_link import JoinLink
from fedsoda_edge.protocol.signatures import (
    KEY_BYTES,
    SIGNATURE_BYTES,
    NotSigned,
    SigningKey,
    as_text,
    fingerprint,
    from_text,
    verify,
)

NONCE_BYTES = 32
MAX_PROOF_BYTES = 4096  # of each of the four messages
TICKET_PREFIX = "fk1-"  # no token begins like this
NO_INVITATION = bytes(KEY_BYTES)  # signed in its place


class ProofMessage(msgspec.Struct, frozen=True, tag_field="proof", kw_only=True, omit_defaults=True):
    """The root of the four messages. Bytes are base64url without padding."""


class Opening(ProofMessage, frozen=True, tag="ask"):
    """The begin of a proof. device_nonce: 32 random bytes, which the hub is to sign."""

    device_nonce: str


class Challenge(ProofMessage, frozen=True, tag="challenge"):
    """The hub's proof that it holds its key, and what the device is to sign."""

    hub_key: str
    hub_nonce: str
    run_id: str
    signature: str


class Invited(msgspec.Struct, frozen=True, kw_only=True):
    """The proof that a device holds an invitation. key: the public key of its secret."""

    key: str
    signature: str


class Answer(ProofMessage, frozen=True, tag="answer"):
    """The device's proof. invitation: that of its join link, which a hub that knows the device does not look at."""

    device_nonce: str
    hub_nonce: str
    device_key: str
    signature: str
    invitation: Invited | None = None


class Ticket(ProofMessage, frozen=True, tag="ticket"):
    """The bearer of the requests that follow, as a token is one, until the hub refuses it."""

    edge: str
    ticket: str
    signature: str


class NotProven(ValueError):
    """A proof that does not prove what it should; the words say why, for the other side."""


def invitation_key(secret: bytes) -> SigningKey:
    """Return the key of an invitation. A hub keeps its public half alone.

    Args:
        secret: that of the join link.
    """
    return SigningKey(hashlib.sha256(b"fedsoda invitation\0" + secret).digest())


def signed_by_device(
    device_nonce: bytes, hub_nonce: bytes, hub: bytes, device: bytes, invited: bytes, run: str
) -> bytes:
    """Return what device and invitation sign: 160 bytes, then the run's id.

    Args:
        hub, device: public keys. invited: the invitation's, or NO_INVITATION.
    """
    return b"".join((hub_nonce, device_nonce, hub, device, invited, run.encode()))


def _signed_by_hub(device_nonce: bytes, hub_nonce: bytes, hub: bytes, run: str) -> bytes:
    return b"".join((device_nonce, hub_nonce, hub, run.encode()))


def _signed_for_ticket(signed: bytes, ticket: str, edge: str) -> bytes:
    return b"\0".join((hashlib.sha256(signed).digest(), ticket.encode(), edge.encode()))


# --- the device's side -----------------------------------------------------------------------------------------------


class DeviceProof:
    """One proof of a device, from `ask` over `answer` to `ticket`.

    Args:
        link: names the hub's key, and holds the invitation. key: the device's. nonce: 32 random bytes, for once.
        address: the hub's, for people.
    """

    def __init__(self, link: JoinLink, key: SigningKey, nonce: bytes, address: str) -> None:
        self._link = link
        self._key = key
        self._nonce = nonce
        self._address = address
        self._signed = b""

    def ask(self) -> bytes:
        """Make the first message."""
        return msgspec.json.encode(Opening(device_nonce=as_text(self._nonce)))

    def answer(self, data: bytes) -> bytes:
        """Read the hub's challenge, and make the answer only where the hub holds the key that the link names.

        Raises:
            HubUnreachable: it does not, or something else than a challenge came.
        """
        try:
            challenge = msgspec.json.decode(data, type=Challenge)
            hub_nonce = from_text(challenge.hub_nonce, NONCE_BYTES)
            hub_key = from_text(challenge.hub_key, KEY_BYTES)
            signature = from_text(challenge.signature, SIGNATURE_BYTES)
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError):
            raise self._no_hub("answers, but not as a hub that takes join links does") from None
        if hub_key != self._link.hub_key:
            raise self._no_hub(
                f"has the key {fingerprint(hub_key)}, the join link is for a hub with {fingerprint(self._link.hub_key)}"
            )
        try:
            verify(hub_key, "hub", _signed_by_hub(self._nonce, hub_nonce, hub_key, challenge.run_id), signature)
        except NotSigned:
            raise self._no_hub(f"does not hold the key {fingerprint(hub_key)} that the join link names") from None
        invited = invitation_key(self._link.secret)
        signed = signed_by_device(self._nonce, hub_nonce, hub_key, self._key.public, invited.public, challenge.run_id)
        self._signed = signed
        return msgspec.json.encode(
            Answer(
                device_nonce=as_text(self._nonce),
                hub_nonce=challenge.hub_nonce,
                device_key=as_text(self._key.public),
                signature=as_text(self._key.sign("device", signed)),
                invitation=Invited(key=as_text(invited.public), signature=as_text(invited.sign("invitation", signed))),
            )
        )

    def ticket(self, data: bytes) -> Ticket:
        """Read the hub's answer.

        Raises:
            HubUnreachable: it is not from the hub that the link names, or not for this proof.
        """
        try:
            ticket = msgspec.json.decode(data, type=Ticket)
            signed = _signed_for_ticket(self._signed, ticket.ticket, ticket.edge)
            verify(self._link.hub_key, "ticket", signed, from_text(ticket.signature, SIGNATURE_BYTES))
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError):  # NotSigned is a ValueError
            raise self._no_hub("gave a ticket that the hub of the join link did not sign for this device") from None
        return ticket

    def _no_hub(self, what: str) -> HubUnreachable:
        return HubUnreachable(
            f"what answers at {self._address} {what}; it may be another hub, or someone between: try from another network, "
            "or ask the hub's owner for a new link",
            "auth",
        )


# --- the hub's side --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proven:
    """A device whose proof is right. device, invited: public keys; invited is None where it showed no invitation."""

    device: bytes
    invited: bytes | None
    signed: bytes


def read(data: bytes) -> Opening | Answer:
    """Read what a device sent.

    Raises:
        NotProven: it is neither message.
    """
    try:
        return msgspec.json.decode(data, type=Opening | Answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise NotProven("the request holds no message of a proof; upgrade the older side") from None


def device_nonce(message: Opening | Answer) -> bytes:
    """Return the device's nonce.

    Raises:
        NotProven: it is none.
    """
    return _bytes(message.device_nonce, NONCE_BYTES, "nonce")


def hub_nonce(answer: Answer) -> bytes:
    """Return the hub's nonce, as the device sent it back.

    Raises:
        NotProven: it is none.
    """
    return _bytes(answer.hub_nonce, NONCE_BYTES, "nonce")


def challenge(key: SigningKey, run_id: str, theirs: bytes, nonce: bytes) -> bytes:
    """Answer an Opening.

    Args:
        key: the hub's. theirs, nonce: the nonces of device and hub.
    """
    return msgspec.json.encode(
        Challenge(
            hub_key=as_text(key.public),
            hub_nonce=as_text(nonce),
            run_id=run_id,
            signature=as_text(key.sign("hub", _signed_by_hub(theirs, nonce, key.public, run_id))),
        )
    )


def check(answer: Answer, hub_key: bytes, run_id: str) -> Proven:
    """Check the signatures of an answer against this hub's key and run.

    Raises:
        NotProven: one of them is wrong, or was made for another hub or run.
    """
    device = _bytes(answer.device_key, KEY_BYTES, "key")
    invited = None if answer.invitation is None else _bytes(answer.invitation.key, KEY_BYTES, "invitation")
    signed = signed_by_device(
        device_nonce(answer),
        hub_nonce(answer),
        hub_key,
        device,
        invited or NO_INVITATION,
        run_id,
    )
    try:
        verify(device, "device", signed, _bytes(answer.signature, SIGNATURE_BYTES, "signature"))
        if answer.invitation is not None and invited is not None:
            theirs = _bytes(answer.invitation.signature, SIGNATURE_BYTES, "signature")
            verify(invited, "invitation", signed, theirs)
    except NotSigned:
        raise NotProven(
            f"the proof of the device {fingerprint(device)} is not for this run of this hub; join again"
        ) from None
    return Proven(device, invited, signed)


def ticket_for(proven: Proven, key: SigningKey, edge: str, ticket: str) -> bytes:
    """Make the answer to a proof that is right."""
    signature = key.sign("ticket", _signed_for_ticket(proven.signed, ticket, edge))
    return msgspec.json.encode(Ticket(edge=edge, ticket=ticket, signature=as_text(signature)))


def _bytes(text: str, size: int, what: str) -> bytes:
    try:
        return from_text(text, size)
    except ValueError:
        raise NotProven(f"the {what} of a proof is not {size} bytes; upgrade the older side") from None
