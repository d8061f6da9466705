"""Forge what an edge says to a real hub in this process, for `bench_trust_frames`: daemon, roster, machine, ledger and blobs.

Only torch's process and the sockets are stood in for. Three edges take part: two are honest, the third is forged. Each frame
is judged by `trust_frames_judge`, and after each episode the ledger and the honest edges must be as they should.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import msgspec
from trust_frames_judge import EITHER, END, STAY, Facts, HubJudge, Verdict
from trust_frames_mutate import Forger, frame_of

from fedsoda_edge.ports import SystemClock, TorchPort
from fedsoda_edge.ports.console import ProgressLine
from fedsoda_edge.ports.logs import printable
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.manifest import BundleManifest, EdgeNeeds, File, LayerPlan, LoRASpec, TensorSpec
from fedsoda_hub.cli.display import HubDisplay
from fedsoda_hub.events import HubEvent, as_json
from fedsoda_hub.federation import jobs
from fedsoda_hub.federation import records as rec
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.tokens import Token
from fedsoda_hub.serving.connection import Connection, Hub
from fedsoda_hub.serving.daemon import Daemon
from fedsoda_hub.settings.open_run import OpenRun, RunOpened
from fedsoda_hub.settings.run import read_settings

LAYOUT = tuple(TensorSpec(f"layers.1.self_attn.q_proj.lora_{factor}", shape) for factor, shape in (("A", (2, 8)), ("B", (8, 2))))
FORGED, HONEST = "mallory", ("alice", "bob")
RUN = """name = "forged"
model = "no-model"
[lora]
rank = 2
[public]
text = "public.txt"
[method]
realign_every = 0
[rounds]
count = 1000000
min_edges = 3
quorum = 1.0
[wire]
codec = "bf16"
stall_seconds = 3600
"""


class StillClock(SystemClock):
    """A clock whose timers never go off: a deadline must not decide here."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.Event().wait()


class Torch:
    """In the place of the process that owns torch: results are hashes of their jobs."""

    rss_bytes = peak_rss_bytes = 0

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self.pid: int | None = None

    async def start(self) -> None:
        self.pid = 1

    async def call(self, call: Any, on_progress: Any = None) -> Any:
        self.pid = 1
        put = self.directory.blobs.put
        if isinstance(call, OpenRun):
            return RunOpened(1)
        if isinstance(call, jobs.Prepare):
            self.directory.bundle.mkdir(exist_ok=True)
            (self.directory.bundle / "norm.safetensors").write_bytes(b"norm")
            view, emulator = (ms.Digest(put(name)) for name in (b"adapter", b"emulator"))
            one = jobs.PreparedSubLLM(
                manifest=ms.Digest(put(_manifest())), adapter_view=view, emulator_view=emulator, public_kl=dict.fromkeys(("pruned", "quantized", "aligned"), 0.1)
            )
            return jobs.PrepareResult(sub_llms=(one,), master=view)
        assert isinstance(call, jobs.Aggregate), call
        text = msgspec.json.encode(call)
        step = jobs.ViewStep(view=ms.Digest(put(b"view" + text)), delta=ms.Digest(put(b"delta" + text)))
        return jobs.AggregateResult(master=ms.Digest(put(b"master" + text)), steps=(step,), moments=None, cross_term=None)

    async def close(self) -> None:
        self.pid = None


def _manifest() -> bytes:
    return msgspec.json.encode(
        BundleManifest(
            format_version=1,
            family="llama",
            config={},
            dtype="bfloat16",
            source="",
            source_revision="",
            plan=LayerPlan(num_layers=2, adapter=(1,), kept=(0, 1), groups=(), mapping=(), distances=()),
            lora=LoRASpec(rank=2, alpha=4, targets=("q_proj",), adapter=LAYOUT, emulator=()),
            adapter_base="bf16",
            quantized_embedding=False,
            files=(File("norm.safetensors", hashlib.sha256(b"norm").hexdigest(), 4),),
            needs=EdgeNeeds(disk_bytes=1, ram_bytes=1, vram_bytes=0),
            bits_per_parameter=16.0,
        )
    )


def update(values: list[float], codec: str = "bf16") -> bytes:
    """Code an update by hand, docs/protocol.md (p5-codecs): bf16, both tensors."""
    header: dict[str, Any] = {"__metadata__": {"codec": codec}}
    body = b"".join(struct.pack("<f", value)[2:] for value in values)
    for at, spec in enumerate(LAYOUT):
        header[spec.name] = {"dtype": "U8", "shape": [32], "data_offsets": [32 * at, 32 * at + 32]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


class Paper:
    """In the place of the terminal's line: keeps what would be printed in a way that steers a terminal, or forges a line."""

    def __init__(self) -> None:
        self.odd: list[str] = []

    def say(self, text: str) -> None:
        shown = printable(text)
        if any(one in shown for one in "\x1b\n\r\x07\x9b\u202e\u2066\u2028") or len(shown) > 2000:
            self.odd.append(shown)

    def show(self, *_: object, **__: object) -> None: ...
    def end(self) -> None: ...


class Line:
    """One connection without a socket: the hub's `Channel`, and what the bench does at the other end."""

    def __init__(self, hub: Hub, edge: str) -> None:
        self.heard: list[dict[str, Any]] = []
        self.is_over = False
        self._up: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._moved = asyncio.Event()
        self._is_idle = False
        self.defect: BaseException | None = None
        connection = Connection(hub, Token(ms.EdgeId(edge), None, False), self)
        self._task = asyncio.create_task(self._talk(connection))

    async def _talk(self, connection: Connection) -> None:
        try:
            await connection.run()
        except BaseException as defect:
            self.defect = defect
            raise
        finally:
            self.is_over = True
            self._moved.set()

    async def send_bytes(self, data: bytes) -> None:
        size = int.from_bytes(data[:4], "big")
        self.heard.append(json.loads(data[4 : 4 + size]))
        self._moved.set()

    async def receive_bytes(self) -> bytes:
        if self._up.empty():
            self._is_idle = True
            self._moved.set()
        frame = await self._up.get()
        self._is_idle = False
        if frame is None:
            raise ConnectionResetError
        return frame

    async def close(self) -> None:
        self.is_over = True
        self._moved.set()

    async def say(self, frame: bytes) -> bool:
        """Send a frame and wait until the hub wants the next one; return whether the connection is still there."""
        self._is_idle = False
        self._up.put_nowait(frame)
        async with asyncio.timeout(20):
            while not (self._is_idle or self.is_over):
                self._moved.clear()
                await self._moved.wait()
        await asyncio.sleep(0)
        if self._is_idle and not self.is_over:
            return True
        async with asyncio.timeout(20):
            await asyncio.wait({self._task})
        return False

    async def hear(self, *kinds: str, after: int = 0) -> dict[str, Any]:
        """Wait for a message of these kinds behind the first `after` ones."""
        async with asyncio.timeout(20):
            while True:
                for message in self.heard[after:]:
                    if message["type"] in kinds:
                        return message
                if self.is_over:
                    return {"type": "over"}
                self._moved.clear()
                await self._moved.wait()

    async def hang_up(self) -> None:
        self._up.put_nowait(None)
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.exception()


class Door:
    """A door whose other side the bench holds."""

    port = 0

    def __init__(self) -> None:
        self.hub: asyncio.Future[Hub] = asyncio.get_running_loop().create_future()

    async def open(self, hub: Hub) -> None:
        self.hub.set_result(hub)

    async def broken(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None: ...


def said(**values: Any) -> bytes:
    """Make the frame of a message, its type first."""
    return frame_of(json.dumps(values))


def hello(edge: str) -> dict[str, Any]:
    """The honest first message of an edge."""
    device = {"ram_bytes": 1 << 33, "vram_bytes": 0, "disk_bytes": 1 << 38, "threads": 8, "accelerator": ""}
    values = {"type": "hello", "protocol": 1, "software": "forged", "device_id": f"device-of-{edge}", "device": device}
    return values | {"place": f"place-of-{edge}"}


class HubBench:
    """The hub, its honest edges, and the forged one. wrong: sentences. tried: forged frames."""

    def __init__(self, directory: Path, seed: int, most_wrong: int = 20) -> None:
        self.tried = self.num_right = 0
        self.wrong: list[str] = []
        self.found: list[dict[str, Any]] = []  # frames of episodes that were wrong
        self._most_wrong = most_wrong
        self._directory = directory
        self._chance = random.Random(seed)
        self.forger = Forger(self._chance)
        self.facts = Facts()
        self._lines: dict[str, Line] = {}
        self._appended: list[Any] = []
        self._body = 0
        self._display, self._paper = HubDisplay(jsonl=False), Paper()
        self._display._line = cast(ProgressLine, self._paper)

    async def __aenter__(self) -> HubBench:
        (self._directory / "public.txt").write_text("public")
        (self._directory / "run.toml").write_text(RUN)
        settings = read_settings(self._directory / "run.toml")
        door, torch = Door(), Torch(RunDirectory(settings.run_dir))
        self.daemon = Daemon.open(settings, self._hear, StillClock(), door=door, torch=cast(TorchPort, torch))
        ledger = self.daemon.disk.ledger
        ledger.database.write(("PRAGMA synchronous = OFF", ()))  # what is tried here is not the disk
        append = ledger.append
        ledger.append = lambda record: (append(record), self._appended.append(record))[0]  # type: ignore[method-assign]
        for edge in (*HONEST, FORGED):
            ledger.tokens.create(edge)
        self._stop: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._serving = asyncio.create_task(self.daemon.serve(self._stop, exit_when_done=False))
        await asyncio.wait({door.hub, self._serving}, return_when=asyncio.FIRST_COMPLETED)
        self.hub = door.hub.result()
        self.facts.most_bytes = len(update([0.0] * 32))
        self.facts.least_refused = 1 << 20
        for edge in HONEST:
            await self._join(edge)
        await self._open_round()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set_result("SIGTERM")
        for line in self._lines.values():
            await line.hang_up()
        await asyncio.wait({self._serving}, timeout=30)
        if not self._serving.done():
            self._serving.cancel()

    def _hear(self, event: HubEvent) -> None:
        as_json(event)
        self._display.say(event)
        while self._paper.odd:
            self._note(f"the hub prints {self._paper.odd.pop()[:80]!r}, which steers a terminal, or is a line of its own")

    def _note(self, what: str) -> None:
        if len(self.wrong) < self._most_wrong:
            self.wrong.append(what)

    # --- the honest course of rounds -------------------------------------------------------------------------------

    async def _join(self, edge: str) -> Line:
        line = self._lines[edge] = Line(self.hub, edge)
        for values in (hello(edge), {"type": "ready", "num_examples": 3}):
            frame = said(**values)
            self.forger.remember(frame)
            assert await line.say(frame), line.heard
        return line

    async def _open_round(self) -> None:
        line = await self._join(FORGED)
        offer = await line.hear("round_offer", after=1)
        facts = self.facts
        facts.round, facts.view, facts.alignment = offer["round"], offer["view"]["digest"], offer["alignment"]
        facts.cohort, facts.accepted = {FORGED, *HONEST}, {}
        facts.blobs = {}
        for view in (offer["view"], offer["emulator"]):
            for one in (view.get("delta"), view.get("snapshot")):
                if one:
                    facts.blobs[one["digest"]] = one["bytes"]
            path = self.daemon.disk.directory.blobs.path(view["digest"])
            facts.blobs[view["digest"]] = path.stat().st_size  # the bundle's own view is a blob too
        await line.hang_up()
        del self._lines[FORGED]

    async def next_round(self) -> None:
        """Let the round end honestly, and check that each honest update was counted once, as it was sent."""
        facts = self.facts
        if FORGED not in facts.accepted:
            line = await self._join(FORGED)
            await line.say(said(type="decline", round=facts.round, reason="done"))
            await line.hang_up()
            del self._lines[FORGED]
        for edge in HONEST:
            start, chunk = self.upload(facts.round, facts.view)
            for frame in (start, chunk):
                self.forger.remember(frame)
                if not await self._lines[edge].say(frame):
                    self._note(f"{edge}, who is honest, lost the connection in round {facts.round}")
                    return
            answer = await self._lines[edge].hear("receipt", "refusal", after=max(0, len(self._lines[edge].heard) - 1))
            if answer["type"] != "receipt":
                self._note(f"{edge}, who is honest, was refused: {answer}")
            facts.receipts[edge] = (facts.round, json.loads(start[4:])["digest"])
        # The next offer comes once the round is merged.
        for edge in HONEST:
            line = self._lines[edge]
            closed = await line.hear("round_closed", after=1)
            if closed["type"] != "round_closed":
                self._note(f"round {facts.round} did not close for {edge}: {closed}")
            line.heard.clear()
            line.heard.append({"type": "welcome"})
        closing = [record for record in self._appended if isinstance(record, rec.RoundClosed)]
        if [record.round for record in closing] != [facts.round]:
            self._note(f"closed {[record.round for record in closing]} where round {facts.round} was open")
        self._appended.clear()
        await self._open_round()

    def upload(self, round_number: int, view: str, **changed: Any) -> tuple[bytes, bytes]:
        """Make the two frames of an update that this run can use."""
        data = self.body()
        start = self.start(data, round_number, view) | changed
        return said(**start), frame_of(json.dumps({"type": "update_chunk", "digest": start["digest"], "offset": 0}), data)

    def body(self) -> bytes:
        """Code an update that was not sent before."""
        self._body += 1
        data = update([0.001 * (self._body % 1000), *(float(self._body // 1000) / 64 for _ in range(31))])
        self.facts.bodies.add(hashlib.sha256(data).hexdigest())
        if len(self.facts.bodies) > 5000:
            self.facts.bodies.clear()
            self.facts.bodies.add(hashlib.sha256(data).hexdigest())
        return data

    def start(self, data: bytes, round_number: int, view: str) -> dict[str, Any]:
        """Announce an update."""
        return {
            "type": "update_start",
            "round": round_number,
            "base": view,
            "alignment": self.facts.alignment,
            "digest": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "codec": "bf16",
            "num_examples": 3,
            "loss": 0.5,
        }

    # --- the forged edge --------------------------------------------------------------------------------------------

    async def episode(self) -> None:
        """Hold one forged conversation."""
        chance, facts = self._chance, self.facts
        line = Line(self.hub, FORGED)
        judge = HubJudge(facts, FORGED, f"device-of-{FORGED}", f"place-of-{FORGED}")
        sent: list[bytes] = []
        honest = [said(**hello(FORGED)), said(type="ready", num_examples=3)][: chance.choice((0, 1, 2, 2, 2, 2, 2))]
        todo: list[tuple[bytes, bool]] = [(frame, False) for frame in honest]
        todo += [(frame, True) for frame in self._forged(chance.randint(2, 10))]
        before = len(self.wrong)
        for frame, is_forged in todo:
            was_accepted = facts.accepted.get(FORGED)
            verdict = judge.judge(frame)
            sent.append(frame)
            num_heard = len(line.heard)
            stays = await line.say(frame)
            if is_forged:
                self.tried += 1
                self.forger.remember(frame)
            answer = await self._answer(line, judge, verdict, stays, num_heard)
            problem = self._problem(verdict, stays, answer)
            if any(one["type"] == "round_offer" for one in line.heard) and not judge.is_ready and verdict.then != EITHER:
                problem = problem or "an edge that is not ready was asked for a round"
            accepted = [one for one in self._appended if isinstance(one, rec.UpdateAccepted) and one.edge == FORGED]
            if len(accepted) > (was_accepted is not None or answer == "receipt"):
                problem = problem or "an update without a receipt, or a second one, is in the ledger"
            if problem:
                self._note(f"{problem}: {frame[:160]!r}")
                self.found.append({"frames": [one.hex() for one in sent], "problem": problem})
            elif is_forged:
                self.num_right += 1
            if not stays or problem or verdict.then == EITHER:
                break
        await line.hang_up()
        if line.defect is not None:
            self._note(f"the hub raised {line.defect!r:.200} on {sent[-1][:120]!r}")
            self.found.append({"frames": [one.hex() for one in sent], "problem": repr(line.defect)})
        if self._serving.done():
            raise RuntimeError(f"the hub ended: {self._serving.exception()!r}")
        for edge in HONEST:
            if self._lines[edge].is_over:
                self._note(f"{edge}, who is honest, lost the connection")
                await self._join(edge)
        if len(self.wrong) == before:
            return

    async def _answer(self, line: Line, judge: HubJudge, verdict: Verdict, stays: bool, num_heard: int) -> str:
        """Wait for the answer to a whole update, and note what was accepted."""
        if not stays or verdict.start is None:
            return ""
        found = await line.hear("receipt", "refusal", after=num_heard)
        if found["type"] == "receipt":
            self.facts.accepted[FORGED] = verdict.start["digest"]
            self.facts.receipts[FORGED] = (verdict.start["round"], verdict.start["digest"])
            if (found["round"], found["digest"]) != (verdict.start["round"], verdict.start["digest"]):
                return "another receipt"
        return str(found["type"])

    @staticmethod
    def _problem(verdict: Verdict, stays: bool, answer: str) -> str:
        if verdict.then != EITHER and stays != (verdict.then == STAY):
            return "the connection stays" if stays else "the connection ended, and the frame is allowed"
        if verdict.then == END or verdict.answer in ("", "any"):
            return ""
        return "" if answer == verdict.answer else f"the answer is {answer or 'none'}, {verdict.answer} is right"

    def _forged(self, count: int) -> list[bytes]:
        """Draw the frames of an episode."""
        chance, forger, made = self._chance, self.forger, []
        while len(made) < count:
            kind = chance.random()
            if kind < 0.2:
                made += self._forged_upload()
            elif kind < 0.3 and forger.pool:
                made.append(chance.choice(forger.pool))
            elif kind < 0.42:
                made.append(forger.damaged(chance.choice(forger.pool) if forger.pool and chance.random() < 0.5 else said(**self._any())))
            elif kind < 0.5:
                made.append(said(**self._any()))
            else:
                made.append(forger.message(self._any(), chance.choice((b"", b"", b"", b"x", bytes(500)))))
        return made[:count]

    def _any(self) -> dict[str, Any]:
        """Draw a message that an edge, or a hub, may say at some time."""
        chance, facts = self._chance, self.facts
        number = facts.round + chance.choice((0, 0, 0, -1, 1, 1000))
        digest = chance.choice((*facts.blobs, "0" * 64, facts.view))
        return chance.choice(
            (
                hello(FORGED),
                hello(chance.choice(HONEST)),
                {"type": "ready", "num_examples": 3, "size_class": 0},
                {"type": "blob_request", "digest": digest, "offset": chance.choice((0, 0, 3, 7, 9))},
                self.start(self.body(), number, chance.choice((facts.view, digest))),
                {"type": "update_chunk", "digest": digest, "offset": chance.choice((0, 32))},
                {"type": "decline", "round": number, "reason": "no"},
                {"type": "progress", "round": number, "step": 1, "steps": 9, "loss": 0.5, "tokens_per_second": 1.0},
                {"type": "paused", "reason": "battery"},
                {"type": "resumed"},
                {"type": "leave", "reason": "bye"},
                {"type": "receipt", "round": number, "digest": digest},
                {"type": "refusal", "reason": "no", "round": number, "retry": False, "fatal": False},
                {"type": "blob_chunk", "digest": digest, "offset": 0, "total": 5},
                {"type": "farewell", "rounds": number, "reason": "over"},
            )
        )

    def _forged_upload(self) -> list[bytes]:
        """Draw an update in chunks that may overlap, go back, exceed, stop, or be of something else."""
        chance, facts = self._chance, self.facts
        data = self.body()
        start = self.start(data, facts.round + chance.choice((0, 0, 0, 0, -1, 1)), facts.view)
        if chance.random() < 0.3:
            data = self._spoilt(data)
            start |= {"digest": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        first = self.forger.message(start) if chance.random() < 0.5 else said(**start)
        cuts = sorted({0, len(data), *(chance.randrange(len(data) + 1) for _ in range(chance.randrange(3)))})
        pieces = [(at, data[at:end]) for at, end in zip(cuts, cuts[1:], strict=False)]
        match chance.randrange(9):
            case 0:
                chance.shuffle(pieces)
            case 1:
                pieces.append(pieces[-1])  # once more
            case 2:
                pieces = [(max(0, at - 1), data[max(0, at - 1) : at + len(piece)]) for at, piece in pieces]  # overlapping
            case 3:
                pieces[-1] = (pieces[-1][0], pieces[-1][1] + b"more")
            case 4:
                pieces.pop()
        frames = [first]
        for at, piece in pieces:
            chunk = {"type": "update_chunk", "digest": start["digest"], "offset": at}
            frames.append(self.forger.message(chunk, piece) if chance.random() < 0.12 else frame_of(json.dumps(chunk), piece))
        if chance.random() < 0.1:
            frames.insert(chance.randrange(1, len(frames) + 1), first)
        return frames

    def _spoilt(self, data: bytes) -> bytes:
        """Spoil the bytes of an update; none of the results is one that this run can use."""
        chance, changed = self._chance, bytearray(data)
        match chance.randrange(7):
            case 0:
                changed[-1 - 2 * chance.randrange(32)] = 0x7F  # not finite, or above any LoRA
            case 1:
                del changed[chance.randrange(len(changed)) :]
            case 2:
                changed[chance.randrange(8)] ^= 1 << chance.randrange(8)
            case 3:
                changed += b"\0"
            case 4:
                at = data.index(b"data_offsets") + chance.randrange(20)
                changed[at] ^= 1
            case 5:
                changed = bytearray(data.replace(b"bf16", b"int8"))
            case _:
                changed[8 + chance.randrange(100)] ^= 1 << chance.randrange(7)
        return bytes(changed) or b"\0"


async def run(directory: Path, seed: int, tries: int) -> Mapping[str, Any]:
    """Forge so many frames against one hub."""
    async with HubBench(directory, seed) as bench:
        episodes = 0
        while bench.tried < tries:
            await bench.episode()
            episodes += 1
            if episodes % 60 == 0:
                await bench.next_round()
        with contextlib.suppress(TimeoutError):
            await bench.next_round()
        return {"tried": bench.tried, "right": bench.num_right, "wrong": bench.wrong, "found": bench.found[:20]}
