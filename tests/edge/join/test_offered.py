"""Which offers are worth taking: the latest one, once, unless the hub has its update."""

from __future__ import annotations

import pytest

from fedsoda_edge.errors import ProtocolViolation, UsageProblem
from fedsoda_edge.events import RoundOutcome
from fedsoda_edge.join.offered import Offered
from fedsoda_edge.protocol.messages import Digest, RoundOffer, UpdateStart, ViewRef
from fedsoda_edge.testing import LOCAL

VIEW = ViewRef(digest=Digest("0" * 64), delta=None, snapshot=None)


def offer(number: int) -> RoundOffer:
    return RoundOffer(round=number, rounds=9, view=VIEW, alignment=0, emulator=VIEW, local=LOCAL, due_seconds=60.0)


def update(number: int, digest: str = "1") -> UpdateStart:
    return UpdateStart(
        round=number,
        base=VIEW.digest,
        alignment=0,
        digest=Digest(digest * 64),
        bytes=9,
        codec="int8",
        num_examples=5,
        loss=0.5,
    )


def trained(offered: Offered, number: int) -> None:
    offered.offered(offer(number))
    assert offered.next() == offer(number)
    offered.take(number)
    offered.trained()


def handed_in(offered: Offered, number: int, *, accepted: bool) -> None:
    offered.handing_in(update(number))
    offered.settled(update(number), accepted)
    offered.let_go()


def test_an_offer_is_taken_once_and_the_latest_goes_before() -> None:
    offered = Offered()
    assert offered.next() is None
    offered.offered(offer(1))
    offered.offered(offer(2))
    assert offered.next() == offer(2)
    assert offered.next() is None


def test_an_offer_that_comes_again_after_a_reconnect_is_not_begun_again_while_it_is_trained() -> None:
    offered = Offered()
    offered.offered(offer(1))
    offered.next()
    offered.take(1)
    offered.offered(offer(1))
    assert offered.next() is None
    assert offered.in_hand == 1


@pytest.mark.parametrize(("accepted", "again"), [(True, None), (False, offer(1))])
def test_a_round_is_offered_again_until_the_hub_has_its_update(accepted: bool, again: RoundOffer | None) -> None:
    offered = Offered()
    trained(offered, 1)
    offered.offered(offer(1))  # it is trained, and not handed in yet
    handed_in(offered, 1, accepted=accepted)
    assert offered.next() == again
    assert offered.rounds == [RoundOutcome(round=1, loss=0.5, accepted=accepted)]
    assert (offered.num_accepted, offered.in_hand) == (int(accepted), None)


def test_a_round_that_the_hub_left_behind_is_not_trained() -> None:
    offered = Offered()
    offered.offered(offer(1))
    offered.offered(offer(2))
    with pytest.raises(ProtocolViolation, match="round 1 is over, the hub now offers round 2; take the next offer"):
        offered.take(1)
    assert offered.in_hand is None


def test_a_round_in_hand_follows_the_hub() -> None:
    offered = Offered()
    offered.offered(offer(1))
    offered.take(1)
    offered.offered(offer(2))
    assert offered.follow() == offer(2)
    assert offered.in_hand == 2


def test_an_update_that_is_not_the_one_trained_last_is_refused() -> None:
    offered = Offered()
    assert offered.check(update(2), 2, "1" * 64) == update(2)
    with pytest.raises(UsageProblem, match=r"round 1 \(111111111111\) is not the one .* of round 2 \(111111111111\)"):
        offered.check(update(2), 1, "1" * 64)
    with pytest.raises(UsageProblem, match=r"round 2 \(222222222222\) is not the one .* of round 2 \(111111111111\)"):
        offered.check(update(2), 2, "2" * 64)
    with pytest.raises(UsageProblem, match="no trained update waits"):
        offered.check(None, 2, "1" * 64)


def test_what_the_hub_said_of_an_update_is_said_again() -> None:
    offered = Offered()
    trained(offered, 1)
    assert offered.answer_to(1, "1" * 64) is None
    handed_in(offered, 1, accepted=False)
    assert offered.answer_to(1, "1" * 64) is False
