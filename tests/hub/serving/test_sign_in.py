"""Who is the hub's owner at a browser: links that work once, sessions that end, and names that a rebound site does not have."""

from __future__ import annotations

import pytest

from fedsoda_hub.serving.sign_in import (
    IDLE_SECONDS,
    LINK_SECONDS,
    MAX_LINKS,
    MAX_SESSIONS,
    OWN_NAMES,
    TRIES,
    TRY_SECONDS,
    SignIn,
    TooManyTries,
    host_name,
    is_address_or_own_name,
    own_names,
)


class Time:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def door(time: Time) -> SignIn:
    return SignIn(time, OWN_NAMES, frozenset({"https://hub.example.org"}))


def test_a_link_works_once(door: SignIn) -> None:
    secret = door.new_link()
    begun = door.use_link(secret, "203.0.113.7")
    assert begun is not None
    assert door.find(begun.secret) is begun.session
    assert door.use_link(secret, "203.0.113.7") is None


def test_a_link_ends_after_a_quarter_of_an_hour(door: SignIn, time: Time) -> None:
    old, new = door.new_link(), door.new_link()
    time.now += LINK_SECONDS
    assert door.use_link(new, "a") is not None
    time.now += 0.1
    assert door.use_link(old, "a") is None


def test_of_many_links_the_last_ones_work(door: SignIn) -> None:
    links = [door.new_link() for _ in range(MAX_LINKS + 1)]
    assert door.use_link(links[0], "a") is None
    assert door.use_link(links[1], "a") is not None


def test_wrong_sign_ins_of_an_address_are_bounded_and_those_of_others_are_not(door: SignIn, time: Time) -> None:
    for _ in range(TRIES):
        assert door.use_link("guess", "203.0.113.7") is None
    link = door.new_link()
    with pytest.raises(TooManyTries):
        door.use_link(link, "203.0.113.7")
    assert door.use_link(door.new_link(), "203.0.113.8") is not None
    time.now += TRY_SECONDS
    assert door.use_link(link, "203.0.113.7") is not None


def test_a_session_ends_after_twelve_hours_without_use_and_not_before(door: SignIn, time: Time) -> None:
    begun = door.begin()
    for _ in range(3):
        time.now += IDLE_SECONDS - 1
        assert door.find(begun.secret) is begun.session
    time.now += IDLE_SECONDS
    assert not door.is_alive(begun.session)
    assert door.find(begun.secret) is None


def test_who_signs_out_is_out(door: SignIn) -> None:
    begun = door.begin()
    door.end(begun.secret)
    assert not door.is_alive(begun.session)
    assert door.find(begun.secret) is None
    assert door.find(None) is None


def test_of_too_many_sessions_the_one_that_was_idle_longest_ends(door: SignIn) -> None:
    first, second = door.begin(), door.begin()
    door.find(first.secret)
    for _ in range(MAX_SESSIONS - 1):
        door.begin()
    assert door.find(second.secret) is None
    assert door.find(first.secret) is not None


def test_sessions_have_secrets_of_their_own(door: SignIn) -> None:
    begun = [door.begin() for _ in range(3)]
    values = {one.secret for one in begun} | {one.session.csrf for one in begun}
    assert len(values) == 6
    assert min(map(len, values)) >= 43  # 256 bits


@pytest.mark.parametrize(
    ("host", "is_own"),
    [
        ("localhost", True),
        ("LOCALHOST:8470", True),
        ("127.0.0.1:8470", True),
        ("[::1]:8470", True),
        ("rebound.example.org:8470", False),
        ("localhost.example.org", False),
        ("127.0.0.1.example.org", False),
        ("192.168.1.7:8470", False),
        ("", False),
        ("[", False),
    ],
)
def test_only_a_browser_that_calls_this_machine_by_its_own_name_needs_no_link(
    door: SignIn, host: str, is_own: bool
) -> None:
    assert door.needs_no_link(host) is is_own


@pytest.mark.parametrize(
    ("listen", "public", "names"),
    [
        ("127.0.0.1", None, OWN_NAMES),
        ("127.0.0.9", None, OWN_NAMES | {"127.0.0.9"}),
        ("0.0.0.0", None, OWN_NAMES),
        ("192.168.1.7", None, OWN_NAMES),
        ("127.0.0.1", "http://localhost:8470", OWN_NAMES),
        ("127.0.0.1", "https://hub.example.org", frozenset()),  # behind a proxy on this machine
        ("0.0.0.0", "https://hub.example.org:8470/triage", frozenset()),
    ],
)
def test_behind_a_proxy_everybody_signs_in(listen: str, public: str | None, names: frozenset[str]) -> None:
    assert own_names(listen, public) == names


@pytest.mark.parametrize(
    ("origin", "host", "is_ours"),
    [
        ("http://127.0.0.1:8470", "127.0.0.1:8470", True),
        ("https://hub.example.org", "127.0.0.1:8470", True),  # a proxy that writes its own Host
        ("https://hub.example.org.evil.example", "127.0.0.1:8470", False),
        ("http://127.0.0.1:9999", "127.0.0.1:8470", False),
        ("null", "127.0.0.1:8470", False),
        (None, "127.0.0.1:8470", False),
        ("", "", False),
        ("null", "", False),
    ],
)
def test_a_change_comes_from_this_page_or_not_at_all(
    door: SignIn, origin: str | None, host: str, is_ours: bool
) -> None:
    assert door.is_of_page(origin, host) is is_ours


def test_a_host_is_read_without_port_and_brackets() -> None:
    assert [host_name(host) for host in ("A.b:1", "[::1]:8470", "::1", "")] == ["a.b", "::1", "", ""]


@pytest.mark.parametrize(
    ("host", "is_one"), [("10.0.0.7:1", True), ("[fe80::1]", True), ("localhost", True), ("a.org", False)]
)
def test_an_address_is_no_name_of_a_site(host: str, is_one: bool) -> None:
    assert is_address_or_own_name(host) is is_one
