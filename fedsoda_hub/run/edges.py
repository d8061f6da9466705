"""Say who may join a run, by a token (`tokens.py`) or by a join link (`devices.py`): one edge, one name, one of both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.messages import EdgeId
from fedsoda_hub.federation.state import LastStanding
from fedsoda_hub.run.database import Database
from fedsoda_hub.run.devices import Devices
from fedsoda_hub.run.tokens import Token, Tokens

JoinedBy = Literal["token", "link"]  # what an edge has to join with


class KnownEdge(msgspec.Struct, frozen=True, kw_only=True):
    """An edge that may join, or might once. Times are seconds since 1970.

    fingerprint: of the device's key, where it came by a join link. used: whether a device has come. expires: until when a
    link that no device has used can be; None: of a token, and of a link that was used. first_seen, last_seen: when the
    device was connected. why: why a connected edge does not work, where that is known. size_class, step, steps None: the edge is not at work, or no hub runs. standing: its last update
    beside what the round made of all; None: none of its updates was merged, or none of its rounds' farthest was its.
    """

    edge: EdgeId
    kind: JoinedBy = "token"
    connected: bool = False
    eligible: bool = False
    revoked: bool
    used: bool = False
    fingerprint: str | None = None
    expires: float | None = None
    first_seen: float | None = None
    last_seen: float | None = None
    size_class: int | None = None
    step: int | None = None
    steps: int | None = None
    standing: LastStanding | None = None
    why: str | None = None


class Edges:
    """Both ways to join, together."""

    def __init__(self, database: Database, tokens: Tokens, devices: Devices) -> None:
        self._database = database
        self._tokens = tokens
        self._devices = devices

    def all(self) -> list[KnownEdge]:
        """Return every edge, ascending by its id. Where a name had both a token and a link, what is not revoked counts."""
        rows = self._database.read("SELECT edge, first, last FROM seen")
        seen = {edge: (first, last) for edge, first, last in rows}
        found: dict[EdgeId, KnownEdge] = {}
        for token in self._tokens.all():
            first, last = seen.get(token.edge, (None, None))
            found[token.edge] = KnownEdge(
                edge=token.edge,
                revoked=token.revoked,
                used=token.device is not None,
                first_seen=first,
                last_seen=last,
            )
        for device in self._devices.all():
            if device.edge in found and device.is_revoked:
                continue
            first, last = seen.get(device.edge, (None, None))
            found[device.edge] = KnownEdge(
                edge=device.edge,
                kind="link",
                revoked=device.is_revoked,
                used=device.key is not None,
                fingerprint=device.fingerprint,
                expires=device.expires if device.key is None else None,
                first_seen=first,
                last_seen=last,
            )
        return [found[edge] for edge in sorted(found)]

    def note_seen(self, seen: Mapping[EdgeId, float]) -> None:
        """Note when edges were connected last, seconds since 1970.

        Raises:
            DiskFull: nothing was noted.
        """
        statement = "INSERT INTO seen VALUES (?, ?, ?) ON CONFLICT (edge) DO UPDATE SET last = excluded.last"
        self._database.write(*((statement, (edge, at, at)) for edge, at in seen.items()))

    def kind_of(self, edge: str) -> JoinedBy:
        """Return what this edge has to join with.

        Raises:
            UsageProblem: nobody of this name was ever let in.
        """
        known = {one.edge: one.kind for one in self.all()}
        if edge not in known:
            raise UsageProblem(
                f"{edge!r} has neither a token nor a join link; name one of those that have: {', '.join(known) or 'none'}"
            )
        return known[EdgeId(edge)]

    def shut_out(self, admitted: Iterable[Token]) -> list[tuple[Token, str]]:
        """Select those that may not stay any longer, with the reason for each.

        Args:
            admitted: what the connected edges came in with.
        """
        tokens = {token.edge: token for token in self._tokens.all()}
        devices = {device.edge: device for device in self._devices.all()}
        found = []
        for one in admitted:
            if one.key is not None:
                device = devices.get(one.edge)
                if device is None or device.is_revoked or device.key != one.key:
                    is_other = device is not None and not device.is_revoked
                    found.append((one, (REBOUND if is_other else REVOKED).format(one.edge)))
            elif one.sha256:
                token = tokens.get(one.edge)
                if token is None or token.revoked or token.sha256 != one.sha256:
                    found.append((one, f"the token of {one.edge} was revoked; ask the hub's owner for a new one"))
        return found


REVOKED = (
    "{} was shut out by the hub's owner (revoke); ask the owner for a new join link, which works on this device too"
)
REBOUND = (
    "the hub's owner gave {} to another device (rebind), and this one's key does not count any more; ask the owner for a join "
    "link of this device's own"
)
