"""Decide who may join a run: a token is one edge, bound to the device that uses it first. Only its sha256 is kept.

When a token is checked is `serving/listener.py`'s.
"""

from __future__ import annotations

import errno
import hashlib
import secrets
from dataclasses import dataclass
from pathlib import Path

from fedsoda_edge.errors import AlreadyThere, UsageProblem
from fedsoda_edge.ports.disk import write_durably
from fedsoda_edge.protocol.messages import EdgeId
from fedsoda_edge.units import one_line
from fedsoda_hub.run.database import Database


@dataclass(frozen=True)
class Token:
    """A token without its secret, or the ticket of a device that came by a join link: what a bearer stands for.

    device: the id of the device that it is bound to; None: no device has used it. sha256: that of the token's secret. key:
    the public key of the device, where this is a ticket.
    """

    edge: EdgeId
    device: str | None
    revoked: bool
    sha256: str = ""
    key: bytes | None = None


class Tokens:
    """The tokens of a run, in its database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, edge: str) -> str:
        """Make a token for this edge id and return its secret.

        Raises:
            AlreadyThere: the edge has a token.
            UsageProblem: the name was invited by a join link, or cannot be part of a file name.
            DiskFull: no token was made.
        """
        check_edge_name(edge)
        if self._database.read("SELECT 1 FROM devices WHERE edge = ? AND revoked = 0", (edge,)):
            raise UsageProblem(
                f"{edge!r} was invited by a join link, so it needs no token; shut it out first with `fedsoda-hub revoke "
                f"RUN.toml {edge}`, or choose another --name"
            )
        known = self.of(EdgeId(edge))
        if known is not None and not known.revoked:
            raise AlreadyThere(f"{edge!r} has a token already; revoke it first, or choose another --name")
        token = f"fs1-{secrets.token_urlsafe(32)}"
        statement = "INSERT OR REPLACE INTO tokens (edge, sha256) VALUES (?, ?)"
        self._database.write((statement, (edge, _hash(token))))
        return token

    def all(self) -> list[Token]:
        """Return every token, ascending by edge id."""
        rows = self._database.read("SELECT edge, device, revoked, sha256 FROM tokens ORDER BY edge")
        return [Token(EdgeId(edge), device, bool(revoked), sha256) for edge, device, revoked, sha256 in rows]

    def find(self, secret: str) -> Token | None:
        """Return the token with this secret; None: the run does not know it. An event loop may ask."""
        return self._found("sha256", _hash(secret))

    def of(self, edge: EdgeId) -> Token | None:
        """Return the edge's token; None: it never had one. An event loop may ask."""
        return self._found("edge", edge)

    def _found(self, column: str, value: str) -> Token | None:
        row = self._database.find(f"SELECT edge, device, revoked, sha256 FROM tokens WHERE {column} = ?", (value,))
        return None if row is None else Token(EdgeId(row[0]), row[1], bool(row[2]), row[3])

    def revoke(self, edge: str) -> None:
        """Revoke the edge's token, so that it cannot join; after that the name can get a new one.

        Raises:
            UsageProblem: the edge never had a token.
            DiskFull: the token is as it was.
        """
        self._known(edge)
        self._database.write(("UPDATE tokens SET revoked = 1 WHERE edge = ?", (edge,)))

    def rebind(self, edge: str) -> None:
        """Let go of the device that the edge's token is bound to: the next one that joins with it is its device.

        Raises:
            UsageProblem: the edge never had a token, or its token is revoked.
            DiskFull: the token is as it was.
        """
        if self._known(edge).revoked:
            raise UsageProblem(f"the token of {edge!r} is revoked; make a new one: fedsoda-hub token create")
        self._database.write(("UPDATE tokens SET device = NULL WHERE edge = ?", (edge,)))

    def _known(self, edge: str) -> Token:
        token = self.of(EdgeId(edge))
        if token is None:
            names = ", ".join(token.edge for token in self.all()) or "none"
            raise UsageProblem(f"{edge!r} has no token; name one of those that have: {names}")
        return token

    def bind(self, edge: EdgeId, device: str) -> bool:
        """Bind an unbound token to the device, and tell whether the token belongs to that device.

        Only the first device of a token is written down.

        Raises:
            DiskFull: the token is as it was.
        """
        token = self.of(edge)
        if token is not None and token.device is None:
            self._database.write(("UPDATE tokens SET device = ? WHERE edge = ? AND device IS NULL", (device, edge)))
            token = self.of(edge)
        return token is not None and token.device == device


def check_edge_name(edge: str) -> None:
    """Refuse what cannot be an edge's id, which is also part of file names.

    Raises:
        UsageProblem: it cannot.
    """
    if not edge or not all(c.isalnum() or c in "-_." for c in edge) or len(edge) > 64:
        raise UsageProblem(f"--name {one_line(edge, 80)!r} cannot be an edge's id; use 1 to 64 letters, digits, - _ .")


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def write_secret(path: Path, secret: str) -> None:
    """Write a file of mode 0600 from the first byte on. A file of that name is replaced, since others may have it open.

    Raises:
        UsageProblem: a file cannot be made there.
        DiskFull: the disk has no space left.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EEXIST, "it is there and is not a file")
        write_durably(path, secret.encode(), 0o600)
    except OSError as error:
        raise UsageProblem(
            f"{path} cannot be written ({error.strerror}); name a file in a directory that you may write to"
        ) from error
