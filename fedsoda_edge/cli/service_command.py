"""Parse and do `fedsoda-edge service`: a join that this machine's service manager starts, and starts again.

How systems start services is left to `ports/service_manager.py`, what a join's options mean to `join_choices.py`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from fedsoda_edge.cli import options as opt
from fedsoda_edge.cli.data_command import COLUMN_REMEDY
from fedsoda_edge.ports.console import PULSE, finish, line_out, note, reporting, working
from fedsoda_edge.ports.log_options import LogFileOption, LogFormatOption, LogKeepOption, LogSizeOption

if TYPE_CHECKING:
    from fedsoda_edge.cli.join_choices import JoinChoices
    from fedsoda_edge.ports.service_files import Service
    from fedsoda_edge.ports.service_manager import Manager, ServiceState
    from fedsoda_edge.protocol.join_link import JoinLink

service_app = typer.Typer(
    help="Run a join as a service: it starts with this machine or login, and again after a crash.",
    no_args_is_help=True,
)
SECONDS_TO_SETTLE = 10.0
# What a service does not inherit and a join may need. Options of join that stand in variables become options.
VARIABLES = (
    *(f"{scheme}_proxy" for scheme in ("http", "https", "all", "no")),
    *(f"{scheme}_PROXY" for scheme in ("HTTP", "HTTPS", "ALL", "NO")),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    *("CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "TZ", "FEDSODA_NICE", "FEDSODA_LOG"),
)
_FILES = ("data", "log_file")  # options that are paths, which a service sees from another directory
_ELSEWHERE = ("url", "link_file", "token_file")  # options that the service has in another form
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"

NameOption = Annotated[
    str | None,
    typer.Option("--name", envvar="FEDSODA_NAME", help="the service's name; without it, that of the hub"),
]
NameArgument = Annotated[
    str | None, typer.Argument(metavar="NAME", help="the service's name; not needed where there is one service")
]


@service_app.command(
    epilog="Example: fedsoda-edge service install fedsoda://hub.example.org/#k=... --data visits.jsonl"
)
def install(
    context: typer.Context,
    url: opt.UrlArgument = None,
    *,
    data: opt.DataOption,
    link_file: opt.LinkFileOption = None,
    token_file: opt.TokenFileOption = None,
    pin: opt.PinOption = None,
    insecure_http: opt.InsecureHttpOption = False,
    column: opt.ColumnsOption = None,
    device: opt.DeviceOption = "auto",
    max_disk: opt.MaxDiskOption = None,
    cache: opt.CacheOption = "bf16",
    cache_key: opt.CacheKeyOption = "forget",
    max_rounds: opt.MaxRoundsOption = 0,
    threads: opt.ThreadsOption = 0,
    max_ram: opt.MaxRamOption = None,
    max_vram: opt.MaxVramOption = None,
    pause_on: opt.PauseOnOption = None,
    log_format: LogFormatOption = "auto",
    log_file: LogFileOption = None,
    log_size: LogSizeOption = "10MB",
    log_keep: LogKeepOption = 5,
    name: NameOption = None,
    is_printed: Annotated[
        bool,
        typer.Option(
            "--print", envvar="FEDSODA_PRINT", help="write the unit and its command to stdout, and change nothing"
        ),
    ] = False,
    as_json: opt.JsonOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Start a join now and with this machine or login. The same name again replaces it, also with a new link."""
    with reporting(as_json, False, debug, is_private=True), opt.named_as_options(), working(f"reading {data}"):
        from fedsoda_edge.cli.join_choices import JoinChoices
        from fedsoda_edge.data.local_data import remedy_for_columns
        from fedsoda_edge.errors import LocalError, UsageProblem
        from fedsoda_edge.ports.service_files import user_unit
        from fedsoda_edge.ports.service_manager import manager_here, settled
        from fedsoda_edge.ports.system import user_number

        if not is_printed and user_number() == 0 and os.environ.get("SUDO_USER"):
            raise UsageProblem(
                f"sudo would install it for root, with root's home and keys; run this as {os.environ['SUDO_USER']} itself"
            )
        manager = None if is_printed else manager_here()
        choices = JoinChoices(
            url=url, data=data, link_file=link_file, token_file=token_file, pin=pin, insecure_http=insecure_http,
            column=column, device=device, max_disk=max_disk, cache=cache, cache_key=cache_key, threads=threads,
            max_ram=max_ram, max_vram=max_vram, pause_on=pause_on,
        )  # fmt: skip
        secret, address = _way(choices)
        with remedy_for_columns(COLUMN_REMEDY):
            # The link or token was read, perhaps from stdin: it is not asked for again.
            dataclasses.replace(choices, url=address, link_file=None, token_file=None).checked()
        service = _service(_named(name, address), secret, address, _words(context))
        unit = user_unit(service)
        report: dict[str, object] = {"file": None, "unit": unit, "command": list(service.command), "service": None}
        if manager is None:
            if not as_json:
                line_out(unit.rstrip())
            note(f"# the command alone, for another supervisor: {shlex.join(service.command)}")
            note(f"# it reads its link or token from a file of {service.secrets}, which only install writes")
            finish({"status": "ok", **report}, as_json, False)
            return
        PULSE.work("starting the service")
        _refuse_a_shared_home(manager, service)
        _keep(service, secret)
        path = manager.install(service)
        state = settled(lambda: manager.state(service.name), SECONDS_TO_SETTLE)
        if state.state.startswith("failed"):
            raise LocalError(f"{path} is installed, and the service does not run: {_sentence(state)}")
        note(f"{path}\n{_sentence(state)}")
        for sentence in (manager.advice(), _advice_on_program()):
            if sentence:
                note(f"note: {sentence}")
        finish({"status": "ok", **report, "file": str(path), "service": _values(state)}, as_json, False)


@service_app.command(epilog="Example: fedsoda-edge service status")
def status(name: NameArgument = None, as_json: opt.JsonOption = False, debug: opt.DebugOption = False) -> None:
    """Show each service of this user: whether it runs, what it does, and how it ended."""
    with reporting(as_json, False, debug):
        from fedsoda_edge.ports.service_manager import manager_here

        manager = manager_here()
        names = manager.names() if name is None else [_known(manager, name)]
        states = [manager.state(one) for one in names]
        for state in states:
            note(_sentence(state))
        if not states:
            note("there is no service of fedsoda-edge; fedsoda-edge service install makes one")
        finish({"status": "ok", "services": [_values(state) for state in states]}, as_json, False)


@service_app.command(epilog="Example: fedsoda-edge service logs --follow")
def logs(
    name: NameArgument = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", envvar="FEDSODA_FOLLOW", help="show new lines too, until Ctrl+C")
    ] = False,
    as_json: opt.JsonOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Show what a service has said; with --json, the command that shows it."""
    with reporting(as_json, False, debug):
        from fedsoda_edge.join.home import Home
        from fedsoda_edge.ports.service_manager import manager_here

        manager = manager_here()
        found = _known(manager, name)
        command = manager.log_command(found, follow=follow)
        if as_json:
            log = None if command else str(_log_of(Home().directory, found))
            finish({"status": "ok", "command": command, "file": log}, as_json, False)
            return
        if not command:
            note(f"its log is {_log_of(Home().directory, found)}")
            return
        try:
            status = subprocess.run(command, check=False).returncode
        except KeyboardInterrupt:  # how one leaves --follow
            return
        if status:
            note(
                "journalctl failed: where a machine keeps its journal in memory, users see nothing of it unless they are in the "
                "group systemd-journal; install the service again with --log-file PATH, which its owner always reads"
            )
        raise typer.Exit(1 if status else 0)


@service_app.command(epilog="Example: fedsoda-edge service uninstall")
def uninstall(name: NameArgument = None, as_json: opt.JsonOption = False, debug: opt.DebugOption = False) -> None:
    """Stop a service and delete it, with its link. Data, FEDSODA_HOME and what it holds stay."""
    with reporting(as_json, False, debug):
        from fedsoda_edge.join.home import Home
        from fedsoda_edge.ports.service_manager import manager_here

        manager = manager_here()
        found = _known(manager, name)
        home = manager.home_of(found) or Home().directory
        manager.uninstall(found)
        for ending in ("link", "token", "env", "xml"):
            (home / "services" / f"{found}.{ending}").unlink(missing_ok=True)
        note(f"{found} is uninstalled; {home} and your data stay")
        finish({"status": "ok", "name": found, "home": str(home)}, as_json, False)


# --- what is installed ---------------------------------------------------------------------------------


def _way(choices: JoinChoices) -> tuple[JoinLink | str, str]:
    """Find the link, or the token, and the address of the hub; refuse what no join could use."""
    from fedsoda_edge.join.doctor import linked
    from fedsoda_edge.join.home import Home
    from fedsoda_edge.join.link import link_or_url
    from fedsoda_edge.join.token import read_token
    from fedsoda_edge.network.hub_transport import HubTransport
    from fedsoda_edge.network.tls import Trust, read_pin

    trust = Trust(None if choices.pin is None else read_pin(choices.pin), choices.insecure_http)
    found = link_or_url(choices.url, choices.link_file, choices.token_file)
    if isinstance(found, str):
        token = read_token(choices.token_file)
        HubTransport(found, token, trust)
        return token, found
    HubTransport.by_link(linked(Home(), found, trust))
    return found, found.urls[0]


def _named(name: str | None, address: str) -> str:
    """Return the service's name: as it was given, or made of the hub's address.

    Raises:
        UsageProblem: it cannot be part of the name of a file.
    """
    from fedsoda_edge.errors import UsageProblem

    if name is None:
        parts = urlsplit(address if "//" in address else f"//{address}")
        above = parts.path.strip("/").rpartition("/")[2]
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", above or (parts.netloc or "hub")).strip("-.")[:64] or "hub"
    if not re.fullmatch(_NAME, name):
        raise UsageProblem(f"--name {name!r} cannot be a service's name; write letters, digits and . _ - (at most 64)")
    return name


def _words(context: typer.Context) -> list[str]:
    """Write the options of the join that the command line and variables gave, as `join` takes them.

    What config.toml gives is left there: the join reads it at each start.
    """
    words = []
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in _ELSEWHERE or name in ("name", "is_printed", "as_json", "debug", "help"):
            continue
        source = getattr(context.get_parameter_source(name), "name", "DEFAULT")
        value = context.params.get(name)
        if name in _FILES and value is not None:
            value = Path(str(value)).absolute()
        elif source not in ("COMMANDLINE", "ENVIRONMENT"):
            continue
        words += _as_option(parameter.opts[0], value)
    return words


def _as_option(option: str, value: Any) -> list[str]:
    if value is None or value is False:
        return []
    if value is True:
        return [option]
    values = value if isinstance(value, list | tuple) else [value]
    return [word for one in values for word in (option, str(one))]


def _service(name: str, secret: JoinLink | str, address: str, words: list[str]) -> Service:
    from fedsoda_edge.join.home import Home
    from fedsoda_edge.ports.service_files import Service
    from fedsoda_edge.ports.system import service_system

    home = Home().directory
    kept = home / "services" / f"{name}.{'token' if isinstance(secret, str) else 'link'}"
    way = [address, "--token-file", str(kept)] if isinstance(secret, str) else ["--link-file", str(kept)]
    environment = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    log = _log_of(home, name)
    if service_system() == "schtasks" and "--log-file" not in words:  # which drops what its tasks say
        words = [*words, "--log-file", str(log)]
    return Service(name, (*_program(), "join", *way, "--unattended", *words), home, environment, log)


def _log_of(home: Path, name: str) -> Path:
    return home / "services" / f"{name}.log"


def _program() -> list[str]:
    """Return the installed program by its absolute path; one that was started with python -m is started so again."""
    script = Path(sys.executable).with_name("fedsoda-edge")
    return [str(script)] if script.is_file() else [sys.executable, "-P", "-m", "fedsoda_edge"]


def _advice_on_program() -> str:
    """Say where the program is in a place that is emptied by itself, as uvx and pipx run use one."""
    from platformdirs import user_cache_path

    for place in (user_cache_path(), Path(tempfile.gettempdir())):
        if Path(sys.prefix).is_relative_to(place):
            return (
                f"this program runs from {sys.prefix}, which is emptied by itself, and the service with it; install it "
                "(`uv tool install fedsoda` or `pipx install fedsoda`), and install the service again from there"
            )
    return ""


def _refuse_a_shared_home(manager: Manager, service: Service) -> None:
    """Refuse a second service in one FEDSODA_HOME, where one join runs at a time."""
    from fedsoda_edge.errors import UsageProblem

    for other in manager.names():
        if other != service.name and manager.home_of(other) == service.home:
            raise UsageProblem(
                f"the service {other} joins from {service.home}, and one join runs in a FEDSODA_HOME; give this one another: "
                f"FEDSODA_HOME={shlex.quote(f'{service.home}-{service.name}')} fedsoda-edge service install ..., or replace the "
                f"other with --name {other}"
            )


def _keep(service: Service, secret: JoinLink | str) -> None:
    """Write the link or the token where the service reads it, and what a terminal would have given it."""
    from fedsoda_edge.ports.disk import write_durably

    ending, other = ("token", "link") if isinstance(secret, str) else ("link", "token")
    service.secrets.mkdir(parents=True, exist_ok=True)
    service.secrets.chmod(0o700)
    write_durably(service.secrets / f"{service.name}.{ending}", f"{secret}\n".encode(), 0o600)
    (service.secrets / f"{service.name}.{other}").unlink(missing_ok=True)


def _known(manager: Manager, name: str | None) -> str:
    """Return the service of that name, or the only one.

    Raises:
        UsageProblem: there is none, or more than one to choose from.
    """
    from fedsoda_edge.errors import UsageProblem

    names = manager.names()
    if name is None and len(names) == 1:
        return names[0]
    if name is not None and name in names:
        return name
    if not names:
        raise UsageProblem("there is no service of fedsoda-edge; fedsoda-edge service install makes one")
    what = "there is more than one service" if name is None else f"there is no service {name!r}"
    raise UsageProblem(f"{what}; name one of {', '.join(names)}")


def _sentence(state: ServiceState) -> str:
    from fedsoda_edge.ports.service_manager import sentence

    return sentence(state, "fedsoda-edge service logs")


def _values(state: ServiceState) -> dict[str, object]:
    return dataclasses.asdict(state)
