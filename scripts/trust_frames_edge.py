"""Forge what a hub says to an edge's real conversation in this process, for `bench_trust_frames`.

One conversation holds for an episode: a greeting, a blob that is fetched or an update that is handed in, and forged frames
between. What comes out must be what was asked for, or an error of the tree.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
from collections.abc import AsyncIterator
from typing import Any

from trust_frames_judge import OF_HUB, read
from trust_frames_mutate import Forger, frame_of

from fedsoda_edge.errors import FedSODAError
from fedsoda_edge.join.conversation import Conversation, RunOver
from fedsoda_edge.join.patience import Patience
from fedsoda_edge.ports import SystemClock
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.needs import SampleSizes
from fedsoda_edge.units import human_seconds
from tests.joins import Deaf

STEERING = "\x1b\n\r\x07\x9b\u202e\u2066\u2028"


class Lines:
    """A `Transport` whose other side the bench holds: one connection, of the frames that are put there."""

    url = "forged"

    def __init__(self) -> None:
        self.up = self.down = 0
        self.sent: list[bytes] = []
        self.coming: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.is_idle = asyncio.Event()
        self._connects = 0

    async def connect(self) -> None:
        self._connects += 1
        if self._connects > 1:
            raise RunOver("the episode is over")

    async def send(self, frame: bytes) -> None:
        self.sent.append(frame)

    async def frames(self) -> AsyncIterator[bytes]:
        while True:
            if self.coming.empty():
                self.is_idle.set()
            frame = await self.coming.get()
            if frame is None:
                return
            yield frame

    async def close(self) -> None: ...

    async def fetch(self, digest: str, offset: int) -> AsyncIterator[bytes]:
        yield b""


class NoTime(SystemClock):
    """A clock on which no break takes time."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


HELLO = ms.Hello(
    protocol=1,
    software="bench",
    device_id="bench",
    device=ms.DeviceFacts(ram_bytes=1, vram_bytes=0, disk_bytes=1, threads=1, accelerator=""),
)


class EdgeBench:
    """The edge's side. wrong: sentences. tried: forged frames."""

    def __init__(self, seed: int, most_wrong: int = 20) -> None:
        self.tried = self.num_right = 0
        self.wrong: list[str] = []
        self.found: list[dict[str, Any]] = []
        self._most_wrong = most_wrong
        self._chance = random.Random(seed)
        self.forger = Forger(self._chance)

    def _note(self, what: str, frames: list[bytes]) -> None:
        if len(self.wrong) < self._most_wrong:
            self.wrong.append(f"{what}: {frames[-1][:160]!r}" if frames else what)
            self.found.append({"frames": [one.hex() for one in frames], "problem": what})

    # --- what a hub says --------------------------------------------------------------------------------------------

    def _blob(self, data: bytes) -> dict[str, Any]:
        return {"digest": _digest(data), "bytes": len(data)}

    def _view(self, name: bytes) -> dict[str, Any]:
        return {
            "digest": _digest(name),
            "delta": self._blob(name + b"d"),
            "snapshot": self._blob(name),
            "moved": "both",
        }

    def welcome(self) -> dict[str, Any]:
        """The honest answer to Hello."""
        return {
            "type": "welcome",
            "protocol": 1,
            "run_id": "abc",
            "run_name": "triage",
            "edge": "mallory",
            "manifest": self._blob(b"manifest"),
            "rounds": 5,
            "rounds_done": 0,
            "template": {"prompt": "{a}", "completion": "{b}"},
            "max_length": 64,
            "codec": "nf4",
            "seed": 0,
            "stall_seconds": 60.0,
            "batch_size": 8,
            "emulator": self._view(b"emulator"),
            "smaller": [],
        }

    def offer(self, number: int) -> dict[str, Any]:
        """An honest offer."""
        local = {"epochs": 1, "max_steps": 0, "batch_size": 8, "learning_rate": 1e-4, "weight_decay": 0.01}
        local |= {"max_grad_norm": 1.0, "proximal_mu": 0.01, "max_length": 512}
        return {
            "type": "round_offer",
            "round": number,
            "rounds": 5,
            "view": self._view(b"view"),
            "alignment": 0,
            "emulator": self._view(b"emulator"),
            "local": local,
            "due_seconds": 600.0,
            "trains": "both",
            "has_feedback": True,
            "manifest": self._blob(b"manifest"),
        }

    def _any(self, data: bytes) -> dict[str, Any]:
        chance = self._chance
        digest = chance.choice((_digest(data), "0" * 64))
        number = chance.choice((1, 1, 2, 0, -1))
        return chance.choice(
            (
                self.welcome(),
                self.offer(number),
                self.offer(1),
                {"type": "blob_chunk", "digest": digest, "offset": 0, "total": len(data)},
                {"type": "receipt", "round": number, "digest": digest},
                {
                    "type": "refusal",
                    "reason": "no",
                    "round": number,
                    "retry": chance.random() < 0.5,
                    "fatal": chance.random() < 0.2,
                },
                {"type": "round_closed", "round": number, "num_updates": 3},
                {"type": "farewell", "rounds": 5, "reason": "over"},
                {"type": "ready", "num_examples": 3},
                {"type": "update_start", "round": 1},
            )
        )

    def _forged(self, data: bytes) -> bytes:
        chance, forger = self._chance, self.forger
        kind = chance.random()
        payload = chance.choice((b"", b"", data, data[:3], data + b"x"))
        if kind < 0.12 and forger.pool:
            return chance.choice(forger.pool)
        if kind < 0.27:
            return forger.damaged(frame_of(json.dumps(self._any(data)), b""))
        if kind < 0.4:
            return frame_of(json.dumps(self._any(data)), payload)
        return forger.message(self._any(data), payload)

    # --- an episode -------------------------------------------------------------------------------------------------

    async def episode(self) -> None:
        """Hold one conversation with a forged hub."""
        chance, lines, sent = self._chance, Lines(), []
        clock = NoTime()
        conversation = Conversation(lines, lambda: HELLO, lambda _: None, clock, Patience(clock, 0.0), Deaf())
        before = len(self.wrong)
        if chance.random() < 0.15:  # the greeting itself is forged
            sent.append(self.forger.message(self.welcome()) if chance.random() < 0.7 else self._forged(b"data"))
            self.tried += 1
            lines.coming.put_nowait(sent[-1])
            lines.coming.put_nowait(None)
            try:
                self._use(await conversation.greet(), sent)
            except FedSODAError as error:
                self._readable(str(error), sent)
            except Exception as error:
                self._note(f"the greeting raised {error!r:.150}", sent)
            self.num_right += len(self.wrong) == before
            return
        lines.coming.put_nowait(frame_of(json.dumps(self.welcome())))
        await conversation.greet()
        await conversation.send(ms.Ready(num_examples=3))
        data = chance.randbytes(chance.choice((1, 40, 400)))
        start = ms.UpdateStart(
            round=1,
            base=ms.Digest("0" * 64),
            alignment=0,
            digest=ms.Digest(_digest(data)),
            bytes=len(data),
            codec="nf4",
            num_examples=3,
            loss=0.5,
        )
        is_fetch = chance.random() < 0.5
        asked: asyncio.Task[Any] = asyncio.create_task(
            conversation.fetch(ms.BlobRef(digest=start.digest, bytes=len(data)))
            if is_fetch
            else conversation.hand_in(start, data)
        )
        heard: list[Any] = []
        reading = asyncio.create_task(self._read(conversation, heard))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        honest = self._honest(start, data, is_fetch)
        for _ in range(chance.randint(1, 8)):
            is_forged = not honest or chance.random() < 0.8
            frame = self._forged(data) if is_forged else honest.pop(0)
            sent.append(frame)
            self.tried += is_forged
            self.num_right += is_forged
            self.forger.remember(frame)
            lines.is_idle.clear()
            lines.coming.put_nowait(frame)
            idle = asyncio.create_task(lines.is_idle.wait())
            await asyncio.wait({idle, reading}, return_when=asyncio.FIRST_COMPLETED)
            idle.cancel()
            if reading.done():
                break
        lines.coming.put_nowait(None)
        await asyncio.wait({reading}, timeout=20)
        self._check(reading, asked, heard, sent, start, data, is_fetch)
        asked.cancel()
        with contextlib.suppress(BaseException):
            await asked
        await conversation.close()
        self.num_right -= len(self.wrong) - before

    def _honest(self, start: ms.UpdateStart, data: bytes, is_fetch: bool) -> list[bytes]:
        if not is_fetch:
            return [frame_of(json.dumps({"type": "receipt", "round": 1, "digest": start.digest}))]
        half = len(data) // 2
        parts = [(0, data[:half]), (half, data[half:])] if half else [(0, data)]
        return [
            frame_of(json.dumps({"type": "blob_chunk", "digest": start.digest, "offset": at, "total": len(data)}), part)
            for at, part in parts
        ]

    async def _read(self, conversation: Conversation, heard: list[Any]) -> None:
        with contextlib.suppress(RunOver):
            async for message in conversation.messages():
                heard.append(message)

    def _check(
        self,
        reading: asyncio.Task[None],
        asked: asyncio.Task[Any],
        heard: list[Any],
        sent: list[bytes],
        start: ms.UpdateStart,
        data: bytes,
        is_fetch: bool,
    ) -> None:
        if not reading.done():
            self._note("the conversation hangs", sent)
            reading.cancel()
            return
        error = reading.exception()
        if isinstance(error, FedSODAError):
            self._readable(str(error), sent)
        elif error is not None:
            self._note(f"the conversation raised {error!r:.150}", sent)
        for message in heard:
            self._use(message, sent)
        if asked.done() and not asked.cancelled():
            failed = asked.exception()
            if failed is None and is_fetch and asked.result() != data:
                self._note("a blob without its digest was taken", sent)
            if failed is None and not is_fetch:
                self._use_answer(asked.result(), start, sent)
            if failed is not None and not isinstance(failed, FedSODAError | RunOver):
                self._note(f"a request raised {failed!r:.150}", sent)
        # What the document refuses must not be behind the end of the conversation.
        for frame in sent[:-1]:
            header = int.from_bytes(frame[:4], "big")
            kind = _kind(frame[4 : 4 + header])
            if error is None and kind in OF_HUB and read(frame, OF_HUB) is None:
                self._note("a frame that is none of this protocol was taken", [frame])
                break

    def _use_answer(self, answer: ms.Receipt | ms.Refusal, start: ms.UpdateStart, sent: list[bytes]) -> None:
        if answer.round != start.round or (isinstance(answer, ms.Receipt) and answer.digest != start.digest):
            self._note("an answer to another update was taken", sent)
        if isinstance(answer, ms.Refusal):
            self._readable(answer.reason, sent)

    def _use(self, message: Any, sent: list[bytes]) -> None:
        """Do with a message what an agent does first; bounds must hold."""
        try:
            match message:
                case ms.Welcome():
                    self._readable(message.run_name, sent)
                    SampleSizes(message.batch_size, message.max_length, message.max_length)
                    if not (
                        0 < message.batch_size <= 2**31 and 0 < message.max_length <= 2**31 and message.protocol == 1
                    ):
                        self._note("a Welcome with sizes that are none was taken", sent)
                    refs = [message.manifest, *(one.manifest for one in message.smaller)]
                    if not all(0 < ref.bytes <= 1 << 40 for ref in refs):
                        self._note("a Welcome with a file that no bundle has was taken", sent)
                case ms.RoundOffer():
                    human_seconds(message.due_seconds)
                    if not (message.round >= 0 and message.local.batch_size >= 1 and message.due_seconds >= 0):
                        self._note("an offer with values that are none was taken", sent)
                case ms.Farewell():
                    self._readable(message.reason, sent)
        except Exception as error:
            self._note(f"the use of {type(message).__name__} raised {error!r:.120}", sent)

    def _readable(self, text: str, sent: list[bytes]) -> None:
        if any(one in text for one in STEERING) or len(text) > 2000:
            self._note(f"a sentence for people steers a terminal, or is endless ({text[:60]!r})", sent)


def _kind(header: bytes) -> str:
    try:
        kind = json.loads(header)["type"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""
    return kind if isinstance(kind, str) else ""


async def run(seed: int, tries: int) -> dict[str, Any]:
    """Forge so many frames against edges."""
    bench = EdgeBench(seed)
    while bench.tried < tries:
        await bench.episode()
    return {"tried": bench.tried, "right": bench.num_right, "wrong": bench.wrong, "found": bench.found[:20]}
