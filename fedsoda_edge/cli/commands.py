"""Run the command fedsoda-edge: parse its options, call the SDK, print. All decisions are left to the SDK and its rooms."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsoda_edge.cli import options as opt
from fedsoda_edge.cli.config_command import config
from fedsoda_edge.cli.data_command import COLUMN_REMEDY, data_app
from fedsoda_edge.cli.receipts_command import receipts
from fedsoda_edge.cli.service_command import service_app
from fedsoda_edge.cli.status_command import status
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.ports.console import (
    EXIT_HELP,
    finish,
    is_asked,
    note,
    reporting,
    working,
)
from fedsoda_edge.ports.console import run as run_command
from fedsoda_edge.ports.given_options import effective_settings
from fedsoda_edge.ports.log_lines import LogChoices
from fedsoda_edge.ports.log_options import LogFileOption, LogFormatOption, LogKeepOption, LogSizeOption
from fedsoda_edge.ports.program import Program
from fedsoda_edge.units import parse_bytes

if TYPE_CHECKING:
    from fedsoda_edge.cli.config_file import Defaults, Options
    from fedsoda_edge.join.control import Action, RequestAnswer


class EdgeProgram(Program):
    """The commands of fedsoda-edge."""

    package = "fedsoda_edge"


app = typer.Typer(
    cls=EdgeProgram,
    epilog="Options can also be set in config.toml in FEDSODA_HOME: at its top for every command that has them, or in a "
    "table with the command's name. An option overrides its environment variable, and that overrides the file.\n\n"
    + EXIT_HELP,
    no_args_is_help=True,
    add_completion=True,
)
cache_app = typer.Typer(help="Show or free the disk space of this device's FEDSODA_HOME.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(cache_app, name="cache")
app.add_typer(service_app, name="service")
app.command(epilog="Example: fedsoda-edge config")(config)
app.command(epilog="Example: fedsoda-edge receipts --run triage")(receipts)


@app.callback()
def _read_config(context: typer.Context) -> None:
    """Take part in federated fine-tuning with this device."""
    with reporting(is_asked("--json"), is_asked("--jsonl"), False):
        from fedsoda_edge.cli.config_file import option_defaults
        from fedsoda_edge.join.home import Home

        found = option_defaults(Home().config, _options(context.command))
        context.default_map = as_service_too(found)


def as_service_too(defaults: Defaults) -> Defaults:
    """Let a join that is installed as a service have what config.toml gives to join."""
    service, join = defaults.get("service"), defaults.get("join")
    if isinstance(service, dict) and isinstance(join, dict):
        service["install"] = join | service.get("install", {})
    return defaults


def _options(command: Any) -> Options:
    """Map each command to its options, or to its own commands."""
    return {
        name: _options(each)
        if hasattr(each, "commands")
        else {str(parameter.name) for parameter in each.params} - {"as_json", "jsonl", "schema", "debug", "help"}
        for name, each in command.commands.items()
    }


@app.command(epilog="Example: fedsoda-edge join fedsoda://hub.example.org/#k=... --data visits.jsonl\n\n" + EXIT_HELP)
def join(
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
    unattended: opt.UnattendedOption = False,
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
    as_json: opt.JsonOption = False,
    jsonl: opt.JsonLinesOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Take part until the run ends or Ctrl+C; joining again continues where it stopped."""
    with (
        reporting(as_json, jsonl, debug, is_private=True, logs=LogChoices(log_format, log_file, log_size, log_keep)),
        opt.named_as_options(),
        working(f"reading {data}, then joining the hub"),
    ):
        import msgspec

        from fedsoda_edge import events as ev
        from fedsoda_edge.cli.attended import AttendedJoin
        from fedsoda_edge.cli.display import JoinDisplay
        from fedsoda_edge.cli.join_choices import JoinChoices
        from fedsoda_edge.data.local_data import remedy_for_columns
        from fedsoda_edge.edge import take_part
        from fedsoda_edge.join.home import Home
        from fedsoda_edge.ports.service import Supervisor
        from fedsoda_edge.ports.system import keep_memory_off_disk

        keep_memory_off_disk()
        supervisor = Supervisor.taken()
        edge, local = JoinChoices(
            url=url, data=data, link_file=link_file, token_file=token_file, pin=pin, insecure_http=insecure_http,
            column=column, device=device, max_disk=max_disk, cache=cache, cache_key=cache_key, threads=threads,
            max_ram=max_ram, max_vram=max_vram, pause_on=pause_on,
        ).checked()  # fmt: skip
        with remedy_for_columns(COLUMN_REMEDY), JoinDisplay(jsonl, is_detailed=debug) as display:
            display.say(
                ev.SettingsGiven(
                    msgspec.convert(
                        opt.without_secrets(effective_settings(context)), ev.JoinSettings, from_attributes=True
                    )
                )
            )
            attended = AttendedJoin(supervisor, Home().status)

            def say(event: ev.AnyEvent) -> None:
                display.say(event)
                attended.hears(event)

            with take_part(
                edge,
                local,
                say,
                unattended=unattended,
                max_rounds=max_rounds,
                pause_on=pause_on or "",
                beside=attended.attend,
            ) as participation:
                try:
                    for offer in participation:
                        offer.submit(offer.train())
                finally:
                    supervisor.stopping()
                    report = participation.report
        finish({"status": "ok", **report}, as_json, jsonl)


@app.command(epilog="Example: fedsoda-edge plan https://hub.example.org --token-file me.token")
def plan(
    url: opt.UrlArgument = None,
    link_file: opt.LinkFileOption = None,
    token_file: opt.TokenFileOption = None,
    pin: opt.PinOption = None,
    insecure_http: opt.InsecureHttpOption = False,
    device: opt.DeviceOption = "auto",
    max_ram: opt.MaxRamOption = None,
    max_vram: opt.MaxVramOption = None,
    as_json: opt.JsonOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Show what would be downloaded and trained here, and what it needs; exit 4 if this device has no room for it."""
    with reporting(as_json, False, debug), opt.named_as_options(), working("asking the hub"):
        import asyncio

        import msgspec

        from fedsoda_edge.cli.display import show_memory
        from fedsoda_edge.edge import Edge, look_at
        from fedsoda_edge.units import counted, human_bytes

        edge = Edge(
            url,
            link_file=link_file,
            token_file=token_file,
            pin=pin,
            insecure_http=insecure_http,
            device=device,
            max_ram=None if max_ram is None else parse_bytes(max_ram, "--max-ram"),
            max_vram=None if max_vram is None else parse_bytes(max_vram, "--max-vram"),
        )
        found = asyncio.run(look_at(edge))
        note(
            f"run {found.run}: {found.source}, {found.layers_kept} of {found.layers} layers, "
            f"LoRA rank {found.rank} in {counted(found.adapter_layers, 'layer')}\n"
            f"download {human_bytes(found.disk_needed)} (free {human_bytes(found.disk_free)}); border states on disk: "
            f"at most {human_bytes(found.border_bytes_per_row)} a row, or half of it with --cache int8"
        )
        show_memory(found.memory)
        finish({"status": "ok", **msgspec.to_builtins(found)}, as_json, False)


@app.command(epilog="Example: fedsoda-edge doctor https://hub.example.org --token-file me.token\n\n" + EXIT_HELP)
def doctor(
    url: Annotated[
        str | None,
        typer.Argument(
            metavar="LINK|URL", help="the join link, or the hub's address; without one only this device is checked"
        ),
    ] = None,
    link_file: opt.LinkFileOption = None,
    token_file: opt.TokenFileOption = None,
    pin: opt.PinOption = None,
    insecure_http: opt.InsecureHttpOption = False,
    as_json: opt.JsonOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Check this device and the way to the hub, step by step: PASS, or what to do. Exit with the first failure's status."""
    with reporting(as_json, False, debug), working("checking this device"):
        import asyncio

        from fedsoda_edge.cli.display import show_check
        from fedsoda_edge.join.doctor import DoctorStep, examine
        from fedsoda_edge.join.home import Home
        from fedsoda_edge.join.link import is_given, link_or_url

        hub = link_or_url(url, link_file, token_file) if is_given(url, link_file) else None
        checks: list[DoctorStep] = []

        async def look() -> None:
            async for found in examine(hub, token_file, Home(), pin=pin, insecure_http=insecure_http):
                check = dataclasses.replace(found, detail=opt.as_options(found.detail), fix=opt.as_options(found.fix))
                checks.append(check)
                show_check(check)

        asyncio.run(look())
        first = next((check for check in checks if not check.passed), None)
        status = 0 if first is None else first.exit_status
        lines = [
            {
                "name": check.name,
                "passed": check.passed,
                "detail": check.detail,
                "fix": check.fix,
                "parts": [{"part": part.part, "bytes": part.bytes} for part in check.parts],
            }
            for check in checks
        ]
        ended = {"status": "ok", "exit_status": 0, "code": None, "recovery": None}
        if first is not None:
            ended = {"status": "error", "exit_status": status, "code": "check-failed", "recovery": first.recovery}
        finish({**ended, "checks": lines}, as_json, False)
        raise typer.Exit(status)


@app.command(epilog="Example: fedsoda-edge leave https://hub.example.org --token-file me.token")
def leave(
    url: opt.UrlArgument = None,
    link_file: opt.LinkFileOption = None,
    token_file: opt.TokenFileOption = None,
    pin: opt.PinOption = None,
    insecure_http: opt.InsecureHttpOption = False,
    as_json: opt.JsonOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Tell the hub that this device does not come back."""
    with reporting(as_json, False, debug), opt.named_as_options(), working("asking the hub"):
        import asyncio

        from fedsoda_edge.edge import Edge, say_goodbye
        from fedsoda_edge.join.home import Home

        home = Home()
        if home.is_in_use():  # it would connect again at once, and take part again
            raise UsageProblem(
                f"a join runs in {home.directory}; run fedsoda-edge finish, so that it hands in its round and leaves"
            )
        edge = Edge(url, link_file=link_file, token_file=token_file, pin=pin, insecure_http=insecure_http)
        run = asyncio.run(say_goodbye(edge))
        note(f"left run {run}")
        finish({"status": "ok", "run": run}, as_json, False)


app.command(epilog="Example: fedsoda-edge status --watch")(status)


def _request(do: Action, seconds: float | None = None) -> RequestAnswer:
    """Ask the running join and wait for its answer; state "noted" where it is still starting."""
    import time

    from fedsoda_edge.join import control
    from fedsoda_edge.join.home import Home

    home = Home()
    if not home.is_in_use():
        raise UsageProblem(
            f"no join runs in {home.directory}; start one with fedsoda-edge join, or set FEDSODA_HOME to that of the join"
        )
    request = control.ask(home.control, do, seconds)
    until = time.monotonic() + control.ANSWER_SECONDS
    is_running = True
    while is_running and time.monotonic() < until:
        time.sleep(0.1)
        is_running = home.is_in_use()
        if (answer := control.answer_to(request)) is not None:  # also the last answer of a join that ended meanwhile
            return answer
    if not is_running:
        raise UsageProblem(
            f"the join of {home.directory} has just ended, so there is nothing to {do}; join again first"
        )
    note(f"the join is still starting; it will {do} once it has started")
    return control.RequestAnswer(state="noted")


def _finish(answer: RequestAnswer, as_json: bool) -> None:
    import msgspec

    finish({"status": "ok", **msgspec.to_builtins(answer)}, as_json, False)


@app.command(epilog="Example: fedsoda-edge pause --for 1h\n\n" + EXIT_HELP)
def pause(
    duration: Annotated[
        str | None,
        typer.Option("--for", envvar="FEDSODA_FOR", help="how long: 90s, 30m or 1h; without it, until resume"),
    ] = None,
    as_json: opt.JsonOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Pause the join of this FEDSODA_HOME: its memory is freed, and the round continues after resume."""
    with reporting(as_json, False, debug):
        from fedsoda_edge.join.status import pause_sentence
        from fedsoda_edge.units import human_bytes, parse_seconds

        done = _request("pause", None if duration is None else parse_seconds(duration, "--for"))
        if done.state == "paused":
            said = pause_sentence(done.reason or "", done.seconds)
            freed = f"the worker ended and freed {human_bytes(done.freed_bytes)}"
            note(f"{said}: {freed if done.freed_bytes else 'no worker was running'}")
        elif done.state == "finishing":
            note("not paused: this device finishes its round and leaves")
        _finish(done, as_json)


@app.command(epilog="Example: fedsoda-edge resume")
def resume(as_json: opt.JsonOption = False, debug: opt.DebugOption = False) -> None:
    """End a pause, whether it was requested or began by --pause-on; the round continues where it stopped."""
    with reporting(as_json, False, debug):
        done = _request("resume")
        if done.state != "noted":
            note("resumed after the pause" if done.was_paused else "there was no pause; the join runs")
        _finish(done, as_json)


@app.command("finish", epilog="Example: fedsoda-edge finish")
def finish_round(as_json: opt.JsonOption = False, debug: opt.DebugOption = False) -> None:
    """Let the join hand in its round, then leave and exit 0; without a round, at once. A pause ends."""
    with reporting(as_json, False, debug):
        done = _request("finish")
        if done.state == "finishing":
            note(
                "no round is in hand, so this device leaves now"
                if done.round is None
                else f"this device finishes round {done.round}, hands it in, and then leaves"
            )
        _finish(done, as_json)


@cache_app.command("list", epilog="Example: fedsoda-edge cache list --json")
def cache_list(as_json: opt.JsonOption = False, debug: opt.DebugOption = False) -> None:
    """Show how much space bundles and runs take."""
    with reporting(as_json, False, debug):
        from fedsoda_edge.join.home import Home
        from fedsoda_edge.units import human_bytes

        home = Home()
        sizes = {
            name: sum(path.stat().st_size for path in (home.directory / name).rglob("*") if path.is_file())
            for name in ("store", "runs")
        }
        note("\n".join(f"{human_bytes(size):>10}  {home.directory / name}" for name, size in sizes.items()))
        finish({"status": "ok", "bytes": sizes}, as_json, False)


@cache_app.command("prune", epilog="Example: fedsoda-edge cache prune")
def cache_prune(as_json: opt.JsonOption = False, debug: opt.DebugOption = False) -> None:
    """Delete fetched bundles and border states; a join fetches and computes them again. The state of runs stays."""
    with reporting(as_json, False, debug):
        from fedsoda_edge.join.home import Home
        from fedsoda_edge.units import human_bytes

        home = Home()
        home.lock()
        size = sum(path.stat().st_size for path in home.store.glob("*")) + home.forget_borders()
        shutil.rmtree(home.store, ignore_errors=True)
        home.unlock()
        note(f"freed {human_bytes(size)}")
        finish({"status": "ok", "freed_bytes": size}, as_json, False)


def main() -> None:
    """Run fedsoda-edge and exit with its status."""
    if sys.argv[1:3] == ["data", "check"]:  # here and not in the command, which others may call within their process
        from fedsoda_edge.ports.confine import give_up_network

        give_up_network()
    run_command(app)


if __name__ == "__main__":
    main()
