"""`invite`, `revoke` and `rebind`: what they print, what they keep, and what they say where they refuse."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fedsoda_edge.ports.outlet import OUT
from fedsoda_edge.protocol.join_link import read_link
from fedsoda_edge.protocol.proof import invitation_key
from fedsoda_edge.protocol.signatures import SigningKey, as_text
from fedsoda_hub.cli.commands import app
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import opened
from fedsoda_hub.settings.run import RunSettings
from tests.hub.serving.test_daemon import write_run


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    return write_run(tmp_path, listen={"port": 8470})


def hub(settings: RunSettings, command: str, *words: str) -> Result:
    return CliRunner().invoke(app, [command, str(settings.path), *words])


def test_a_link_stands_alone_on_stdout_before_the_hub_ever_ran_and_names_its_key(settings: RunSettings) -> None:
    done = hub(settings, "invite", "--name", "clinic-7")
    assert done.exit_code == 0, done.output
    [line] = done.stdout.splitlines()
    link = read_link(line)
    seed = RunDirectory(settings.run_dir).signing_key.read_bytes()
    assert (link.addresses, link.hub_key) == (("127.0.0.1:8470",), SigningKey(seed).public)
    assert "the link lets one device join as clinic-7, 127.0.0.1:8470, until 20" in done.stderr
    with opened(RunDirectory(settings.run_dir)) as ledger:
        [device] = ledger.devices.all()
    assert device.invitation == invitation_key(link.secret).public
    assert device.expires == pytest.approx(time.time() + 7 * 86400, abs=60)
    for path in settings.run_dir.iterdir():  # the secret is in no file
        assert link.secret not in path.read_bytes()
        assert as_text(link.secret).encode() not in path.read_bytes()


def test_a_second_link_replaces_one_that_nobody_used_and_says_so(settings: RunSettings) -> None:
    first = hub(settings, "invite", "--name", "a", "--expires", "12h")
    second = hub(settings, "invite", "--name", "a", "--expires", "90s")
    assert "made before" not in first.stderr
    assert "the link of a that was made before, and that no device has used, is worth nothing" in second.stderr
    with opened(RunDirectory(settings.run_dir)) as ledger:
        [device] = ledger.devices.all()
        assert device.invitation == invitation_key(read_link(second.stdout).secret).public
        assert device.expires == pytest.approx(time.time() + 90, abs=60)
        ledger.devices.bind(device.invitation, b"k" * 32, time.time())
    refused = hub(settings, "invite", "--name", "a")
    assert refused.exit_code == 2
    assert re.search("error: the link of 'a' was used on 20.* `fedsoda-hub rebind RUN.toml a`", refused.stderr)


def test_a_file_takes_the_link_with_mode_0600_and_json_has_it_as_a_field(settings: RunSettings, tmp_path: Path) -> None:
    done = hub(settings, "invite", "--name", "a", "--out", str(tmp_path / "a.link"))
    assert (done.exit_code, done.stdout) == (0, "")
    assert read_link((tmp_path / "a.link").read_text()).addresses == ("127.0.0.1:8470",)
    assert (tmp_path / "a.link").stat().st_mode & 0o777 == 0o600
    found = json.loads(hub(settings, "invite", "--name", "b", "--json").stdout)
    assert (found["edge"], found["kind"]) == ("b", "link")
    assert read_link(found["link"]).is_plain


@pytest.mark.parametrize("command", ["invite", "rebind"])
def test_where_nobody_could_read_the_link_all_is_as_it_was(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    hub(settings, "invite", "--name", "a")
    with opened(RunDirectory(settings.run_dir)) as ledger:
        if command == "rebind":
            ledger.devices.bind(ledger.devices.all()[0].invitation, b"k" * 32, 1e9)
        before = ledger.devices.all()

    def full(_: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(OUT, "give", full)
    done = hub(settings, command, *(["--name"] if command == "invite" else []), "a")
    assert done.exit_code == 2
    with opened(RunDirectory(settings.run_dir)) as ledger:
        assert ledger.devices.all() == before


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["invite", "--name", "a/b"], "--name 'a/b' cannot be an edge's id"),
        (
            ["invite", "--name", "a", "--expires", "soon"],
            "--expires 'soon' is not a time; write it as 90s, 30m, 1h or 7d",
        ),
        (["revoke", "a"], "'a' has neither a token nor a join link; name one of those that have: none"),
        (["rebind", "a"], "'a' has neither a token nor a join link; name one of those that have: none"),
    ],
)
def test_what_cannot_be_is_refused_in_words(settings: RunSettings, words: list[str], why: str) -> None:
    done = hub(settings, *words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert why in done.stderr


def test_edges_lists_who_may_join_also_before_the_run_began(settings: RunSettings) -> None:
    assert "has not been started" in hub(settings, "edges").stderr
    hub(settings, "invite", "--name", "link-1")
    hub(settings, "invite", "--name", "link-2")
    with opened(RunDirectory(settings.run_dir)) as ledger:
        ledger.tokens.create("token-1")
        ledger.devices.bind(ledger.devices.all()[1].invitation, b"k" * 32, 1e9)
        ledger.edges.note_seen({ledger.devices.all()[1].edge: 1.7e9})
    hub(settings, "revoke", "token-1")
    lines = hub(settings, "edges").stderr.splitlines()
    assert re.fullmatch(r"link-1 +link +not used, link until 20\S+ \S+ UTC", lines[0])
    assert re.fullmatch(
        r"link-2 +link +([a-z2-7]{4}-?){4} away, seen 2023-11-14 22:13 UTC to 2023-11-14 22:13 UTC", lines[1]
    )
    assert re.fullmatch(r"token-1 +token +revoked", lines[2])


def test_a_link_of_a_hub_that_listens_everywhere_names_the_machine_and_says_that_it_guessed(tmp_path: Path) -> None:
    settings = write_run(tmp_path, listen={"port": 8470, "host": "0.0.0.0"})
    done = hub(settings, "invite", "--name", "a")
    assert done.exit_code == 0, done.output
    assert "0.0.0.0" not in done.stdout


def test_a_port_that_nobody_knows_yet_is_refused(tmp_path: Path) -> None:
    done = hub(write_run(tmp_path), "invite", "--name", "a")
    assert done.exit_code == 2
    assert "[listen] port = 0 is known once the hub serves" in done.stderr
