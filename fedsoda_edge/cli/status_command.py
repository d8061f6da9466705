"""Parse `fedsoda-edge status`, and show what the join of this home does: once, live in the terminal, or on a page."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from fedsoda_edge.cli import options as opt
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.ports.console import finish, note, reporting

WEB_PORT = 8471


def status(
    watch: Annotated[
        bool, typer.Option("--watch", envvar="FEDSODA_WATCH", help="show it live until the join ends, or Ctrl+C")
    ] = False,
    web: Annotated[
        bool, typer.Option("--web", envvar="FEDSODA_WEB", help="show it live on a page of this machine, until Ctrl+C")
    ] = False,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, envvar="FEDSODA_PORT", help="port of the page; 0: any free one")
    ] = WEB_PORT,
    as_json: opt.JsonOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Show what the join of this FEDSODA_HOME does: state, round, step, due time, memory, last error."""
    with reporting(as_json, False, debug):
        import time

        from fedsoda_edge.join.glance import Looking
        from fedsoda_edge.join.home import Home
        from fedsoda_edge.join.status import read_status, sentences

        home = Home()
        if watch + web + as_json > 1:
            raise UsageProblem("--watch, --web and --json do not go together; choose one")
        if watch:
            from fedsoda_edge.cli.watch import watch as show_live

            return show_live(Looking(home).look)
        if web:
            from fedsoda_edge.cli.status_page import serve_page

            return serve_page(Looking(home).look, port)
        is_running = home.is_in_use()
        found = read_status(home.status)
        runs = sorted(path.name for path in (home.directory / "runs").glob("*"))
        if found is None:
            note(f"{home.directory}: {'a join is starting' if is_running else 'no join has run here yet'}")
        else:
            note("\n".join(sentences(found, is_running=is_running, now=time.time())))
        finish(
            {
                "status": "ok",
                "home": str(home.directory),
                "running": is_running,
                "runs": runs,
                "join": msgspec.to_builtins(found),
            },
            as_json,
            False,
        )
        return None
