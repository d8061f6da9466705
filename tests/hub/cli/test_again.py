"""The same `token create` and `invite` a second time: no second secret, and the same answer."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from fedsoda_edge.protocol.join_link import read_link
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import opened
from fedsoda_hub.settings.run import RunSettings
from tests.hub.cli.test_guests import hub
from tests.hub.serving.test_daemon import write_run


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    return write_run(tmp_path, listen={"port": 8470})


def made(settings: RunSettings, *words: str, out: Path) -> tuple[dict[str, object], str]:
    done = hub(settings, *words, "--out", str(out), "--json")
    assert done.exit_code == 0, done.output
    answer: dict[str, object] = json.loads(done.stdout)
    return answer, out.read_text()


def token_create(settings: RunSettings, name: str, out: Path | None) -> tuple[int, dict[str, object]]:
    from typer.testing import CliRunner

    from fedsoda_hub.cli.commands import app

    more = [] if out is None else ["--out", str(out)]
    done = CliRunner().invoke(app, ["token", "create", str(settings.path), "--name", name, "--json", *more])
    answer: dict[str, object] = json.loads(done.stdout)
    return done.exit_code, answer


def test_a_token_that_its_file_holds_is_not_made_again(settings: RunSettings, tmp_path: Path) -> None:
    out = tmp_path / "a.token"
    first = token_create(settings, "a", out)
    text = out.read_text()
    assert token_create(settings, "a", out) == first == (0, {"schema": 1, "status": "ok", "edge": "a"})
    assert out.read_text() == text


def test_a_token_whose_file_is_another_one_is_not_made_again_either(settings: RunSettings, tmp_path: Path) -> None:
    out = tmp_path / "a.token"
    token_create(settings, "a", out)
    token_create(settings, "b", tmp_path / "b.token")
    for other in (None, tmp_path / "new.token", tmp_path / "b.token"):
        before = other.read_text() if other and other.exists() else None
        status, answer = token_create(settings, "a", other)
        assert (status, answer["code"], answer["recovery"]) == (2, "already-there", "fix-input")
        assert (other.read_text() if other and other.exists() else None) == before


def test_a_link_that_its_file_holds_is_not_made_again(settings: RunSettings, tmp_path: Path) -> None:
    out = tmp_path / "a.link"
    first = made(settings, "invite", "--name", "a", out=out)
    assert made(settings, "invite", "--name", "a", out=out) == first


def test_a_link_that_is_worth_nothing_is_made_again(settings: RunSettings, tmp_path: Path) -> None:
    out = tmp_path / "a.link"
    _, first = made(settings, "invite", "--name", "a", out=out)
    for spoilt in (first[:-9], "", "fedsoda://", "\x00\xff", first.replace("8470", "8471")):
        out.write_text(spoilt, encoding="latin-1")
        _, again = made(settings, "invite", "--name", "a", out=out)
        assert read_link(again).secret != read_link(first).secret
    made(settings, "invite", "--name", "a", "--expires", "0.001s", out=tmp_path / "short")
    time.sleep(0.01)
    answer, _ = made(settings, "invite", "--name", "a", out=tmp_path / "short")
    assert float(str(answer["expires"])) > time.time() + 3600


def test_a_link_that_a_device_has_used_is_not_made_again(settings: RunSettings, tmp_path: Path) -> None:
    out = tmp_path / "a.link"
    made(settings, "invite", "--name", "a", out=out)
    with opened(RunDirectory(settings.run_dir)) as ledger:
        [device] = ledger.devices.all()
        ledger.devices.bind(device.invitation, b"k" * 32, time.time())
    refused = hub(settings, "invite", "--name", "a", "--out", str(out), "--json")
    assert json.loads(refused.stdout)["code"] == "already-there"
