"""What is said between two connections waits for the next one; what waits for a hub that will not answer ends, too."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
import pytest

from fedsoda_edge import events as ev
from fedsoda_edge.errors import FedSODAError, HubUnreachable, ProtocolViolation, RefusedByHub
from fedsoda_edge.join.conversation import Connected, Conversation, Lost, RunOver
from fedsoda_edge.join.patience import Patience
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.codec import MAX_CHUNK_BYTES, decode, encode
from fedsoda_edge.protocol.session import chunks
from tests.joins import Deaf
from tests.skipping_clock import SkippingClock

T = TypeVar("T")

DATA = bytes(2 * MAX_CHUNK_BYTES)
DIGEST = ms.Digest(hashlib.sha256(DATA).hexdigest())
BLOB = ms.BlobRef(digest=DIGEST, bytes=len(DATA))
START = ms.UpdateStart(
    round=1, base=DIGEST, alignment=0, digest=DIGEST, bytes=len(DATA), codec="int8", num_examples=1, loss=0.5
)
RECEIPT = ms.Receipt(round=1, digest=DIGEST)
FACTS = ms.DeviceFacts(ram_bytes=1, vram_bytes=0, disk_bytes=1, threads=1, accelerator="")
HELLO = ms.Hello(protocol=ms.PROTOCOL_VERSION, software="fedsoda", device_id="d", device=FACTS)
WELCOME = ms.Welcome(
    protocol=ms.PROTOCOL_VERSION,
    run_id="r",
    run_name="triage",
    edge=ms.EdgeId("a"),
    manifest=BLOB,
    rounds=2,
    rounds_done=0,
    template=None,
    max_length=8,
    codec="int8",
    seed=0,
    stall_seconds=60.0,
)
UPLOAD = ["UpdateStart", "UpdateChunk", "UpdateChunk"]


class Wire:
    """A Transport: `said` is what the edge says, `say` what the hub does. welcome: answers Hello, or is raised."""

    url = "a wire"
    up = down = 0

    def __init__(self) -> None:
        self.said: list[str] = []
        self.welcome: ms.HubMessage | FedSODAError = WELCOME
        self.when: dict[str, Callable[[], None]] = {}  # the edge says it for the first time
        self._down: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def connect(self) -> None:
        if isinstance(self.welcome, FedSODAError):
            raise self.welcome
        self._down = asyncio.Queue()

    async def send(self, frame: bytes) -> None:
        message = decode(frame)[0]
        self.said.append(type(message).__name__)
        if isinstance(message, ms.Hello) and not isinstance(self.welcome, FedSODAError):
            self.say(self.welcome)
        self.when.pop(self.said[-1], lambda: None)()
        await asyncio.sleep(0)  # as a socket may: others come in between two chunks

    def say(self, message: ms.HubMessage, payload: bytes | memoryview = b"") -> None:
        self._down.put_nowait(encode(message, payload))

    def send_blob(self) -> None:
        for offset, piece in chunks(DATA):
            self.say(ms.BlobChunk(digest=DIGEST, offset=offset, total=len(DATA)), piece)

    def hang_up(self) -> None:
        self._down.put_nowait(None)

    async def frames(self) -> AsyncIterator[bytes]:
        while (frame := await self._down.get()) is not None:
            yield frame

    def fetch(self, digest: str, offset: int) -> AsyncIterator[bytes]:
        raise AssertionError("files of the bundle are the download's")

    async def close(self) -> None:
        self.hang_up()


class Talk:
    """A conversation with the hub at the other end of the wire, and what came of reading it."""

    def __init__(self) -> None:
        self.wire = Wire()
        self.clock = SkippingClock()
        self.events: list[ev.JoinEvent] = []
        self.heard: list[str] = []
        self.conversation = Conversation(
            self.wire, lambda: HELLO, self.events.append, self.clock, Patience.of(self.clock, unattended=False), Deaf()
        )

    async def read(self) -> None:
        """Say Ready on every connection, as an agent that is prepared."""
        async with contextlib.aclosing(self.conversation.messages()) as messages:
            async for message in messages:
                self.heard.append(type(message).__name__)
                if isinstance(message, Connected):
                    await self.conversation.send(ms.Ready(num_examples=1))

    async def until(self, *said: str) -> None:
        while self.wire.said[-len(said) :] != list(said):
            await asyncio.sleep(0)


def talk(scene: Callable[[Talk], Coroutine[Any, Any, T]], *, is_ready: bool = True) -> tuple[T, Talk]:
    """Play a scene after the first Welcome; no scene hangs."""

    async def play() -> tuple[T, Talk]:
        talk = Talk()
        async with asyncio.timeout(10):
            await talk.conversation.greet()
            reading = asyncio.create_task(talk.read())
            if is_ready:
                await talk.conversation.send(ms.Ready(num_examples=1))
            try:
                return await scene(talk), talk
            finally:
                reading.cancel()
                await asyncio.wait({reading})
                await talk.conversation.close()

    return asyncio.run(play())


# --- what a lost connection broke off --------------------------------------------------------------------------------


def test_an_upload_that_is_cut_off_between_two_chunks_begins_again_on_the_next_connection() -> None:
    async def scene(talk: Talk) -> ms.Receipt | ms.Refusal:
        talk.wire.when["UpdateChunk"] = talk.wire.hang_up
        handing_in = asyncio.create_task(talk.conversation.hand_in(START, DATA))
        await talk.until("Hello", "Ready", *UPLOAD)
        talk.wire.say(RECEIPT)
        return await handing_in

    answer, done = talk(scene)
    assert answer == RECEIPT
    assert done.wire.said[: done.wire.said.index("Hello", 1)] in (  # the second chunk may be on its way already
        ["Hello", "Ready", "UpdateStart", "UpdateChunk"],
        ["Hello", "Ready", *UPLOAD],
    )
    assert done.heard == ["Connected"]


def test_a_blob_is_asked_for_again_on_the_next_connection() -> None:
    async def scene(talk: Talk) -> bytes:
        fetching = asyncio.create_task(talk.conversation.fetch(BLOB))
        await talk.until("BlobRequest")
        talk.wire.hang_up()
        while talk.wire.said.count("BlobRequest") < 2:
            await asyncio.sleep(0)
        talk.wire.send_blob()
        return await fetching

    assert talk(scene)[0] == DATA


def test_an_update_waits_until_ready_was_said() -> None:
    async def scene(talk: Talk) -> ms.Receipt | ms.Refusal:
        handing_in = asyncio.create_task(talk.conversation.hand_in(START, DATA))
        for _ in range(10):
            await asyncio.sleep(0)
        assert talk.wire.said == ["Hello"]
        await talk.conversation.send(ms.Ready(num_examples=1))
        await talk.until(*UPLOAD)
        talk.wire.say(ms.Refusal(round=2, reason="of another round"))
        talk.wire.say(RECEIPT)
        return await handing_in

    assert talk(scene, is_ready=False)[0] == RECEIPT


def test_a_pause_breaks_off_who_waits_for_a_blob_and_the_next_request_comes_after_it() -> None:
    async def scene(talk: Talk) -> ms.Receipt | ms.Refusal:
        fetching = asyncio.create_task(talk.conversation.fetch(BLOB))
        await talk.until("BlobRequest")
        fetching.cancel()
        await asyncio.wait({fetching})
        handing_in = asyncio.create_task(talk.conversation.hand_in(START, DATA))
        for _ in range(10):
            await asyncio.sleep(0)
        assert talk.wire.said[-1] == "BlobRequest"
        talk.wire.send_blob()
        await talk.until(*UPLOAD)
        talk.wire.say(RECEIPT)
        return await handing_in

    assert talk(scene)[0] == RECEIPT


def test_who_is_away_for_a_while_is_told_of_once() -> None:
    away = HubUnreachable("TCP: nothing answers", "TCP")

    async def scene(talk: Talk) -> None:
        talk.wire.welcome = away
        talk.wire.hang_up()
        while not talk.events:
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        talk.wire.welcome = WELCOME
        await talk.until("Hello", "Ready")

    assert talk(scene)[1].events == [ev.Reconnecting(str(away))]


class Flapping(Wire):
    """Welcomes each time, and hangs up at once: as a hub where another device with this identity pushes this one out."""

    def say(self, message: ms.HubMessage, payload: bytes | memoryview = b"") -> None:
        super().say(message, payload)
        if isinstance(message, ms.Welcome):
            self.hang_up()


def test_a_greeting_is_no_progress_so_that_who_is_put_out_each_time_comes_more_and_more_rarely() -> None:
    async def play() -> None:
        clock, wire, events = SkippingClock(), Flapping(), list[ev.JoinEvent]()
        conversation = Conversation(
            wire, lambda: HELLO, events.append, clock, Patience.of(clock, unattended=False), Deaf()
        )
        began = clock.monotonic()
        within_45_s = 0
        await conversation.greet()

        async def read() -> None:
            nonlocal within_45_s
            async for _ in conversation.messages():
                if clock.monotonic() - began < 45:
                    within_45_s = wire.said.count("Hello")

        with pytest.raises(HubUnreachable, match="ended again and again; join again later"):
            await read()
        assert within_45_s < 40  # ten or so; not the hundreds of a back-off that each greeting resets
        assert 500 < clock.monotonic() - began < 700
        assert "the connection to the hub ended again, before anything was done on it" in [
            event.message for event in events if isinstance(event, ev.Reconnecting)
        ]

    asyncio.run(play())


@pytest.mark.parametrize("held_seconds", [0.0, 31.0])
def test_a_connection_that_holds_is_progress(held_seconds: float) -> None:
    async def scene(talk: Talk) -> bool:
        for number in (2, 3):
            talk.wire.hang_up()
            while talk.wire.said.count("Ready") < number:
                await asyncio.sleep(0)
            talk.clock.slept += held_seconds
        return any("again" in event.message for event in talk.events if isinstance(event, ev.Reconnecting))

    assert talk(scene)[0] == (not held_seconds)


@pytest.mark.parametrize("work", ["a blob", "an upload"])
def test_what_was_done_on_a_connection_is_progress(work: str) -> None:
    async def scene(talk: Talk) -> None:
        for number in range(1, 30):
            if work == "a blob":
                talk.wire.when["BlobRequest"] = talk.wire.send_blob
                await talk.conversation.fetch(BLOB)
            else:
                talk.wire.when["UpdateStart"] = lambda: talk.wire.say(RECEIPT)
                await talk.conversation.hand_in(START, DATA)
            talk.wire.hang_up()
            while talk.wire.said.count("Hello") <= number:
                await asyncio.sleep(0)

    _, done = talk(scene)
    assert all(seconds <= 1 for seconds in done.clock.breaks)
    assert done.events == []


def test_another_connection_of_this_identity_is_waited_for_and_then_the_refusal_stands() -> None:
    shared = ms.Refusal(reason="two devices share one identity", retry=True, fatal=True)

    async def play(*, dies: bool) -> int:
        clock, wire = SkippingClock(), Wire()
        wire.welcome = shared
        conversation = Conversation(wire, lambda: HELLO, lambda _: None, clock, Patience(clock, None), Deaf())
        greeting = asyncio.create_task(conversation.greet(Patience(clock, None)))
        while clock.slept < 10:
            await asyncio.sleep(0)
        if dies:
            wire.welcome = WELCOME
        await greeting
        return wire.said.count("Hello")

    assert asyncio.run(play(dies=True)) > 3  # the old connection of the same device was dead, as after a power cut
    with pytest.raises(RefusedByHub, match="two devices share one identity") as refused:
        asyncio.run(play(dies=False))
    assert refused.value.exit_status == 5


def test_a_blob_is_not_asked_for_on_a_connection_that_was_lost_meanwhile() -> None:
    async def scene(talk: Talk) -> bytes:
        fetching = asyncio.create_task(talk.conversation.fetch(BLOB))
        await asyncio.sleep(0)  # it has its connection, and its request has not begun
        talk.conversation._become(Lost())
        talk.wire.hang_up()
        while talk.wire.said.count("BlobRequest") < 1:
            await asyncio.sleep(0)
        talk.wire.send_blob()
        return await fetching

    data, done = talk(scene)
    assert data == DATA
    assert done.wire.said[-2:] in (["Ready", "BlobRequest"], ["BlobRequest", "Ready"])


# --- what nobody can hear --------------------------------------------------------------------------------------------


async def before_the_first(talk: Talk) -> None:
    talk.conversation = Conversation(
        talk.wire, lambda: HELLO, talk.events.append, talk.clock, Patience(talk.clock, None), Deaf()
    )


async def after_it_was_lost(talk: Talk) -> None:
    talk.wire.welcome = HubUnreachable("TCP: nothing answers", "TCP")
    talk.wire.hang_up()
    while not talk.events:
        await asyncio.sleep(0)


async def after_leave(talk: Talk) -> None:
    await talk.conversation.leave("the owner left")


@pytest.mark.parametrize("state", [before_the_first, after_it_was_lost, after_leave])
def test_without_a_connection_nothing_is_said(state: Callable[[Talk], Awaitable[None]]) -> None:
    async def scene(talk: Talk) -> None:
        await state(talk)
        with pytest.raises(HubUnreachable):
            await talk.conversation.send(ms.Progress(round=1, step=1, steps=2))

    assert "Progress" not in talk(scene)[1].wire.said


def test_a_mistake_of_our_own_is_told_and_not_tried_again() -> None:
    async def scene(talk: Talk) -> None:
        def mistake() -> None:
            raise AssertionError("a chunk of nothing")

        talk.wire.when["UpdateStart"] = mistake
        with pytest.raises(AssertionError, match="a chunk of nothing"):
            await talk.conversation.hand_in(START, DATA)

    assert talk(scene)[1].wire.said.count("UpdateStart") == 1


# --- the end of all waiting ------------------------------------------------------------------------------------------


def garbage(wire: Wire) -> None:
    wire.say(WELCOME)


def revoked(wire: Wire) -> None:
    wire.say(ms.Refusal(reason="this token was revoked", fatal=True))


def refused_at_the_next_hello(wire: Wire) -> None:
    wire.welcome = ms.Refusal(reason="this token was revoked", fatal=True)
    wire.hang_up()


def another_run(wire: Wire) -> None:
    wire.welcome = ms.Welcome(**{name: getattr(WELCOME, name) for name in WELCOME.__struct_fields__} | {"run_id": "q"})
    wire.hang_up()


def farewell(wire: Wire) -> None:
    wire.say(ms.Farewell(rounds=2, reason="all rounds are done"))


@pytest.mark.parametrize(
    ("end", "error", "reason"),
    [
        (garbage, ProtocolViolation, "the hub sent Welcome in state open"),
        (revoked, RefusedByHub, "the hub refused: this token was revoked"),
        (refused_at_the_next_hello, RefusedByHub, "the hub refused: this token was revoked"),
        (another_run, RefusedByHub, "the hub now serves the run q, this join began with r; join again"),
        (farewell, RunOver, "all rounds are done"),
    ],
)
@pytest.mark.parametrize("waiting", ["an upload", "a blob", "a connection"])
def test_whoever_waits_for_the_hub_ends_with_the_reason(
    end: Callable[[Wire], None], error: type[Exception], reason: str, waiting: str
) -> None:
    async def scene(talk: Talk) -> None:
        if waiting == "a blob":
            task: asyncio.Task[Any] = asyncio.create_task(talk.conversation.fetch(BLOB))
            await talk.until("BlobRequest")
        else:
            task = asyncio.create_task(talk.conversation.hand_in(START, DATA))
            if waiting == "an upload":
                await talk.until(*UPLOAD)
        end(talk.wire)
        with pytest.raises(error, match=reason):
            await task
        with pytest.raises(error, match=reason):
            await talk.conversation.fetch(BLOB)

    talk(scene, is_ready=waiting != "a connection")


def test_a_receipt_that_comes_with_the_farewell_counts() -> None:
    async def scene(talk: Talk) -> ms.Receipt | ms.Refusal:
        handing_in = asyncio.create_task(talk.conversation.hand_in(START, DATA))
        await talk.until(*UPLOAD)
        talk.wire.say(RECEIPT)
        farewell(talk.wire)
        return await handing_in

    answer, done = talk(scene)
    assert (answer, done.heard) == (RECEIPT, ["Farewell"])


def test_what_was_on_its_way_to_an_edge_that_left_breaks_no_rule() -> None:
    async def scene(talk: Talk) -> None:
        reading = asyncio.create_task(talk.read())
        await talk.conversation.leave("the owner left")
        talk.wire.say(RECEIPT)
        await reading

    assert talk(scene)[1].wire.said[-1] == "Leave"


# --- the log ---------------------------------------------------------------------------------------------------------


def test_frames_are_logged_by_their_grammar_without_text_and_a_transfer_in_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, logger="fedsoda_edge.join")

    async def scene(talk: Talk) -> None:
        handing_in = asyncio.create_task(talk.conversation.hand_in(START, DATA))
        await talk.until(*UPLOAD)
        talk.wire.say(RECEIPT)
        await handing_in
        await talk.conversation.leave("a private reason")

    talk(scene)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split()[:2] for line in lines] == [
        [">", "Hello"], ["<", "Welcome"], ["=", "connection"], [">", "Ready"], [">", "UpdateStart"],
        [">", "UpdateChunk"], ["<", "Receipt"], ["=", "connection"], [">", "Leave"],
    ]  # fmt: skip
    assert f"digest=sha256:{DIGEST[:4]}… " in lines[4] + " "
    assert lines[5] == f"> UpdateChunk digest=sha256:{DIGEST[:4]}… offset=0 payload={len(DATA)}"
    assert not any("private" in line or DIGEST in line or "triage" in line for line in lines)


def test_a_receipt_for_another_update_of_the_round_is_a_violation() -> None:
    async def scene(talk: Talk) -> None:
        talk.wire.when["UpdateStart"] = lambda: talk.wire.say(ms.Receipt(round=1, digest=ms.Digest("1" * 64)))
        with pytest.raises(ProtocolViolation, match="the hub has the update 111111111111 of round 1"):
            await talk.conversation.hand_in(START, DATA)

    talk(scene)


def test_what_a_hub_says_in_its_own_words_is_a_part_of_one_line() -> None:
    words = "no\nround 9 closed\x1b[2J\u202e" + "a" * 5000

    async def scene(talk: Talk) -> ms.Receipt | ms.Refusal:
        talk.wire.when["UpdateStart"] = lambda: talk.wire.say(ms.Refusal(round=1, reason=words))
        return await talk.conversation.hand_in(START, DATA)

    answer, _ = talk(scene)
    assert isinstance(answer, ms.Refusal)
    assert not {"\n", "\x1b", "\u202e"} & set(answer.reason)
    assert len(answer.reason) < 500

    async def refused(talk: Talk) -> None:
        talk.wire.say(ms.Refusal(reason=words, fatal=True))
        with pytest.raises(RefusedByHub) as caught:
            await talk.conversation.fetch(BLOB)
        assert not {"\n", "\x1b", "\u202e"} & set(str(caught.value))

    talk(refused)


# --- a hub that prepares its run -------------------------------------------------------------------------------------

ALIGNING = ms.Preparing(
    protocol=ms.PROTOCOL_VERSION,
    run_id="r",
    run_name="triage",
    stage="aligning",
    done=81,
    total=200,
    seconds_left=660.0,
)


def test_a_hub_that_prepares_its_run_is_waited_for_and_says_how_far_it_is_now_and_then() -> None:
    async def play() -> Talk:
        talk = Talk()
        talk.wire.welcome = ALIGNING
        greeting = asyncio.create_task(talk.conversation.greet(Patience(talk.clock, 20.0)))
        await talk.until("Hello")
        for done in range(82, 182):  # a flood: one sentence is enough
            talk.wire.say(msgspec.structs.replace(ALIGNING, done=done))
        await settled()
        talk.clock.slept += 3600.0  # a preparation takes an hour: no patience ends with it
        talk.wire.say(msgspec.structs.replace(ALIGNING, done=199, seconds_left=5.0))
        await settled()
        talk.wire.say(WELCOME)
        assert (await greeting).run_id == "r"
        await talk.conversation.close()
        return talk

    talk = asyncio.run(play())
    assert [(event.run, event.message) for event in talk.events if isinstance(event, ev.HubPreparing)] == [
        ("triage", "preparing: aligning 81 of 200, about 11 min left"),
        ("triage", "preparing: aligning 199 of 200, about 5 s left"),
    ]
    assert talk.wire.said == ["Hello"]  # it does not ask again and again


def test_a_hub_that_is_started_again_in_its_preparation_is_waited_for_longer_than_one_that_never_answered() -> None:
    async def play() -> Talk:
        talk = Talk()
        talk.wire.welcome = ALIGNING
        greeting = asyncio.create_task(talk.conversation.greet(Patience(talk.clock, 20.0)))
        await talk.until("Hello")
        await settled()
        talk.wire.welcome = HubUnreachable("nothing answers", "TCP")
        talk.wire.hang_up()
        while talk.clock.slept < 60:
            await asyncio.sleep(0)
        talk.wire.welcome = WELCOME
        await greeting
        await talk.conversation.close()
        return talk

    asyncio.run(play())


def test_who_asks_once_does_not_wait_for_a_preparation() -> None:
    async def play() -> None:
        talk = Talk()
        talk.wire.welcome = ALIGNING
        with pytest.raises(
            HubUnreachable, match="the hub of the run triage answers, and is preparing: aligning 81 of 200"
        ):
            await talk.conversation.greet()
        assert talk.events == []

    asyncio.run(play())


def test_a_hub_that_prepares_another_run_than_this_joins_is_refused() -> None:
    async def play() -> None:
        talk = Talk()
        await talk.conversation.greet()
        talk.wire.welcome = msgspec.structs.replace(ALIGNING, run_id="another\n")
        with pytest.raises(
            RefusedByHub, match="the hub now serves the run another\N{REPLACEMENT CHARACTER}, this join began with r"
        ):
            await talk.conversation.greet(Patience(talk.clock, 20.0))

    asyncio.run(play())


def test_a_hub_does_not_prepare_after_its_welcome() -> None:
    async def scene(talk: Talk) -> None:
        talk.wire.say(ALIGNING)
        with pytest.raises(ProtocolViolation, match="the hub sent Preparing in state open"):
            await talk.conversation.fetch(BLOB)

    talk(scene)


async def settled() -> None:
    for _ in range(300):
        await asyncio.sleep(0)
