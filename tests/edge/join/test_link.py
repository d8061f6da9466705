"""Where a join link comes from, what a device keeps for it, and that its secret is shown nowhere."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedsoda_edge.cli.commands import app
from fedsoda_edge.edge import Edge
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.join import identity
from fedsoda_edge.join.home import Home
from fedsoda_edge.join.link import link_or_url, without_secret
from fedsoda_edge.network.hub_transport import HubTransport
from fedsoda_edge.protocol.join_link import JoinLink, read_link
from fedsoda_edge.protocol.signatures import SigningKey, as_text

SECRET = bytes(range(24))
LINK = JoinLink(("127.0.0.1:9", "127.0.0.1:1"), SigningKey(b"h" * 32).public, SECRET, None, True)


@pytest.fixture(autouse=True)
def _no_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSODA_LINK", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")


def test_a_link_is_an_argument_or_comes_from_a_file_stdin_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert link_or_url(f"  <{LINK}>\n", None, None) == LINK
    (tmp_path / "me.link").write_text(f"\ufeff{LINK}\r\n", encoding="utf-8")
    assert link_or_url(None, tmp_path / "me.link", None) == LINK
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{LINK}\nmore\n"))
    assert link_or_url(None, "-", None) == LINK
    monkeypatch.setenv("FEDSODA_LINK", str(LINK))
    assert link_or_url(None, None, None) == LINK
    assert link_or_url("https://hub.example.org", None, "me.token") == "https://hub.example.org"  # what is given counts


def test_a_link_that_a_mail_broke_into_lines_is_whole_again(tmp_path: Path) -> None:
    text = str(LINK)
    (tmp_path / "me.link").write_text("\n".join((text[:40], text[40:90], text[90:])) + "\n")
    assert link_or_url(None, tmp_path / "me.link", None) == LINK


@pytest.mark.parametrize(
    ("hub", "link_file", "token_file", "why"),
    [
        (None, None, None, "there is no hub to join; give the join link that `fedsoda-hub invite` printed"),
        (None, None, "me.token", "there is no hub to join; "),
        ("https://hub", "me.link", None, "a hub and link_file were both given; leave one of them out"),
        (str(LINK), None, "me.token", "a join link and token_file were both given; leave one of them out"),
        (None, "me.link", "me.token", "a join link and token_file were both given; leave one of them out"),
        (None, "none.link", None, "the file of the join link none.link cannot be read: No such file or directory; "),
        (str(LINK).partition("#")[0], None, None, "the join link lacks the hub's key (it may end at its # sign); "),
    ],
)
def test_what_names_no_hub_or_two_is_refused(
    hub: str | None, link_file: str | None, token_file: str | None, why: str
) -> None:
    with pytest.raises(UsageProblem) as refused:
        link_or_url(hub, link_file, token_file)
    assert str(refused.value).startswith(why)


def test_the_sdk_takes_a_link_in_each_way(tmp_path: Path) -> None:
    (tmp_path / "me.link").write_text(str(LINK))
    for edge in (
        Edge(str(LINK), home=tmp_path),
        Edge(link=str(LINK), home=tmp_path),
        Edge(link_file=tmp_path / "me.link", home=tmp_path),
    ):
        transport = edge.transport()
        assert isinstance(transport, HubTransport)
        assert [route.url for route in transport.routes] == ["http://127.0.0.1:9", "http://127.0.0.1:1"]
    with pytest.raises(UsageProblem, match="a hub and link were both given"):
        Edge("https://hub", link=str(LINK))


def test_a_devices_key_is_made_once_for_all_that_ask_at_once_and_is_for_its_owner_alone(tmp_path: Path) -> None:
    found: list[bytes] = []
    start = threading.Barrier(8)

    def ask() -> None:
        start.wait()
        found.append(identity.device_key(Home(tmp_path)).public)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["device.key"]
    assert (tmp_path / "device.key").stat().st_mode & 0o777 == 0o600


def test_a_key_that_was_cut_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "device.key").write_bytes(b"short")
    with pytest.raises(UsageProblem, match=r"has 5 bytes instead of 32: .* `fedsoda-hub rebind`"):
        identity.device_key(Home(tmp_path))


def test_where_a_hub_was_reached_last_is_tried_first(tmp_path: Path) -> None:
    home = Home(tmp_path)
    first, second = LINK.urls
    assert identity.addresses(home, LINK) == [first, second]
    identity.reached(home, LINK, second)
    assert identity.addresses(home, LINK) == [second, first]
    other = JoinLink(LINK.addresses, SigningKey(b"o" * 32).public, SECRET, None, True)
    assert identity.addresses(home, other) == [first, second]  # another hub
    moved = JoinLink(("127.0.0.1:7",), LINK.hub_key, SECRET, None, True)
    assert identity.addresses(home, moved) == ["http://127.0.0.1:7"]  # what the link does not name is not asked


@pytest.mark.parametrize("jsonl", [True, False])
@pytest.mark.parametrize("where", ["argument", "file", "environment"])
def test_the_secret_is_shown_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, jsonl: bool) -> None:
    """Nobody answers at the link's addresses; what is said of that has no part of the fragment in it."""
    monkeypatch.setenv("FEDSODA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("fedsoda_edge.join.agent.FIRST_SECONDS", 0.0)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "me.link").write_text(str(LINK))
    words = ["join", "--data", str(tmp_path / "rows.jsonl"), "--debug", *(["--jsonl"] if jsonl else [])]
    match where:
        case "argument":
            words.insert(1, str(LINK))
        case "file":
            words += ["--link-file", str(tmp_path / "me.link")]
        case _:
            monkeypatch.setenv("FEDSODA_LINK", str(LINK))
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 3, ended.output
    assert "no address of the hub can be used" in ended.output
    for path in (tmp_path / "home").rglob("*"):
        assert not path.is_file() or SECRET not in path.read_bytes()
    for shown in (as_text(SECRET), str(LINK), LINK.__str__().partition("#")[2][:20]):
        assert shown not in ended.output
        assert shown not in (tmp_path / "home" / "status.json").read_text()
    if jsonl and where == "argument":
        settings = json.loads(next(line for line in ended.output.splitlines() if '"settings"' in line))
        assert settings["values"]["url"]["value"] == "fedsoda://127.0.0.1:9/#..."


def test_a_link_is_shown_without_its_fragment() -> None:
    assert without_secret(str(LINK)) == "fedsoda://127.0.0.1:9/#..."
    assert without_secret("https://hub.example.org/a#b") == "https://hub.example.org/a#b"
    assert repr(read_link(str(LINK))) == "JoinLink(127.0.0.1:9, 127.0.0.1:1)"
