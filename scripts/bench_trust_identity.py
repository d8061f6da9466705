"""Attack how devices join by link: proofs between a device and a hub, by their names, with seeds; what is wrong is counted.

Both sides are the product's own code, without sockets: `protocol/proof.py`, `serving/proofs.py`, `run/devices.py`.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from fedsoda_edge.errors import HubUnreachable
from fedsoda_edge.protocol import proof
from fedsoda_edge.protocol.join_link import JoinLink
from fedsoda_edge.protocol.signatures import SigningKey, as_text, from_text
from fedsoda_hub.run.devices import Devices
from fedsoda_hub.run.ledger import Ledger
from fedsoda_hub.serving import proofs
from fedsoda_hub.serving.proofs import Nonces, Proofs

DAY_SECONDS = 86400.0
ADDRESS = "http://hub"


class Hub:
    """A hub with its own key, clocks and database in memory."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.key = SigningKey(chance.randbytes(32))
        self.run_id = chance.randbytes(8).hex()
        self.now, self.wall = 1e4, 1.8e9
        self.ledger = Ledger(None)
        self.num_invited = 0
        self.start()

    def start(self) -> None:
        """Start, or start again: what was in memory is gone."""
        self.proofs = Proofs(self.key, self.ledger.devices, lambda: self.run_id, lambda: self.now, lambda: self.wall)

    def invite(self) -> tuple[str, JoinLink]:
        """Invite another edge: (its id, the link)."""
        self.num_invited += 1
        name, secret = f"edge-{self.num_invited}", self.chance.randbytes(24)
        self.ledger.devices.invite(name, proof.invitation_key(secret).public, self.wall + 7 * DAY_SECONDS)
        return name, JoinLink(("hub",), self.key.public, secret)

    def rebind(self, name: str) -> JoinLink:
        """Invite another device in place of the one that has the name."""
        secret = self.chance.randbytes(24)
        self.ledger.devices.rebind(name, proof.invitation_key(secret).public, self.wall + 7 * DAY_SECONDS)
        return JoinLink(("hub",), self.key.public, secret)

    def admits(self, request: bytes) -> str | None:
        """Return the edge as which an answer gets in; None: it is refused."""
        status, data = self.proofs.answer(request)
        if status != 200:
            return None
        ticket = json.loads(data).get("ticket")
        token = self.proofs.tickets.find(ticket) if ticket else None
        return None if token is None else token.edge


class Device:
    """A device with a key of its own."""

    def __init__(self, hub: Hub, link: JoinLink) -> None:
        self.key = SigningKey(hub.chance.randbytes(32))
        self.link = link
        self.hub = hub

    def asks(self, hub: Hub | None = None) -> tuple[proof.DeviceProof, bytes]:
        """Begin a proof: (the proof, the hub's challenge)."""
        hub = hub or self.hub
        begun = proof.DeviceProof(self.link, self.key, hub.chance.randbytes(32), ADDRESS)
        return begun, hub.proofs.answer(begun.ask())[1]

    def answers(self) -> bytes:
        """Make the answer to a challenge of its hub."""
        begun, challenge = self.asks()
        return begun.answer(challenge)


Attack = Callable[[Hub], bool]  # whether the product did what it promises


def _burnt(hub: Hub) -> bool:
    name, link = hub.invite()
    first, second = Device(hub, link), Device(hub, link)
    return [hub.admits(one.answers()) for one in (first, second, first)] == [name, None, name]


def _raced(hub: Hub) -> bool:
    name, link = hub.invite()
    answers = [Device(hub, link).answers() for _ in range(4)]
    return [hub.admits(answer) for answer in hub.chance.sample(answers, 4)] == [name, None, None, None]


def _replayed(hub: Hub) -> bool:
    name, link = hub.invite()
    answer = Device(hub, link).answers()
    first = hub.admits(answer)
    hub.now += hub.chance.uniform(0.0, 59.0)
    return (first, hub.admits(answer)) == (name, None)


def _stale(hub: Hub) -> bool:
    answer = Device(hub, hub.invite()[1]).answers()
    hub.now += hub.chance.uniform(60.1, 1e6)
    return hub.admits(answer) is None


def _restarted(hub: Hub) -> bool:
    name, link = hub.invite()
    device = Device(hub, link)
    hub.admits(device.answers())
    old = device.answers()
    hub.start()
    return (hub.admits(old), hub.admits(device.answers())) == (None, name)


def _expired(hub: Hub) -> bool:
    device = Device(hub, hub.invite()[1])
    hub.wall += hub.chance.uniform(7.001, 1000.0) * DAY_SECONDS
    return hub.admits(device.answers()) is None


def _known_after_expiry(hub: Hub) -> bool:
    name, link = hub.invite()
    device = Device(hub, link)
    hub.admits(device.answers())
    hub.wall += hub.chance.uniform(-1e9, 1e9)
    return hub.admits(device.answers()) == name


def _revoked(hub: Hub) -> bool:
    name, link = hub.invite()
    device = Device(hub, link)
    hub.admits(device.answers())
    hub.ledger.devices.revoke(name)
    return hub.admits(device.answers()) is None


def _rebound(hub: Hub) -> bool:
    name, link = hub.invite()
    old = Device(hub, link)
    hub.admits(old.answers())
    new = Device(hub, hub.rebind(name))
    return [hub.admits(one.answers()) for one in (old, new, old)] == [None, name, None]


def _guessed(hub: Hub) -> bool:
    hub.invite()
    return hub.admits(Device(hub, JoinLink(("hub",), hub.key.public, hub.chance.randbytes(24))).answers()) is None


def _wrong_hub(hub: Hub) -> bool:
    """Another hub answers at the address: the device tells it nothing."""
    device, other = Device(hub, hub.invite()[1]), Hub(hub.chance)
    begun, challenge = device.asks(other)
    claimed = challenge.replace(as_text(other.key.public).encode(), as_text(hub.key.public).encode())
    for came in (challenge, claimed):
        with contextlib.suppress(HubUnreachable):
            begun.answer(came)
            return False
    return True


def _passed_on(hub: Hub) -> bool:
    """A hub that is a thief lets its own device answer the challenge of another hub."""
    thief = Hub(hub.chance)
    device = Device(thief, thief.invite()[1])
    hub.ledger.devices.invite("x", proof.invitation_key(device.link.secret).public, hub.wall + DAY_SECONDS)
    begun, challenge = device.asks(hub)
    nonce = from_text(json.loads(challenge)["hub_nonce"], 32)
    theirs = proof.device_nonce(proof.read(begun.ask()))
    passed = proof.challenge(thief.key, hub.run_id, theirs, nonce)
    hub.ledger.devices.put_back("x", None)
    return hub.admits(begun.answer(passed)) is None and "x" not in {one.edge for one in hub.ledger.devices.all()}


def _wrong_run(hub: Hub) -> bool:
    answer = Device(hub, hub.invite()[1]).answers()
    hub.run_id = hub.chance.randbytes(8).hex()
    return hub.admits(answer) is None


def _overheard(hub: Hub) -> bool:
    """Who hears a proof puts its own key into it, and signs as well as it can."""
    link = hub.invite()[1]
    heard = json.loads(Device(hub, link).answers())
    mallory = SigningKey(hub.chance.randbytes(32))
    signed = proof.signed_by_device(
        from_text(heard["device_nonce"], 32),
        from_text(heard["hub_nonce"], 32),
        hub.key.public,
        mallory.public,
        from_text(heard["invitation"]["key"], 32),
        hub.run_id,
    )
    mine = {"device_key": as_text(mallory.public), "signature": as_text(mallory.sign("device", signed))}
    return hub.admits(json.dumps(heard | mine).encode()) is None


def _reflected(hub: Hub) -> bool:
    """The hub's own signatures come back in the place of a device's."""
    device = Device(hub, hub.invite()[1])
    begun, challenge = device.asks()
    answer = json.loads(begun.answer(challenge))
    mine = {"device_key": as_text(hub.key.public), "signature": json.loads(challenge)["signature"]}
    return hub.admits(json.dumps(answer | mine).encode()) is None and hub.admits(challenge) is None


def _mutated(hub: Hub) -> bool:
    """One field of an answer is another one of its kind; then the honest answer still counts."""
    name, link = hub.invite()
    answer: dict[str, Any] = json.loads(Device(hub, link).answers())
    field = hub.chance.choice(["device_nonce", "hub_nonce", "device_key", "signature", "key", "invited", "none"])
    changed = json.loads(json.dumps(answer))
    if field in ("key", "invited"):
        part = "key" if field == "key" else "signature"
        size = 32 if part == "key" else 64
        changed["invitation"][part] = as_text(hub.chance.randbytes(size))
    elif field == "none":
        del changed["invitation"]
    else:
        changed[field] = as_text(hub.chance.randbytes(64 if field == "signature" else 32))
    forged = hub.admits(json.dumps(changed).encode())
    return (forged, hub.admits(json.dumps(answer).encode())) == (None, name)


def _ticket_stolen(hub: Hub) -> bool:
    """A ticket that was signed for another proof is none, and one that was revoked or is old opens nothing."""
    devices = [Device(hub, hub.invite()[1]) for _ in range(2)]
    tickets = []
    for device in devices:
        begun, challenge = device.asks()
        tickets.append((begun, hub.proofs.answer(begun.answer(challenge))[1]))
    try:
        tickets[0][0].ticket(tickets[1][1])
    except HubUnreachable:
        ticket = tickets[0][0].ticket(tickets[0][1]).ticket
        hub.now += proofs.TICKET_SECONDS
        return hub.proofs.tickets.find(ticket) is None
    return False


def _secret_kept(hub: Hub) -> bool:
    """What the hub keeps of an invitation lets nobody in."""
    hub.invite()
    [*rows] = hub.ledger.database.read("SELECT invitation FROM devices")
    stolen = [JoinLink(("hub",), hub.key.public, bytes(row[0])[:24]) for row in rows]
    return not any(hub.admits(Device(hub, link).answers()) for link in stolen)


ATTACKS: dict[str, Attack] = {
    "burnt": _burnt,
    "raced": _raced,
    "replayed": _replayed,
    "stale": _stale,
    "restarted": _restarted,
    "expired": _expired,
    "known after expiry": _known_after_expiry,
    "revoked": _revoked,
    "rebound": _rebound,
    "guessed": _guessed,
    "wrong hub": _wrong_hub,
    "passed on": _passed_on,
    "wrong run": _wrong_run,
    "overheard": _overheard,
    "reflected": _reflected,
    "mutated": _mutated,
    "ticket stolen": _ticket_stolen,
    "secret kept": _secret_kept,
}


def measure(quick: bool) -> dict[str, object]:
    """Try each attack with many seeds.

    Returns:
        tried, right, wrong (up to 20 sentences), by_attack: the number of tries of each.
    """
    wrong: list[str] = []
    counts: Counter[str] = Counter()
    for name, attack in ATTACKS.items():
        for seed in range(8 if quick else 200):
            counts[name] += 1
            if not attack(Hub(random.Random(f"{name} {seed}"))):
                wrong.append(f"{name}, seed {seed}: the product did not do what it promises")
    tried = counts.total()
    return {"tried": tried, "right": tried - len(wrong), "wrong": wrong[:20], "by_attack": dict(counts)}


@dataclass(frozen=True)
class _Without:
    """A check that is taken out while the block runs."""

    where: object
    name: str
    instead: object

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with mock.patch.object(self.where, self.name, self.instead):
            yield


def _bind_anyhow(devices: Devices, invitation: bytes, key: bytes, now: float) -> object:
    devices._database.write(("UPDATE devices SET key = ?, bound = ? WHERE invitation = ?", (key, now, invitation)))
    return devices.invited(invitation)


def _verify_nothing(*_: object) -> None:
    """Take every signature."""


def _without_run(device: bytes, nonce: bytes, hub: bytes, key: bytes, invited: bytes, _: str) -> bytes:
    return b"".join((nonce, device, hub, key, invited))


DEFECTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "identity: no signature is checked": _Without(proof, "verify", _verify_nothing),
    "identity: nonces are not checked": _Without(Nonces, "check", lambda *_: None),
    "identity: a proof counts again": _Without(Nonces, "burn", lambda *_: True),
    "identity: a link binds whatever its state": _Without(Devices, "bind", _bind_anyhow),
    "identity: the run is not signed": _Without(proof, "signed_by_device", _without_run),
}
