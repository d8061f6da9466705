"""Who sends much waits for those who send little, and frames are counted before anything is made of them."""

from __future__ import annotations

import asyncio
import random
from typing import cast

import pytest
from websockets.frames import Frame, Opcode

from fedsoda_hub.serving import turns
from fedsoda_hub.serving.turns import FrameHeads, Turns


class Transport:
    """Of one connection: whether it is read."""

    def __init__(self) -> None:
        self.is_read, self.is_over = True, False

    def pause_reading(self) -> None:
        self.is_read = False

    def resume_reading(self) -> None:
        self.is_read = True

    def is_closing(self) -> bool:
        return self.is_over


def connection() -> tuple[Transport, asyncio.Transport]:
    made = Transport()
    return made, cast(asyncio.Transport, made)


class Clock:
    """The loop's clock, which only looks move on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self.now)

    def spend(self, seconds: float) -> None:
        self.now += seconds


def test_a_thousand_that_come_at_once_leave_the_loop_to_others_after_each_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def play() -> None:
        clock, shared, looked = Clock(monkeypatch), Turns(), list[int]()
        longest = 0.0

        def look(number: int) -> None:
            looked.append(number)
            clock.spend(0.002)

        held = [connection() for _ in range(1000)]
        for number, (_, transport) in enumerate(held):
            shared.take(transport, lambda number=number: look(number))  # type: ignore[misc]
        assert len(looked) == 3  # 2 ms each, and 5 ms are to be had
        assert [one.is_read for one, _ in held].count(False) == 997
        while len(looked) < 1000:
            before = clock.now
            await asyncio.sleep(0)
            longest = max(longest, clock.now - before)
        assert looked == list(range(1000))
        assert longest < turns.TURN_SECONDS + 0.002
        assert all(one.is_read for one, _ in held)

    asyncio.run(play())


def test_one_who_comes_alone_is_looked_at_at_once() -> None:
    async def play() -> None:
        shared, looked = Turns(), list[int]()
        held, transport = connection()
        for number in range(3):
            shared.take(transport, lambda number=number: looked.append(number))  # type: ignore[misc]
            assert looked == [*range(number + 1)]
            assert held.is_read
            await asyncio.sleep(0)

    asyncio.run(play())


def test_what_one_connection_said_is_looked_at_in_its_order_and_not_once_it_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def play() -> None:
        clock, shared, looked = Clock(monkeypatch), Turns(), list[str]()
        (_, first), (gone, second), (_, third) = connection(), connection(), connection()
        shared.take(first, lambda: clock.spend(1.0))
        shared.take(first, lambda: looked.append("first"))
        shared.take(second, lambda: looked.append("second"))
        shared.take(third, lambda: looked.append("third"))
        shared.take(first, lambda: looked.append("first again"))
        gone.is_over = True
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert looked == ["first", "third", "first again"]

    asyncio.run(play())


def test_a_look_that_fails_keeps_nobody_else_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> None:
        clock, shared, looked, told = Clock(monkeypatch), Turns(), list[str](), list[object]()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context.get("exception")))

        def fail() -> None:
            raise ValueError("a defect")

        _, transport = connection()
        shared.take(transport, lambda: clock.spend(1.0))
        shared.take(transport, fail)
        shared.take(transport, lambda: looked.append("after"))
        for _ in range(3):
            await asyncio.sleep(0)
        assert looked == ["after"]
        assert [str(one) for one in told] == ["a defect"]

    asyncio.run(play())


# --- frames ----------------------------------------------------------------------------------------------------------


def frames(drawn: random.Random, number: int) -> tuple[bytes, int, int]:
    data, messages, controls = b"", 0, 0
    for _ in range(number):
        opcode = drawn.choice([Opcode.BINARY, Opcode.TEXT, Opcode.CONT, Opcode.PING, Opcode.PONG])
        is_control = opcode in (Opcode.PING, Opcode.PONG)
        size = drawn.choice([0, 1, 125] if is_control else [0, 5, 125, 126, 127, 300, 65_535, 65_536, 70_000])
        data += Frame(opcode, bytes(size), fin=is_control or drawn.random() < 0.7).serialize(mask=drawn.random() < 0.9)
        messages, controls = messages + (not is_control), controls + is_control
    return data, messages, controls


@pytest.mark.parametrize("seed", range(5))
def test_frames_are_counted_however_their_bytes_are_cut(seed: int) -> None:
    drawn = random.Random(seed)
    data, messages, controls = frames(drawn, 60)
    heads, found = FrameHeads(), (0, 0)
    while data:
        size = drawn.choice([1, 2, 3, 7, 100, 16_384])
        some = heads.count(data[:size], 1000)
        found = found[0] + some[0], found[1] + some[1]
        data = data[size:]
    assert found == (messages, controls)


def test_of_many_frames_no_more_are_counted_than_matter() -> None:
    assert FrameHeads().count(Frame(Opcode.PING, b"").serialize(mask=True) * 1000, 20) == (0, 21)
