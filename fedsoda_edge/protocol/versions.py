"""Say which versions of the protocol this release speaks, and which one two sides take. Pure.

A side speaks a range. `Hello.protocol` is the oldest version of the edge's range, since a release that knows no ranges
compares that one, and `Hello.newest` the newest; `Welcome.protocol` is the version that the hub took. docs/protocol.md
(p1-versions) says how long a version is spoken.
"""

from __future__ import annotations

from typing import NamedTuple

from fedsoda_edge.errors import ProtocolMismatch
from fedsoda_edge.protocol.messages import PROTOCOL_VERSION, Hello


class Speaks(NamedTuple):
    """The versions of the protocol that a side speaks, from the oldest to the newest."""

    oldest: int
    newest: int

    def agreed(self, other: Speaks) -> int | None:
        """Return the newest version that both sides speak; None: there is none."""
        newest = min(self.newest, other.newest)
        return newest if newest >= max(self.oldest, other.oldest) else None

    def mismatch(self, hub: Speaks, remedy: str) -> ProtocolMismatch:
        """Make the error of an edge, which speaks this range, and a hub that speaks none of it.

        Args:
            remedy: the command that brings this device a newer release.
        """
        if self.newest < hub.oldest:
            return ProtocolMismatch(self.newest, hub.oldest, remedy)
        return ProtocolMismatch(self.oldest, hub.newest)


# The newest protocol of each minor release. A release speaks that of the two minor releases before it, at least.
RELEASED = {(0, 1): 1}
SPEAKS = Speaks(oldest=1, newest=PROTOCOL_VERSION)


def agreed_with(hello: Hello) -> int | None:
    """Return the version that a hub of this release takes with the edge that said this Hello; None: there is none."""
    return SPEAKS.agreed(Speaks(hello.protocol, max(hello.protocol, hello.newest)))
