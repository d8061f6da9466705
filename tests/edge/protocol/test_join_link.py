"""A join link is one line that survives mail and chat, and says what is lost where it does not."""

from __future__ import annotations

import pytest

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.join_link import JoinLink, is_link, read_link

KEY, SECRET, PIN = bytes(range(32)), bytes(range(24)), bytes(range(32, 64))
LINKS = (
    JoinLink(("hub.example.org:8470",), KEY, SECRET, PIN),
    JoinLink(("hub.example.org/fed/soda",), KEY, SECRET),
    JoinLink(("[2001:db8::1]:8470", "198.51.100.7:8470", "hub.example.org"), KEY, SECRET, PIN),
    JoinLink(("127.0.0.1:8470",), KEY, SECRET, is_plain=True),
)


@pytest.mark.parametrize("link", LINKS, ids=repr)
def test_a_link_comes_back(link: JoinLink) -> None:
    assert read_link(str(link)) == link


def test_the_line_is_this() -> None:
    key, secret, pin = (
        "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8",
        "AAECAwQFBgcICQoLDA0ODxAREhMUFRYX",
        "ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8",
    )
    assert str(LINKS[0]) == f"fedsoda://hub.example.org:8470/#k={key}&s={secret}&t={pin}"
    assert LINKS[0].urls == ("https://hub.example.org:8470",)
    assert LINKS[3].urls == ("http://127.0.0.1:8470",)


def test_what_mail_and_chat_put_around_a_line_is_taken_off() -> None:
    line = str(LINKS[0])
    for around in (f" {line}\r\n", f"<{line}>", f'"{line}"', f"'{line}'\n"):
        assert read_link(around) == LINKS[0]
        assert is_link(around.strip("<>\"'"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda line: line.split("#")[0], "lacks the hub's key"),
        (lambda line: line[: line.index("&s=") + 10], "the secret in the join link has 7 characters"),
        (lambda line: line[:-1], "the pin of the hub's TLS key in the join link has 42 characters"),
        (lambda line: line.replace("fedsoda://", "https://"), "begins with fedsoda://"),
        (lambda line: line.replace("hub.example.org:8470", ""), "does not name a host"),
        (lambda line: line.replace(":8470", ":99999"), "does not name a host"),
        (lambda line: line.replace("hub.example.org", "user:word@hub.example.org"), "does not name a host"),
        (lambda line: line.replace("&s=", "&s=AAAA&s="), "lacks the secret"),
        (lambda line: line + "&a=hub" * 9, "does not name a host"),
        (lambda line: line + "&" + "x" * 3000, "characters, but at most"),
    ],
)
def test_a_damaged_link_is_refused_in_a_sentence_without_its_secret(change, said: str) -> None:  # type: ignore[no-untyped-def]
    line = str(LINKS[0])
    with pytest.raises(UsageProblem, match=said) as refused:
        read_link(change(line))
    assert "AAECAwQFBgcICQoLDA0ODxAREhMUFRYX" not in str(refused.value)


def test_a_link_is_never_shown_with_its_secret() -> None:
    assert "AAEC" not in repr(LINKS[0])
    assert "AAEC" not in f"{(LINKS[0],)}"
