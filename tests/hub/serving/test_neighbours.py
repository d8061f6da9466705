"""A hub and an edge of another release talk: recorded frames of the first release, and a range that a later one will say."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest

from fedsoda_edge.errors import ProtocolMismatch
from fedsoda_edge.join.conversation import Conversation
from fedsoda_edge.join.patience import Patience
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol import versions
from fedsoda_edge.protocol.codec import encode
from fedsoda_edge.protocol.versions import Speaks
from fedsoda_hub.settings.run import RunSettings
from tests.edge.join.test_conversation import HELLO, WELCOME, Wire
from tests.hub.serving.test_daemon import connected, hello, serving, write_run
from tests.joins import Deaf
from tests.skipping_clock import SkippingClock

GOLDEN = Path(__file__).parents[2] / "golden" / "protocol_1.json"
FRAMES: dict[str, bytes] = {name: bytes.fromhex(text) for name, text in json.loads(GOLDEN.read_text()).items()}


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    return write_run(tmp_path)


def header(frame: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(frame[4 : 4 + int.from_bytes(frame[:4], "big")])
    return found


def test_an_edge_of_the_first_release_is_welcomed_and_gets_its_offer(settings: RunSettings) -> None:
    """Its own bytes are sent; the hub's answers have each key that it reads, as JSON of the same type."""

    async def talk() -> None:
        async with (
            serving(settings) as hub,
            connected(hub.url, hub.token("a")) as a,
            connected(hub.url, hub.token("b")) as b,
        ):
            answers: dict[str, dict[str, Any]] = {}
            for edge in (a, b):
                await edge.socket.send(FRAMES["Hello"].replace(b"d-1", b"d-2") if edge is b else FRAMES["Hello"])
                frame = await edge.socket.recv()
                assert isinstance(frame, bytes)
                answers["Welcome"] = header(frame)
                await edge.socket.send(FRAMES["Ready"])
            frame = await a.socket.recv()
            assert isinstance(frame, bytes)
            answers["RoundOffer"] = header(frame)
            for name, answer in answers.items():
                for key, value in header(FRAMES[name]).items():
                    assert type(answer[key]) is type(value) or None in (answer[key], value), key
            assert answers["Welcome"]["protocol"] == 1

    asyncio.run(talk())


@pytest.mark.parametrize(("hub_speaks", "taken"), [((1, 1), 1), ((1, 2), 2), ((2, 5), 3), ((4, 5), None)])
def test_the_newest_protocol_that_both_speak_is_taken(
    settings: RunSettings, hub_speaks: tuple[int, int], taken: int | None
) -> None:
    """An edge that speaks 1 to 3."""

    async def talk() -> None:
        async with serving(settings) as hub, connected(hub.url, hub.token("a")) as edge:
            await edge.say(msgspec.structs.replace(hello("laptop", 1), newest=3))
            if taken is None:
                refusal = await edge.hear(ms.Refusal)
                assert (refusal.fatal, refusal.speaks) == (True, hub_speaks)
                assert await edge.is_hung_up_on()
            else:
                assert (await edge.hear(ms.Welcome)).protocol == taken

    speaks = Speaks(*hub_speaks)
    with mock.patch("fedsoda_hub.serving.roster.SPEAKS", speaks), mock.patch.object(versions, "SPEAKS", speaks):
        asyncio.run(talk())


def test_a_hub_of_the_first_release_takes_what_an_edge_says_of_its_range() -> None:
    """It compares `protocol` with 1, so that is the oldest; and it ignores `newest`."""
    said = header(encode(msgspec.structs.replace(hello("laptop", 1), newest=3)))
    assert (said["protocol"], said["newest"]) == (1, 3)
    assert "newest" not in header(encode(hello("laptop", 1)))


@pytest.mark.parametrize(
    ("answer", "edge", "hub", "recovery"),
    [
        (ms.Refusal(reason="protocol mismatch", fatal=True, speaks=(2, 3)), 1, 2, "fix-machine"),
        (ms.Refusal(reason="protocol mismatch", fatal=True, speaks=(0, 0)), 1, 0, "ask-owner"),
        (msgspec.structs.replace(WELCOME, protocol=2), 1, 2, "fix-machine"),
        (msgspec.structs.replace(WELCOME, protocol=0), 1, 0, "ask-owner"),
    ],
)
def test_an_edge_that_no_version_is_left_for_says_what_brings_one(
    answer: ms.HubMessage, edge: int, hub: int, recovery: str
) -> None:
    async def talk(wire: Wire) -> None:
        clock = SkippingClock()
        await Conversation(wire, lambda: HELLO, lambda _: None, clock, Patience(clock, 0.0), Deaf()).greet()

    wire = Wire()
    wire.welcome = answer
    with (
        mock.patch.dict("os.environ", {"FEDSODA_IMAGE": ""}),
        pytest.raises(ProtocolMismatch) as raised,
    ):
        asyncio.run(talk(wire))
    assert (raised.value.edge, raised.value.hub, raised.value.way_out().recovery) == (edge, hub, recovery)
    assert bool(raised.value.way_out().helps) == (recovery == "fix-machine")
