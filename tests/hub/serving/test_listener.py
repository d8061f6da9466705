"""The hub's one port, spoken to with real websockets and HTTP: who is let in, what is served, what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from fedsoda_edge.errors import RefusedByHub, UsageProblem
from fedsoda_edge.network.hub_transport import HubTransport
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.codec import MAX_CHUNK_BYTES, MAX_FRAME_BYTES, MAX_HEADER_BYTES, decode, encode
from fedsoda_edge.protocol.session import Blob, EdgeSession, Gathered, InMemory, Upload, chunks
from fedsoda_hub.federation.state import LedgerState
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.status import LiveStatus, live_status, run_status
from fedsoda_hub.run.tokens import Token
from fedsoda_hub.serving import listener
from fedsoda_hub.serving.connection import MAX_QUEUED_BYTES, PIECE_BYTES, Connection, Hub
from fedsoda_hub.serving.listener import UNKNOWN_TOKEN, Server, bind, make_app
from fedsoda_hub.serving.metrics import Metrics
from fedsoda_hub.serving.ordering import ask_running_hub
from fedsoda_hub.serving.strangers import Handshakes

SHARD = bytes(range(256)) * 4
SHARD_DIGEST = hashlib.sha256(SHARD).hexdigest()
VIEW = b"v" * (MAX_CHUNK_BYTES + 100)  # two chunks
VIEW_DIGEST = ms.Digest(hashlib.sha256(VIEW).hexdigest())
UPDATE = b"u" * (MAX_CHUNK_BYTES + 7)
UPDATE_DIGEST = ms.Digest(hashlib.sha256(UPDATE).hexdigest())
HELLO = ms.Hello(
    protocol=ms.PROTOCOL_VERSION,
    software="test",
    device_id="laptop",
    device=ms.DeviceFacts(ram_bytes=1, vram_bytes=0, disk_bytes=1, threads=1, accelerator=""),
)


STATUS: LiveStatus = live_status(run_status("triage", 1, [], LedgerState()), [], url="http://here")


class MemoryHub:
    """What the listener needs of a hub, remembered: alice's token is good, that of mallory was revoked.

    defects: what the listener says that its own code raised.
    """

    def __init__(self, shard: Path) -> None:
        self.stall_seconds = 30.0
        self.max_update_bytes = 1 << 20
        self.shard = shard
        self.view = shard.with_name("view")
        self.view.write_bytes(VIEW)
        self.greeted: list[Connection] = []
        self.heard: list[ms.EdgeMessage | Upload] = []
        self.gone: list[Connection] = []
        self.defects: list[Exception] = []
        self.metrics = Metrics()

    @property
    def parts(self) -> Hub:
        return Hub(self, self, self)

    def token(self, secret: str) -> Token | None:
        known = {name: Token(ms.EdgeId(name), None, name == "mallory") for name in ("alice", "bob", "mallory")}
        return known.get(secret)

    async def prove(self, request: bytes) -> tuple[int, bytes]:
        return 200, request

    health = "serving"

    def is_admin(self, secret: str) -> bool:
        return secret == "admin"

    def bundle_file(self, digest: str) -> Path | None:
        return self.shard if digest == SHARD_DIGEST else None

    async def run_blob(self, digest: str) -> Path | None:
        return self.view if digest == VIEW_DIGEST else None

    def gather(self, edge: ms.EdgeId, start: ms.UpdateStart) -> Gathered:
        return InMemory()

    async def status(self) -> LiveStatus:
        return STATUS

    async def greet(self, connection: Connection, hello: ms.Hello) -> ms.Welcome | ms.Refusal | None:
        self.greeted.append(connection)
        return ms.Welcome(
            protocol=ms.PROTOCOL_VERSION,
            run_id="1",
            run_name="triage",
            edge=connection.edge,
            manifest=ms.BlobRef(digest=VIEW_DIGEST, bytes=len(VIEW)),
            rounds=1,
            rounds_done=0,
            template=None,
            max_length=8,
            codec="int8",
            seed=0,
            stall_seconds=self.stall_seconds,
        )

    async def said(self, connection: Connection, message: ms.EdgeMessage | Upload) -> None:
        self.heard.append(message)

    def ended(self, connection: Connection) -> None:
        self.gone.append(connection)


@pytest.fixture
def hub(tmp_path: Path) -> MemoryHub:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "admin.token").write_text("admin")
    shard = tmp_path / "bundle" / "norm.safetensors"
    shard.write_bytes(SHARD)
    return MemoryHub(shard)


def serve(hub: MemoryHub, talk: Callable[[str], Awaitable[None]]) -> None:
    """Run the real server around the hub and `talk` to its address."""

    async def both() -> None:
        server, taken = Server(hub.parts, hub.defects.append), bind("127.0.0.1", 0)
        serving = asyncio.create_task(server.serve(sockets=[taken]))
        await server.has_started.wait()
        try:
            await talk(f"127.0.0.1:{taken.getsockname()[1]}")
        finally:
            server.should_exit = True
            await serving
            taken.close()

    asyncio.run(both())


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def session(address: str, token: str = "alice") -> AsyncIterator[ClientConnection]:
    """A websocket with that token on which nothing was said yet."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with connect(
        f"ws://{address}/v1/session", additional_headers=headers, compression=None, proxy=None
    ) as socket:
        yield socket


async def hear(socket: ClientConnection) -> ms.AnyMessage:
    async with asyncio.timeout(10):
        frame = await socket.recv()
    assert isinstance(frame, bytes)
    return decode(frame)[0]


async def greet(socket: ClientConnection) -> EdgeSession:
    """Hello and Welcome; the conversation from here on."""
    said = EdgeSession()
    await socket.send(said.send(HELLO))
    frame = await socket.recv()
    assert isinstance(frame, bytes)
    assert isinstance(said.receive(frame), ms.Welcome)
    return said


async def assert_hub_ends_it(socket: ClientConnection) -> None:
    async with asyncio.timeout(10):
        with pytest.raises(ConnectionClosed):
            await socket.recv()


# --- the token -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        ({}, "the request has no token; join with a join link or --token-file"),
        ({"Authorization": "Bearer"}, "the request has no token; join with a join link or --token-file"),
        ({"Authorization": "Basic alice"}, "the request has no token; join with a join link or --token-file"),
        ({"Authorization": "Bearer guess"}, UNKNOWN_TOKEN),
        ({"Authorization": "Bearer mallory"}, "the token of mallory was revoked; ask the hub's owner for a new one"),
    ],
    ids=["none", "empty", "not a bearer", "unknown", "revoked"],
)
def test_without_a_good_token_there_is_no_upgrade_and_no_blob(
    hub: MemoryHub, headers: dict[str, str], why: str
) -> None:
    async def talk(address: str) -> None:
        with pytest.raises(InvalidStatus) as refused:
            await connect(f"ws://{address}/v1/session", additional_headers=headers, proxy=None)
        assert refused.value.response.status_code == 401
        assert json.loads(refused.value.response.body or b"") == {"reason": why}
        async with httpx.AsyncClient(verify=False, trust_env=False, headers=headers) as client:
            answer = await client.get(f"http://{address}/v1/blobs/{SHARD_DIGEST}")
        assert (answer.status_code, answer.json()) == (401, {"reason": why})

    serve(hub, talk)
    assert hub.greeted == hub.gone == []


def test_an_edge_reads_a_refused_token_as_exit_status_5_with_the_hubs_reason(hub: MemoryHub) -> None:
    async def talk(address: str) -> None:
        edge = HubTransport(f"http://{address}", "mallory")
        with pytest.raises(
            RefusedByHub, match=r"the token of mallory was revoked; ask the hub's owner for a new one"
        ) as refused:
            await edge.connect()
        assert refused.value.exit_status == 5
        with pytest.raises(RefusedByHub, match="revoked"):
            [piece async for piece in edge.fetch(SHARD_DIGEST, 0)]

    serve(hub, talk)


# --- blobs over HTTP -------------------------------------------------------------------------------------------------


def test_a_bundle_file_comes_whole_or_by_range(hub: MemoryHub) -> None:
    async def talk(address: str) -> None:
        url = f"http://{address}/v1/blobs/{SHARD_DIGEST}"
        async with httpx.AsyncClient(
            verify=False, trust_env=False, headers={"Authorization": "Bearer alice"}
        ) as client:
            whole = await client.get(url)
            assert (whole.status_code, whole.content) == (200, SHARD)
            for asked, content in (("bytes=1000-", SHARD[1000:]), ("bytes=2-4", SHARD[2:5]), ("bytes=-3", SHARD[-3:])):
                part = await client.get(url, headers={"Range": asked})
                assert (part.status_code, part.content) == (206, content), asked
            assert part.headers["content-range"] == "bytes 1021-1023/1024"
            assert (await client.get(url, headers={"Range": "bytes=1024-"})).status_code == 416
        edge = HubTransport(f"http://{address}", "alice")
        for offset in (0, 1000):
            assert b"".join([piece async for piece in edge.fetch(SHARD_DIGEST, offset)]) == SHARD[offset:]

    serve(hub, talk)


async def status_line(address: str, target: str, *headers: str) -> bytes:
    """Of a GET whose target is sent as it is: HTTP clients tidy up dots."""
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    lines = [f"GET {target} HTTP/1.1", f"Host: {address}", "Connection: close", *headers, "", ""]
    writer.write("\r\n".join(lines).encode())
    answer = await reader.read()
    writer.close()
    assert b"admin" not in answer  # what the file outside the bundle holds
    return answer.splitlines()[0]


def test_what_is_no_digest_of_the_bundle_is_not_there(hub: MemoryHub) -> None:
    paths = ["../admin.token", "..%2fadmin.token", "%2e%2e/admin.token", "..", "norm.safetensors", "%00", ""]
    digests = ["a" * 64, SHARD_DIGEST.upper(), SHARD_DIGEST[:-1]]

    async def talk(address: str) -> None:
        for name in paths + digests:
            line = await status_line(address, f"/v1/blobs/{name}", "Authorization: Bearer alice")
            assert line == b"HTTP/1.1 404 Not Found", name
        assert (await status_line(address, f"/v1/blobs/{SHARD_DIGEST}", "Authorization: Bearer alice")).endswith(b"OK")

    serve(hub, talk)


# --- health, metrics, status -----------------------------------------------------------------------------------------


def test_on_loopback_health_metrics_and_status_are_open(hub: MemoryHub) -> None:
    async def talk(address: str) -> None:
        async with httpx.AsyncClient(verify=False, trust_env=False, base_url=f"http://{address}") as client:
            assert (await client.get("/healthz")).json() == {"hub": "fedsoda", "protocol": 1, "state": "serving"}
            assert "fedsoda_rounds_total 0.0" in (await client.get("/metrics")).text.splitlines()
            assert (await client.get("/v1/status")).json() == msgspec.to_builtins(STATUS)

    serve(hub, talk)


def ask(hub: MemoryHub, path: str, client: tuple[str, int] | None, token: str) -> int:
    """The HTTP status for a client at that address."""
    answers: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        answers.append(dict(message))

    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1:8470"), *([(b"authorization", f"Bearer {token}".encode())] if token else [])],
        "client": client,
    }
    app = make_app(hub.parts, hub.defects.append, Handshakes(time.monotonic))

    async def ask() -> None:
        await app(scope, receive, send)

    asyncio.run(ask())
    return int(answers[0]["status"])


@pytest.mark.parametrize("client", [("203.0.113.7", 4711), ("2001:db8::7", 4711), ("not-an-address", 0), None])
@pytest.mark.parametrize("path", ["/metrics", "/v1/status"])
def test_from_elsewhere_metrics_and_status_need_the_admin_token_and_health_none(
    hub: MemoryHub, path: str, client: tuple[str, int] | None
) -> None:
    assert [ask(hub, path, client, token) for token in ("", "guess", "alice", "admin")] == [401, 401, 401, 200]
    assert ask(hub, "/healthz", client, "") == 200


@pytest.mark.parametrize("client", [("127.0.0.1", 4711), ("127.8.8.8", 4711), ("::1", 4711)])
def test_every_loopback_address_is_loopback(hub: MemoryHub, client: tuple[str, int]) -> None:
    assert ask(hub, "/v1/status", client, "") == 200


def test_who_comes_through_a_proxy_on_this_machine_is_not_on_loopback(hub: MemoryHub) -> None:
    async def talk(address: str) -> None:
        proxied = {"X-Forwarded-For": "203.0.113.7"}
        async with httpx.AsyncClient(
            verify=False, trust_env=False, base_url=f"http://{address}", headers=proxied
        ) as client:
            assert (await client.get("/v1/status")).status_code == 401
            assert (await client.get("/metrics")).status_code == 401
            admin = {"Authorization": "Bearer admin"}
            assert (await client.get("/v1/status", headers=admin)).status_code == 200

    serve(hub, talk)


# --- the conversation --------------------------------------------------------------------------------------------------


def headed(header: bytes) -> bytes:
    """A frame with this header, whatever it holds."""
    return len(header).to_bytes(4, "big") + header


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (b"", "a frame of 0 bytes announces a header of 0 bytes, so it is damaged"),
        (b"GET / HTTP/1.1", "it is damaged"),
        (b"\x00\x00\x00\x02{}", "a frame holds no message of this protocol"),
        (headed(b'{"type":"' + b"x" * (MAX_HEADER_BYTES - 11) + b'"}'), "a frame holds no message of this protocol"),
        ("text", "the edge sent text, but frames are binary"),
        (encode(ms.Ready(num_examples=3)), "the edge sent Ready in state new"),
        (encode(ms.BlobRequest(digest=VIEW_DIGEST)), "the edge sent BlobRequest in state new"),
        (encode(ms.Farewell(rounds=1, reason="")), "the edge sent Farewell, which only hubs say"),
    ],
    ids=["empty", "garbage", "no message", "a long message", "text", "Ready", "BlobRequest", "a hub's message"],
)
def test_what_may_not_be_said_before_hello_is_refused_and_ends_the_connection(
    hub: MemoryHub, frame: bytes | str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def talk(address: str) -> None:
        async with session(address) as socket:
            await socket.send(frame)
            refusal = await hear(socket)
            assert isinstance(refusal, ms.Refusal)
            assert refusal.fatal
            assert why in refusal.reason
            await assert_hub_ends_it(socket)

    serve(hub, talk)
    assert (hub.greeted, hub.heard, len(hub.gone)) == ([], [], 1)
    assert caplog.text == ""  # an edge cannot make the hub print tracebacks


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (HELLO, "the edge sent Hello in state open"),
        (ms.UpdateChunk(digest=UPDATE_DIGEST, offset=0), "a chunk of an update it had not announced"),
        (ms.BlobRequest(digest=UPDATE_DIGEST), f"this round has no blob {UPDATE_DIGEST[:12]} with a byte 0"),
        (ms.BlobRequest(digest=ms.Digest("../admin.token")), "Expected `str` matching regex"),
        (
            ms.BlobRequest(digest=VIEW_DIGEST, offset=len(VIEW)),
            f"this round has no blob {VIEW_DIGEST[:12]} with a byte {len(VIEW)}",
        ),
        (ms.BlobRequest(digest=VIEW_DIGEST, offset=-1), f"this round has no blob {VIEW_DIGEST[:12]} with a byte -1"),
        (ms.Progress(round=1, step=10**400, steps=1), "Expected `int` <= 2147483648 - at `$.step`"),
        (ms.Progress(round=1, step=1, steps=-1), "Expected `int` >= 0 - at `$.steps`"),
    ],
    ids=[
        "Hello again",
        "unannounced chunk",
        "unknown blob",
        "a path",
        "past the end",
        "before the start",
        "a step that no bar can show",
        "steps below 0",
    ],
)
def test_what_may_not_be_said_after_hello_is_refused_and_ends_the_connection(
    hub: MemoryHub, message: ms.EdgeMessage, why: str
) -> None:
    async def talk(address: str) -> None:
        async with session(address) as socket, session(address, "bob") as bystander:
            await greet(socket)
            said = await greet(bystander)
            await socket.send(encode(message))
            refusal = await hear(socket)
            assert isinstance(refusal, ms.Refusal)
            assert refusal.fatal
            assert why in refusal.reason
            await assert_hub_ends_it(socket)
            await bystander.send(said.send(ms.Ready(num_examples=3)))
            await until(lambda: hub.heard == [ms.Ready(num_examples=3)])  # others do not notice

    serve(hub, talk)


def test_a_frame_above_the_limit_is_not_read(hub: MemoryHub) -> None:
    async def talk(address: str) -> None:
        async with session(address) as socket:
            await socket.send(b"x" * (MAX_FRAME_BYTES + 1))
            await assert_hub_ends_it(socket)
            assert socket.close_code == 1009

    serve(hub, talk)
    assert (hub.heard, len(hub.gone)) == ([], 1)


def test_messages_and_whole_uploads_reach_the_hub_in_order_without_their_chunks(
    hub: MemoryHub, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="fedsoda_hub.serving")
    start = ms.UpdateStart(
        round=1,
        base=VIEW_DIGEST,
        alignment=0,
        digest=UPDATE_DIGEST,
        bytes=len(UPDATE),
        codec="int8",
        num_examples=3,
        loss=0.5,
    )

    async def talk(address: str) -> None:
        async with session(address) as socket:
            said = await greet(socket)
            await socket.send(said.send(ms.Ready(num_examples=3)))
            await socket.send(said.send(start))
            for offset, piece in chunks(UPDATE):
                await socket.send(said.send(ms.UpdateChunk(digest=UPDATE_DIGEST, offset=offset), piece))
            await socket.send(said.send(ms.Leave(reason="done")))
            await assert_hub_ends_it(socket)

    serve(hub, talk)
    ready, announced, upload, leave = hub.heard
    assert (ready, announced, leave) == (ms.Ready(num_examples=3), start, ms.Leave(reason="done"))
    assert upload == Upload(start, UPDATE)
    assert hub.gone == hub.greeted
    came = [record.getMessage() for record in caplog.records if record.getMessage().startswith("< Update")]
    assert [line.split()[1] for line in came] == ["UpdateStart", "UpdateChunk"]  # one line for all its chunks
    assert f" offset=0 payload={len(UPDATE)} " in came[1]


@pytest.mark.parametrize("offset", [0, 50, MAX_CHUNK_BYTES])
def test_a_blob_of_the_round_comes_in_chunks_from_any_offset_and_is_one_line_of_the_log(
    hub: MemoryHub, offset: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="fedsoda_hub.serving")

    async def talk(address: str) -> None:
        async with session(address) as socket:
            said = await greet(socket)
            if offset == 0:  # as an edge asks
                await socket.send(said.request(ms.BlobRef(digest=VIEW_DIGEST, bytes=len(VIEW))))
                arrived = None
                while arrived is None:
                    frame = await socket.recv()
                    assert isinstance(frame, bytes)
                    arrived = said.receive(frame)
                assert arrived == Blob(VIEW_DIGEST, VIEW)
                return
            await socket.send(said.send(ms.BlobRequest(digest=VIEW_DIGEST, offset=offset)))
            data = b""
            while offset + len(data) < len(VIEW):
                frame = await socket.recv()
                assert isinstance(frame, bytes)
                chunk, piece = decode(frame)
                assert chunk == ms.BlobChunk(digest=VIEW_DIGEST, offset=offset + len(data), total=len(VIEW))
                data += piece
            assert data == VIEW[offset:]

    serve(hub, talk)
    [line] = [record.getMessage() for record in caplog.records if "BlobChunk" in record.getMessage()]
    assert f" offset={offset} total={len(VIEW)} " in line


def test_a_stalled_upload_ends_its_connection_and_a_silent_edge_may_stay(hub: MemoryHub) -> None:
    hub.stall_seconds = 0.1
    start = ms.UpdateStart(
        round=1, base=VIEW_DIGEST, alignment=0, digest=UPDATE_DIGEST, bytes=9, codec="int8", num_examples=3, loss=0.5
    )

    async def talk(address: str) -> None:
        async with session(address) as silent, session(address, "bob") as stalled:
            said = await greet(silent)
            uploading = await greet(stalled)
            await stalled.send(uploading.send(ms.Ready(num_examples=3)))
            await stalled.send(uploading.send(start))
            await stalled.send(uploading.send(ms.UpdateChunk(digest=UPDATE_DIGEST, offset=0), b"half"))
            await assert_hub_ends_it(stalled)
            await silent.send(said.send(ms.Ready(num_examples=4)))
            await until(lambda: ms.Ready(num_examples=4) in hub.heard)
            assert [connection.edge for connection in hub.gone] == ["bob"]

    serve(hub, talk)


def test_an_edge_that_does_not_read_holds_up_nobody(hub: MemoryHub) -> None:
    async def talk(address: str) -> None:
        async with session(address) as slow, session(address, "bob") as other:
            await greet(slow)
            await greet(other)
            to_slow, to_other = hub.greeted
            hub.view.write_bytes(bytes(60 * MAX_CHUNK_BYTES))  # 15 MiB: more than all buffers on the way
            await slow.send(encode(ms.BlobRequest(digest=VIEW_DIGEST)))
            to_other.send(ms.RoundClosed(round=1, num_updates=1))
            assert await hear(other) == ms.RoundClosed(round=1, num_updates=1)
            assert to_slow.down < 60 * MAX_CHUNK_BYTES
            slow.transport.abort()  # it would not read the closing handshake either

    serve(hub, talk)


def test_an_edge_that_does_not_read_is_ended_when_it_has_taken_nothing_for_long(hub: MemoryHub) -> None:
    hub.stall_seconds = 0.3
    hub.view.write_bytes(bytes(60 * MAX_CHUNK_BYTES))

    async def talk(address: str) -> None:
        async with session(address) as slow:
            await greet(slow)
            await slow.send(encode(ms.BlobRequest(digest=VIEW_DIGEST)))
            await until(lambda: hub.gone)
            slow.transport.abort()

    serve(hub, talk)
    assert [connection.edge for connection in hub.gone] == ["alice"]


def test_a_slow_reader_that_makes_progress_gets_the_whole_blob(hub: MemoryHub) -> None:
    hub.stall_seconds = 0.5
    data = bytes(range(256)) * (16 << 10)  # 4 MiB
    hub.view.write_bytes(data)

    async def talk(address: str) -> None:
        async with session(address) as slow:
            await greet(slow)
            await slow.send(encode(ms.BlobRequest(digest=VIEW_DIGEST)))
            came = b""
            while len(came) < len(data):
                frame = await slow.recv()
                assert isinstance(frame, bytes)
                came += decode(frame)[1]
                await asyncio.sleep(0.015)  # longer than a stall, all in all
            assert came == data

    serve(hub, talk)


def test_of_a_blob_that_nobody_reads_the_hub_holds_a_piece(hub: MemoryHub) -> None:
    hub.view.write_bytes(bytes(60 * MAX_CHUNK_BYTES))

    async def talk(address: str) -> None:
        async with session(address) as slow:
            await greet(slow)
            [connection] = hub.greeted
            await slow.send(encode(ms.BlobRequest(digest=VIEW_DIGEST)))
            before = -1
            while connection.down != before:
                before = connection.down
                await asyncio.sleep(0.1)
            lending = connection._lending
            assert lending is not None
            assert 0 <= lending.offset - connection.down <= PIECE_BYTES
            assert not connection._out
            slow.transport.abort()

    serve(hub, talk)


def test_a_second_blob_is_not_asked_for_before_the_first_has_come(hub: MemoryHub) -> None:
    hub.view.write_bytes(bytes(60 * MAX_CHUNK_BYTES))

    async def talk(address: str) -> None:
        async with session(address) as greedy:
            await greet(greedy)
            for _ in range(2):
                await greedy.send(encode(ms.BlobRequest(digest=VIEW_DIGEST)))
            last: ms.AnyMessage | None = None
            with contextlib.suppress(ConnectionClosed):
                while True:
                    last = await hear(greedy)
            assert isinstance(last, ms.Refusal)
            assert last.fatal
            assert "ask for one at a time" in last.reason

    serve(hub, talk)


def test_messages_that_nobody_reads_end_the_conversation_and_do_not_pile_up(hub: MemoryHub) -> None:
    async def talk(address: str) -> None:
        async with session(address) as deaf:
            await greet(deaf)
            [connection] = hub.greeted
            frame = encode(ms.RoundClosed(round=1, num_updates=1))
            for _ in range(MAX_QUEUED_BYTES // len(frame) + 10):
                connection.send(ms.RoundClosed(round=1, num_updates=1))
            assert connection._queued_bytes <= MAX_QUEUED_BYTES
            await until(lambda: hub.gone)
            deaf.transport.abort()

    serve(hub, talk)


def test_one_edge_takes_a_few_files_at_once_and_more_when_those_are_read(
    hub: MemoryHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "MAX_FILES", 2)
    hub.shard.write_bytes(bytes(32 << 20))

    async def asked(address: str, token: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*address.split(":"), limit=1 << 12)
        writer.write(
            f"GET /v1/blobs/{SHARD_DIGEST} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
        )
        return reader, writer

    async def talk(address: str) -> None:
        held = [await asked(address, "alice") for _ in range(2)]
        for reader, _ in held:
            assert (await reader.readline()).endswith(b"200 OK\r\n")
        reader, writer = await asked(address, "alice")
        assert b" 429 " in await reader.readline()
        other, third = await asked(address, "bob")
        assert (await other.readline()).endswith(b"200 OK\r\n")
        for one in (*(one for _, one in held), writer, third):
            one.transport.abort()
        await asyncio.sleep(0.2)
        reader, writer = await asked(address, "alice")
        assert (await reader.readline()).endswith(b"200 OK\r\n")
        writer.transport.abort()

    serve(hub, talk)


def test_a_download_that_nobody_reads_is_ended(hub: MemoryHub) -> None:
    hub.stall_seconds = 0.3
    hub.shard.write_bytes(bytes(32 << 20))

    async def talk(address: str) -> None:
        reader, writer = await asyncio.open_connection(*address.split(":"), limit=1 << 12)
        writer.write(
            f"GET /v1/blobs/{SHARD_DIGEST} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer alice\r\n\r\n".encode()
        )
        await asyncio.sleep(1.5)
        came = 0
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(5):
                while piece := await reader.read(1 << 16):
                    came += len(piece)
        assert came < 32 << 20
        writer.close()

    serve(hub, talk)


def test_what_was_said_before_close_still_leaves(hub: MemoryHub) -> None:
    async def talk(address: str) -> None:
        async with session(address) as socket:
            await greet(socket)
            [connection] = hub.greeted
            connection.send(ms.Farewell(rounds=1, reason="the run is over"))
            connection.close()
            connection.send(ms.RoundClosed(round=1, num_updates=1))  # too late, and no error
            assert await hear(socket) == ms.Farewell(rounds=1, reason="the run is over")
            await assert_hub_ends_it(socket)

    serve(hub, talk)


def test_a_connection_counts_payload_and_framing_of_its_websocket(hub: MemoryHub) -> None:
    short, long = encode(ms.BlobRequest(digest=VIEW_DIGEST)), encode(ms.Paused(reason="the lid is closed " * 10))
    assert len(short) < 126 <= len(long)

    async def talk(address: str) -> None:
        async with session(address) as socket:
            await greet(socket)
            [connection] = hub.greeted
            await until(lambda: connection.down)
            up, down = connection.up, connection.down
            await socket.send(short)
            await socket.send(long)
            *pieces, last = [await socket.recv() for _ in range(5)]
            await until(lambda: hub.heard)
            assert connection.up - up == len(short) + 2 + 4 + len(long) + 4 + 4  # RFC 6455, 5.2; clients mask
            assert connection.down - down == sum(len(one) + 10 for one in pieces) + len(last) + 4

    serve(hub, talk)


# --- what fails, and how loudly --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["greet", "said", "run_blob", "ended"])
def test_a_defect_of_the_hubs_own_code_is_told_and_does_not_look_like_a_lost_edge(hub: MemoryHub, where: str) -> None:
    defect = RuntimeError("a defect")

    def fail(*_: Any) -> Any:
        raise defect

    setattr(hub, where, fail)

    async def talk(address: str) -> None:
        async with session(address) as socket:
            if where == "greet":
                await socket.send(encode(HELLO))
            else:
                said = await greet(socket)
                asked = ms.BlobRequest(digest=VIEW_DIGEST) if where == "run_blob" else ms.Leave(reason="done")
                await socket.send(said.send(asked))
            await assert_hub_ends_it(socket)

    serve(hub, talk)
    assert [leaves(told) for told in hub.defects] == [[defect]]


def leaves(told: Exception) -> list[Exception]:
    return [one for inner in told.exceptions for one in leaves(inner)] if isinstance(told, ExceptionGroup) else [told]


def test_a_defect_behind_an_http_request_is_told_too(hub: MemoryHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> Path:
        raise RuntimeError("a defect")

    monkeypatch.setattr(hub, "bundle_file", fail)

    async def talk(address: str) -> None:
        async with httpx.AsyncClient(
            verify=False, trust_env=False, headers={"Authorization": "Bearer alice"}
        ) as client:
            assert (await client.get(f"http://{address}/v1/blobs/{SHARD_DIGEST}")).status_code == 500

    serve(hub, talk)
    assert [str(defect) for defect in hub.defects] == ["a defect"]


def test_an_edge_that_vanishes_while_it_is_spoken_to_is_no_defect(hub: MemoryHub) -> None:
    async def talk(address: str) -> None:
        async with session(address) as socket:
            await greet(socket)
            [connection] = hub.greeted
            socket.transport.abort()
            while not hub.gone:
                connection.send(ms.RoundClosed(round=1, num_updates=1))
                await asyncio.sleep(0)

    serve(hub, talk)
    assert hub.defects == []


# --- the port ------------------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_known_before_anything_is_prepared() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageProblem, match=rf"\[listen\] 127.0.0.1:{port} cannot be used .*in use") as refused:
            bind("127.0.0.1", port)
    assert refused.value.exit_status == 2
    assert str(refused.value).endswith("stop the program that uses it, or choose another port")


def test_a_port_is_free_again_at_once_after_a_hub_that_had_connections(hub: MemoryHub) -> None:
    ports: list[int] = []

    async def talk(address: str) -> None:
        ports.append(int(address.split(":")[1]))
        async with session(address) as socket:
            await greet(socket)
            hub.greeted[0].close()  # the side that closes first keeps the pair for a minute (TIME_WAIT)
            await assert_hub_ends_it(socket)

    serve(hub, talk)
    bind("127.0.0.1", ports[0]).close()


# --- asking a running hub ------------------------------------------------------------------------------------------------


def test_a_running_hub_is_asked_with_the_admin_token_of_its_run(hub: MemoryHub, tmp_path: Path) -> None:
    async def talk(address: str) -> None:
        run = RunDirectory(tmp_path)
        assert await asyncio.to_thread(ask_running_hub, run) is None  # never served
        (tmp_path / "address").write_text(f"http://{address}")
        assert await asyncio.to_thread(ask_running_hub, run) == STATUS

    serve(hub, talk)
    assert ask_running_hub(RunDirectory(tmp_path)) is None  # the address a killed hub left


@pytest.fixture
def stranger() -> Iterator[str]:
    """Another program that took the port of a hub that was killed."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_another_program_at_the_old_address_is_no_running_hub(stranger: str, tmp_path: Path) -> None:
    (tmp_path / "admin.token").write_text("admin")
    (tmp_path / "address").write_text(stranger)
    assert ask_running_hub(RunDirectory(tmp_path)) is None
