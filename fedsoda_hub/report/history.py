"""Fold a run's records into what a report shows. Everything shown was recorded; nothing is trained or judged here.

Pictures of it are `pictures.py`'s, the page is `page.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from fedsoda_hub.federation import records as rec
from fedsoda_hub.federation.jobs import Standing
from fedsoda_hub.run.ledger import Ledger

STAGES = ("pruned", "quantized", "aligned")  # of public KL, in the order of preparation


@dataclass
class Contribution:
    """An accepted update. at: seconds since 1970. loss: nats an id.

    standing: beside what the round made of all updates; None: the round is open, or has no such record of the edge.
    """

    at: float
    num_examples: int
    loss: float
    standing: Standing | None = None


@dataclass
class Round:
    """One round as the ledger has it. answered: by invited edge without an update, the time and the reason."""

    number: int
    opened_at: float
    cohort: list[str]
    closed_at: float | None = None
    updates: dict[str, Contribution] = field(default_factory=dict)
    answered: dict[str, tuple[float, str]] = field(default_factory=dict)

    @property
    def loss(self) -> float | None:
        """The mean of the edges' losses, weighted by examples; None while the round is open."""
        total = sum(update.num_examples for update in self.updates.values())
        if self.closed_at is None or not total:
            return None
        return sum(update.loss * update.num_examples for update in self.updates.values()) / total


@dataclass
class History:
    """The course of a run.

    began_at: seconds since 1970. cross_terms: by round, what averaging A and B apart lost. repruned: rounds before which
    other layers were drawn. traffic: by (edge, round), bytes up and down, with realignments and without the bundle.
    count: the rounds that the owner asked for while a hub served the run; None: as many as RUN.toml says.
    """

    began_at: float
    is_over: bool = False
    count: int | None = None
    public_kl: dict[str, float] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    cross_terms: dict[int, float] = field(default_factory=dict)
    realigned: list[rec.Realigned] = field(default_factory=list)
    repruned: list[int] = field(default_factory=list)
    evaluated: list[rec.Evaluated] = field(default_factory=list)
    traffic: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)

    @property
    def closed(self) -> list[Round]:
        """The rounds that have closed."""
        return [one for one in self.rounds if one.closed_at is not None]

    @property
    def last_at(self) -> float:
        """The time at which a round last opened or closed; only of a run with a round."""
        return max(one.closed_at or one.opened_at for one in self.rounds)

    @property
    def edges(self) -> list[str]:
        """The edges that were ever invited or sent anything; clinic-2 comes before clinic-10."""
        invited = {edge for one in self.rounds for edge in one.cohort}
        return sorted(invited | {edge for edge, _ in self.traffic}, key=_natural)

    def bytes_until(self, number: int) -> int:
        """Sum what all edges sent and received up to the end of this round."""
        return sum(up + down for (_, at), (up, down) in self.traffic.items() if at <= number)


def _natural(name: str) -> list[str]:
    parts = re.split(r"(\d+)", name)
    parts[1::2] = [part.zfill(64) for part in parts[1::2]]
    return parts


def read_history(ledger: Ledger) -> History:
    """Fold the records of a run that was started."""
    recorded = ledger.history()
    history, of_file = History(recorded[0][0]), 0.0
    for at, record in recorded:
        now = history.rounds[-1] if history.rounds else None
        history.is_over = history.is_over and not isinstance(record, rec.RoundOpened)
        match record:
            case rec.RunPrepared():
                history.public_kl = record.public_kl
            case rec.RoundOpened():
                history.rounds.append(Round(record.round, at, list(record.cohort)))
            case rec.CohortExtended() if now:
                now.cohort += [edge for edge in record.invited if edge not in now.cohort]
                for edge in record.invited:
                    now.answered.pop(edge, None)
            case rec.UpdateAccepted() if now:
                now.updates[record.edge] = Contribution(at, record.num_examples, record.loss)
                now.answered.pop(record.edge, None)
            case rec.EdgeAnswered() if now:
                now.answered[record.edge] = at, record.how
            case rec.RoundClosed() if now:
                now.closed_at = at
                for found in record.standings:
                    now.updates[found.edge].standing = found
                if record.cross_term is not None:
                    history.cross_terms[record.round] = record.cross_term
            case rec.Realigned():
                history.realigned.append(record)
            case rec.Repruned():
                history.repruned.append(record.round)
            case rec.Evaluated():
                history.evaluated.append(record)
            case rec.RulesChanged() if "count" in record.values:
                history.count, of_file = int(record.values["count"]), record.instead_of["count"]
            case rec.SettingsChanged() if record.values.get("count") != of_file:  # what RUN.toml says since then counts
                history.count = None
            case rec.RunEnded():
                history.is_over = True
    history.traffic = {(edge, number): (up, down) for edge, number, up, down in ledger.traffic()}
    return history


def date(at: float) -> str:
    """Write a time, in seconds since 1970, as people read it."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")


def kl_sentence(kl: Mapping[str, float]) -> str:
    """Say what pruning and storing cost the sub-LLM, and what alignment gave back, as public KL in nats."""
    if not kl["pruned"]:  # exactly 0 with a full emulator
        return f"public KL {kl['quantized']:.3f} as stored, all layers kept"
    aligned = f"{kl['aligned']:.3f} aligned" if kl["aligned"] != kl["quantized"] else "not aligned"
    return f"public KL {kl['pruned']:.3f} pruned, {kl['quantized']:.3f} as stored, {aligned}"
