"""Write the files by which systems start services: units of systemd, launchd's property lists, Windows' tasks. Text alone.

Who reads these files is left to `service_manager.py`.
"""

from __future__ import annotations

import json
import plistlib
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from fedsoda_edge.errors import UsageProblem, lasting_statuses

WATCHDOG_SECONDS = 120
RESTART_SECONDS = 30
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}
_RECORD = "X-FedSODA"  # a section that systemd leaves to us


@dataclass(frozen=True)
class Service:
    """A join that a service manager starts.

    name: as people call it. command: the program's absolute path, and its arguments. home: its FEDSODA_HOME.
    environment: what it needs beside, which may hold a proxy's password. log: the file of its log where the system keeps
    none.
    """

    name: str
    command: tuple[str, ...]
    home: Path
    environment: Mapping[str, str]
    log: Path

    @property
    def secrets(self) -> Path:
        """The directory of this device's services: links, tokens and environments, mode 0600."""
        return self.home / "services"

    @property
    def environment_file(self) -> Path:
        """The file of the environment, for systemd."""
        return self.secrets / f"{self.name}.env"


# --- systemd -------------------------------------------------------------------------------------------


def argument(text: str) -> str:
    """Quote one argument of ExecStart=: no specifier, variable or escape of it counts.

    Raises:
        UsageProblem: it is a path that is not UTF-8, which systemd does not start.
    """
    return _quoted(text).replace("$", "$$")


def program(path: str) -> str:
    """Quote the program of ExecStart=, in which systemd replaces no variables, and takes no quotes and backslashes."""
    if re.search(r"[\\\"'\x00-\x1f\x7f]", path):
        return f"/usr/bin/env {argument(path)}"
    return _quoted(path)


def command_line(command: Sequence[str]) -> str:
    """Write a command for ExecStart=."""
    return " ".join([program(command[0]), *map(argument, command[1:])])


def assignment(name: str, value: str) -> str:
    """Write a variable for Environment=."""
    return _quoted(f"{name}={value}")


def plain_path(path: str | Path) -> str:
    """Write a path for settings that take a whole line: specifiers alone count there."""
    return _utf8(str(path)).replace("%", "%%")


def quoted_path(path: str | Path) -> str:
    """Write a path for settings that take a list of them."""
    return _quoted(str(path))


def _quoted(text: str) -> str:
    escaped = "".join(_ESCAPES.get(one) or (f"\\x{ord(one):02x}" if ord(one) < 0x20 else one) for one in _utf8(text))
    return f'"{escaped.replace("%", "%%")}"'


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageProblem(
            f"{text.encode('utf-8', 'backslashreplace').decode()} is not UTF-8, and systemd starts nothing with such a name; "
            "rename it"
        ) from None
    return text


def restart_lines() -> list[str]:
    """Write when systemd starts a service again: after what may end by itself, a crash or a hang."""
    return [
        "Restart=on-failure",
        f"RestartSec={RESTART_SECONDS}",
        f"RestartPreventExitStatus={' '.join(map(str, lasting_statuses()))}",
        # A child that is killed for memory is this program's matter: it continues with less.
        "OOMPolicy=continue",
        # Only the program itself is asked to end; it ends its children in order.
        "KillMode=mixed",
        "TimeoutStopSec=90",
    ]


def notify_lines() -> list[str]:
    """Write how the service tells systemd that it is up and alive. Reading data may take any time before that."""
    return ["Type=notify", "NotifyAccess=main", f"WatchdogSec={WATCHDOG_SECONDS}", "TimeoutStartSec=infinity"]


def user_unit(service: Service) -> str:
    """Write the unit of a join, for the systemd of its user."""
    lines = [
        "[Unit]",
        f"Description=FedSODA edge {plain_path(service.name)}",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        *notify_lines(),
        f"ExecStart={command_line(service.command)}",
        f"Environment={assignment('FEDSODA_HOME', str(service.home))}",
        f"EnvironmentFile={_globbed(service.environment_file)}",
        *restart_lines(),
        "LimitCORE=0",
        "UMask=0077",
        "NoNewPrivileges=yes",
        "",
        "[Install]",
        "WantedBy=default.target",
        "",
        f"[{_RECORD}]",
        f"Home={json.dumps(str(service.home))}",
    ]
    return "\n".join(lines) + "\n"


def home_in(unit: str) -> Path | None:
    """Read from a unit which FEDSODA_HOME its join has; None: it is not one of ours."""
    found = re.search(rf'^\[{_RECORD}\]\nHome=(".*")$', unit, re.MULTILINE)
    return Path(json.loads(found[1])) if found else None


def environment_lines(environment: Mapping[str, str]) -> str:
    """Write the file of EnvironmentFile=."""
    escaped = {name: re.sub(r'([\\"$`])', r"\\\1", value) for name, value in sorted(environment.items())}
    return "".join(f'{name}="{value}"\n' for name, value in escaped.items())


def _globbed(path: Path) -> str:
    """Write a path for EnvironmentFile=, which takes patterns."""
    return re.sub(r"([*?\[\\])", r"\\\1", plain_path(path))


# --- launchd and Task Scheduler --------------------------------------------------------------------------


def launch_agent(service: Service, label: str) -> bytes:
    """Write the property list of a join, for launchd: started at login, and again after a failure."""
    return plistlib.dumps(
        {
            "Label": label,
            "ProgramArguments": list(service.command),
            "EnvironmentVariables": {**service.environment, "FEDSODA_HOME": str(service.home)},
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": RESTART_SECONDS,
            "ProcessType": "Background",
            "ExitTimeOut": 90,
            "StandardErrorPath": str(service.log),
            "Umask": 0o077,
        }
    )


def scheduled_task(service: Service, user: str) -> bytes:
    """Write the task of a join, for Windows' Task Scheduler: started at login, also on battery, without a time limit.

    Args:
        user: DOMAIN\\name of who it runs as.
    """
    schema = "http://schemas.microsoft.com/windows/2004/02/mit/task"
    task = ElementTree.Element("Task", {"version": "1.2", "xmlns": schema})

    def add(path: str, text: str) -> None:
        parent = task
        *above, name = path.split("/")
        for one in above:
            found = parent.find(one)
            parent = ElementTree.SubElement(parent, one) if found is None else found
        ElementTree.SubElement(parent, name).text = text

    add("RegistrationInfo/Description", f"FedSODA edge {service.name}")
    add("Triggers/LogonTrigger/UserId", user)
    add("Principals/Principal/UserId", user)
    add("Principals/Principal/LogonType", "InteractiveToken")
    add("Settings/MultipleInstancesPolicy", "IgnoreNew")
    add("Settings/DisallowStartIfOnBatteries", "false")
    add("Settings/StopIfGoingOnBatteries", "false")
    add("Settings/StartWhenAvailable", "true")
    add("Settings/ExecutionTimeLimit", "PT0S")
    add("Settings/RestartOnFailure/Interval", "PT1M")
    add("Settings/RestartOnFailure/Count", "999")
    add("Actions/Exec/Command", service.command[0])
    add("Actions/Exec/Arguments", subprocess.list2cmdline(service.command[1:]))
    return ElementTree.tostring(task, encoding="utf-16", xml_declaration=True)
