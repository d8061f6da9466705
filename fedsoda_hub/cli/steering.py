"""Parse and do the commands that ask the hub which serves a run: `open`, `pause`, `resume`, `finish` and `change`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsoda_edge.ports.console import finish as finish_command
from fedsoda_edge.ports.console import hand_over, note, reporting
from fedsoda_hub.cli.options import Debug, Json, RunFile

if TYPE_CHECKING:
    import msgspec

    from fedsoda_hub.events import HubEvent, HubSay
    from fedsoda_hub.serving.daemon import Daemon


def open_page(run: RunFile, as_json: Json = False, debug: Debug = False) -> None:
    """Print a link to the run's page, which signs a browser in once, within 15 minutes."""
    with reporting(as_json, False, debug):
        from fedsoda_hub.run.directory import RunDirectory
        from fedsoda_hub.serving.ordering import order, page_url
        from fedsoda_hub.settings.run import read_settings

        settings = read_settings(run)
        directory = RunDirectory(settings.run_dir)
        secret = order(directory, "/page/link")["secret"]
        url = page_url(settings, directory)
        link = f"{url}/#sign-in={secret}"
        hand_over(link, {"status": "ok", "url": f"{url}/", "link": link} if as_json else None)
        note("it signs one browser in, once, within 15 minutes; whoever has it can do what the run's owner can")


def pause(run: RunFile, as_json: Json = False, debug: Debug = False) -> None:
    """Open no further round; the open one continues to its end. Edges stay connected."""
    _ask(run, "pause", as_json, debug)


def resume(run: RunFile, as_json: Json = False, debug: Debug = False) -> None:
    """End a pause."""
    _ask(run, "resume", as_json, debug)


def finish(run: RunFile, as_json: Json = False, debug: Debug = False) -> None:
    """End the run after the open round."""
    _ask(run, "finish", as_json, debug)


def change(
    run: RunFile,
    rounds: Annotated[
        int | None, typer.Option("--rounds", envvar="FEDSODA_CHANGE_ROUNDS", help="how many the run has, in all")
    ] = None,
    quorum: Annotated[
        float | None,
        typer.Option(
            "--quorum",
            envvar="FEDSODA_CHANGE_QUORUM",
            help="share of the invited edges whose updates are enough at the deadline; above 0, at most 1",
        ),
    ] = None,
    deadline: Annotated[
        str | None,
        typer.Option("--deadline", envvar="FEDSODA_CHANGE_DEADLINE", help="of a round, the open one too: 90s, 30m, 2h"),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Change rules of a run that is served. RUN.toml stays; what it says counts again once it is changed there."""
    with reporting(as_json, False, debug):
        from fedsoda_edge.units import parse_seconds
        from fedsoda_hub.serving.actions import OtherRules

        seconds = None if deadline is None else parse_seconds(deadline, "--deadline")
        _order(run, "change", as_json, OtherRules(rounds, quorum, seconds))


def _ask(run: Path, action: str, as_json: bool, debug: bool) -> None:
    with reporting(as_json, False, debug):
        _order(run, action, as_json)


def _order(run: Path, action: str, as_json: bool, body: msgspec.Struct | None = None) -> None:
    from fedsoda_hub.run.directory import RunDirectory
    from fedsoda_hub.serving.ordering import order
    from fedsoda_hub.settings.run import read_settings

    said = order(RunDirectory(read_settings(run).run_dir), f"/page/do/{action}", body)["said"]
    note(str(said))
    finish_command({"status": "ok", "said": str(said)}, as_json, False)


def telling_where_the_page_is(daemon: Daemon, tell: Callable[[str], None]) -> HubSay:
    """Make a listener that tells, once the hub serves, where its owner can watch it.

    A link that signs in is shown on a terminal alone: what is written elsewhere may be kept, and read by others.
    """
    from fedsoda_hub import events

    def heard(event: HubEvent) -> None:
        if not isinstance(event, events.Listening):
            return
        settings = daemon.settings
        if settings.listen.is_loopback and settings.listen.public_url is None:
            tell(f"watch it at {event.url}/")
        elif event.public_url is None:
            tell("watch it at the proxy's address; [listen] public_url says it")
        elif sys.stderr is not None and sys.stderr.isatty():
            link = f"{event.public_url.rstrip('/')}/#sign-in={daemon.desk.sign_in.new_link()}"
            tell(f"watch it, signed in once, within 15 minutes: {link}")
        else:
            tell(
                f"watch it at {event.public_url.rstrip('/')}/; `fedsoda-hub open {settings.path}` prints a link that signs in"
            )

    return heard
