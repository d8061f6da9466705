"""Parse `fedsoda-hub notify`, and tell whether a trial arrived. How notices travel is `serving/webhook.py`'s and `serving/hook_command.py`'s."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import typer

from fedsoda_edge.ports.console import finish, note, reporting, working
from fedsoda_hub.cli.options import Debug, Json, RunFile

if TYPE_CHECKING:
    from fedsoda_hub.settings.run import RunSettings


class Tried(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one way. why: None: the trial was delivered."""

    way: str
    why: str | None


def notify(run: RunFile, as_json: Json = False, debug: Debug = False) -> None:
    r"""Send a trial by each way of \[notify], once, and tell whether it was delivered; exit 1 where one was not."""
    with reporting(as_json, False, debug), working("sending a trial"):
        import asyncio

        from fedsoda_hub.settings.run import read_settings

        tried = asyncio.run(_tried(read_settings(run)))
        for one in tried:
            note(f"{one.way}: {'delivered' if one.why is None else one.why}")
        status = 1 if any(one.why is not None for one in tried) else 0
        report = {"status": "error" if status else "ok", "exit_status": status, "ways": msgspec.to_builtins(tried)}
        finish(report, as_json, False)
        raise typer.Exit(status)


async def _tried(settings: RunSettings) -> list[Tried]:
    """Send the trial.

    Raises:
        UsageProblem: [notify] names no way.
    """
    import dataclasses
    import secrets
    import time

    from fedsoda_edge.errors import UsageProblem
    from fedsoda_hub.run.directory import RunDirectory
    from fedsoda_hub.serving.notices import TrialNotice
    from fedsoda_hub.serving.notify import NotDelivered
    from fedsoda_hub.serving.ways import ways_of
    from fedsoda_hub.serving.webhook import Webhook

    if not settings.notify.command and settings.notify.webhook is None:
        raise UsageProblem(f"{settings.path} has no [notify] command and no webhook; write one of them")
    settings.run_dir.mkdir(exist_ok=True)
    trial = TrialNotice(
        id=secrets.token_hex(16),
        at=time.time(),
        run=settings.name,
        run_id="",
        text=f"a trial of the notifications of {settings.name}",
    )
    found = []
    for way in ways_of(settings, RunDirectory(settings.run_dir), time.time):
        once = dataclasses.replace(way, pauses=()) if isinstance(way, Webhook) else way
        try:
            await once.deliver(trial, msgspec.json.encode(trial))
            found.append(Tried(way=way.name, why=None))
        except NotDelivered as error:
            found.append(Tried(way=way.name, why=str(error)))
    return found
