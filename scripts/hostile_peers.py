"""Be the other side of a hub, a thousand times: edges that play rounds, and peers that do their worst. No torch.

    python scripts/hostile_peers.py honest|hostile PORT VALUE [tls]     (tokens come as a line of JSON on stdin)

Websockets are written by hand, since clients of a library cost more than the hub. Each connection comes from an address of
its own in 127.0.0.0/8. `bench_trust_resources.py` starts it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import resource
import socket
import ssl
import struct
import sys
import time
from asyncio.sslproto import SSLProtocol
from collections.abc import Awaitable, Callable
from typing import Any

from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.codec import decode, encode
from fedsoda_edge.protocol.manifest import TensorSpec
from fedsoda_hub.serving import strangers

LAYOUT = (TensorSpec("layers.1.lora_A", (2, 8)), TensorSpec("layers.1.lora_B", (8, 2)))


def raise_limit() -> None:
    """Let this process open as many files as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else max(soft, 65_536), hard)
        )


class Raw:
    """A connection that says what it wants, from an address of its own. encryption: None: it speaks plain HTTP."""

    encryption: ssl.SSLContext | None = None

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def to(cls, port: int, number: int) -> Raw:
        """Connect from the address with this number."""
        taken = socket.socket()
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 10)
        taken.setblocking(False)
        taken.bind((f"127.{1 + (number >> 16)}.{number >> 8 & 255}.{number & 255}", 0))
        await asyncio.get_running_loop().sock_connect(taken, ("127.0.0.1", port))
        name = "" if cls.encryption else None  # no name is checked
        return cls(*await asyncio.open_connection(sock=taken, limit=1 << 14, ssl=cls.encryption, server_hostname=name))

    def say(self, data: bytes) -> None:
        if self.writer.transport.is_closing():
            raise ConnectionError("the hub ended it")
        self.writer.write(data)

    def say_frame(self, data: bytes, opcode: int = 2, *, is_last: bool = True) -> None:
        """Send a websocket frame, masked with zeros."""
        size = len(data)
        length = bytes([0x80 | size]) if size < 126 else struct.pack("!BH", 0x80 | 126, size)
        self.say(bytes([(0x80 if is_last else 0) | opcode]) + length + bytes(4) + data)

    async def hear_frame(self) -> tuple[int, bytes]:
        """Return the next frame's opcode and bytes; pings are answered."""
        while True:
            first, second = await self.reader.readexactly(2)
            size = second & 127
            if size >= 126:
                size = int.from_bytes(await self.reader.readexactly(2 if size == 126 else 8), "big")
            data = await self.reader.readexactly(size)
            if first & 15 != 9:
                return first & 15, data
            self.say_frame(data, 10)

    async def upgrade(self, token: str) -> None:
        """Make it a websocket."""
        key = base64.b64encode(os.urandom(16)).decode()
        self.say(
            f"GET /v1/session HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
            f"Sec-WebSocket-Version: 13\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
        )
        head = await self.reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101"):
            raise ConnectionError(head.split(b"\r\n")[0].decode())

    async def greet(self, token: str, device: str) -> ms.Welcome:
        """Say Hello and Ready."""
        await self.upgrade(token)
        facts = ms.DeviceFacts(ram_bytes=1, vram_bytes=0, disk_bytes=1, threads=1, accelerator="")
        self.say_frame(encode(ms.Hello(protocol=ms.PROTOCOL_VERSION, software="bench", device_id=device, device=facts)))
        welcome = decode((await self.hear_frame())[1])[0]
        assert isinstance(welcome, ms.Welcome), welcome
        return welcome

    def close(self) -> None:
        self.writer.transport.abort()


def update_of(number: int) -> bytes:
    """A coded update in bf16: safetensors by hand."""
    header: dict[str, Any] = {"__metadata__": {"codec": "bf16"}}
    body = b""
    for spec in LAYOUT:
        data = struct.pack("<f", 1.0 + number / 8)[2:] * (spec.shape[0] * spec.shape[1])
        header[spec.name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


async def take_part(raw: Raw, number: int, rounds: int) -> None:
    """Answer each offer with an update, so many times."""
    data = update_of(number % 7)
    digest = ms.Digest(hashlib.sha256(data).hexdigest())
    raw.say_frame(encode(ms.Ready(num_examples=1)))
    done = 0
    while done < rounds:
        opcode, frame = await raw.hear_frame()
        if opcode != 2:
            raise ConnectionError("the hub ended an honest conversation")
        message = decode(frame)[0]
        if isinstance(message, ms.RoundOffer):
            start = ms.UpdateStart(
                round=message.round,
                base=message.view.digest,
                alignment=message.alignment,
                digest=digest,
                bytes=len(data),
                codec="bf16",
                num_examples=1,
                loss=1.0,
            )
            raw.say_frame(encode(start))
            raw.say_frame(encode(ms.UpdateChunk(digest=digest, offset=0), data))
        elif isinstance(message, ms.Receipt):
            done += 1


async def honest(port: int, tokens: list[str], rounds: int) -> None:
    """Let one edge for each token play all rounds; the first is ready only at a line of stdin, since all are awaited."""
    gate = asyncio.Semaphore(32)

    async def come(number: int) -> Raw:
        async with gate:
            raw = await Raw.to(port, number)
            await raw.greet(tokens[number], tokens[number])
            return raw

    async def take_all(number: int) -> None:
        await take_part(await come(number), number, rounds)

    here = [asyncio.create_task(take_all(number)) for number in range(1, len(tokens))]
    last = await come(0)  # no round opens before it is ready
    await asyncio.to_thread(sys.stdin.readline)
    await asyncio.gather(take_part(last, 0, rounds), *here)
    print("played", flush=True)
    await asyncio.to_thread(sys.stdin.readline)


async def _slow_reader(raw: Raw, token: str) -> None:
    welcome = await raw.greet(token, token)
    assert welcome.emulator is not None
    raw.say_frame(encode(ms.BlobRequest(digest=welcome.emulator.digest)))
    raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await asyncio.Event().wait()


async def _slow_head(raw: Raw, _: str) -> None:
    for byte in b"GET /healthz HTTP/1.1\r\nX: " + b"a" * 10_000:
        raw.say(bytes([byte]))
        await asyncio.sleep(0.5)


async def _half_open(raw: Raw, _: str) -> None:
    raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await asyncio.Event().wait()


async def _garbage(raw: Raw, _: str) -> None:
    raw.say(os.urandom(2000) + b"\r\n\r\n")
    await raw.reader.read()
    await asyncio.sleep(1)


async def _handshakes(raw: Raw, _: str) -> None:
    with contextlib.suppress(ConnectionError):
        await raw.upgrade("guess")
    await asyncio.sleep(0.2)


async def _never_hello(raw: Raw, token: str) -> None:
    await raw.upgrade(token)
    await raw.reader.read()


async def _pings(raw: Raw, token: str) -> None:
    await raw.upgrade(token)
    for _ in range(20):
        for _ in range(100):
            raw.say_frame(b"", 9)
        await asyncio.sleep(0.05)
    await raw.reader.read()


async def _endless_upload(raw: Raw, token: str) -> None:
    await raw.greet(token, token)
    raw.say_frame(encode(ms.Ready(num_examples=1)))
    digest = ms.Digest("0" * 64)
    start = ms.UpdateStart(
        round=1, base=digest, alignment=0, digest=digest, bytes=4000, codec="bf16", num_examples=1, loss=1.0
    )
    raw.say_frame(encode(start))
    for offset in range(3999):
        raw.say_frame(encode(ms.UpdateChunk(digest=digest, offset=offset), b"x"))
        await asyncio.sleep(1)


DEEDS: tuple[Callable[[Raw, str], Awaitable[None]], ...] = (
    _slow_reader,
    _slow_head,
    _half_open,
    _garbage,
    _handshakes,
    _never_hello,
    _pings,
    _endless_upload,
)


async def hostile(port: int, tokens: list[str], seconds: float) -> None:
    """Let as many connections as there are tokens do their worst, each again when it was ended; say when all have begun."""
    slowly = len(tokens) / 100.0  # seconds in which they come
    until = time.monotonic() + seconds + slowly

    async def one(number: int) -> None:
        await asyncio.sleep(number / len(tokens) * slowly)
        while time.monotonic() < until:
            raw = None
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, AssertionError, asyncio.LimitOverrunError):
                async with asyncio.timeout(max(0.1, until - time.monotonic())):
                    raw = await Raw.to(port, 4096 + number)
                    await DEEDS[number % len(DEEDS)](raw, tokens[number])
            if raw is not None:
                raw.close()
            await asyncio.sleep(1)

    async def tell() -> None:
        await asyncio.sleep(slowly)
        print("besieged", flush=True)

    await asyncio.gather(tell(), *(one(number) for number in range(len(tokens))))


async def floods(port: int, token: str) -> dict[str, float]:
    """Return how many of 600 connections of one address are answered, and how much of a blob one gets who stops reading."""

    async def asks(_: int) -> bool:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            raw = await Raw.to(port, 1)
            try:
                raw.say(b"GET /healthz HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
                return b'"fedsoda"' in await raw.reader.read()
            finally:
                raw.close()
        return False

    raw = await Raw.to(port, 2)
    welcome = await raw.greet(token, token)
    assert welcome.emulator is not None
    raw.say_frame(encode(ms.BlobRequest(digest=welcome.emulator.digest)))
    raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
    gate = asyncio.Semaphore(40)

    async def one(number: int) -> bool:
        async with gate:
            return await asks(number)

    started = time.monotonic()
    answered = sum(await asyncio.gather(*(one(number) for number in range(600))))
    allowed = strangers.HANDSHAKES_AT_ONCE + strangers.HANDSHAKES_A_SECOND * (time.monotonic() - started + 1)
    await asyncio.sleep(4.0)
    raw.writer.transport.resume_reading()  # type: ignore[attr-defined]
    came = 0
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(5):
            while piece := await raw.reader.read(1 << 16):
                came += len(piece)
    raw.close()
    return {"answered_of_one_address": answered, "allowed_of_one_address": allowed, "blob_bytes_unread_too_long": came}


def main() -> None:
    """Be the peers that are asked for."""
    raise_limit()
    kind, port, value, *how = sys.argv[1:]
    if how == ["tls"]:
        SSLProtocol.max_size = 4 << 10  # of a buffer for each connection, 256 KiB as asyncio has it
        Raw.encryption = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        Raw.encryption.check_hostname, Raw.encryption.verify_mode = False, ssl.CERT_NONE
    tokens = json.loads(sys.stdin.readline())
    if kind == "honest":
        asyncio.run(honest(int(port), tokens, int(float(value))))
    else:
        asyncio.run(hostile(int(port), tokens, float(value)))


if __name__ == "__main__":
    main()
