"""A hub and mirrors that do as they are told, on real sockets, and the edge's own greeting and download against them.

Used by bench_trust_bundles.py and by the tests of signed bundles; which attacks there are is theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol

from fedsoda_edge import events as ev
from fedsoda_edge.join.conversation import Conversation
from fedsoda_edge.join.download import Download
from fedsoda_edge.join.home import Home
from fedsoda_edge.join.patience import Patience
from fedsoda_edge.join.receipts import ReceiptLog
from fedsoda_edge.join.sources import Sources
from fedsoda_edge.join.trust import HubTrust
from fedsoda_edge.join.witness import HubWitness
from fedsoda_edge.network.hub_transport import HubTransport
from fedsoda_edge.network.mirror import Mirror
from fedsoda_edge.ports import SystemClock
from fedsoda_edge.ports.store import FileStore
from fedsoda_edge.protocol import manifest as mf
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.codec import decode, encode
from fedsoda_edge.protocol.manifest import parse_manifest
from fedsoda_edge.protocol.signatures import SigningKey
from fedsoda_edge.protocol.statements import BundleStatement, sign

KEY = SigningKey(b"h" * 32)  # of the run's hub
MALLORY = SigningKey(b"m" * 32)
RUN = "0123456789abcdef"
DAY = 86400
STALL_SECONDS = 1.5
Answer = Callable[["Heard", asyncio.StreamWriter], Awaitable[None]]  # writes what one request for a file gets


def digest_of(data: bytes) -> str:
    """Name a file."""
    return hashlib.sha256(data).hexdigest()


class Bundle:
    """A small bundle: its manifest and files, by digest. mark: makes another one of the same form."""

    def __init__(self, mark: str = "", *, needs: int | None = None, more: tuple[str, ...] = ()) -> None:
        roles = ("layers.0", "layers.1", "embedding", "norm", "emulator_lora", "adapter_lora")
        names = ["tokenizer.json", *(f"{role}.safetensors" for role in roles), *more]
        contents = {name: f"{mark} {name} ".encode() * 400 for name in names}
        files = tuple(mf.File(name, digest_of(data), len(data)) for name, data in contents.items())
        total = sum(len(data) for data in contents.values())
        made = mf.BundleManifest(
            format_version=mf.FORMAT_VERSION,
            family="llama",
            config={
                "num_hidden_layers": 2,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_attention_heads": 4,
                "vocab_size": 320,
                "tie_word_embeddings": True,
            },
            dtype="bfloat16",
            source="made",
            source_revision=mark,
            plan=mf.LayerPlan(num_layers=2, adapter=(1,), kept=(0, 1), groups=(), mapping=(), distances=()),
            lora=mf.LoRASpec(rank=4, alpha=8.0, targets=("q_proj",), adapter=(), emulator=()),
            adapter_base="nf4",
            quantized_embedding=False,
            files=files,
            needs=mf.EdgeNeeds(disk_bytes=total if needs is None else needs, ram_bytes=1, vram_bytes=1),
            bits_per_parameter=4.5,
        )
        self.manifest = mf.encode_manifest(made)
        self.files = {digest_of(data): data for data in (self.manifest, *contents.values())}

    @property
    def ref(self) -> ms.BlobRef:
        """The manifest as messages name it."""
        return ms.BlobRef(digest=ms.Digest(digest_of(self.manifest)), bytes=len(self.manifest))


def statement(
    *bundles: Bundle,
    run: str = RUN,
    version: int = 1,
    signed_ago: float = 0.0,
    mirrors: tuple[str, ...] = (),
    key: SigningKey = KEY,
) -> ms.Signed:
    """What a hub signs of its bundles."""
    at = int(SystemClock().wall() - signed_ago)
    refs = tuple(bundle.ref for bundle in bundles)
    said = BundleStatement(
        run_id=run, version=version, signed_at=at, expires=at + 3 * DAY, manifests=refs, mirrors=mirrors
    )
    return sign(key, said)


def welcome(*bundles: Bundle, signed: ms.Signed | None, run: str = RUN) -> ms.Welcome:
    """A hub's answer to Hello with these size classes."""
    first, *others = bundles
    return ms.Welcome(
        protocol=ms.PROTOCOL_VERSION,
        run_id=run,
        run_name="triage",
        edge=ms.EdgeId("clinic-7"),
        manifest=first.ref,
        rounds=2,
        rounds_done=0,
        template=None,
        max_length=64,
        codec="int8",
        seed=0,
        stall_seconds=STALL_SECONDS,
        smaller=tuple(ms.SizeClass(manifest=one.ref, emulator=None) for one in others),
        signed=signed,
    )


# --- servers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heard:
    """A request: its path, and its headers by lower-case name."""

    path: str
    headers: dict[str, str]

    @property
    def digest(self) -> str:
        """The file that is asked for."""
        return self.path.rpartition("/")[2]

    @property
    def offset(self) -> int:
        """Where its range begins."""
        found = re.match(r"bytes=(\d+)-", self.headers.get("range", ""))
        return int(found[1]) if found else 0


@dataclass
class Server:
    """A server of files, and of a hub's conversation where `said` is not empty. written: bytes of bodies that it sent.

    heard: all requests. says: what it answers to Hello, and then without being asked.
    """

    answer: Answer
    says: list[ms.HubMessage] = field(default_factory=list)
    heard: list[Heard] = field(default_factory=list)
    written: int = 0
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection."""
        # Cancelled: the test is over, and nobody waits for what this server still had to say.
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
            heard = Heard(lines[0].split(" ")[1], headers)
            self.heard.append(heard)
            if "upgrade" in headers:
                await self._converse(head, reader, writer)
            else:
                before = _sent(writer)
                try:
                    await self.answer(heard, writer)
                    await writer.drain()
                finally:
                    self.written += _sent(writer) - before
        writer.close()

    async def _converse(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        protocol = ServerProtocol()
        protocol.receive_data(head)
        [request] = protocol.events_received()
        assert isinstance(request, Request)
        protocol.send_response(protocol.accept(request))
        to_say = list(self.says)
        while True:
            for data in protocol.data_to_send():
                writer.write(data)
            await writer.drain()
            if protocol.close_expected():  # a server is the first to close
                return
            data = await reader.read(65536)
            if not data:
                return
            protocol.receive_data(data)
            for event in protocol.events_received():
                if isinstance(event, Frame) and event.opcode is Opcode.BINARY:
                    message = decode(bytes(event.data))[0]
                    if isinstance(message, ms.Hello):
                        protocol.send_binary(encode(to_say.pop(0)))
                    elif isinstance(message, ms.UpdateChunk | ms.Ready):
                        for one in to_say:
                            protocol.send_binary(encode(one))
                        to_say = []


def _sent(writer: asyncio.StreamWriter) -> int:
    total = getattr(writer, "hostile_bytes", 0)
    return int(total)


def put(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Send a part of a body, and count it."""
    writer.hostile_bytes = _sent(writer) + len(data)  # type: ignore[attr-defined]
    writer.write(data)


def header(writer: asyncio.StreamWriter, status: str, **headers: object) -> None:
    """Send the head of an answer."""
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    writer.write("\r\n".join([*lines, "Connection: close", "", ""]).encode())


def serving(files: dict[str, bytes]) -> Answer:
    """Answer as an honest server of these files does, with ranges."""

    async def answer(heard: Heard, writer: asyncio.StreamWriter) -> None:
        data = files.get(heard.digest)
        if data is None:
            header(writer, "404 Not Found", Content_Length=0)
            return
        rest = data[heard.offset :]
        span = f"bytes {heard.offset}-{len(data) - 1}/{len(data)}"
        if heard.offset:
            header(writer, "206 Partial Content", Content_Length=len(rest), Content_Range=span)
        else:
            header(writer, "200 OK", Content_Length=len(rest))
        put(writer, rest)

    return answer


@contextlib.asynccontextmanager
async def listening(*servers: Server) -> AsyncIterator[None]:
    """Let servers answer at their URLs, which they have from then on."""
    async with contextlib.AsyncExitStack() as stack:
        opened = []
        for one in servers:
            server = await asyncio.start_server(one.serve, "127.0.0.1", 0)
            stack.callback(server.close)
            one.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            opened.append(server)
        yield


# --- the edge --------------------------------------------------------------------------------------------------------


class ShiftedClock(SystemClock):
    """The clock of a device that is wrong by some seconds; its breaks are short."""

    def __init__(self, ahead: float = 0.0) -> None:
        self._ahead = ahead
        self._slept = 0.0

    def wall(self) -> float:
        return super().wall() + self._ahead

    def monotonic(self) -> float:
        return super().monotonic() + self._slept

    async def sleep(self, seconds: float) -> None:
        self._slept += seconds
        await asyncio.sleep(0)


class Device:
    """A device with its FEDSODA_HOME. said: the sentences that its owner saw."""

    def __init__(self, home: Path, *, ahead: float = 0.0, hub_key: bytes | None = None) -> None:
        self.home = Home(home)
        self.store = FileStore(self.home.store)
        self.clock = ShiftedClock(ahead)
        self.hub_key = hub_key
        self.said: list[str] = []

    def say(self, event: ev.AnyEvent) -> None:
        """Take an event of the join."""
        if isinstance(event, ev.Notice | ev.Reconnecting):
            self.said.append(event.message)

    def parts(self, url: str) -> tuple[HubTransport, HubWitness, Conversation, Sources]:
        """Wire a join's conversation and sources as `join/agent.py` does."""
        hub = HubTransport(url, "good")
        log = ReceiptLog(self.home.receipts)
        witness = HubWitness(hub.url, HubTrust(self.home, self.say, self.clock, self.hub_key), log, self.clock)
        facts = ms.DeviceFacts(ram_bytes=1, vram_bytes=0, disk_bytes=1, threads=1, accelerator="")
        greeting = ms.Hello(protocol=ms.PROTOCOL_VERSION, software="fedsoda", device_id="d", device=facts)
        patience = Patience(self.clock, 0.0)
        conversation = Conversation(hub, lambda: greeting, self.say, self.clock, patience, witness)
        return hub, witness, conversation, Sources(hub, self.say, witness, Mirror)

    async def join(self, url: str) -> None:
        """Greet a hub and fetch the bundle of its first size class, as a join does before it needs torch.

        Raises:
            FedSODAError: what the join refuses.
        """
        hub, _, conversation, sources = self.parts(url)
        try:
            greeted = await conversation.greet()
            await self._fetch(greeted, sources)
        finally:
            await sources.close()
            await conversation.close()
            await hub.close()

    async def _fetch(self, greeted: ms.Welcome, sources: Sources) -> None:
        async def run(work: Callable[[], Awaitable[Path]]) -> Path:
            return await work()

        download = Download(
            sources,
            self.store,
            run=run,
            say=self.say,
            patience=Patience(self.clock, 5.0),
            clock=self.clock,
            stall_seconds=greeted.stall_seconds,
        )
        manifest = parse_manifest((await download.manifest(greeted.manifest)).read_bytes())
        async with download.bundle(manifest, greeted.manifest.digest) as fetch:
            await fetch()

    @property
    def held(self) -> dict[str, bytes]:
        """The whole files in the store, by name."""
        if not self.store.directory.exists():
            return {}
        return {path.name: path.read_bytes() for path in self.store.directory.iterdir() if "." not in path.name}


def changed(signed: ms.Signed, old: str, new: str) -> ms.Signed:
    """A statement whose text somebody changed after it was signed."""
    assert old in signed.text
    return msgspec.structs.replace(signed, text=signed.text.replace(old, new))
