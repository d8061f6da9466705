"""Parse `fedsoda-edge receipts`, and show what left this device. The file is `join/receipts.py`'s."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fedsoda_edge.cli import options as opt
from fedsoda_edge.ports.console import finish, note, reporting
from fedsoda_edge.units import counted, human_bytes

if TYPE_CHECKING:
    from fedsoda_edge.join.receipts import Departure

ANSWERS = {
    "none": "sent, no receipt",
    "verified": "receipt, signature verified",
    "unsigned": "receipt without signature (an older hub)",
    "forged": "RECEIPT NOT OF THIS HUB",
    "refused": "refused",
}


def receipts(
    run: Annotated[
        str | None, typer.Option("--run", envvar="FEDSODA_RUN", help="name or id of one run; without it, all runs")
    ] = None,
    as_json: opt.JsonOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """List all that ever left this device: when, to which hub, what, and the hub's signed receipt. Nothing is sent."""
    with reporting(as_json, False, debug):
        import msgspec

        from fedsoda_edge.join.home import Home
        from fedsoda_edge.join.receipts import ReceiptLog, departures

        log = ReceiptLog(Home().receipts)
        lines, unread = log.lines()
        found = departures(lines, run)
        for one in found:
            note(_sentence(one))
        if not found:
            note("nothing has left this device" if run is None else f"nothing has left this device for the run {run!r}")
        if unread:
            note(f"{counted(unread, 'line')} of {log.path} cannot be read: cut by a crash, or of a later release")
        values = msgspec.to_builtins(found)
        finish({"status": "ok", "file": str(log.path), "unread_lines": unread, "sent": values}, as_json, False)


def _sentence(one: Departure) -> str:
    to = f"{one.hub}" + (f" (key {one.hub_key})" if one.hub_key else "")
    if one.what == "update":
        loss = "not finite" if one.loss is None else f"{one.loss:.3f}"
        answer = ANSWERS[one.answer or "none"] + (f": {one.reason}" if one.reason else "")
        what = (
            f"update of round {one.round}: {human_bytes(one.bytes)}, sha256 {(one.digest or '')[:12]}, "
            f"{one.num_examples} examples, loss {loss}; {answer}"
        )
    elif one.what == "download":
        what = "digests of files, and this device's address, to fetch the bundle"
    elif one.what == "counted":
        return f"{one.at}  earlier small messages, counted: {one.said}"
    else:
        what = f"{one.what}: {one.said}"
    return f"{one.at}  {f'{one.run}: ' if one.run else ''}{what}  -> {to}"
