"""Ask the service manager of this system to start, stop and show the joins of this user.

Linux with systemd is tested. launchd (macOS) and Task Scheduler (Windows) follow the documentation of those systems and were
not run. What their files say is `service_files.py`'s.
"""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedsoda_edge.errors import LocalError, UsageProblem
from fedsoda_edge.ports.disk import write_durably
from fedsoda_edge.ports.service_files import (
    Service,
    environment_lines,
    home_in,
    launch_agent,
    scheduled_task,
    user_unit,
)
from fedsoda_edge.ports.system import service_system, user_number
from fedsoda_edge.units import counted

PREFIX = "fedsoda-edge-"
_SHOWN = ("ActiveState", "SubState", "Result", "ExecMainStatus", "StatusText", "NRestarts", "MainPID", "UnitFileState")
_LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class ServiceState:
    """The state of a service as its manager tells it.

    state: "running", "starting", "waiting to start again", "failed", "over" or what else the manager says. says: what
    the service says of itself; "": nothing. exit_status: of its last end; None: not known. restarts: since it was
    started by hand.
    """

    name: str
    state: str
    says: str = ""
    exit_status: int | None = None
    restarts: int = 0


class Manager(Protocol):
    """The service manager of a user."""

    def names(self) -> list[str]:
        """List the services of this program."""

    def home_of(self, name: str) -> Path | None:
        """Return the FEDSODA_HOME of a service; None: it is not known."""

    def install(self, service: Service) -> Path:
        """Write the service's files, and start it now and at each login or boot; return the file that it is in."""

    def uninstall(self, name: str) -> None:
        """Stop the service and delete its file."""

    def state(self, name: str) -> ServiceState:
        """Return how the service is."""

    def log_command(self, name: str, *, follow: bool) -> list[str]:
        """Return the command that shows the service's log."""

    def advice(self) -> str:
        """Say what this user should know of services here; "": nothing."""


def manager_here() -> Manager:
    """Return the service manager of this user.

    Raises:
        UsageProblem: there is none, or it cannot be reached.
    """
    match service_system():
        case "systemd":
            return Systemd.reached()
        case "launchd":
            return LaunchAgents()
        case "schtasks":
            return TaskScheduler()
        case _:
            raise UsageProblem(
                "no systemd runs here, as in a container or in WSL without it, so nothing here starts services; let what "
                "starts this container or machine run the join: --print shows its command and when to start it again"
            )


def systemctl(words: Sequence[str], *, is_system: bool = False) -> str:
    """Run systemctl and return what it prints.

    Raises:
        LocalError: it failed, with its words.
    """
    command = ["systemctl", *([] if is_system else ["--user"]), *words]
    ended = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=_environment(), check=False, timeout=120
    )
    if ended.returncode:
        raise LocalError(f"`{' '.join(command)}` failed: {ended.stderr.strip() or ended.stdout.strip()}")
    return ended.stdout


def _environment() -> dict[str, str]:
    """Return this environment with the way to the user's systemd, which sudo and su leave out."""
    runtime = f"/run/user/{user_number()}"
    return {**({"XDG_RUNTIME_DIR": runtime} if os.path.isdir(runtime) else {}), **os.environ}


def shown(unit: str, *, is_system: bool = False) -> dict[str, str]:
    """Return what systemd knows of a unit."""
    words = ["show", unit, *(f"--property={name}" for name in _SHOWN)]
    lines = systemctl(words, is_system=is_system).splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def state_of(name: str, values: dict[str, str]) -> ServiceState:
    """Say in one word how a service is, from what systemd shows."""
    active, sub = values.get("ActiveState", ""), values.get("SubState", "")
    words = {"active": "running", "inactive": "over", "deactivating": "stopping", "failed": "failed"}
    state = "waiting to start again" if sub == "auto-restart" else words.get(active, "starting")
    status = values.get("ExecMainStatus", "")
    return ServiceState(
        name,
        f"failed ({values['Result']})"
        if state == "failed" and values.get("Result") not in (None, "exit-code")
        else state,
        values.get("StatusText", "") if state in ("running", "starting", "stopping") else "",
        int(status) if status.isdecimal() and state not in ("running", "starting") else None,
        int(values.get("NRestarts") or 0),
    )


class Systemd:
    """The systemd of this user. directory: of the user's units."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @classmethod
    def reached(cls) -> Systemd:
        """Return the user's systemd, which answers.

        Raises:
            UsageProblem: it does not: this user is not logged in, as under sudo and su.
        """
        try:
            systemctl(["show", "--property=Version"])
        except LocalError as error:
            name = getpass.getuser()
            raise UsageProblem(
                f"the systemd of {name} does not answer ({error}); log in as {name} itself (sudo and su are no login), or run "
                f"`sudo loginctl enable-linger {name}` once, and try again; --print shows the unit without it"
            ) from None
        return cls(units_directory())

    def _unit(self, name: str) -> Path:
        return self._directory / f"{PREFIX}{name}.service"

    def names(self) -> list[str]:
        return sorted(
            path.stem.removeprefix(PREFIX)
            for path in self._directory.glob(f"{PREFIX}*.service")
            if self.home_of(path.stem.removeprefix(PREFIX)) is not None
        )

    def home_of(self, name: str) -> Path | None:
        try:
            return home_in(self._unit(name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            return None

    def install(self, service: Service) -> Path:
        path = self._unit(service.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(service.environment_file, environment_lines(service.environment).encode(), 0o600)
        write_durably(path, user_unit(service).encode())
        systemctl(["daemon-reload"])
        systemctl(["enable", path.name])
        systemctl(["restart", "--no-block", path.name])
        return path

    def uninstall(self, name: str) -> None:
        unit = self._unit(name)
        systemctl(["disable", "--now", unit.name])
        unit.unlink(missing_ok=True)
        systemctl(["daemon-reload"])

    def state(self, name: str) -> ServiceState:
        return state_of(name, shown(self._unit(name).name))

    def log_command(self, name: str, *, follow: bool) -> list[str]:
        words = ["journalctl", f"--user-unit={self._unit(name).name}", "--output=short-iso", "--lines=200"]
        return [*words, "--follow"] if follow else [*words, "--no-pager"]

    def advice(self) -> str:
        name = getpass.getuser()
        if shutil.which("loginctl") is None:
            return ""
        asked = ["loginctl", "show-user", name, "--property=Linger", "--value"]
        told = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30).stdout.strip()
        if told == "yes" or user_number() == 0:
            return ""
        return (
            f"systemd ends it when {name} logs out, and starts it at the next login; `loginctl enable-linger` keeps it running "
            f"and starts it at boot (where that asks for an administrator: `sudo loginctl enable-linger {name}`)"
        )


def units_directory() -> Path:
    """Return the directory of the units of this user."""
    config = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(config) if config.startswith("/") else Path.home() / ".config") / "systemd" / "user"


class LaunchAgents:
    """The launchd, for the services of this user on macOS."""

    def __init__(self) -> None:
        self._directory = Path.home() / "Library" / "LaunchAgents"
        self._domain = f"gui/{user_number()}"

    def _label(self, name: str) -> str:
        return f"org.fedsoda.edge.{name}"

    def _file(self, name: str) -> Path:
        return self._directory / f"{self._label(name)}.plist"

    def names(self) -> list[str]:
        prefix = self._label("")
        return sorted(path.stem.removeprefix(prefix) for path in self._directory.glob(f"{prefix}*.plist"))

    def home_of(self, name: str) -> Path | None:
        return None

    def install(self, service: Service) -> Path:
        path = self._file(service.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        _run(["launchctl", "bootout", f"{self._domain}/{self._label(service.name)}"], may_fail=True)
        write_durably(path, launch_agent(service, self._label(service.name)), 0o600)
        _run(["launchctl", "bootstrap", self._domain, str(path)])
        return path

    def uninstall(self, name: str) -> None:
        _run(["launchctl", "bootout", f"{self._domain}/{self._label(name)}"], may_fail=True)
        self._file(name).unlink(missing_ok=True)

    def state(self, name: str) -> ServiceState:
        told = _run(["launchctl", "print", f"{self._domain}/{self._label(name)}"], may_fail=True)
        return ServiceState(name, "running" if "state = running" in told else "over")

    def log_command(self, name: str, *, follow: bool) -> list[str]:
        return []

    def advice(self) -> str:
        return "macOS starts it when you log in"


class TaskScheduler:
    """The Task Scheduler, for the services of this user on Windows."""

    def _task(self, name: str) -> str:
        return f"\\FedSODA\\{name}"

    def names(self) -> list[str]:
        lines = _run(["schtasks", "/Query", "/FO", "CSV", "/NH"], may_fail=True).splitlines()
        prefix = self._task("")
        found = (line.split('","')[0].lstrip('"') for line in lines)
        return sorted({task.removeprefix(prefix) for task in found if task.startswith(prefix)})

    def home_of(self, name: str) -> Path | None:
        return None

    def install(self, service: Service) -> Path:
        path = service.secrets / f"{service.name}.xml"
        user = f"{os.environ.get('USERDOMAIN', '.')}\\{getpass.getuser()}"
        write_durably(path, scheduled_task(service, user), 0o600)
        _run(["schtasks", "/Create", "/F", "/TN", self._task(service.name), "/XML", str(path)])
        _run(["schtasks", "/Run", "/TN", self._task(service.name)])
        return path

    def uninstall(self, name: str) -> None:
        _run(["schtasks", "/End", "/TN", self._task(name)], may_fail=True)
        _run(["schtasks", "/Delete", "/F", "/TN", self._task(name)])

    def state(self, name: str) -> ServiceState:
        told = _run(["schtasks", "/Query", "/FO", "CSV", "/NH", "/TN", self._task(name)], may_fail=True)
        return ServiceState(name, told.strip().rpartition(',"')[2].rstrip('"').lower() or "not installed")

    def log_command(self, name: str, *, follow: bool) -> list[str]:
        return []

    def advice(self) -> str:
        return (
            "Windows starts it when you log in, and gives it the variables of your user alone: set FEDSODA_HOME and those of "
            "a proxy with setx where they are needed"
        )


def _run(command: list[str], *, may_fail: bool = False) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=120)
    if ended.returncode and not may_fail:
        raise LocalError(f"`{' '.join(command)}` failed: {ended.stderr.strip() or ended.stdout.strip()}")
    return ended.stdout


def settled(state: Callable[[], ServiceState], seconds: float) -> ServiceState:
    """Return how a service is that was just started: as soon as it runs or has ended, or after this time."""
    until = time.monotonic() + seconds
    while (found := state()).state == "starting" and time.monotonic() < until:
        time.sleep(_LOOK_SECONDS)
    return found


def sentence(state: ServiceState, log_command: str) -> str:
    """Say how a service is, on one line.

    Args:
        log_command: what shows why it failed.
    """
    line = f"{state.name}: {state.state}"
    line += f", {state.says}" if state.says else ""
    line += f", exit status {state.exit_status}" if state.exit_status else ""
    line += f", started again {counted(state.restarts, 'time')}" if state.restarts else ""
    return line + (f"; {log_command} says why" if state.state.startswith(("failed", "waiting")) else "")
