"""Which versions two sides take, that the window of two minor releases holds, and that neighbours read each other.

An older side is one whose frames were recorded: tests/golden/protocol_1.json has those of the first release.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.codec import decode
from fedsoda_edge.protocol.versions import RELEASED, SPEAKS, Speaks

WINDOW = 2  # minor releases before this one
GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.mark.parametrize(
    ("edge", "hub", "agreed"),
    [
        ((1, 1), (1, 1), 1),
        ((1, 3), (1, 2), 2),
        ((2, 3), (1, 2), 2),
        ((1, 2), (2, 4), 2),
        ((1, 1), (2, 3), None),
        ((3, 4), (1, 2), None),
        ((3, 2), (1, 9), None),  # a range that ends before it begins
    ],
)
def test_two_sides_take_the_newest_version_that_both_speak(
    edge: tuple[int, int], hub: tuple[int, int], agreed: int | None
) -> None:
    assert Speaks(*edge).agreed(Speaks(*hub)) == agreed
    assert Speaks(*hub).agreed(Speaks(*edge)) == agreed


def test_the_older_side_is_named_and_who_can_change_it() -> None:
    old = Speaks(1, 2).mismatch(Speaks(3, 4), "pipx upgrade fedsoda")
    assert (old.exit_status, old.way_out().recovery, old.way_out().helps) == (6, "fix-machine", "pipx upgrade fedsoda")
    assert "speaks protocol 2 at most, the hub 3 at least" in str(old)
    assert str(old).endswith("pipx upgrade fedsoda")
    new = Speaks(3, 4).mismatch(Speaks(1, 2), "pipx upgrade fedsoda")
    assert (new.exit_status, new.way_out().recovery, new.way_out().helps) == (6, "ask-owner", "")
    assert "speaks protocol 2 at most, this device 3 at least" in str(new)
    assert "pipx" not in str(new)


def neighbours(release: tuple[int, int]) -> list[tuple[int, int]]:
    major, minor = release
    return [(major, one) for one in range(max(0, minor - WINDOW), minor + 1)]


def unreadable(release: tuple[int, int], speaks: Speaks, released: dict[tuple[int, int], int]) -> list[str]:
    """What breaks the window for this release."""
    wrong = [] if released.get(release) == speaks.newest else [f"RELEASED[{release}] is not {speaks.newest}"]
    for one in neighbours(release):
        if one in released and not speaks.oldest <= released[one] <= speaks.newest:
            wrong.append(f"{one} speaks {released[one]}, this release {speaks}")
    return wrong


def test_a_release_speaks_the_protocols_of_the_two_minor_releases_before_it() -> None:
    major, minor, *_ = version("fedsoda").split(".")
    assert unreadable((int(major), int(minor)), SPEAKS, RELEASED) == []
    for newest in range(SPEAKS.oldest, SPEAKS.newest + 1):  # and its frames are kept, to be read by each later release
        assert (GOLDEN / f"protocol_{newest}.json").is_file()


def test_a_window_that_closes_too_early_is_found() -> None:
    released = {(0, 1): 1, (0, 2): 2, (0, 3): 3, (0, 4): 4}
    assert unreadable((0, 4), Speaks(2, 4), released) == []
    assert unreadable((0, 4), Speaks(3, 4), released) == ["(0, 2) speaks 2, this release Speaks(oldest=3, newest=4)"]
    assert unreadable((0, 5), Speaks(3, 5), released) == ["RELEASED[(0, 5)] is not 5"]


@pytest.mark.parametrize("name", [kind.__name__ for kind in ms.EdgeMessage.__args__ + ms.HubMessage.__args__])
def test_what_an_older_side_says_is_read_also_where_a_newer_one_says_more(name: str) -> None:
    frame = bytes.fromhex(json.loads((GOLDEN / "protocol_1.json").read_text())[name])
    size = int.from_bytes(frame[:4], "big")
    header, payload = frame[4 : 4 + size], frame[4 + size :]
    more = header[:-1] + b',"mood":{"of":["a","newer","release"]}}'
    assert decode(len(more).to_bytes(4, "big") + more + payload) == decode(frame)
