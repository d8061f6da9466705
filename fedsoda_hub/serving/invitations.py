"""Let devices in by a join link, and out: what the commands and the owner's page do alike.

What is kept of an invitation is `run/devices.py`'s.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass

from fedsoda_edge.protocol.join_link import SECRET_BYTES, JoinLink
from fedsoda_edge.protocol.proof import invitation_key
from fedsoda_hub.run.devices import Device
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.edges import JoinedBy
from fedsoda_hub.run.keys import signing_key
from fedsoda_hub.run.ledger import Ledger
from fedsoda_hub.serving.tls import WayIn, way_in
from fedsoda_hub.settings.run import RunSettings


@dataclass(frozen=True)
class MadeLink:
    """A join link that was just made. expires: seconds since 1970. before: what it replaces; None: nothing."""

    link: JoinLink
    edge: str
    expires: float
    way: WayIn
    before: Device | None


@contextlib.contextmanager
def inviting(
    settings: RunSettings, ledger: Ledger, edge: str, seconds: float, *, is_rebound: bool = False
) -> Iterator[MadeLink]:
    """Make a join link for one device and keep its invitation; where the block fails, nobody has the link and all is as it was.

    Args:
        seconds: how long a device may first come.
        is_rebound: whether the name is taken from the device that has it.

    Raises:
        UsageProblem: the name cannot be one, or is not free; or nobody knows where devices reach the hub.
        DiskFull: all is as it was.
    """
    directory = RunDirectory(settings.run_dir)
    way = way_in(settings)
    secret, until = secrets.token_bytes(SECRET_BYTES), time.time() + seconds
    link = JoinLink(way.addresses, signing_key(directory.signing_key).public, secret, way.tls_pin, way.is_plain)
    keep = ledger.devices.rebind if is_rebound else ledger.devices.invite
    before = keep(edge, invitation_key(secret).public, until)
    try:
        yield MadeLink(link, edge, until, way, before)
    except BaseException:
        with contextlib.suppress(Exception):
            ledger.devices.put_back(edge, before)
        raise


def rebind_token(ledger: Ledger, edge: str) -> bool:
    """Let go of the device of an edge that has a token; tell whether it has one, since the others need a new link.

    Raises:
        UsageProblem: nobody of this name was ever let in, or its token is revoked.
        DiskFull: all is as it was.
    """
    if ledger.edges.kind_of(edge) != "token":
        return False
    ledger.tokens.rebind(edge)
    return True


def revoke(ledger: Ledger, edge: str) -> JoinedBy:
    """Shut an edge out, and return what it had to join with.

    Raises:
        UsageProblem: nobody of this name was ever let in.
        DiskFull: all is as it was.
    """
    kind = ledger.edges.kind_of(edge)
    if kind == "token":
        ledger.tokens.revoke(edge)
    else:
        ledger.devices.revoke(edge)
    return kind
