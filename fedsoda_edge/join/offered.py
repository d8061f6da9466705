"""Decide which offer is worth taking, from the offers, the round in hand and the rounds that are done. Pure.

Training and handing in are left to `rounds.py`, files on disk to `run_state.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsoda_edge.errors import ProtocolViolation, UsageProblem
from fedsoda_edge.events import RoundOutcome
from fedsoda_edge.protocol.messages import RoundOffer, UpdateStart


@dataclass(frozen=True)
class NothingInHand:
    """The state without a round in hand."""


@dataclass(frozen=True)
class InTraining:
    """The state while the round is trained or, with is_trained, its update waits to be handed in."""

    round: int
    is_trained: bool = False


@dataclass(frozen=True)
class HandingIn:
    """The state while an update is on its way, until the hub's answer."""

    round: int


class Offered:
    """The offers of the hub to this edge, and what became of them."""

    def __init__(self) -> None:
        self.rounds: list[RoundOutcome] = []
        self._latest: RoundOffer | None = None
        self._untaken: RoundOffer | None = None
        self._hand: NothingInHand | InTraining | HandingIn = NothingInHand()
        self._answers: dict[tuple[int, str], bool] = {}  # round and digest of an update: whether the hub accepted it

    @property
    def in_hand(self) -> int | None:
        """The number of the round that is trained or handed in; None: none is."""
        return None if isinstance(self._hand, NothingInHand) else self._hand.round

    @property
    def num_accepted(self) -> int:
        """The number of this join's updates that the hub accepted."""
        return sum(done.accepted for done in self.rounds)

    @property
    def latest(self) -> RoundOffer:
        """The hub's latest offer."""
        assert self._latest is not None, "a round is trained after it was offered"
        return self._latest

    def offered(self, offer: RoundOffer) -> None:
        """Note an offer. After a reconnect the same one comes again: a round in hand is not begun again."""
        is_new = self._latest is None or self._latest.round != offer.round
        self._latest = offer
        if is_new or not (self._hand == InTraining(offer.round) or self._is_accepted(offer.round)):
            self._untaken = offer

    def next(self) -> RoundOffer | None:
        """Return the offer that is to be taken now, once; None where there is none."""
        offer, self._untaken = self._untaken, None
        if offer is None or self._is_accepted(offer.round):
            return None
        return offer

    def take(self, round_number: int) -> None:
        """Begin to train a round.

        Raises:
            ProtocolViolation: the hub offers another one by now.
        """
        if self.latest.round != round_number:
            raise ProtocolViolation(
                f"round {round_number} is over, the hub now offers round {self.latest.round}; take the next offer"
            )
        self._hand = InTraining(round_number)

    def follow(self) -> RoundOffer:
        """Return the hub's latest offer, whose round is the one in hand from now on."""
        self._hand = InTraining(self.latest.round)
        return self.latest

    def trained(self) -> None:
        """Note that the update of the round in hand is made."""
        assert isinstance(self._hand, InTraining), "`take` comes first"
        self._hand = InTraining(self._hand.round, is_trained=True)

    def handing_in(self, start: UpdateStart) -> None:
        """Note that an update is on its way."""
        self._hand = HandingIn(start.round)

    def settled(self, start: UpdateStart, accepted: bool) -> None:
        """Note the hub's answer to an update."""
        self.rounds.append(RoundOutcome(round=start.round, loss=start.loss, accepted=accepted))
        self._answers[start.round, start.digest] = accepted

    def let_go(self) -> None:
        """Note that no round is in hand any more, whatever became of it."""
        self._hand = NothingInHand()

    def answer_to(self, round_number: int, digest: str) -> bool | None:
        """Return whether the hub accepted this update; None where it has not answered."""
        return self._answers.get((round_number, digest))

    def check(self, pending: UpdateStart | None, round_number: int, digest: str) -> UpdateStart:
        """Return what is announced to the hub for an update that its owner submits.

        Raises:
            UsageProblem: it is not the update that was trained last.
        """
        if pending is None:
            raise UsageProblem(
                f"the update of round {round_number} ({digest[:12]}) cannot be submitted: no trained update waits; "
                "submit what Offer.train returned"
            )
        if (pending.round, pending.digest) != (round_number, digest):
            raise UsageProblem(
                f"the update of round {round_number} ({digest[:12]}) is not the one that was trained last, of round "
                f"{pending.round} ({pending.digest[:12]}); submit what Offer.train returned"
            )
        return pending

    def _is_accepted(self, round_number: int) -> bool:
        return any(done.round == round_number and done.accepted for done in self.rounds)
