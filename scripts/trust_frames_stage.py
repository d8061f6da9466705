"""Stand in for the world around a hub, for `trust_frames_hub`: torch's process, sockets, clock and terminal.

All else is the product's own: daemon, roster, machine, ledger, blobs.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable
from typing import Any

import msgspec
from small_manifest import small_manifest
from trust_frames_mutate import frame_of

from fedsoda_edge.ports import SystemClock
from fedsoda_edge.ports.log_lines import printable
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.manifest import TensorSpec
from fedsoda_hub.federation import jobs
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.tokens import Token
from fedsoda_hub.serving.connection import Connection, Hub
from fedsoda_hub.settings.open_run import OpenRun, RunOpened

LAYOUT = tuple(
    TensorSpec(f"layers.1.self_attn.q_proj.lora_{factor}", shape) for factor, shape in (("A", (2, 8)), ("B", (8, 2)))
)
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
                manifest=ms.Digest(put(small_manifest(LAYOUT, b"norm"))),
                adapter_view=view,
                emulator_view=emulator,
                public_kl=dict.fromkeys(("pruned", "quantized", "aligned"), 0.1),
            )
            return jobs.PrepareResult(sub_llms=(one,), master=view)
        assert isinstance(call, jobs.Aggregate), call
        text = msgspec.json.encode(call)
        step = jobs.ViewStep(view=ms.Digest(put(b"view" + text)), delta=ms.Digest(put(b"delta" + text)))
        return jobs.AggregateResult(
            master=ms.Digest(put(b"master" + text)), steps=(step,), moments=None, cross_term=None
        )

    async def close(self) -> None:
        self.pid = None


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
    """In the place of the terminal's line: tells of what would steer a terminal, or be a line of its own."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note

    def say(self, text: str, *_: object) -> None:
        shown = printable(text)
        if any(one in shown for one in "\x1b\n\r\x07\x9b\u202e\u2066\u2028") or len(shown) > 2000:
            self._note(f"the hub prints {shown[:80]!r}, which steers a terminal, or is a line of its own")

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
