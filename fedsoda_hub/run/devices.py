"""Decide which device an invitation belongs to: the first that proves it, with a key of its own; afterwards the key counts.

Of an invitation only the public half of the key is kept that its secret is the seed of (`protocol/proof.py`). When a proof is
checked is `serving/proofs.py`'s; tokens, which programs carry, are `tokens.py`'s.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fedsoda_edge.errors import AlreadyThere, UsageProblem
from fedsoda_edge.protocol.messages import EdgeId
from fedsoda_edge.protocol.signatures import fingerprint
from fedsoda_hub.run.database import Database
from fedsoda_hub.run.tokens import check_edge_name

# An invitation in place of the one that had this name; whose key it was is remembered, for a sentence.
_INVITE = (
    "INSERT INTO devices (edge, invitation, expires) VALUES (?, ?, ?) ON CONFLICT (edge) DO UPDATE SET "
    "invitation = excluded.invitation, expires = excluded.expires, former = COALESCE(key, former), key = NULL, "
    "bound = NULL, revoked = 0"
)
_COLUMNS = "edge, invitation, expires, key, bound, former, revoked"


@dataclass(frozen=True)
class Device:
    """An invitation, and the device that it belongs to. Times are seconds since 1970.

    invitation: the public key of its secret. expires: until when a first device may come. key: the device's public key;
    None: none has come. bound: when it came. former: the key of the device that had this name before; None: none had.
    """

    edge: EdgeId
    invitation: bytes
    expires: float
    key: bytes | None
    bound: float | None
    former: bytes | None
    is_revoked: bool

    @property
    def fingerprint(self) -> str | None:
        """The letters that people compare the device's key by; None: no device has come."""
        return None if self.key is None else fingerprint(self.key)


class Devices:
    """The invitations of a run and the devices that came by them, in its database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def invite(self, edge: str, invitation: bytes, expires: float) -> Device | None:
        """Keep an invitation; return the one of this name that nobody can use afterwards, or None.

        Args:
            invitation: the public key of its secret.

        Raises:
            AlreadyThere: a device has the name.
            UsageProblem: the name cannot be one, or a token has it.
            DiskFull: all is as it was.
        """
        check_edge_name(edge)
        if self._database.read("SELECT 1 FROM tokens WHERE edge = ? AND revoked = 0", (edge,)):
            raise UsageProblem(
                f"{edge!r} has a token, so it needs no invitation; shut it out first with `fedsoda-hub revoke RUN.toml "
                f"{edge}`, or choose another --name"
            )
        before = self.named(edge)
        self._database.write((f"{_INVITE} WHERE key IS NULL OR revoked = 1", (edge, invitation, expires)))
        there = self.named(edge)
        assert there is not None, "it was there, or was written"
        if there.invitation != invitation:
            raise AlreadyThere(
                f"the link of {edge!r} was used on {at_words(there.bound or 0.0)} by the device {there.fingerprint}; if that "
                f"device lost its FEDSODA_HOME, `fedsoda-hub rebind RUN.toml {edge}` makes a new link; if it shall not come "
                f"back, `fedsoda-hub revoke RUN.toml {edge}` first; for a further device choose another --name"
            )
        return before

    def put_back(self, edge: str, before: Device | None) -> None:
        """Undo an invitation of which nobody has the link."""
        statement = f"INSERT OR REPLACE INTO devices ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)"
        again = [] if before is None else [(statement, dataclasses.astuple(before))]
        self._database.write(("DELETE FROM devices WHERE edge = ?", (edge,)), *again)

    def named(self, edge: str) -> Device | None:
        """Return the invitation of this name."""
        return _first(self._select("edge = ?", edge))

    def invited(self, invitation: bytes) -> Device | None:
        """Return the invitation with this public key."""
        return _first(self._select("invitation = ?", invitation))

    def with_key(self, key: bytes) -> Device | None:
        """Return what the device with this key belongs to, or did before it was revoked."""
        return _first(self._select("key = ? ORDER BY revoked", key))

    def once_with_key(self, key: bytes) -> Device | None:
        """Return what belonged to the device with this key before another one was invited instead."""
        return _first(self._select("former = ?", key))

    def all(self) -> list[Device]:
        """Return every invitation, ascending by edge id."""
        return list(self._select("1 ORDER BY edge"))

    def _select(self, where: str, *values: object) -> Iterable[Device]:
        for row in self._database.read(f"SELECT {_COLUMNS} FROM devices WHERE {where}", values):
            yield _device(row)

    def bind(self, invitation: bytes, key: bytes, now: float) -> Device | None:
        """Bind an invitation that no device has used to this one, if it may be; return how it stands then.

        Of several devices that come at once exactly one gets it. Each looks at the key of what is returned.

        Raises:
            DiskFull: all is as it was.
        """
        self._database.write(
            (
                "UPDATE devices SET key = ?, bound = ? WHERE invitation = ? AND key IS NULL AND revoked = 0 AND expires > ?",
                (key, now, invitation, now),
            ),
            (  # of another device that had this name
                "DELETE FROM seen WHERE edge = (SELECT edge FROM devices WHERE invitation = ? AND key = ? AND bound = ?)",
                (invitation, key, now),
            ),
        )
        return self.invited(invitation)

    def revoke(self, edge: str) -> None:
        """Shut the device out, and let nobody use the invitation.

        Raises:
            DiskFull: all is as it was.
        """
        self._database.write(("UPDATE devices SET revoked = 1 WHERE edge = ?", (edge,)))

    def rebind(self, edge: str, invitation: bytes, expires: float) -> Device:
        """Invite another device, or the same one with a new key, in place of the one that has this name; return how it was.

        Raises:
            UsageProblem: the name is revoked.
            DiskFull: all is as it was.
        """
        before = self.named(edge)
        assert before is not None, "the caller has looked"
        if before.is_revoked:
            raise UsageProblem(f"{edge!r} is revoked; make a new link: fedsoda-hub invite RUN.toml --name {edge}")
        self._database.write((f"{_INVITE} WHERE revoked = 0", (edge, invitation, expires)))
        return before


def _device(row: tuple[Any, ...]) -> Device:
    edge, invitation, expires, key, bound, former, revoked = row
    return Device(EdgeId(edge), invitation, expires, key, bound, former, bool(revoked))


def _first(devices: Iterable[Device]) -> Device | None:
    return next(iter(devices), None)


def at_words(at: float) -> str:
    """Write a time, seconds since 1970, as people read it."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at))
