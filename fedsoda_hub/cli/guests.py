"""Parse and do the commands that let a device in by a join link, or out: `invite`, `revoke` and `rebind`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsoda_edge.ports.console import finish, hand_over, note, reporting
from fedsoda_edge.units import parse_seconds
from fedsoda_hub.cli.of_run import EdgeName
from fedsoda_hub.cli.options import Debug, Json, RunFile

if TYPE_CHECKING:
    from fedsoda_hub.settings.run import RunSettings

Expires = Annotated[
    str,
    typer.Option(
        "--expires", envvar="FEDSODA_EXPIRES", help="how long a device may first come: 12h, 7d; then the link ends"
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", envvar="FEDSODA_LINK_OUT", help="write the join link there, mode 0600")
]


def invite(
    run: RunFile,
    name: Annotated[str, typer.Option("--name", envvar="FEDSODA_TOKEN_NAME", help="the edge's id")],
    expires: Expires = "7d",
    out: Out = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print a join link for one device: one line, of which nothing is stored that could be used."""
    with reporting(as_json, False, debug):
        if out is not None and _is_there(run, name, out, as_json):
            return
        from fedsoda_hub.settings.run import read_settings

        _hand_over_link(read_settings(run), name, expires, out, as_json, is_rebound=False)


def _is_there(run: Path, name: str, out: Path, as_json: bool) -> bool:
    """Tell, and report, that the file holds the link of this edge."""
    from fedsoda_hub.cli.again import has_link
    from fedsoda_hub.run.directory import RunDirectory
    from fedsoda_hub.run.ledger import opened
    from fedsoda_hub.settings.run import read_settings

    settings = read_settings(run)
    with opened(RunDirectory(settings.run_dir)) as ledger:
        until = has_link(settings, ledger, name, out)
    if until is None:
        return False
    note(f"{out} holds the link of {name} already, and no device has used it; nothing was made")
    finish({"status": "ok", "edge": name, "kind": "link", "expires": until}, as_json, False)
    return True


def rebind(
    run: RunFile,
    name: EdgeName,
    expires: Expires = "7d",
    out: Out = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Give an edge's name to another device, or to one that lost its FEDSODA_HOME: print a new join link, end the old key."""
    with reporting(as_json, False, debug):
        from fedsoda_hub.run.directory import RunDirectory
        from fedsoda_hub.run.ledger import opened
        from fedsoda_hub.serving.invitations import rebind_token
        from fedsoda_hub.settings.run import read_settings

        settings = read_settings(run)
        with opened(RunDirectory(settings.run_dir)) as ledger:
            is_token = rebind_token(ledger, name)
        if is_token:
            note(f"the token of {name} belongs to the next device that joins with it")
            finish({"status": "ok", "edge": name, "kind": "token"}, as_json, False)
            return
        _hand_over_link(settings, name, expires, out, as_json, is_rebound=True)


def revoke(run: RunFile, name: EdgeName, as_json: Json = False, debug: Debug = False) -> None:
    """Shut an edge out, whether it has a token or came by a join link; its connection ends within seconds."""
    with reporting(as_json, False, debug):
        from fedsoda_hub.run.directory import RunDirectory
        from fedsoda_hub.run.ledger import opened
        from fedsoda_hub.serving.invitations import revoke as revoke_edge
        from fedsoda_hub.settings.run import read_settings

        with opened(RunDirectory(read_settings(run).run_dir)) as ledger:
            kind = revoke_edge(ledger, name)
        note(f"revoked the {'token' if kind == 'token' else 'join link and device'} of {name}")
        finish({"status": "ok", "edge": name, "kind": kind}, as_json, False)


def _hand_over_link(
    settings: RunSettings, name: str, expires: str, out: Path | None, as_json: bool, *, is_rebound: bool
) -> None:
    """Make a link and print it; where nobody can have it, all is as it was."""
    from fedsoda_hub.run.devices import at_words
    from fedsoda_hub.run.directory import RunDirectory
    from fedsoda_hub.run.ledger import opened
    from fedsoda_hub.run.tokens import write_secret
    from fedsoda_hub.serving.invitations import inviting

    seconds = parse_seconds(expires, "--expires")
    with (
        opened(RunDirectory(settings.run_dir)) as ledger,
        inviting(settings, ledger, name, seconds, is_rebound=is_rebound) as made,
    ):
        if made.way.is_guess:
            note(
                f"note: nobody said where devices reach the hub, so the link names {made.way.addresses[0]}; "
                "[listen] public_url says it"
            )
        if not is_rebound and made.before is not None and not made.before.is_revoked:
            note(f"the link of {name} that was made before, and that no device has used, is worth nothing from now on")
        values = {"status": "ok", "edge": name, "kind": "link", "expires": made.expires}
        if out is not None:
            write_secret(out, f"{made.link}\n")
        else:
            hand_over(str(made.link), {**values, "link": str(made.link)} if as_json else None)
    note(
        f"the link lets one device join as {name}, {', '.join(made.way.addresses)}, until {at_words(made.expires)}; "
        "once a device has used it, it is worth nothing to anybody else"
    )
    if out is not None:
        note(f"wrote it to {out}")
        finish(values, as_json, False)
