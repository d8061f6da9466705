"""Parse and do the commands that change who may join a run, and what there is of it: `token` and `reset`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.ports.console import finish, hand_over, note, reporting
from fedsoda_edge.units import counted, human_bytes
from fedsoda_hub.cli.options import Debug, Json, RunFile

if TYPE_CHECKING:
    from fedsoda_hub.run.ledger import Ledger

token_app = typer.Typer(help="What an edge needs to join.", no_args_is_help=True)
EdgeName = Annotated[str, typer.Argument(help="the edge's id")]


@token_app.command("create", epilog="Example: fedsoda-hub token create triage.toml --name clinic-7 > clinic-7.token")
def token_create(
    run: RunFile,
    name: Annotated[str, typer.Option("--name", envvar="FEDSODA_TOKEN_NAME", help="the edge's id")],
    out: Annotated[
        Path | None, typer.Option("--out", envvar="FEDSODA_TOKEN_OUT", help="write the token there, mode 0600")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a token and print it; it is stored nowhere else."""
    with reporting(as_json, False, debug):
        from fedsoda_hub.cli.again import has_token
        from fedsoda_hub.run.tokens import write_secret

        with contextlib.closing(_ledger(run)) as ledger:
            if has_token(ledger, name, out):
                note(f"{out} holds the token of {name} already; nothing was made")
                finish({"status": "ok", "edge": name}, as_json, False)
                return
            token = ledger.tokens.create(name)
            try:
                if out is not None:
                    write_secret(out, token + "\n")
                else:
                    hand_over(token, {"status": "ok", "edge": name, "token": token} if as_json else None)
            except BaseException:
                ledger.tokens.revoke(name)  # nobody has the token, and the name becomes free again
                raise
        if out is not None:
            note(f"wrote the token of {name} to {out}")
            finish({"status": "ok", "edge": name}, as_json, False)


@token_app.command("list", epilog="Example: fedsoda-hub token list triage.toml")
def token_list(run: RunFile, as_json: Json = False, debug: Debug = False) -> None:
    """List the edges that may join, and whether a device has joined as them."""
    with reporting(as_json, False, debug):
        with contextlib.closing(_ledger(run, is_read_only=True)) as ledger:
            tokens = ledger.tokens.all()
        for token in tokens:
            state = "revoked" if token.revoked else "in use" if token.device else "unused"
            note(f"{token.edge:<24} {state}")
        rows = [{"edge": t.edge, "device": t.device, "revoked": t.revoked} for t in tokens]
        finish({"status": "ok", "tokens": rows}, as_json, False)


@token_app.command("revoke", epilog="Example: fedsoda-hub token revoke triage.toml clinic-7")
def token_revoke(run: RunFile, name: EdgeName, as_json: Json = False, debug: Debug = False) -> None:
    """Revoke an edge's token: it is refused from its next connection on."""
    with reporting(as_json, False, debug):
        with contextlib.closing(_ledger(run)) as ledger:
            ledger.tokens.revoke(name)
        note(f"revoked the token of {name}")
        finish({"status": "ok", "edge": name}, as_json, False)


@token_app.command("rebind", epilog="Example: fedsoda-hub token rebind triage.toml clinic-7")
def token_rebind(run: RunFile, name: EdgeName, as_json: Json = False, debug: Debug = False) -> None:
    """Let an edge's token go from a device that lost its FEDSODA_HOME: the next device that joins with it has it."""
    with reporting(as_json, False, debug):
        with contextlib.closing(_ledger(run)) as ledger:
            ledger.tokens.rebind(name)
        note(f"the token of {name} belongs to the next device that joins with it")
        finish({"status": "ok", "edge": name}, as_json, False)


def _ledger(run: Path, *, is_read_only: bool = False) -> Ledger:
    from fedsoda_hub.run.directory import RunDirectory
    from fedsoda_hub.run.ledger import Ledger
    from fedsoda_hub.settings.run import read_settings

    path = RunDirectory(read_settings(run).run_dir).ledger
    return Ledger(path, is_read_only=is_read_only and path.exists())


def reset(
    run: RunFile,
    is_sure: Annotated[bool, typer.Option("--yes", envvar="FEDSODA_YES", help="do not ask")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Delete a run's bundle, rounds and results, so that it begins again with other settings; tokens stay."""
    with reporting(as_json, False, debug):
        import msgspec

        from fedsoda_hub.run.directory import RunDirectory
        from fedsoda_hub.run.reset import begun
        from fedsoda_hub.run.reset import reset as reset_run
        from fedsoda_hub.settings.run import read_settings

        directory = RunDirectory(read_settings(run).run_dir)
        if not directory.ledger.exists() and not directory.preparation.exists():
            raise UsageProblem(f"{run.name} has not begun, so there is nothing to reset; run `fedsoda-hub serve {run}`")
        lock = directory.lock()
        try:
            found = begun(directory)
            rounds = "a damaged ledger" if found.rounds_closed is None else counted(found.rounds_closed, "closed round")
            what = f"{rounds} and {human_bytes(found.bytes)} in {directory.path}"
            links = f" and {counted(found.links, 'join link')}" if found.links else ""
            kept = f"{counted(found.tokens, 'token')}{links} kept"
            if found.rounds_closed is None:
                kept = "its tokens are lost, its join links too"
            if not is_sure:
                _ask(f"delete {what}? ({kept})", f"delete {what} ({kept})")
            reset_run(directory)
        finally:
            lock.release()
        note(f"deleted {what}; {kept}; `fedsoda-hub serve {run}` begins again")
        finish({"status": "ok", **msgspec.to_builtins(found)}, as_json, False)


def _ask(question: str, what: str) -> None:
    """Return where the owner says yes.

    Raises:
        UsageProblem: the answer is another one, or there is nobody to ask.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageProblem(f"this would {what}, and there is no terminal to ask at; give --yes")
    if not typer.confirm(question, err=True):
        raise UsageProblem("nothing was deleted; answer y, or give --yes")
