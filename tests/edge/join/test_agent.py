"""What an agent says between two connections waits for the next one; a mistake of its own is never taken for a loss."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest

from fedsoda_edge.join.agent import Agent, AgentSettings
from fedsoda_edge.join.home import Home
from fedsoda_edge.ports import SystemClock
from fedsoda_edge.ports.child import Child
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.codec import MAX_CHUNK_BYTES, decode
from fedsoda_edge.protocol.session import EdgeSession
from fedsoda_edge.testing import ScriptedHub

DATA = bytes(2 * MAX_CHUNK_BYTES)
DIGEST = ms.Digest(hashlib.sha256(DATA).hexdigest())
START = ms.UpdateStart(
    round=1, base=DIGEST, alignment=0, digest=DIGEST, bytes=len(DATA), codec="int8", num_examples=1, loss=0.5
)


class Line(ScriptedHub):
    """Notes what is said. The connection is lost after the first chunk, and made again: Hello has no answer yet."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self.agent = Agent(self, Child("none"), Home(), AgentSettings("cpu"), lambda _: None, SystemClock())
        self.welcome()

    def welcome(self) -> None:
        self.agent._session = EdgeSession()
        self.agent._session.state = "open"
        self.agent._ready.set()

    async def send(self, frame: bytes) -> None:
        self.said.append(type(decode(frame)[0]).__name__)
        if self.said == ["UpdateStart", "UpdateChunk"]:
            self.agent._lost()
            self.agent._session = EdgeSession()
        if self.said[-3:] == ["UpdateStart", "UpdateChunk", "UpdateChunk"]:
            assert self.agent._answer is not None
            self.agent._answer.set_result(ms.Receipt(round=1, digest=DIGEST))


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Line:
    monkeypatch.setenv("FEDSODA_HOME", str(tmp_path))
    return Line()


def test_an_upload_that_is_cut_off_between_two_chunks_begins_again_on_the_next_connection(line: Line) -> None:
    async def hand_in() -> ms.Receipt | ms.Refusal:
        agent = line.agent
        upload = asyncio.create_task(agent._patiently(agent._ready, lambda: agent._upload(START, DATA)))
        await asyncio.sleep(0.1)
        assert line.said == ["UpdateStart", "UpdateChunk"]
        line.welcome()
        async with asyncio.timeout(5):
            return await upload

    assert asyncio.run(hand_in()) == ms.Receipt(round=1, digest=DIGEST)
    assert line.said[2:] == ["UpdateStart", "UpdateChunk", "UpdateChunk"]


@pytest.mark.parametrize("state", ["new", "greeted", "over"])
def test_progress_that_nobody_can_hear_is_not_said(line: Line, state: str) -> None:
    line.agent._session.state = state
    progress = ms.Progress(round=1, step=1, steps=2, loss=0.5, tokens_per_second=1.0)
    asyncio.run(line.agent._try_send(progress))
    assert line.said == []


def test_a_mistake_of_our_own_is_told_and_not_tried_again(line: Line) -> None:
    async def mistake() -> None:
        line.agent._lost()
        raise AssertionError("one blob at a time")

    async def work() -> None:
        async with asyncio.timeout(5):
            await line.agent._patiently(line.agent._ready, mistake)

    with pytest.raises(AssertionError, match="one blob at a time"):
        asyncio.run(work())


def test_a_home_is_free_after_a_close_that_the_connection_spoils(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    async def spoilt() -> None:
        raise ConnectionResetError("the other end is gone")

    monkeypatch.setattr(line, "close", spoilt)
    line.agent.home.lock()
    with pytest.raises(ConnectionResetError, match="the other end is gone"):
        asyncio.run(line.agent.close())
    assert not Home().is_in_use()
