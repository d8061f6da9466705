"""The way to a hub: the first step that fails is named, downloads go by range. Every server here is a real one."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import re
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from fedsoda_edge.errors import FedSODAError, HubUnreachable, RefusedByHub, UsageProblem
from fedsoda_edge.join.download import fetch_file
from fedsoda_edge.network import checks
from fedsoda_edge.network.hub_transport import HubTransport
from fedsoda_edge.ports.store import FileStore
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.codec import decode, encode, wire_bytes
from fedsoda_edge.protocol.session import Gathered, InMemory, Upload
from fedsoda_hub.federation.state import LedgerState
from fedsoda_hub.run.status import LiveStatus, live_status, run_status
from fedsoda_hub.run.tokens import Token
from fedsoda_hub.serving.connection import Connection, Hub
from fedsoda_hub.serving.listener import UNKNOWN_TOKEN, Server, bind
from fedsoda_hub.serving.metrics import Metrics

DATA = bytes(i * i % 251 for i in range(3_000_000))
DIGEST = hashlib.sha256(DATA).hexdigest()
HELLO = ms.Hello(
    protocol=1,
    software="test",
    device_id="d",
    device=ms.DeviceFacts(ram_bytes=1, vram_bytes=0, disk_bytes=1, threads=1, accelerator=""),
)
RUN_IS_OVER = ms.Refusal(reason="this run is over", fatal=True)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


# -- servers --------------------------------------------------------------------------------------------


class SmallHub:
    """What the hub's real listener asks of a daemon: two tokens, files by digest, one answer to Hello."""

    stall_seconds = 60.0
    max_update_bytes = 1 << 20

    def __init__(self, directory: Path, answer: ms.Welcome | ms.Refusal = RUN_IS_OVER) -> None:
        self._directory = directory
        self._answer = answer
        self.metrics = Metrics()

    def token(self, secret: str) -> Token | None:
        known = {"good": False, "old": True}
        return Token(ms.EdgeId("clinic-7"), None, known[secret]) if secret in known else None

    def bundle_file(self, digest: str) -> Path | None:
        path = self._directory / digest
        return path if path.exists() else None

    async def greet(self, connection: Connection, hello: ms.Hello) -> ms.Welcome | ms.Refusal:
        return self._answer

    health = "serving"

    def is_admin(self, secret: str) -> bool:
        return False

    async def run_blob(self, digest: str) -> Path | None:
        return None

    async def status(self) -> LiveStatus:
        return live_status(run_status("triage", 1, [], LedgerState()), [])

    async def prove(self, request: bytes) -> tuple[int, bytes]:
        return 403, b"{}"

    def gather(self, edge: ms.EdgeId, start: ms.UpdateStart) -> Gathered:
        return InMemory()

    async def said(self, connection: Connection, message: ms.EdgeMessage | Upload) -> None: ...

    def ended(self, connection: Connection) -> None: ...


@pytest.fixture
def hub(tmp_path: Path) -> SmallHub:
    (tmp_path / DIGEST).write_bytes(DATA)
    return SmallHub(tmp_path)


@contextlib.asynccontextmanager
async def listening(hub: SmallHub) -> AsyncIterator[str]:
    """The URL of the hub's own listener."""
    port = bind("127.0.0.1", 0)
    defects: list[Exception] = []
    server = Server(Hub(hub, hub, hub), defects.append)
    serving = asyncio.create_task(server.serve(sockets=[port]))
    await server.has_started.wait()
    yield f"http://127.0.0.1:{port.getsockname()[1]}"
    server.should_exit = True
    await serving
    port.close()
    assert defects == []


@contextlib.asynccontextmanager
async def answering(answer: Callable[[str], bytes]) -> AsyncIterator[int]:
    """The port of a server that gives the request's head to `answer`, sends what it returns, and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            head = await reader.read(4096)
            writer.write(answer(head.decode("latin-1")))
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
    if talks := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(talks)


def http(status: str, body: bytes = b"", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def start_of_range(head: str) -> int:
    found = re.search(r"^range: bytes=(\d+)-\r$", head, re.MULTILINE | re.IGNORECASE)
    return int(found[1]) if found else 0


async def failure_of(edge: HubTransport) -> FedSODAError:
    """Why this edge cannot join."""
    with pytest.raises(FedSODAError) as failure:
        await edge.connect()
    await edge.close()
    assert "\n" not in str(failure.value)
    return failure.value


def unreachable(scheme: str, answer: Callable[[str], bytes]) -> HubUnreachable:
    """Why a server that answers like this cannot be joined; `PORT` stands for its port."""

    async def meet() -> HubUnreachable:
        async with answering(answer) as port:
            failure = await failure_of(HubTransport(f"{scheme}://127.0.0.1:{port}", "good"))
            assert isinstance(failure, HubUnreachable)
            return HubUnreachable(str(failure).replace(str(port), "PORT"), failure.step)

    return asyncio.run(meet())


# -- the way there --------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["hub.invalid", "hub..example"])
def test_a_name_without_address_fails_at_dns(host: str) -> None:
    failure = asyncio.run(failure_of(HubTransport(f"https://{host}:8470", "good")))
    assert isinstance(failure, HubUnreachable)
    assert failure.step == "DNS"
    assert str(failure).startswith(f"DNS: the name {host!r} has no address (")
    assert str(failure).endswith("; check its spelling and the network")
    assert failure.exit_status == 3


def test_a_closed_port_fails_at_tcp() -> None:
    with socket.socket() as taken:  # bound but not listening: nobody else gets the port meanwhile
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        failure = asyncio.run(failure_of(HubTransport(f"http://127.0.0.1:{port}", "good")))
    assert isinstance(failure, HubUnreachable)
    assert failure.step == "TCP"
    assert str(failure).startswith(f"TCP: nothing answers at 127.0.0.1:{port} (")
    assert str(failure).endswith("; check that the hub runs and that the port is open")
    assert failure.exit_status == 3


@pytest.mark.parametrize("words", [http("400 Bad Request"), b"SSH-2.0-OpenSSH_9.6\r\n", b""])
def test_https_to_a_port_without_tls_fails_at_tls(words: bytes) -> None:
    failure = unreachable("https", lambda _: words)
    assert failure.step == "TLS"
    says_http = words.startswith(b"HTTP/")
    what = "in plain HTTP, not in TLS" if says_http else ", but a TLS handshake with it fails"
    assert str(failure).startswith(f"TLS: 127.0.0.1:PORT answers{' ' * says_http}{what} (")
    fix = "check the port, or write http:// if that network is yours alone" if says_http else "check address and port"
    assert str(failure).endswith(f"; {fix}")
    assert failure.exit_status == 3


@pytest.mark.parametrize("words", [b"SSH-2.0-OpenSSH_9.6\r\n", b"", b"HTTP/1.1 101 Switching Protocols\r\n\r\n"])
def test_a_port_that_speaks_something_else_fails_at_http(words: bytes) -> None:
    failure = unreachable("http", lambda _: words)
    assert failure.step == "HTTP"
    assert str(failure).startswith("HTTP: http://127.0.0.1:PORT answers, but not as a hub does (")
    assert str(failure).endswith("); check address and port")
    assert failure.exit_status == 3


@pytest.mark.parametrize("status", ["200 OK", "404 Not Found", "501 Not Implemented"])
def test_a_web_server_that_is_not_a_hub_fails_at_http_with_its_status(status: str) -> None:
    failure = unreachable("http", lambda _: http(status, b"<h1>Welcome to nginx!</h1>"))
    assert failure.step == "HTTP"
    assert str(failure) == (
        f"http://127.0.0.1:PORT answers HTTP {status[:3]}, which no hub does; "
        "check the address, and the proxy if there is one"
    )
    assert failure.exit_status == 3


@pytest.mark.parametrize(("scheme", "step"), [("http", "HTTP"), ("https", "TLS")])
def test_a_port_that_stays_silent_is_given_up_and_named(
    scheme: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "OPEN_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        failure = asyncio.run(failure_of(HubTransport(f"{scheme}://127.0.0.1:{mute.getsockname()[1]}", "good")))
    assert isinstance(failure, HubUnreachable)
    assert failure.step == step
    assert re.search(r"\(time.*\); check", str(failure))  # an empty reason would tell nobody anything


@pytest.mark.parametrize("url", ["ftp://hub", "http://", "http://hub:port", "http://hub:99999", "http://[::1"])
def test_what_is_no_address_is_refused_before_anything_is_sent(url: str) -> None:
    with pytest.raises(UsageProblem) as failure:
        HubTransport(url, "good")
    assert str(failure.value) == f"{url!r} is not the address of a hub; write http://host:port or https://host"
    assert failure.value.exit_status == 2


def test_an_address_without_scheme_is_https_and_on_this_machine_http() -> None:
    assert HubTransport("10.0.0.5:8470", "good").url == "https://10.0.0.5:8470"
    assert HubTransport("127.0.0.1:8470", "good").url == "http://127.0.0.1:8470"


# -- at the door ----------------------------------------------------------------------------------------


def test_a_token_is_judged_before_the_conversation_and_the_hubs_reason_is_told(hub: SmallHub) -> None:
    async def knock() -> None:
        async with listening(hub) as url:
            for token, reason in {
                "unknown": UNKNOWN_TOKEN,
                "old": "the token of clinic-7 was revoked; ask the hub's owner for a new one",
            }.items():
                refused = await failure_of(HubTransport(url, token))
                assert refused == RefusedByHub(f"the hub {url} refused: {reason}")
                assert refused.exit_status == 5
                with pytest.raises(RefusedByHub, match=reason):  # blobs need it too
                    await anext(HubTransport(url, token).fetch(DIGEST, 0))

    asyncio.run(knock())


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden", "502 Bad Gateway", "503 Service Unavailable"])
@pytest.mark.parametrize("body", [b"", b"<html>Unauthorized</html>", b'{"detail": "no"}', b'["no"]', b"\xff"])
def test_a_refusal_that_is_not_the_hubs_own_is_of_something_between_and_tried_again(status: str, body: bytes) -> None:
    async def knock() -> None:
        async with answering(lambda _: http(status, body)) as port:
            url = f"http://127.0.0.1:{port}"
            for refused in (await failure_of(HubTransport(url, "good")), await no_file(HubTransport(url, "good"))):
                assert refused == HubUnreachable(
                    f"{url} answers HTTP {status[:3]}, and not the hub itself but something between: a server in front "
                    "of the hub, or a firewall; try again later, or ask its owner",
                    "HTTP",
                )

    asyncio.run(knock())


async def no_file(edge: HubTransport) -> FedSODAError:
    """Why this edge gets no file."""
    with pytest.raises(FedSODAError) as failure:
        await anext(edge.fetch(DIGEST, 0))
    await edge.close()
    return failure.value


def test_frames_go_both_ways_and_their_bytes_are_counted_until_the_hub_hangs_up(hub: SmallHub) -> None:
    async def talk() -> None:
        async with listening(hub) as url:
            edge = HubTransport(url, "good")
            await edge.connect()
            hello = encode(HELLO)
            await edge.send(hello)
            frames = [frame async for frame in edge.frames()]  # ends, since the hub closes after a refusal
            assert [decode(frame)[0] for frame in frames] == [RUN_IS_OVER]
            assert edge.up == wire_bytes(hello, masked=True)
            assert edge.down == wire_bytes(frames[0], masked=False)
            with pytest.raises(HubUnreachable, match=r"the connection to http://127\.0\.0\.1.* ended .*; join again"):
                await edge.send(hello)
            await edge.close()
            with pytest.raises(HubUnreachable, match="there is no connection"):
                await edge.send(hello)

    asyncio.run(talk())


# -- bundle files ---------------------------------------------------------------------------------------


async def fetched(edge: HubTransport, offset: int) -> bytes:
    return b"".join([piece async for piece in edge.fetch(DIGEST, offset)])


def test_a_bundle_file_comes_whole_or_from_any_offset(hub: SmallHub) -> None:
    async def download() -> None:
        async with listening(hub) as url:
            edge = HubTransport(url, "good")
            assert await fetched(edge, 0) == DATA
            assert await fetched(edge, 2_000_001) == DATA[2_000_001:]
            assert await fetched(edge, len(DATA) - 1) == DATA[-1:]

    asyncio.run(download())


def test_only_the_missing_bytes_are_asked_for_with_the_token_and_as_they_are() -> None:
    heads = list[str]()

    def serve(head: str) -> bytes:
        heads.append(head.lower())
        return http("206 Partial Content", DATA[start_of_range(head) :])

    async def download() -> None:
        async with answering(serve) as port:
            assert await fetched(HubTransport(f"http://127.0.0.1:{port}", "good"), 1_000_000) == DATA[1_000_000:]

    asyncio.run(download())
    assert heads[0].startswith(f"get /v1/blobs/{DIGEST} http/1.1\r\n")
    assert "\r\nauthorization: bearer good\r\n" in heads[0]
    assert "\r\nrange: bytes=1000000-\r\n" in heads[0]


def test_a_proxy_that_drops_the_range_costs_bytes_but_not_the_file() -> None:
    async def download() -> None:
        async with answering(lambda _: http("200 OK", DATA)) as port:
            assert await fetched(HubTransport(f"http://127.0.0.1:{port}", "good"), 1_500_000) == DATA[1_500_000:]

    asyncio.run(download())


def test_a_proxy_that_would_compress_is_asked_not_to() -> None:
    def serve(head: str) -> bytes:
        accepts = re.search(r"^accept-encoding: .*gzip", head, re.MULTILINE | re.IGNORECASE)
        return http("200 OK", gzip.compress(DATA, 1), Content_Encoding="gzip") if accepts else http("200 OK", DATA)

    async def download() -> None:
        async with answering(serve) as port:
            assert await fetched(HubTransport(f"http://127.0.0.1:{port}", "good"), 0) == DATA

    asyncio.run(download())


def test_a_download_that_breaks_off_says_so_and_the_store_goes_on_there(tmp_path: Path) -> None:
    starts = list[int]()

    def serve(head: str) -> bytes:
        starts.append(start_of_range(head))
        whole = http("206 Partial Content", DATA[starts[-1] :])
        return whole[:1_200_000] if len(starts) == 1 else whole

    async def download() -> None:
        store = FileStore(tmp_path)
        async with answering(serve) as port:
            edge = HubTransport(f"http://127.0.0.1:{port}", "good")
            with pytest.raises(HubUnreachable) as failure:
                await fetch_file(store, edge, DIGEST, len(DATA))
            assert str(failure.value).startswith(f"the download from http://127.0.0.1:{port} broke off (")
            assert str(failure.value).endswith("); join again, which continues it")
            assert failure.value.exit_status == 3
            held = store.held_bytes([(DIGEST, len(DATA))])
            assert 1_000_000 < held < 1_200_000  # all that came but the head
            assert (await fetch_file(store, edge, DIGEST, len(DATA))).read_bytes() == DATA
            assert starts == [0, held]

    asyncio.run(download())


def test_a_file_that_the_hub_does_not_have_is_told_with_its_reason(hub: SmallHub) -> None:
    async def download() -> None:
        async with listening(hub) as url:
            with pytest.raises(HubUnreachable) as failure:
                await anext(HubTransport(url, "good").fetch("0" * 64, 0))
            assert str(failure.value) == (
                f"{url} answers HTTP 404: this run's bundle has no such file; try again later, or ask the hub's owner"
            )

    asyncio.run(download())


@pytest.mark.parametrize("words", [http("401 Unauthorized", b'{"reason": "no"}'), http("500 Oops"), b"", b"\0"])
def test_the_token_is_in_no_error(words: bytes) -> None:
    async def knock() -> None:
        async with answering(lambda _: words) as port:
            edge = HubTransport(f"http://127.0.0.1:{port}", "fs1-secret")
            assert "secret" not in str(await failure_of(edge))
            with pytest.raises(FedSODAError) as failure:
                await anext(edge.fetch(DIGEST, 0))
            assert "secret" not in str(failure.value)

    asyncio.run(knock())
