"""The hub's side of proofs, with attacks by their names: one invitation, one device; what was used is worth nothing."""

from __future__ import annotations

import itertools
import json
import threading
from dataclasses import dataclass, field

import msgspec
import pytest

from fedsoda_edge.errors import DiskFull, UsageProblem
from fedsoda_edge.protocol import proof
from fedsoda_edge.protocol.join_link import JoinLink
from fedsoda_edge.protocol.messages import EdgeId
from fedsoda_edge.protocol.signatures import SigningKey, as_text, fingerprint, from_text
from fedsoda_hub.run.ledger import Ledger
from fedsoda_hub.serving.proofs import Proofs

KEY = SigningKey(b"k" * 32)
DAY = 86400.0
NONCES = itertools.count()


@dataclass
class Time:
    """Both clocks of the hub. wall: one that people set."""

    monotonic: float = 1000.0
    wall: float = 1.7e9


@dataclass
class TheHub:
    """A hub without a port. requests: all bodies that it got."""

    ledger: Ledger = field(default_factory=lambda: Ledger(None))
    time: Time = field(default_factory=Time)
    key: SigningKey = KEY
    run_id: str = "run-1"

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start, as after a restart: what was in memory is gone."""
        self.proofs = Proofs(
            self.key, self.ledger.devices, lambda: self.run_id, lambda: self.time.monotonic, lambda: self.time.wall
        )

    def invite(self, name: str = "clinic-7", days: float = 7.0, secret: bytes | None = None) -> JoinLink:
        secret = next(NONCES).to_bytes(24, "big") if secret is None else secret
        self.ledger.devices.invite(name, proof.invitation_key(secret).public, self.time.wall + days * DAY)
        return JoinLink(("hub",), self.key.public, secret)

    def ask(self, device: Device) -> bytes:
        """Return the challenge."""
        status, data = self.proofs.answer(device.begun.ask())
        assert status == 200
        return data


class Device:
    """A device with a link. begun: its proof under way."""

    def __init__(self, link: JoinLink, seed: int = 0) -> None:
        self.link = link
        self.key = SigningKey(bytes([seed]) * 32)
        self.renew()

    def renew(self) -> None:
        self.begun = proof.DeviceProof(self.link, self.key, next(NONCES).to_bytes(32, "big"), "http://hub")

    def answer(self, hub: TheHub) -> bytes:
        """Return the answer to a challenge of the hub."""
        self.renew()
        return self.begun.answer(hub.ask(self))

    def proves(self, hub: TheHub) -> proof.Ticket:
        status, data = hub.proofs.answer(self.answer(hub))
        assert status == 200, data
        return self.begun.ticket(data)

    def is_refused(self, hub: TheHub) -> str:
        return reason(*hub.proofs.answer(self.answer(hub)))


def reason(status: int, data: bytes, expected: int = 403) -> str:
    assert status == expected, data
    found: str = json.loads(data)["reason"]
    return found


@pytest.fixture
def hub() -> TheHub:
    return TheHub()


def test_the_first_device_with_the_link_is_its_device_and_stays_it(hub: TheHub) -> None:
    device = Device(hub.invite())
    ticket = device.proves(hub)
    token = hub.proofs.tickets.find(ticket.ticket)
    assert token is not None
    assert (ticket.edge, token.edge, token.key) == ("clinic-7", "clinic-7", device.key.public)
    [known] = hub.ledger.edges.all()
    assert (known.kind, known.used, known.fingerprint) == ("link", True, fingerprint(device.key.public))


def test_after_a_restart_and_long_after_the_link_ended_the_device_proves_itself_again(hub: TheHub) -> None:
    device = Device(hub.invite(days=1))
    first = device.proves(hub)
    hub.time.wall += 400 * DAY
    hub.start()
    assert hub.proofs.tickets.find(first.ticket) is None
    assert device.proves(hub).edge == "clinic-7"


def test_burnt_another_device_with_the_link_is_refused_with_who_when_and_what_to_do(hub: TheHub) -> None:
    link = hub.invite()
    first, second = Device(link, 1), Device(link, 2)
    first.proves(hub)
    told = second.is_refused(hub)
    for part in (
        "the join link of clinic-7 was used on 2023-11-14 22:13 UTC",
        f"by the device {fingerprint(first.key.public)}, and this one is {fingerprint(second.key.public)}",
        "ask the hub's owner for another one",
        "`fedsoda-hub revoke RUN.toml clinic-7`",
        "`fedsoda-hub rebind RUN.toml clinic-7`",
    ):
        assert part in told
    assert first.proves(hub).edge == "clinic-7"


def test_leaked_of_devices_that_race_with_one_link_exactly_one_gets_it(hub: TheHub) -> None:
    link = hub.invite()
    devices = [Device(link, seed) for seed in range(1, 9)]
    answers = [device.answer(hub) for device in devices]
    statuses: list[int] = []
    start = threading.Barrier(len(answers))

    def send(answer: bytes) -> None:
        start.wait()
        statuses.append(hub.proofs.answer(answer)[0])

    threads = [threading.Thread(target=send, args=(answer,)) for answer in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] + [403] * 7
    [bound] = hub.ledger.devices.all()
    assert bound.key in {device.key.public for device in devices}


def test_expired_a_link_that_nobody_used_ends(hub: TheHub) -> None:
    device = Device(hub.invite(days=7))
    hub.time.wall += 7 * DAY
    assert device.is_refused(hub) == (
        "the join link of clinic-7 could be used until 2023-11-21 22:13 UTC, by the hub's clock; ask the hub's owner for a "
        "new one"
    )
    assert hub.ledger.devices.all()[0].key is None


def test_replay_an_answer_counts_once(hub: TheHub) -> None:
    device = Device(hub.invite())
    answer = device.answer(hub)
    assert hub.proofs.answer(answer)[0] == 200
    assert reason(*hub.proofs.answer(answer)) == "this proof was used already; join again"


def test_stale_an_answer_comes_within_a_minute(hub: TheHub) -> None:
    answer = Device(hub.invite()).answer(hub)
    hub.time.monotonic += 61
    assert reason(*hub.proofs.answer(answer)) == "the nonce is older than 60 s; join again"


def test_a_replay_is_refused_for_as_long_as_its_nonce_is_fresh(hub: TheHub) -> None:
    device = Device(hub.invite())
    answer = device.answer(hub)
    for _ in range(61):
        status = hub.proofs.answer(answer)[0]
        hub.time.monotonic += 1
        assert status == (200 if _ == 0 else 403)


def test_clock_changes_of_years_change_nothing_for_a_proof(hub: TheHub) -> None:
    device = Device(hub.invite())
    answer = device.answer(hub)
    hub.time.wall -= 30 * 365 * DAY
    status, data = hub.proofs.answer(answer)
    assert status == 200
    hub.time.wall += 60 * 365 * DAY
    assert hub.proofs.tickets.find(device.begun.ticket(data).ticket) is not None
    device.proves(hub)


def test_old_challenge_of_the_hub_before_its_restart_is_refused(hub: TheHub) -> None:
    answer = Device(hub.invite()).answer(hub)
    hub.start()
    assert reason(*hub.proofs.answer(answer)) == "the hub did not make this nonce, or has restarted since; join again"


def test_wrong_hub_what_was_proven_to_one_hub_is_worth_nothing_to_another(hub: TheHub) -> None:
    """A hub that is a thief passes the challenge of another hub on: the device does not answer it."""
    thief = TheHub(key=SigningKey(b"t" * 32))
    device = Device(thief.invite())
    hub.ledger.devices.invite("clinic-7", proof.invitation_key(device.link.secret).public, hub.time.wall + DAY)
    theirs = json.loads(hub.ask(device))
    nonce = from_text(theirs["hub_nonce"], 32)
    begun = proof.device_nonce(proof.read(device.begun.ask()))
    passed_on = device.begun.answer(proof.challenge(thief.key, hub.run_id, begun, nonce))
    assert "not for this run of this hub" in reason(*hub.proofs.answer(passed_on))
    assert hub.ledger.devices.all()[0].key is None


def test_wrong_run_what_was_proven_to_one_run_of_a_hub_is_worth_nothing_to_another(hub: TheHub) -> None:
    device = Device(hub.invite())
    answer = device.answer(hub)
    hub.run_id = "run-2"  # begun again meanwhile
    assert "not for this run of this hub" in reason(*hub.proofs.answer(answer))


def test_unknown_a_secret_that_was_guessed_or_is_another_hubs_opens_nothing(hub: TheHub) -> None:
    hub.invite()
    assert Device(JoinLink(("hub",), KEY.public, b"g" * 24)).is_refused(hub) == (
        "the hub does not know this join link, nor this device: the link was replaced by a later one, or is for another run; "
        "ask the hub's owner for a new one"
    )


def test_revoked_a_device_is_refused_and_a_new_link_lets_it_in_again(hub: TheHub) -> None:
    device = Device(hub.invite())
    device.proves(hub)
    hub.ledger.devices.revoke("clinic-7")
    assert device.is_refused(hub).startswith("clinic-7 was shut out by the hub's owner (revoke)")
    again = hub.invite()
    assert device.is_refused(hub).startswith("the hub's owner gave clinic-7 to another device")
    device.link = again
    assert device.proves(hub).edge == "clinic-7"


def test_revoked_a_link_that_nobody_used_is_worth_nothing(hub: TheHub) -> None:
    device = Device(hub.invite())
    hub.ledger.devices.revoke("clinic-7")
    assert "was revoked before it was used" in device.is_refused(hub)


def test_rebound_the_new_device_has_the_name_and_the_old_key_is_refused(hub: TheHub) -> None:
    old = Device(hub.invite(), 1)
    old.proves(hub)
    secret = b"n" * 24
    hub.ledger.devices.rebind("clinic-7", proof.invitation_key(secret).public, hub.time.wall + DAY)
    assert old.is_refused(hub).startswith("the hub's owner gave clinic-7 to another device (rebind)")
    new = Device(JoinLink(("hub",), KEY.public, secret), 2)
    assert new.proves(hub).edge == "clinic-7"
    assert old.is_refused(hub).startswith("the hub's owner gave clinic-7 to another device (rebind)")


def test_replaced_a_second_invitation_ends_the_first_until_a_device_came(hub: TheHub) -> None:
    first = hub.invite()
    second = hub.invite()
    assert "does not know this join link" in Device(first, 1).is_refused(hub)
    device = Device(second, 2)
    device.proves(hub)
    with pytest.raises(UsageProblem) as refused:
        hub.invite()
    assert str(refused.value).startswith(
        f"the link of 'clinic-7' was used on 2023-11-14 22:13 UTC by the device {fingerprint(device.key.public)}; "
    )
    assert "`fedsoda-hub rebind RUN.toml clinic-7`" in str(refused.value)
    assert device.proves(hub).edge == "clinic-7"


def test_a_name_has_a_token_or_a_link(hub: TheHub) -> None:
    hub.ledger.tokens.create("ward")
    with pytest.raises(UsageProblem, match="'ward' has a token"):
        hub.invite("ward")
    hub.invite("clinic-7")
    with pytest.raises(UsageProblem, match="'clinic-7' was invited by a join link"):
        hub.ledger.tokens.create("clinic-7")
    hub.ledger.tokens.revoke("ward")
    hub.invite("ward")
    assert [(edge.edge, edge.kind, edge.revoked) for edge in hub.ledger.edges.all()] == [
        ("clinic-7", "link", False),
        ("ward", "link", False),
    ]


def test_nothing_that_the_hub_keeps_lets_anybody_in(hub: TheHub) -> None:
    """Who reads the database of a hub cannot use the invitations in it: what is kept is no secret of a proof."""
    link = hub.invite()
    rows = hub.ledger.database.read("SELECT * FROM devices")
    kept = [bytes(value) for row in rows for value in row if isinstance(value, bytes)]
    assert kept == [proof.invitation_key(link.secret).public]
    for stolen in kept:
        with pytest.raises(AssertionError):
            Device(JoinLink(("hub",), KEY.public, stolen[:24])).proves(hub)


def test_tickets_are_bounded_and_end(hub: TheHub) -> None:
    device = Device(hub.invite())
    tickets = [device.proves(hub).ticket for _ in range(6)]
    found = [hub.proofs.tickets.find(ticket) is not None for ticket in tickets]
    assert found == [False, False, True, True, True, True]
    hub.time.monotonic += 3600
    assert hub.proofs.tickets.find(tickets[-1]) is None


def test_a_device_that_proves_itself_all_the_time_waits_and_stops_nobody_else(hub: TheHub) -> None:
    busy, other = Device(hub.invite(), 1), Device(hub.invite("clinic-8"), 2)
    for _ in range(60):
        busy.proves(hub)
    assert "60 times within a minute" in reason(*hub.proofs.answer(busy.answer(hub)), expected=503)
    other.proves(hub)
    hub.time.monotonic += 62
    busy.proves(hub)


def test_who_has_no_link_leaves_nothing_in_the_hubs_memory(hub: TheHub) -> None:
    before = len(hub.proofs._nonces._used)
    for seed in range(20):
        Device(JoinLink(("hub",), KEY.public, b"g" * 24), seed).is_refused(hub)
    assert len(hub.proofs._nonces._used) == before
    assert hub.proofs.tickets.held() == []


def test_a_full_disk_refuses_for_now_and_the_link_is_as_it_was(hub: TheHub, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(hub.invite())

    def full(*_: object) -> None:
        raise DiskFull("the ledger's disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(hub.ledger.database, "write", full)
        assert "disk is full" in reason(*hub.proofs.answer(device.answer(hub)), expected=503)
    assert device.proves(hub).edge == "clinic-7"


@pytest.mark.parametrize("body", [b"", b"{}", b"[1]", b"\x00" * 4096, msgspec.json.encode({"proof": "ask"})])
def test_other_bodies_are_refused_in_words(hub: TheHub, body: bytes) -> None:
    assert "the request holds no message of a proof" in reason(*hub.proofs.answer(body))


def test_a_nonce_is_for_the_device_nonce_that_asked_for_it(hub: TheHub) -> None:
    """Else the answer to one challenge could be used where another was asked for."""
    device = Device(hub.invite())
    answer = json.loads(device.answer(hub)) | {"device_nonce": as_text(b"y" * 32)}
    assert "the hub did not make this nonce" in reason(*hub.proofs.answer(json.dumps(answer).encode()))


def test_shut_out_are_those_whose_token_or_key_does_not_count_any_more(hub: TheHub) -> None:
    names = ("kept", "revoked", "rebound")
    devices = {name: Device(hub.invite(name), seed) for seed, name in enumerate(names)}
    held = []
    for name in names:
        token = hub.proofs.tickets.find(devices[name].proves(hub).ticket)
        assert token is not None
        held.append(token)
    for name in ("kept-token", "revoked-token"):
        token = hub.ledger.tokens.find(hub.ledger.tokens.create(name))
        assert token is not None
        held.append(token)
    hub.ledger.devices.revoke("revoked")
    hub.ledger.devices.rebind("rebound", b"i" * 32, hub.time.wall + DAY)
    hub.ledger.tokens.revoke("revoked-token")
    hub.ledger.tokens.create("revoked-token")  # the name has a new one, and the old one does not come back by it
    found = hub.ledger.edges.shut_out(held)
    assert [token.edge for token, _ in found] == [EdgeId("revoked"), EdgeId("rebound"), EdgeId("revoked-token")]
