"""Fold the ledger's records, as they come, into what the page draws: per round and per edge, small whatever the run's length. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from fedsoda_edge.protocol.messages import EdgeId
from fedsoda_hub.federation import records as rec
from fedsoda_hub.federation.jobs import EvaluateResult


@dataclass
class RoundTally:
    """One round. Times are seconds since 1970; closed_at None: it is open."""

    number: int
    opened_at: float
    closed_at: float | None = None
    invited: int = 0
    updates: int = 0
    examples: int = 0
    weighted_loss: float = 0.0

    @property
    def loss(self) -> float | None:
        """The mean loss, weighted by examples; None: no update has come."""
        return self.weighted_loss / self.examples if self.examples else None


@dataclass
class Tally:
    """The records up to the one with the number `last`. judged: (round, figures) of each evaluation."""

    last: int = 0
    began_at: float | None = None
    ended_at: float | None = None
    rounds: list[RoundTally] = field(default_factory=list)
    invited: Counter[EdgeId] = field(default_factory=Counter)
    given: Counter[EdgeId] = field(default_factory=Counter)
    judged: list[tuple[int, EvaluateResult]] = field(default_factory=list)
    _of_round: set[EdgeId] = field(default_factory=set)

    def fold(self, records: Iterable[tuple[int, float, rec.AnyRecord]]) -> None:
        """Fold in the records that follow, each with its number and the time of its writing."""
        for number, at, record in records:
            self.last = number
            self.began_at = at if self.began_at is None else self.began_at
            self._fold(at, record)

    def _fold(self, at: float, record: rec.AnyRecord) -> None:
        now = self.rounds[-1] if self.rounds else None
        match record:
            case rec.RoundOpened():
                self.rounds.append(RoundTally(record.round, at, invited=len(record.cohort)))
                self.invited.update(record.cohort)
                self._of_round = set(record.cohort)
                self.ended_at = None
            case rec.CohortExtended() if now:
                new = [edge for edge in record.invited if edge not in self._of_round]
                now.invited += len(new)
                self.invited.update(new)
                self._of_round.update(new)
            case rec.UpdateAccepted() if now:
                self.given[record.edge] += 1
                now.updates += 1
                now.examples += record.num_examples
                now.weighted_loss += record.loss * record.num_examples
            case rec.RoundClosed() if now:
                now.closed_at = at
            case rec.Evaluated():
                self.judged.append((record.round, record.result))
            case rec.RunEnded():
                self.ended_at = at

    @property
    def closed(self) -> list[RoundTally]:
        """The rounds that have closed."""
        return [one for one in self.rounds if one.closed_at is not None]
