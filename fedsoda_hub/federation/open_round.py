"""Know at once who is here, who is awaited and whom an offer is owed to, so that no event looks at all edges.

What is kept follows from the state and from who is connected; each change of one edge costs O(log n). What is decided by
it is `rounds.py`'s and `collecting.py`'s.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from itertools import islice

from fedsoda_edge.protocol.messages import EdgeId
from fedsoda_hub.federation import records as rec
from fedsoda_hub.federation.state import LedgerState


class OpenRound:
    """The edges that are here, and what the open round expects of whom.

    here: the eligible edges. awaited: those whose answer the round waits for, in the order of their invitation.
    awaited_here: those of them that are here. to_offer: those of them that have no offer as it stands now.
    """

    def __init__(self, state: LedgerState) -> None:
        self.here: set[EdgeId] = set()
        self.awaited: OrderedDict[EdgeId, None] = OrderedDict()
        self.awaited_here: set[EdgeId] = set()
        self.to_offer: set[EdgeId] = set()
        self._state = state
        self._ordered: list[EdgeId] = []  # `here`, ascending
        self._invited: set[EdgeId] = set()
        self._invited_here: set[EdgeId] = set()
        self._accepted_here: set[EdgeId] = set()
        self._last_invited = EdgeId("")
        if state.phase == "collecting":
            self._open(state.cohort)

    @property
    def ordered(self) -> list[EdgeId]:
        """The eligible edges, ascending."""
        return self._ordered

    @property
    def has_uninvited(self) -> bool:
        """Whether an edge is here that the round has not invited."""
        return len(self.here) > len(self._invited_here)

    @property
    def has_unaccepted(self) -> bool:
        """Whether an edge is here whose update the round does not have."""
        return len(self.here) > len(self._accepted_here)

    def is_invited(self, edge: EdgeId) -> bool:
        """Tell whether the open round has invited this edge."""
        return self._state.phase == "collecting" and edge in self._invited

    def is_awaited(self, edge: EdgeId) -> bool:
        """Tell whether the open round waits for this edge's answer."""
        return self._state.phase == "collecting" and edge in self.awaited

    def uninvited(self, most: int) -> list[EdgeId]:
        """Return edges that are here and were not invited: in ascending order, beginning after the last one invited."""
        if not self.has_uninvited:
            return []
        size, first = len(self._ordered), bisect_right(self._ordered, self._last_invited)
        turn = (self._ordered[(first + step) % size] for step in range(size))
        return sorted(islice((edge for edge in turn if edge not in self._invited), most))

    # --- what happens ------------------------------------------------------------------------------------

    def come(self, edge: EdgeId) -> None:
        """Note that an edge is here, perhaps again, and has no offer yet."""
        if edge not in self.here:
            self.here.add(edge)
            insort(self._ordered, edge)
        if edge in self._invited:
            self._invited_here.add(edge)
        if edge in self.awaited:
            self.awaited_here.add(edge)
            self.to_offer.add(edge)
        if edge in self._state.accepted:
            self._accepted_here.add(edge)

    def go(self, edge: EdgeId) -> None:
        """Note that an edge is not here any more."""
        if edge in self.here:
            self.here.discard(edge)
            del self._ordered[bisect_left(self._ordered, edge)]
        for those in (self._invited_here, self.awaited_here, self.to_offer, self._accepted_here):
            those.discard(edge)

    def fold(self, record: rec.AnyRecord, *, has_new_deadline: bool) -> None:
        """Follow a record that the state has just folded in.

        Args:
            has_new_deadline: a record that extends the cohort moves the deadline, which all who are awaited are told.
        """
        match record:
            case rec.RoundOpened():
                self._open(record.cohort)
            case rec.CohortExtended():
                for edge in record.invited:
                    self._invite(edge)
                self._last_invited = max(record.invited, default=self._last_invited)
                if has_new_deadline:
                    self.to_offer = set(self.awaited_here)
            case rec.RulesChanged():
                if has_new_deadline:
                    self.to_offer = set(self.awaited_here)
            case rec.UpdateAccepted():
                self._answered(record.edge)
                if record.edge in self.here:
                    self._accepted_here.add(record.edge)
            case rec.EdgeAnswered():
                self._answered(record.edge)

    def _open(self, cohort: tuple[EdgeId, ...] | list[EdgeId]) -> None:
        self.awaited = OrderedDict()
        self.awaited_here, self.to_offer = set(), set()
        self._invited, self._invited_here, self._accepted_here = set(), set(), set()
        self._last_invited = EdgeId("")
        for edge in cohort:
            self._invite(edge)

    def _invite(self, edge: EdgeId) -> None:
        self._invited.add(edge)
        is_here = edge in self.here
        if is_here:
            self._invited_here.add(edge)
        if edge not in self._state.accepted and edge not in self._state.answered:
            self.awaited[edge] = None
            if is_here:
                self.awaited_here.add(edge)
                self.to_offer.add(edge)

    def _answered(self, edge: EdgeId) -> None:
        self.awaited.pop(edge, None)
        self.awaited_here.discard(edge)
        self.to_offer.discard(edge)
