"""A device proves itself to a hub that proves itself first: bytes in, bytes out. What the hub remembers is its own test's."""

from __future__ import annotations

import hashlib
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsoda_edge.errors import HubUnreachable
from fedsoda_edge.protocol import proof
from fedsoda_edge.protocol.join_link import JoinLink
from fedsoda_edge.protocol.signatures import SigningKey, as_text, fingerprint

HUB, OTHER_HUB, DEVICE = (SigningKey(bytes([n]) * 32) for n in (1, 2, 3))
SECRET = bytes(range(24))
LINK = JoinLink(("hub.example.org",), HUB.public, SECRET)
THEIRS, OURS = b"d" * 32, b"h" * 32  # nonces of device and hub
RUN = "run-1"


def begun(link: JoinLink = LINK) -> proof.DeviceProof:
    return proof.DeviceProof(link, DEVICE, THEIRS, "https://hub.example.org")


def challenged(by: SigningKey = HUB, run: str = RUN, nonce: bytes = THEIRS) -> bytes:
    return proof.challenge(by, run, nonce, OURS)


def answered() -> proof.Answer:
    answer = proof.read(begun().answer(challenged()))
    assert isinstance(answer, proof.Answer)
    return answer


def test_both_prove_themselves_and_the_device_gets_a_ticket() -> None:
    device = begun()
    ask = proof.read(device.ask())
    assert proof.device_nonce(ask) == THEIRS
    answer = proof.read(device.answer(proof.challenge(HUB, RUN, proof.device_nonce(ask), OURS)))
    assert isinstance(answer, proof.Answer)
    proven = proof.check(answer, HUB.public, RUN)
    assert (proven.device, proven.invited) == (DEVICE.public, proof.invitation_key(SECRET).public)
    ticket = device.ticket(proof.ticket_for(proven, HUB, "clinic-7", "fk1-abc"))
    assert (ticket.edge, ticket.ticket) == ("clinic-7", "fk1-abc")


def test_the_bytes_that_are_signed_are_those_of_the_protocol() -> None:
    """docs/protocol.md (p12-proof), with nothing of ours but the text forms."""
    challenge = json.loads(challenged())
    theirs = Ed25519PrivateKey.from_private_bytes(bytes([1]) * 32)
    invited = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"fedsoda invitation\0" + SECRET).digest())
    device = Ed25519PrivateKey.from_private_bytes(bytes([3]) * 32)
    publics = [one.public_key().public_bytes_raw() for one in (theirs, device, invited)]
    assert challenge == {
        "proof": "challenge",
        "hub_key": as_text(publics[0]),
        "hub_nonce": as_text(OURS),
        "run_id": RUN,
        "signature": as_text(theirs.sign(b"fedsoda hub\0" + THEIRS + OURS + publics[0] + b"run-1")),
    }
    signed = OURS + THEIRS + publics[0] + publics[1] + publics[2] + b"run-1"
    assert json.loads(begun().answer(challenged())) == {
        "proof": "answer",
        "device_nonce": as_text(THEIRS),
        "hub_nonce": as_text(OURS),
        "device_key": as_text(publics[1]),
        "signature": as_text(device.sign(b"fedsoda device\0" + signed)),
        "invitation": {
            "key": as_text(publics[2]),
            "signature": as_text(invited.sign(b"fedsoda invitation\0" + signed)),
        },
    }
    proven = proof.check(answered(), HUB.public, RUN)
    digest = hashlib.sha256(signed).digest()
    assert json.loads(proof.ticket_for(proven, HUB, "clinic-7", "fk1-abc")) == {
        "proof": "ticket",
        "edge": "clinic-7",
        "ticket": "fk1-abc",
        "signature": as_text(theirs.sign(b"fedsoda ticket\0" + digest + b"\0fk1-abc\0clinic-7")),
    }


def test_nothing_that_travels_holds_the_secret_or_the_seed_of_its_key() -> None:
    device = begun()
    travelled = device.ask() + device.answer(challenged())
    for secret in (SECRET, hashlib.sha256(b"fedsoda invitation\0" + SECRET).digest(), hashlib.sha256(SECRET).digest()):
        for written in (as_text(secret), secret.hex()):
            assert written.encode() not in travelled


@pytest.mark.parametrize(
    ("came", "why"),
    [
        pytest.param(
            challenged(OTHER_HUB),
            f"has the key {fingerprint(OTHER_HUB.public)}, the join link is for a hub with {fingerprint(HUB.public)}",
            id="wrong hub",
        ),
        pytest.param(
            challenged(OTHER_HUB).replace(as_text(OTHER_HUB.public).encode(), as_text(HUB.public).encode()),
            f"does not hold the key {fingerprint(HUB.public)} that the join link names",
            id="a hub that claims another's key",
        ),
        pytest.param(
            challenged(nonce=b"x" * 32),
            f"does not hold the key {fingerprint(HUB.public)} that the join link names",
            id="replayed challenge",
        ),
        pytest.param(
            challenged().replace(b"run-1", b"run-2"),
            f"does not hold the key {fingerprint(HUB.public)} that the join link names",
            id="challenge of another run",
        ),
        pytest.param(b"<html>sign in</html>", "answers, but not as a hub that takes join links does", id="a page"),
        pytest.param(b'{"proof":"ask"}', "answers, but not as a hub that takes join links does", id="reflected"),
        pytest.param(b"[" * 4000, "answers, but not as a hub that takes join links does", id="deep"),
    ],
)
def test_a_device_tells_nothing_to_what_is_not_the_hub_of_its_link(came: bytes, why: str) -> None:
    with pytest.raises(HubUnreachable) as refused:
        begun().answer(came)
    assert str(refused.value) == (
        f"what answers at https://hub.example.org {why}; it may be another hub, or someone between: try from another "
        "network, or ask the hub's owner for a new link"
    )
    assert refused.value.step == "auth"


@pytest.mark.parametrize("attack", ["of another hub", "for another device", "for another edge", "replaced"])
def test_a_ticket_that_the_hub_did_not_sign_for_this_proof_is_refused(attack: str) -> None:
    device = begun()
    device.answer(challenged())
    proven = proof.check(answered(), HUB.public, RUN)
    match attack:
        case "of another hub":
            data = proof.ticket_for(proven, OTHER_HUB, "clinic-7", "fk1-abc")
        case "for another device":
            data = proof.ticket_for(proof.Proven(b"k" * 32, None, b"other bytes"), HUB, "clinic-7", "fk1-abc")
        case "for another edge":
            data = proof.ticket_for(proven, HUB, "clinic-7", "fk1-abc").replace(b"clinic-7", b"clinic-8")
        case _:
            data = proof.ticket_for(proven, HUB, "clinic-7", "fk1-abc").replace(b"fk1-abc", b"fk1-xyz")
    with pytest.raises(HubUnreachable, match="gave a ticket that the hub of the join link did not sign"):
        device.ticket(data)


def altered(**fields: object) -> proof.Answer:
    answer = proof.read(json.dumps(json.loads(begun().answer(challenged())) | fields).encode())
    assert isinstance(answer, proof.Answer)
    return answer


MALLORY = SigningKey(b"m" * 32)
REFUSED = {
    "wrong hub": lambda: proof.check(answered(), OTHER_HUB.public, RUN),
    "wrong run": lambda: proof.check(answered(), HUB.public, "run-2"),
    "another device's key": lambda: proof.check(altered(device_key=as_text(MALLORY.public)), HUB.public, RUN),
    "another nonce of the hub": lambda: proof.check(altered(hub_nonce=as_text(b"x" * 32)), HUB.public, RUN),
    "another nonce of the device": lambda: proof.check(altered(device_nonce=as_text(b"x" * 32)), HUB.public, RUN),
    "invitation taken away": lambda: proof.check(altered(invitation=None), HUB.public, RUN),
    "the hub's signature reflected": lambda: proof.check(
        altered(device_key=as_text(HUB.public), signature=json.loads(challenged())["signature"]), HUB.public, RUN
    ),
    "another invitation's key": lambda: proof.check(
        altered(invitation={"key": as_text(MALLORY.public), "signature": as_text(bytes(64))}), HUB.public, RUN
    ),
    "an invitation without its secret": lambda: proof.check(
        altered(invitation=json.loads(begun().answer(challenged()))["invitation"] | {"signature": as_text(bytes(64))}),
        HUB.public,
        RUN,
    ),
    "short key": lambda: proof.check(altered(device_key="AA"), HUB.public, RUN),
}


@pytest.mark.parametrize("attack", REFUSED)
def test_a_hub_refuses_what_was_not_made_for_it(attack: str) -> None:
    with pytest.raises(proof.NotProven):
        REFUSED[attack]()


def test_who_listens_cannot_use_an_invitation_for_a_device_of_its_own() -> None:
    """What it needs is the invitation's signature over its own key, and it has only that over the other device's."""
    heard = json.loads(begun().answer(challenged()))
    signed = proof.signed_by_device(THEIRS, OURS, HUB.public, MALLORY.public, proof.invitation_key(SECRET).public, RUN)
    mine = heard | {"device_key": as_text(MALLORY.public), "signature": as_text(MALLORY.sign("device", signed))}
    answer = proof.read(json.dumps(mine).encode())
    assert isinstance(answer, proof.Answer)
    with pytest.raises(proof.NotProven):
        proof.check(answer, HUB.public, RUN)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"proof":"ticket"}', b"\xff", b"[" * 4000, challenged()])
def test_other_bytes_are_no_message_of_a_device(data: bytes) -> None:
    with pytest.raises(proof.NotProven, match="the request holds no message of a proof"):
        proof.read(data)
