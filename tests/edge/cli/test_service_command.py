"""`fedsoda-edge service`: what is written, what is refused before that, and what the service manager is asked.

systemctl is a script here that answers as systemd 252 did; docs/operations.md says how the units ran under a real one.
"""

from __future__ import annotations

import inspect
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fedsoda_edge.cli import commands, service_command
from fedsoda_edge.protocol.join_link import JoinLink
from tests.edge.ports.test_service_files import arguments_of
from tests.schema import EDGE
from tests.test_schemas import ROWS

LINK = str(JoinLink(("hub.example.org:8470",), b"k" * 32, b"s" * 24, b"t" * 32))
OTHER = str(JoinLink(("hub.example.org:8470",), b"k" * 32, b"S" * 24, b"t" * 32))

SYSTEMCTL = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in
  *"show --property=Version"*) [ -z "$NO_BUS" ] || { echo "Failed to connect to bus: No medium found" >&2; exit 1; } ;;
  *" show "*) printf '%s\\n' "$SHOWN" ;;
esac
"""
RUNNING = "ActiveState=active\nSubState=running\nResult=success\nExecMainStatus=0\nStatusText=waiting for a round\nNRestarts=2"
REFUSED = "ActiveState=failed\nSubState=failed\nResult=exit-code\nExecMainStatus=5\nStatusText=connecting\nNRestarts=0"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine with systemd, of which the user's systemctl writes down how it is called."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in {"systemctl": SYSTEMCTL, "loginctl": "#!/bin/sh\necho no\n"}.items():
        (programs / name).write_text(script)
        (programs / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("SHOWN", RUNNING)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("SUDO_USER", "FEDSODA_THREADS", *service_command.VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("fedsoda_edge.ports.service_manager.service_system", lambda: "systemd")
    monkeypatch.setattr("fedsoda_edge.ports.service_manager.user_number", lambda: 1000)
    (tmp_path / "my %h visits.jsonl").write_text(ROWS)
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def service(*words: str, **environment: str) -> Result:
    return CliRunner().invoke(commands.app, ["service", *words], env=environment)


def install(*words: str, **environment: str) -> Result:
    return service("install", "--data", "my %h visits.jsonl", *words, **environment)


def unit_of(machine: Path, name: str) -> dict[str, str]:
    text = (machine / "config" / "systemd" / "user" / f"fedsoda-edge-{name}.service").read_text()
    assert LINK not in text
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def test_a_service_takes_the_options_of_join_and_no_others_but_its_own() -> None:
    named = {
        command: set(inspect.signature(command).parameters) for command in (commands.join, service_command.install)
    }
    own, not_of_services = {"name", "is_printed"}, {"unattended", "jsonl"}
    assert named[service_command.install] - own == named[commands.join] - not_of_services


def test_install_writes_link_and_environment_for_this_user_alone_and_starts_the_unit(machine: Path) -> None:
    done = install(LINK, "--max-ram", "6GB", "--column", "a=b", "--column", "c=d", https_proxy="http://u:p$w@proxy")
    assert done.exit_code == 0, done.output
    unit = unit_of(machine, "hub.example.org-8470")
    home = machine / "home"
    kept = home / "services" / "hub.example.org-8470"
    program, *words = arguments_of(unit["ExecStart"])
    assert Path(program).is_absolute()
    assert words[-12:] == [
        *("join", "--link-file", f"{kept}.link", "--unattended", "--data", str(machine / "my %h visits.jsonl")),
        *("--column", "a=b", "--column", "c=d", "--max-ram", "6GB"),
    ]
    assert Path(f"{kept}.link").read_text() == f"{LINK}\n"
    assert Path(f"{kept}.env").read_text() == 'https_proxy="http://u:p\\$w@proxy"\n'
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (home / "services").iterdir()}
    assert modes == {"hub.example.org-8470.link": 0o600, "hub.example.org-8470.env": 0o600}
    assert stat.S_IMODE((home / "services").stat().st_mode) == 0o700
    calls = (machine / "calls").read_text().splitlines()
    name = "fedsoda-edge-hub.example.org-8470.service"
    assert calls[1:4] == ["--user daemon-reload", f"--user enable {name}", f"--user restart --no-block {name}"]
    assert "hub.example.org-8470: running, waiting for a round, started again 2 times" in done.stderr
    assert "loginctl enable-linger" in done.stderr


def test_installed_again_a_service_has_the_new_link_and_there_is_one(machine: Path) -> None:
    assert install(LINK).exit_code == 0
    assert install(OTHER, "--threads", "2").exit_code == 0
    found = EDGE.report("service status", service("status", "--json").stdout)["services"]
    assert [one["name"] for one in found] == ["hub.example.org-8470"]
    assert (machine / "home" / "services" / "hub.example.org-8470.link").read_text() == f"{OTHER}\n"
    assert unit_of(machine, "hub.example.org-8470")["ExecStart"].endswith('"--threads" "2"')


def test_a_token_is_kept_in_a_file_too_and_variables_become_options(machine: Path) -> None:
    done = install("https://hub.example.org/fl/triage", FEDSODA_TOKEN="fs1-abc", FEDSODA_DEVICE="cpu")
    assert done.exit_code == 0, done.output
    words = arguments_of(unit_of(machine, "triage")["ExecStart"])
    kept = machine / "home" / "services" / "triage.token"
    assert words[words.index("join") + 1 :][:3] == ["https://hub.example.org/fl/triage", "--token-file", str(kept)]
    assert words[-2:] == ["--device", "cpu"]
    assert kept.read_text() == "fs1-abc\n"


def test_what_config_toml_gives_to_join_is_checked_and_stays_there(machine: Path) -> None:
    (machine / "home").mkdir()
    (machine / "home" / "config.toml").write_text('[join]\ndata = "my %h visits.jsonl"\nthreads = 3\n')
    done = service("install", LINK, "--name", "a")
    assert done.exit_code == 0, done.output
    words = arguments_of(unit_of(machine, "a")["ExecStart"])
    assert words[-2:] == ["--data", str(machine / "my %h visits.jsonl")]  # the file's path is relative to nothing
    (machine / "home" / "config.toml").write_text('[join]\ndata = "my %h visits.jsonl"\ncache = "fp8"\n')
    assert service("install", LINK).exit_code == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([LINK, "--cache", "fp8"], "fp8"),
        ([LINK, "--pause-on", "sunday"], "sunday"),
        ([LINK, "--max-ram", "lots"], "--max-ram"),
        ([LINK, "--data", "nothing.jsonl"], "nothing.jsonl"),
        ([LINK[:-9]], "damaged"),
        (["http://hub.example.org"], "--insecure-http"),
        ([], "there is no hub to join"),
        ([LINK, "--name", "../up"], "cannot be a service's name"),
    ],
)
def test_what_join_refuses_is_refused_before_anything_is_written(
    machine: Path, words: list[str], sentence: str
) -> None:
    done = install(*words, FEDSODA_TOKEN="t")
    assert done.exit_code == 2, done.output
    assert sentence in done.stderr
    assert not (machine / "config").exists()
    assert not (machine / "home" / "services").exists()


def test_a_second_service_in_one_home_is_refused_with_what_to_do(machine: Path) -> None:
    assert install(LINK, "--name", "one").exit_code == 0
    done = install(LINK, "--name", "two")
    assert done.exit_code == 2
    assert f"FEDSODA_HOME={machine / 'home'}-two" in done.stderr
    assert install(LINK, "--name", "two", FEDSODA_HOME=f"{machine / 'home'}-two").exit_code == 0
    assert "name one of one, two" in service("uninstall").stderr


def test_uninstall_leaves_data_and_home(machine: Path) -> None:
    install(LINK)
    (machine / "home" / "device_id").write_text("mine")
    done = service("uninstall")
    assert done.exit_code == 0, done.output
    assert list((machine / "home" / "services").iterdir()) == []
    assert list((machine / "config" / "systemd" / "user").iterdir()) == []
    assert (machine / "home" / "device_id").exists()
    assert (machine / "my %h visits.jsonl").exists()
    assert "disable --now fedsoda-edge-hub.example.org-8470.service" in (machine / "calls").read_text()


def test_a_service_that_does_not_start_is_told_with_its_exit_status(machine: Path) -> None:
    done = install(LINK, SHOWN=REFUSED)
    assert done.exit_code == 1
    assert (
        "does not run: hub.example.org-8470: failed, exit status 5; fedsoda-edge service logs says why" in done.stderr
    )


@pytest.mark.parametrize(
    "words", [["install", "--data", "my %h visits.jsonl", LINK], ["status"], ["uninstall"], ["logs"]]
)
def test_where_no_systemd_runs_it_is_said_with_what_to_do(
    machine: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setattr("fedsoda_edge.ports.service_manager.service_system", lambda: "")
    done = service(*words)
    assert done.exit_code == 2
    assert "no systemd runs here" in done.stderr
    assert "--print" in done.stderr


def test_where_the_users_systemd_does_not_answer_it_is_said_how_it_would(machine: Path) -> None:
    done = install(LINK, NO_BUS="1")
    assert done.exit_code == 2
    assert "enable-linger" in done.stderr
    assert "No medium found" in done.stderr


@pytest.mark.parametrize("user", [0, 1000])
def test_sudo_to_root_is_refused_and_to_another_user_is_not(
    machine: Path, monkeypatch: pytest.MonkeyPatch, user: int
) -> None:
    monkeypatch.setattr("fedsoda_edge.ports.system.user_number", lambda: user)
    done = install(LINK, SUDO_USER="ann")
    assert ("run this as ann itself" in done.stderr, done.exit_code) == ((True, 2) if user == 0 else (False, 0))


def test_print_shows_the_unit_and_changes_nothing(machine: Path) -> None:
    done = install(LINK, "--print")
    assert done.exit_code == 0, done.output
    assert "Type=notify" in done.stdout
    assert LINK not in done.output
    assert not (machine / "calls").exists()
    assert not (machine / "home" / "services").exists()


def test_every_report_is_as_promised(machine: Path) -> None:
    printed = EDGE.report("service install", install(LINK, "--print", "--json").stdout)
    assert (printed["file"], printed["service"]) == (None, None)
    done = EDGE.report("service install", install(LINK, "--name", "a", "--json").stdout)
    assert done["service"]["says"] == "waiting for a round"
    assert done["command"][-2:] == ["--data", str(machine / "my %h visits.jsonl")]
    assert EDGE.report("service logs", service("logs", "--json").stdout)["command"][0] == "journalctl"
    assert EDGE.report("service uninstall", service("uninstall", "--json").stdout)["name"] == "a"
