"""Serve a small network of real sockets in a thread: proxies that help, refuse or are dead, and a scripted hub.

What a test or a case of `bench_inputs` does with them is its own matter; no name here leads out of this machine.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.manifest import parse_manifest
from fedsoda_edge.protocol.session import Gathered, InMemory, Upload
from fedsoda_edge.testing import ScriptedHub
from fedsoda_hub.federation.state import LedgerState
from fedsoda_hub.run.status import LiveStatus, live_status, run_status
from fedsoda_hub.run.tokens import Token
from fedsoda_hub.serving.connection import Connection, Hub
from fedsoda_hub.serving.listener import Server, bind
from fedsoda_hub.serving.metrics import Metrics
from fedsoda_hub.serving.roster import refused_as_a_copy

Serving = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


@contextlib.contextmanager
def _in_thread(serve: Callable[[], contextlib.AbstractAsyncContextManager[int]]) -> Iterator[int]:
    """Run a server's event loop in a thread; give its port."""
    ready, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()
    port = 0

    async def run() -> None:
        nonlocal port
        async with serve() as port:
            ready.set()
            await stop.wait()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    try:
        assert ready.wait(30), "the server does not start"
        yield port
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()


@contextlib.asynccontextmanager
async def _tcp(serving: Serving) -> AsyncIterator[int]:
    server = await asyncio.start_server(serving, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await source.read(1 << 16):
            sink.write(piece)
            await sink.drain()
    with contextlib.suppress(OSError):
        sink.close()


@dataclass
class Answers:
    """A server that gives each request's head to `answer`, sends what it returns, and hangs up. heads: what was asked."""

    answer: Callable[[str], bytes]
    heads: list[str] = field(default_factory=list)
    _exit: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    port: int = 0

    def __enter__(self) -> Answers:
        self.port = self._exit.enter_context(_in_thread(lambda: _tcp(self._serve)))
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            self.heads.append((await reader.readuntil(b"\r\n\r\n")).decode("latin-1"))
            writer.write(self.answer(self.heads[-1]))
            await writer.drain()
        writer.close()


def answer(status: str, body: bytes = b"", **headers: str) -> bytes:
    """Make an HTTP answer."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass
class Front:
    """A server in front of a hub, which passes requests on but those that meet trouble.

    trouble: given a request's head, returns what is sent instead of an answer before it hangs up; None: nothing.
    below: the path below which the hub is. drops_upgrade: whether it passes no header Upgrade on.
    """

    hub_port: int
    trouble: Callable[[str], bytes | None]
    below: str = ""
    drops_upgrade: bool = False
    heads: list[str] = field(default_factory=list)
    _exit: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    port: int = 0

    def __enter__(self) -> Front:
        self.port = self._exit.enter_context(_in_thread(lambda: _tcp(self._serve)))
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            self.heads.append(head)
            instead = self.trouble(head)
            if not head.split(" ")[1].startswith(f"{self.below}/"):
                instead = answer("404 Not Found", b"<html>")
            head = head.replace(f" {self.below}/", " /", 1)
            if self.drops_upgrade:
                head = re.sub(r"(?im)^upgrade:.*\r\n", "", head)
            if instead is not None:
                writer.write(instead)
                await writer.drain()
            else:
                onward_reader, onward = await asyncio.open_connection("127.0.0.1", self.hub_port)
                if "upgrade: websocket" not in head.lower():  # one request a connection, so that each is looked at
                    head = re.sub(r"(?im)^connection:.*\r\n", "", head).replace("\r\n", "\r\nConnection: close\r\n", 1)
                onward.write(head.encode("latin-1"))
                await asyncio.gather(_pump(reader, onward), _pump(onward_reader, writer))
        writer.close()


@dataclass
class SmallProxy:
    """A proxy for HTTP and SOCKS 5 on one port.

    names: ports of this machine by names that only the proxy knows. refuses: the status that it answers CONNECT with
    instead; 0: none. password: "user:password" that it asks for. asked: what was asked of it, such as
    "CONNECT hub.internal:80".
    """

    names: Mapping[str, int] = field(default_factory=dict)
    refuses: int = 0
    password: str = ""
    asked: list[str] = field(default_factory=list)
    _exit: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    port: int = 0

    def __enter__(self) -> SmallProxy:
        self.port = self._exit.enter_context(_in_thread(lambda: _tcp(self._serve)))
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _there(self, host: str, port: int) -> tuple[str, int]:
        return ("127.0.0.1", self.names[host]) if host in self.names else (host, port)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            first = await reader.readexactly(1)
            if first == b"\x05":
                await self._socks(reader, writer)
            else:
                await self._http(first + await reader.readuntil(b"\r\n\r\n"), reader, writer)
        writer.close()

    async def _http(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, _, rest = head.decode("latin-1").partition("\r\n")
        verb, target, _ = line.split(" ")
        self.asked.append(f"{verb} {target}")
        given = re.search(r"^proxy-authorization: basic (\S+)", rest, re.MULTILINE | re.IGNORECASE)
        if self.password and (not given or base64.b64decode(given[1]).decode() != self.password):
            writer.write(answer("407 Proxy Authentication Required", b"<html>", Proxy_Authenticate="Basic"))
        elif verb == "CONNECT":
            host, _, port = target.rpartition(":")
            if self.refuses:
                writer.write(answer(f"{self.refuses} No", b"<html>no"))
            else:
                await self._join(
                    self._there(host.strip("[]"), int(port)), reader, writer, b"HTTP/1.1 200 OK\r\n\r\n", b""
                )
        else:
            parts = urlsplit(target)
            onward = f"{verb} {parts.path} HTTP/1.1\r\nConnection: close\r\n" + re.sub(
                r"(?im)^(proxy-authorization|connection):.*\r\n", "", rest
            )
            there = self._there(parts.hostname or "", parts.port or 80)
            await self._join(there, reader, writer, b"", onward.encode("latin-1"))

    async def _socks(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly((await reader.readexactly(1))[0])  # the methods that the client knows
        writer.write(b"\x05\x00")
        _, _, _, kind = await reader.readexactly(4)
        if kind == 3:
            host = (await reader.readexactly((await reader.readexactly(1))[0])).decode()
        else:
            family, size = (socket.AF_INET, 4) if kind == 1 else (socket.AF_INET6, 16)
            host = socket.inet_ntop(family, await reader.readexactly(size))
        port = int.from_bytes(await reader.readexactly(2), "big")
        self.asked.append(f"SOCKS5 {host}:{port}")
        if self.refuses:
            writer.write(b"\x05\x02\x00\x01" + bytes(6))  # not allowed by ruleset
            return
        await self._join(self._there(host, port), reader, writer, b"\x05\x00\x00\x01" + bytes(6), b"")

    async def _join(
        self, there: tuple[str, int], reader: asyncio.StreamReader, writer: asyncio.StreamWriter, down: bytes, up: bytes
    ) -> None:
        onward_reader, onward = await asyncio.open_connection(*there)
        writer.write(down)
        onward.write(up)
        await asyncio.gather(_pump(reader, onward), _pump(onward_reader, writer))


class SmallHub(ScriptedHub):
    """A scripted hub behind the real port. It knows the token "good"; that of "old" was revoked.

    revoked: whether "good" is refused from now on, as after `token revoke`. greetings: how many Hellos came.
    """

    stall_seconds = 60.0
    max_update_bytes = 1 << 24

    def __init__(self, bundle: Path, rounds: int = 1, host: str = "127.0.0.1") -> None:
        self.metrics = Metrics()
        super().__init__(rounds, bundle=bundle)
        self.revoked = False
        self._host = host
        self.greetings = 0
        manifest = bundle / "manifest.json"
        self._files = {file.sha256: bundle / file.name for file in parse_manifest(manifest.read_bytes()).files}
        self._files[self._welcome().manifest.digest] = manifest
        self._connection: Connection | None = None
        self._exit = contextlib.ExitStack()
        self._loop = asyncio.new_event_loop()  # its thread's own, once it serves
        self._loop.close()
        self.port = 0

    def __enter__(self) -> SmallHub:
        self.port = self._exit.enter_context(_in_thread(self._listening))
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def hang_up(self) -> None:
        """End the conversation with the edge, which may come again."""
        connection = self._connection
        assert connection is not None, "an edge said Hello before"
        self._loop.call_soon_threadsafe(connection.close)

    @contextlib.asynccontextmanager
    async def _listening(self) -> AsyncIterator[int]:
        self._loop = asyncio.get_running_loop()
        taken = bind(self._host, self.port)
        defects: list[Exception] = []
        server = Server(Hub(self, self, self), defects.append)
        serving = asyncio.create_task(server.serve(sockets=[taken]))
        await server.has_started.wait()
        try:
            yield taken.getsockname()[1]
        finally:
            server.should_exit = True
            await serving
            taken.close()
            assert defects == []

    async def prove(self, request: bytes) -> tuple[int, bytes]:
        return 403, b'{"reason": "this hub takes tokens alone"}'

    def token(self, secret: str) -> Token | None:
        known = {"good": self.revoked, "old": True}
        return Token(ms.EdgeId("clinic-7"), None, known[secret]) if secret in known else None

    async def greet(self, connection: Connection, hello: ms.Hello) -> ms.Welcome | ms.Refusal | None:
        self.greetings += 1
        if self._connection is not None:
            if (refusal := refused_as_a_copy(self._connection, hello)) is not None:
                return refusal
            self._connection.close()
        connection.hello = hello
        self._connection = connection
        return self._welcome()

    def _say(self, message: ms.HubMessage) -> None:
        if self._connection is not None:
            self._connection.send(message)

    def gather(self, edge: ms.EdgeId, start: ms.UpdateStart) -> Gathered:
        return InMemory()

    async def said(self, connection: Connection, message: ms.EdgeMessage | Upload) -> None:
        match message:
            case ms.Ready():
                self._offer()
            case Upload():
                self.updates.append(message.start)
                self._say(ms.Receipt(round=message.start.round, digest=message.start.digest))
                self._offer()
            case _:
                pass

    def ended(self, connection: Connection) -> None:
        if self._connection is connection:
            self._connection = None

    def bundle_file(self, digest: str) -> Path | None:
        return self._files.get(digest)

    async def run_blob(self, digest: str) -> Path | None:
        return None

    health = "serving"

    def is_admin(self, secret: str) -> bool:
        return False

    async def status(self) -> LiveStatus:
        return live_status(run_status("scripted", 1, [], LedgerState()), [])
