"""What the hub hears of an edge on each connection: Ready once it can train, Paused and Resumed as it is."""

from __future__ import annotations

import pytest

from fedsoda_edge.join.presence import Presence
from fedsoda_edge.protocol.messages import Message, Paused, Ready, Resumed

READY, PAUSED, RESUMED = Ready(num_examples=8, size_class=1), Paused(reason="on battery"), Resumed()


def heard(presence: Presence) -> list[Message]:
    said = list[Message]()
    while (message := presence.next()) is not None:
        said.append(message)
    return said


@pytest.fixture
def presence() -> Presence:
    presence = Presence()
    presence.connected()
    return presence


def test_ready_is_said_once_this_edge_can_train(presence: Presence) -> None:
    assert heard(presence) == []
    presence.prepared(8, 1)
    assert heard(presence) == [READY]
    assert heard(presence) == []


def test_a_pause_and_its_end_are_said_once(presence: Presence) -> None:
    presence.prepared(8, 1)
    heard(presence)
    presence.paused("on battery")
    assert heard(presence) == [PAUSED]
    presence.paused("by its owner")  # the hub knows enough
    assert heard(presence) == []
    presence.resumed()
    assert heard(presence) == [RESUMED]
    assert heard(presence) == []


def test_a_pause_that_ended_before_the_hub_heard_of_it_is_not_said(presence: Presence) -> None:
    presence.prepared(8, 1)
    heard(presence)
    presence.paused("on battery")
    presence.resumed()
    assert heard(presence) == []


def test_a_pause_during_the_preparation_ends_with_ready(presence: Presence) -> None:
    presence.paused("on battery")
    assert heard(presence) == [PAUSED]
    presence.prepared(8, 1)
    assert heard(presence) == []
    presence.resumed()
    assert heard(presence) == [READY]


def test_a_pause_that_ends_before_this_edge_can_train_leaves_the_hub_with_it(presence: Presence) -> None:
    presence.paused("on battery")
    heard(presence)
    presence.resumed()
    assert heard(presence) == []  # neither of the two would be true
    presence.prepared(8, 1)
    assert heard(presence) == [READY]


def test_every_connection_begins_from_nothing(presence: Presence) -> None:
    presence.prepared(8, 1)
    heard(presence)
    presence.connected()
    assert heard(presence) == [READY]
    presence.paused("on battery")
    presence.connected()
    assert heard(presence) == [PAUSED]
    presence.resumed()
    assert heard(presence) == [READY]
