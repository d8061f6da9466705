"""`fedsoda-hub service`: a unit that systemd takes and finds well shut in, and what is refused before it is installed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fedsoda_hub.cli import service_command
from fedsoda_hub.cli.commands import app
from tests.edge.ports.test_service_files import arguments_of
from tests.hub.serving.test_daemon import write_run
from tests.schema import HUB

HARDEST = 3.0  # of 10, where `systemd-analyze security` says how exposed a unit is
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine"
)


@pytest.fixture(autouse=True)
def _sigterm_as_it_was() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def service(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["service", *map(str, words)])


def printed(directory: Path, **tables: Any) -> str:
    done = service("install", write_run(directory, **tables).path, "--print")
    assert done.exit_code == 0, done.output
    return done.stdout


def lines_of(unit: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in unit.splitlines() if "=" in line)


def test_the_unit_serves_this_run_as_a_user_of_its_own_and_writes_to_the_run_alone(tmp_path: Path) -> None:
    directory = tmp_path / "my runs %h $HOME é"
    lines = lines_of(printed(directory))
    program, *words = arguments_of(lines["ExecStart"])
    assert Path(program).is_absolute()
    assert words[-2:] == ["serve", str(directory / "run.toml")]
    assert lines["User"] == "fedsoda-hub"
    assert lines["StateDirectory"] == "fedsoda-hub/small"
    assert lines["ReadWritePaths"] == f'"{str(directory).replace("%", "%%")}/small.run"'
    assert lines["RestartPreventExitStatus"] == "1 2 4 5 6"
    assert lines["ProtectSystem"] == "strict"


def test_a_run_on_the_cpu_sees_no_devices_and_others_see_gpus(tmp_path: Path) -> None:
    assert "DeviceAllow=char-nvidia rw" in printed(tmp_path / "gpu")
    path = Path(write_run(tmp_path / "cpu").path)
    path.write_text(f'device = "cpu"\n{path.read_text()}')
    unit = service("install", path, "--print").stdout
    assert "PrivateDevices=yes" in unit
    assert "nvidia" not in unit


@pytest.mark.parametrize(("port", "capability"), [(443, "CAP_NET_BIND_SERVICE"), (8470, "")])
def test_a_low_port_needs_the_one_capability_for_it(tmp_path: Path, port: int, capability: str) -> None:
    lines = lines_of(printed(tmp_path, listen={"port": port}))
    assert (lines["CapabilityBoundingSet"], lines["AmbientCapabilities"]) == (capability, capability)


@needs_systemd
@pytest.mark.parametrize("port", [443, 8470])
def test_systemd_takes_the_unit_and_finds_it_little_exposed(tmp_path: Path, port: int) -> None:
    unit = tmp_path / "fedsoda-hub-small.service"
    unit.write_text(printed(tmp_path / "run %h é", listen={"port": port}), encoding="utf-8")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["systemd-analyze", *words, str(unit)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    checked = run("verify")
    assert checked.returncode == 0, checked.stderr
    assert unit.name not in checked.stderr
    found = run("security", "--offline=true", "--no-pager").stdout
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", found)
    assert exposure is not None, found
    assert float(exposure[1]) <= HARDEST


def on_systemd(monkeypatch: pytest.MonkeyPatch, user: int) -> list[str]:
    """Let this machine have systemd and this user; return what systemctl is asked."""
    asked: list[str] = []
    monkeypatch.setattr("fedsoda_edge.ports.system.service_system", lambda: "systemd")
    monkeypatch.setattr("fedsoda_edge.ports.system.user_number", lambda: user)

    def systemctl(words: list[str], *, is_system: bool) -> str:
        assert is_system
        asked.append(" ".join(words))
        return "ActiveState=active\nSubState=running\nStatusText=waiting for edges" if words[0] == "show" else ""

    monkeypatch.setattr("fedsoda_edge.ports.service_manager.systemctl", systemctl)
    return asked


def test_who_is_not_root_is_told_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_systemd(monkeypatch, 1000)
    settings = write_run(tmp_path)
    done = service("install", settings.path)
    assert done.exit_code == 2
    assert re.search(rf"run `sudo /\S+fedsoda-hub service install {settings.path}`", done.stderr), done.stderr
    assert not settings.run_dir.exists()


def test_without_systemd_it_is_said_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsoda_edge.ports.system.service_system", lambda: "")
    done = service("install", write_run(tmp_path).path)
    assert done.exit_code == 2
    assert "no systemd runs here" in done.stderr


def test_a_run_that_the_service_could_not_read_is_refused_with_what_is_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = on_systemd(monkeypatch, 0)
    monkeypatch.setattr(service_command, "TEMPORARY", ())
    monkeypatch.setattr("fedsoda_edge.ports.system.numbers_of_user", lambda _: (64123, [64123]))
    closed = tmp_path / "closed"
    settings = write_run(closed)
    monkeypatch.setattr(service_command, "_program", lambda: ["/usr/bin/env"])
    monkeypatch.setattr("sys.executable", "/usr/bin/env")
    monkeypatch.setattr("sys.prefix", "/usr")
    closed.chmod(0o700)
    done = service("install", settings.path)
    assert done.exit_code == 2
    assert "fedsoda-hub may not read" in done.stderr
    assert "chmod o+rx" in done.stderr
    assert asked == []


def test_a_run_in_a_directory_that_is_emptied_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_systemd(monkeypatch, 0)
    monkeypatch.setattr(service_command, "TEMPORARY", (str(tmp_path),))
    monkeypatch.setattr("fedsoda_edge.ports.system.numbers_of_user", lambda _: (0, [0]))
    assert "emptied by itself" in service("install", write_run(tmp_path).path).stderr


def test_installed_it_is_started_and_uninstalled_the_run_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = on_systemd(monkeypatch, 0)
    monkeypatch.setattr(service_command, "TEMPORARY", ())
    monkeypatch.setattr(service_command, "UNITS", tmp_path / "units")
    monkeypatch.setattr("fedsoda_edge.ports.system.numbers_of_user", lambda _: (os.getuid(), [os.getgid()]))
    settings = write_run(tmp_path / "run")
    assert "has no service" in service("status", settings.path).stderr
    printed = HUB.report("service install", service("install", settings.path, "--print", "--json").stdout)
    assert (printed["file"], printed["service"]) == (None, None)
    done = service("install", settings.path, "--json")
    assert done.exit_code == 0, done.output
    assert HUB.report("service install", done.stdout)["service"]["says"] == "waiting for edges"
    assert "small: running, waiting for edges" in done.stderr
    assert HUB.report("service status", service("status", settings.path, "--json").stdout)["service"]["name"] == "small"
    assert HUB.report("service logs", service("logs", settings.path, "--json").stdout)["command"][0] == "journalctl"
    name = "fedsoda-hub-small.service"
    assert asked[:3] == ["daemon-reload", f"enable {name}", f"restart --no-block {name}"]
    assert (tmp_path / "units" / name).stat().st_mode & 0o777 == 0o644
    gone = HUB.report("service uninstall", service("uninstall", settings.path, "--json").stdout)
    assert gone["run_dir"] == str(settings.run_dir)
    assert f"disable --now {name}" in asked
    assert list((tmp_path / "units").iterdir()) == []
    assert settings.run_dir.is_dir()
