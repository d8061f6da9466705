"""Parse and do `fedsoda-hub service`: a run that the systemd of this machine serves, hardened, as a user of its own.

How systemd quotes, and when it starts a service again, is left to the edge's `ports/service_files.py`.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsoda_edge.ports.console import finish, line_out, note, reporting
from fedsoda_hub.cli.options import Debug, Json, RunFile

if TYPE_CHECKING:
    from fedsoda_edge.ports.service_manager import ServiceState
    from fedsoda_hub.settings.run import RunSettings

service_app = typer.Typer(
    help="Serve a run as a service of this machine: it starts at boot, and again after a crash.", no_args_is_help=True
)
USER = "fedsoda-hub"  # which `install` makes; its files stay, so it is not a dynamic one
UNITS = Path("/etc/systemd/system")
SYSUSERS = Path(f"/etc/sysusers.d/{USER}.conf")
SECONDS_TO_SETTLE = 10.0
LOWEST_FREE_PORT = 1024
HOMES = ("/home", "/root", "/run/user")
TEMPORARY = ("/tmp", "/var/tmp")
# What CUDA opens: the driver's devices, those of unified memory and of a GPU's parts, and that of WSL.
GPU_DEVICES = ("char-nvidia", "char-nvidia-frontend", "char-nvidia-uvm", "char-nvidia-caps", "/dev/dxg")
# What the hub's own sandboxes ask for, which no group of systemd 252 has.
SANDBOX_CALLS = ("seccomp", "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self")


@service_app.command(epilog="Example: fedsoda-hub service install triage.toml --print")
def install(
    run: RunFile,
    user: Annotated[
        str, typer.Option("--user", envvar="FEDSODA_USER", help="who serves it; the default is made if needed")
    ] = USER,
    is_printed: Annotated[
        bool, typer.Option("--print", envvar="FEDSODA_PRINT", help="write the unit to stdout, and change nothing")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Serve the run now and from each boot on. Once more replaces the service. Needs root, but for --print."""
    with reporting(as_json, False, debug):
        from fedsoda_edge.errors import LocalError, UsageProblem
        from fedsoda_edge.ports.disk import write_durably
        from fedsoda_edge.ports.service_manager import systemctl
        from fedsoda_edge.ports.system import user_number
        from fedsoda_hub.settings.run import read_settings

        settings = read_settings(run)
        unit = hub_unit(settings, user)
        report: dict[str, object] = {"file": None, "unit": unit, "user": user, "service": None}
        if is_printed:
            if not as_json:
                line_out(unit.rstrip())
            finish({"status": "ok", **report}, as_json, False)
            return
        _refuse_without_systemd()
        if user_number() != 0:
            words = shlex.join(["sudo", *_program(), "service", "install", settings.path])
            raise UsageProblem(
                f"a service of the machine is installed by root; run `{words}`, or write the unit with --print"
            )
        numbers = _numbers_of(user)
        _refuse_unless_readable(settings, user, numbers)
        _hand_over(settings.run_dir, user, numbers)
        path = UNITS / unit_name(settings)
        write_durably(path, unit.encode(), 0o644)
        path.chmod(0o644)
        systemctl(["daemon-reload"], is_system=True)
        systemctl(["enable", path.name], is_system=True)
        systemctl(["restart", "--no-block", path.name], is_system=True)
        state = _settled(settings)
        if state.state.startswith("failed"):
            raise LocalError(f"{path} is installed, and the service does not run: {_sentence(state)}")
        note(f"{path}\n{_sentence(state)}")
        note(
            f"note: the run belongs to {user}, so its owner's commands are given as that user: "
            f"`sudo -u {user} {shlex.join([*_program(), 'status', settings.path])}`"
        )
        values = dataclasses.asdict(state)
        finish({"status": "ok", **report, "file": str(path), "service": values}, as_json, False)


@service_app.command(epilog="Example: fedsoda-hub service status triage.toml")
def status(run: RunFile, as_json: Json = False, debug: Debug = False) -> None:
    """Show whether the service runs, what it does, and how it ended."""
    with reporting(as_json, False, debug):
        state = _state(_installed(run))
        note(_sentence(state))
        finish({"status": "ok", "service": dataclasses.asdict(state)}, as_json, False)


@service_app.command(epilog="Example: fedsoda-hub service logs triage.toml --follow")
def logs(
    run: RunFile,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", envvar="FEDSODA_FOLLOW", help="show new lines too, until Ctrl+C")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what the service has said; with --json, the command that shows it."""
    with reporting(as_json, False, debug):
        words = ["journalctl", f"--unit={unit_name(_installed(run))}", "--output=short-iso", "--lines=200"]
        words.append("--follow" if follow else "--no-pager")
        if as_json:
            finish({"status": "ok", "command": words}, as_json, False)
            return
        try:
            ended = subprocess.run(words, check=False).returncode
        except KeyboardInterrupt:  # how one leaves --follow
            return
        raise typer.Exit(1 if ended else 0)


@service_app.command(epilog="Example: fedsoda-hub service uninstall triage.toml")
def uninstall(run: RunFile, as_json: Json = False, debug: Debug = False) -> None:
    """Stop the service and delete it. The run and all its files stay. Needs root."""
    with reporting(as_json, False, debug):
        from fedsoda_edge.errors import UsageProblem
        from fedsoda_edge.ports.service_manager import systemctl
        from fedsoda_edge.ports.system import user_number

        settings = _installed(run)
        if user_number() != 0:
            words = shlex.join(["sudo", *_program(), "service", "uninstall", settings.path])
            raise UsageProblem(f"a service of the machine is uninstalled by root; run `{words}`")
        unit = UNITS / unit_name(settings)
        systemctl(["disable", "--now", unit.name], is_system=True)
        unit.unlink(missing_ok=True)
        systemctl(["daemon-reload"], is_system=True)
        note(f"{unit.name} is uninstalled; {settings.run_dir} stays")
        finish({"status": "ok", "unit": unit.name, "run_dir": str(settings.run_dir)}, as_json, False)


# --- the unit ------------------------------------------------------------------------------------------


def unit_name(settings: RunSettings) -> str:
    """Return the name of the unit of a run."""
    return f"fedsoda-hub-{settings.name}.service"


def hub_unit(settings: RunSettings, user: str) -> str:
    """Write the unit of a run, which may write to its directory alone, and sees of the devices the GPUs."""
    from fedsoda_edge.ports.service_files import (
        assignment,
        command_line,
        notify_lines,
        plain_path,
        quoted_path,
        restart_lines,
    )

    own = f"{USER}/{settings.name}"
    lines = [
        "[Unit]",
        f"Description=FedSODA hub of {plain_path(settings.name)}",
        "Wants=network-online.target",
        "After=network-online.target",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        *notify_lines(),
        f"User={user}",
        f"ExecStart={command_line([*_program(), 'serve', settings.path])}",
        *restart_lines(),
        "",
        f"StateDirectory={own}",  # of this run: services of other users have their own
        "StateDirectoryMode=0700",
        f"CacheDirectory={own}",
        f"Environment={assignment('HOME', f'/var/lib/{own}')} {assignment('XDG_CACHE_HOME', f'/var/cache/{own}')}",
        f"ReadWritePaths={quoted_path(settings.run_dir)}",
        *_hardening(settings),
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    ]
    return "\n".join(lines) + "\n"


def _hardening(settings: RunSettings) -> list[str]:
    """Write what the hub may not do, beside what it needs: its network, its directory, its GPUs."""
    is_low = 0 < settings.listen.port < LOWEST_FREE_PORT
    in_homes = any(path.is_relative_to(home) for path in _read(settings) for home in HOMES)
    return [
        # torch and CUDA compile code at run time, so memory may be both written and executed.
        "NoNewPrivileges=yes",
        f"CapabilityBoundingSet={'CAP_NET_BIND_SERVICE' if is_low else ''}",
        f"AmbientCapabilities={'CAP_NET_BIND_SERVICE' if is_low else ''}",
        f"PrivateUsers={'no' if is_low else 'yes'}",
        "ProtectSystem=strict",
        f"ProtectHome={'read-only' if in_homes else 'yes'}",
        "PrivateTmp=yes",
        "ProtectProc=invisible",
        "ProtectClock=yes",
        "ProtectHostname=yes",
        "ProtectControlGroups=yes",
        "ProtectKernelLogs=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelTunables=yes",
        "RestrictNamespaces=yes",
        "RestrictRealtime=yes",
        "RestrictSUIDSGID=yes",
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
        "LockPersonality=yes",
        "RemoveIPC=yes",
        "KeyringMode=private",
        "LimitCORE=0",
        "UMask=0077",
        "SystemCallArchitectures=native",
        f"SystemCallFilter=@system-service {' '.join(SANDBOX_CALLS)}",
        "SystemCallErrorNumber=EPERM",
        *(
            ["PrivateDevices=yes"]
            if settings.device == "cpu"
            else ["DevicePolicy=closed", *(f"DeviceAllow={device} rw" for device in GPU_DEVICES)]
        ),
    ]


def _read(settings: RunSettings) -> list[Path]:
    """List what the service reads, each with where its links lead: program, settings, model, texts and certificates."""
    files = [settings.public_text, settings.like_task, settings.eval_data, *(settings.own_certificate or ())]
    model = settings.directory / settings.model
    found = [Path(_program()[0]), Path(sys.executable), Path(sys.prefix), Path(settings.path)]
    found += [file for file in files if file is not None] + ([model] if model.exists() else [])
    return [one for path in found for one in (path.absolute(), path.resolve())]


def _program() -> list[str]:
    """Return the installed program by its absolute path; one that was started with python -m is started so again."""
    script = Path(sys.executable).with_name("fedsoda-hub")
    return [str(script)] if script.is_file() else [sys.executable, "-P", "-m", "fedsoda_hub"]


# --- the machine ---------------------------------------------------------------------------------------


def _refuse_without_systemd() -> None:
    from fedsoda_edge.errors import UsageProblem
    from fedsoda_edge.ports.system import service_system

    if service_system() != "systemd":
        raise UsageProblem(
            "no systemd runs here, as in a container or in WSL without it; let what starts this container or machine run "
            "`fedsoda-hub serve RUN.toml`, and write the unit for another machine with --print"
        )


def _numbers_of(user: str) -> tuple[int, list[int]]:
    """Return the numbers of a user and of its groups, the first its own; the default user is made where it is missing.

    Raises:
        UsageProblem: there is no such user.
    """
    from fedsoda_edge.errors import LocalError, UsageProblem
    from fedsoda_edge.ports.disk import write_durably
    from fedsoda_edge.ports.system import numbers_of_user

    found = numbers_of_user(user)
    if found is None and user == USER:
        write_durably(SYSUSERS, f'u {USER} - "FedSODA hub" /var/lib/{USER}\n'.encode())
        SYSUSERS.chmod(0o644)
        made = subprocess.run(["systemd-sysusers", str(SYSUSERS)], capture_output=True, text=True, check=False)
        if made.returncode:
            raise LocalError(
                f"the user {USER} cannot be made: {made.stderr.strip()}; name one that is there with --user"
            )
        found = numbers_of_user(user)
    if found is None:
        raise UsageProblem(f"there is no user {user!r}; make it, or leave --user out")
    return found


def _refuse_unless_readable(settings: RunSettings, user: str, numbers: tuple[int, list[int]]) -> None:
    """Refuse a run of which the service could not read something.

    Raises:
        UsageProblem: names the first thing that keeps the user out.
    """
    from fedsoda_edge.errors import UsageProblem

    for path in _read(settings):
        if any(path.is_relative_to(place) for place in TEMPORARY):
            raise UsageProblem(
                f"{path} is in a directory that is emptied by itself, and that a service has one of its own of; move it to "
                "where it stays, such as /srv or /var/lib"
            )
        for one in (*reversed(path.parents), path):
            if not _may_read(one, *numbers):
                owner = f"--user {os.environ['SUDO_USER']}" if os.environ.get("SUDO_USER") else "--user with its owner"
                raise UsageProblem(
                    f"{user} may not read {one} (mode {one.stat().st_mode & 0o7777:o}), which the service needs for {path}; let it "
                    f"(`chmod o+rx {shlex.quote(str(one))}`), move the run and the program to where it may, such as "
                    f"/var/lib and /opt, or serve as who owns it: {owner}"
                )


def _may_read(path: Path, user: int, groups: list[int]) -> bool:
    found = path.stat()
    shift = 6 if found.st_uid == user else 3 if found.st_gid in groups else 0
    wanted = 0o1 if path.is_dir() else 0o4
    return user == 0 or found.st_mode >> shift & wanted == wanted


def _hand_over(run_dir: Path, user: str, numbers: tuple[int, list[int]]) -> None:
    """Let the run's directory belong to who serves it; what another person's hub wrote is left alone.

    Raises:
        UsageProblem: it belongs to somebody else.
    """
    from fedsoda_edge.errors import UsageProblem

    number, groups = numbers
    run_dir.mkdir(parents=True, exist_ok=True)
    owner = run_dir.stat().st_uid
    if owner not in (0, number):
        raise UsageProblem(
            f"{run_dir} belongs to another user ({run_dir.owner()}), who has served this run; serve it as that one with "
            f"--user {run_dir.owner()}, or give it away first: `chown -R {user}: {shlex.quote(str(run_dir))}`"
        )
    if owner == 0 and number != 0:
        for path in (run_dir, *run_dir.rglob("*")):
            os.chown(path, number, groups[0], follow_symlinks=False)


def _installed(run: Path) -> RunSettings:
    """Read the settings of a run that has a service.

    Raises:
        UsageProblem: it has none.
    """
    from fedsoda_edge.errors import UsageProblem
    from fedsoda_hub.settings.run import read_settings

    settings = read_settings(run)
    _refuse_without_systemd()
    if not (UNITS / unit_name(settings)).exists():
        raise UsageProblem(f"{settings.path} has no service; `sudo fedsoda-hub service install {run}` makes one")
    return settings


def _state(settings: RunSettings) -> ServiceState:
    from fedsoda_edge.ports.service_manager import shown, state_of

    return state_of(settings.name, shown(unit_name(settings), is_system=True))


def _settled(settings: RunSettings) -> ServiceState:
    from fedsoda_edge.ports.service_manager import settled

    return settled(lambda: _state(settings), SECONDS_TO_SETTLE)


def _sentence(state: ServiceState) -> str:
    from fedsoda_edge.ports.service_manager import sentence

    return sentence(state, "fedsoda-hub service logs RUN.toml")
