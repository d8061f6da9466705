"""Who has not said who they are can neither fill the hub, nor silence it, nor fill its log. Real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from fedsoda_edge.protocol import messages as ms
from fedsoda_hub.serving import connection, guarded, listener, strangers
from fedsoda_hub.serving.listener import Server, bind
from fedsoda_hub.serving.strangers import Complaints, ConnectionLimits, Handshakes, network_of
from tests.conftest import ROOT
from tests.hub.serving.test_listener import MemoryHub, ask, assert_hub_ends_it, greet, session

UPGRADE = (
    b"GET /v1/session HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\nAuthorization: Bearer guess\r\n\r\n"
)


@pytest.fixture
def hub(tmp_path: Path) -> MemoryHub:
    (tmp_path / "shard").write_bytes(b"shard")
    return MemoryHub(tmp_path / "shard")


@contextlib.asynccontextmanager
async def serving(
    hub: MemoryHub, limits: ConnectionLimits | None = None, host: str = "127.0.0.1", *, counts_loopback: bool = False
) -> AsyncIterator[int]:
    server = Server(hub.parts, hub.defects.append, limits, counts_loopback=counts_loopback)
    taken = bind(host, 0)
    running = asyncio.create_task(server.serve(sockets=[taken]))
    await server.has_started.wait()
    try:
        yield taken.getsockname()[1]
    finally:
        server.should_exit = True
        await running
        taken.close()
        assert hub.defects == []


async def ended(reader: asyncio.StreamReader, seconds: float = 5.0) -> bool:
    """Whether the hub ends a connection within that time."""
    try:
        async with asyncio.timeout(seconds):
            return await reader.read() == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


async def is_alive(port: int) -> bool:
    async with httpx.AsyncClient(verify=False, trust_env=False) as client:
        return (await client.get(f"http://127.0.0.1:{port}/healthz")).status_code == 200


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET /healthz HTTP/1.1\r\nHost: h\r\nX-Slow: ",
        b"\0",
        b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\nGET",
        b"POST /healthz HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nhalf",
        UPGRADE,
    ],
    ids=["nothing", "half a head", "a byte", "one request and half of the next", "half a body", "no token"],
)
def test_a_connection_without_a_whole_request_is_ended(
    hub: MemoryHub, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(strangers, "SILENT_SECONDS", 0.2)

    async def play() -> None:
        async with serving(hub) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(said)
            started = time.monotonic()
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(5):
                    await reader.read()
            assert time.monotonic() - started < 4  # uvicorn's own patience is for kept connections alone
            writer.close()

    asyncio.run(play())


def test_a_head_that_drips_is_ended_all_the_same(hub: MemoryHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strangers, "SILENT_SECONDS", 0.3)

    async def play() -> None:
        async with serving(hub) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for byte in b"GET /healthz HTTP/1.1\r\nX-Slow: " + b"a" * 100:
                writer.write(bytes([byte]))
                if reader.at_eof() or reader.exception():
                    break
                await asyncio.sleep(0.02)
            else:
                pytest.fail("a slow head may hold a connection")

    asyncio.run(play())


def test_a_conversation_without_hello_is_ended_and_one_with_it_stays(
    hub: MemoryHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strangers, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(connection, "HELLO_SECONDS", 0.2)

    async def play() -> None:
        async with (
            serving(hub) as port,
            session(f"127.0.0.1:{port}") as quiet,
            session(f"127.0.0.1:{port}", "bob") as edge,
        ):
            await greet(edge)
            await assert_hub_ends_it(quiet)
            await asyncio.sleep(0.5)
            assert [one.edge for one in hub.gone] == ["alice"]

    asyncio.run(play())


def test_too_many_strangers_make_room_the_oldest_first_and_who_is_known_stays(hub: MemoryHub) -> None:
    async def play() -> None:
        limits = ConnectionLimits(strangers.RESERVED_DESCRIPTORS + 12)
        assert (limits.all, limits.strangers, limits.of_address) == (8, 4, 4)
        async with serving(hub, limits) as port, session(f"127.0.0.1:{port}") as edge:
            await greet(edge)
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(30)]
            assert await is_alive(port)
            await asyncio.sleep(0.1)
            assert await ended(held[0][0], 1)
            assert not await ended(held[-1][0], 0.1)
            assert hub.gone == []
            for _, writer in held:
                writer.close()

    asyncio.run(play())


def test_where_all_places_are_taken_by_conversations_the_next_is_refused_and_told_of_once(
    hub: MemoryHub, caplog: pytest.LogCaptureFixture
) -> None:
    async def play() -> None:
        async with contextlib.AsyncExitStack() as stack:
            port = await stack.enter_async_context(serving(hub, ConnectionLimits(strangers.RESERVED_DESCRIPTORS + 6)))
            for _ in range(4):
                await greet(await stack.enter_async_context(session(f"127.0.0.1:{port}")))
            for _ in range(10):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                assert await ended(reader)
                writer.close()
            assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1

    asyncio.run(play())
    assert "refused: 4 others are open; raise the limit of open files (ulimit -n) (1)" in caplog.text


def test_strangers_are_told_of_in_one_line_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    seconds = iter(second for second in range(180) for _ in range(1000))
    now = 0
    complaints = Complaints(lambda: float(now))
    for now in seconds:  # noqa: B007
        complaints.add("ended")
    complaints.tell()
    assert [record.getMessage() for record in caplog.records] == [
        "connections: ended (1)",
        "connections: ended (60000)",
        "connections: ended (60000)",
        "connections: ended (59999)",
    ]


def test_what_uvicorn_warns_of_is_counted_and_not_repeated(
    hub: MemoryHub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fedsoda_hub", "fedsoda_hub.serving", "fedsoda_hub.serving.strangers"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        monkeypatch.setattr(logging.getLogger(name), "disabled", False)
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "filters", [])  # of hubs that other tests broke off

    async def play() -> None:
        async with serving(hub) as port:
            for _ in range(20):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"\x16\x03\x01 TLS to a port without\r\n\r\n")
                await reader.read()
                writer.close()

    asyncio.run(play())
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert told == ["connections: Invalid HTTP request received (1)", "connections: Invalid HTTP request received (19)"]


def test_a_lack_of_descriptors_is_counted_and_other_errors_of_the_loop_are_told_as_ever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def play() -> None:
        loop, complaints = asyncio.get_running_loop(), Complaints(lambda: 0.0)
        for _ in range(1000):
            full = OSError(errno.EMFILE, "Too many open files")
            complaints.handle(loop, {"message": "socket.accept() out of system resource", "exception": full})
        complaints.handle(loop, {"message": "another", "exception": RuntimeError("a defect")})

    asyncio.run(play())
    few, other = caplog.records
    assert few.getMessage() == (
        "connections: not accepted: Too many open files; raise the limit of open files (ulimit -n) (1)"
    )
    assert "another" in other.getMessage()


# --- who speaks, and is not heard --------------------------------------------------------------------------------------


async def upgraded(port: int, token: str = "alice") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A raw websocket that answers nothing by itself."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(UPGRADE.replace(b"guess", token.encode()))
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
    return reader, writer


def masked(data: bytes, opcode: int = 2, *, is_last: bool = True) -> bytes:
    assert len(data) < 126
    return bytes([(0x80 if is_last else 0) | opcode, 0x80 | len(data)]) + bytes(4) + data


def test_a_hub_that_ends_while_it_refuses_a_token_leaves_no_traceback(
    hub: MemoryHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shown: list[guarded.GuardedWebSocket] = []
    made = guarded.GuardedWebSocket.connection_made

    def noted(self: guarded.GuardedWebSocket, transport: asyncio.BaseTransport) -> None:
        shown.append(self)
        made(self, transport)

    def refused(*_: object) -> tuple[None, str]:
        shown[0].shutdown()  # as uvicorn calls it when it ends
        return None, "no"

    monkeypatch.setattr(guarded.GuardedWebSocket, "connection_made", noted)
    monkeypatch.setattr(listener, "_refused", refused)

    async def play() -> None:
        async with serving(hub) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(UPGRADE)
            assert (await reader.read()).startswith(b"HTTP/1.1 500")
            writer.close()

    asyncio.run(play())
    assert shown
    assert [record for record in caplog.records if record.exc_info] == []


@pytest.mark.parametrize("said", [b"", masked(b"garbage")], ids=["nothing", "garbage"])
def test_who_never_answers_the_closing_handshake_holds_no_place(
    hub: MemoryHub, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(strangers, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(guarded, "GOODBYE_SECONDS", 0.3)

    async def play() -> None:
        async with serving(hub) as port:
            reader, writer = await upgraded(port)
            writer.write(said)
            async with asyncio.timeout(5):
                with contextlib.suppress(ConnectionError):
                    await reader.read()
            writer.close()

    asyncio.run(play())


def test_websockets_without_hello_make_room_as_all_strangers_do(hub: MemoryHub) -> None:
    async def play() -> None:
        limits = ConnectionLimits(strangers.RESERVED_DESCRIPTORS + 12)
        async with serving(hub, limits) as port, session(f"127.0.0.1:{port}", "bob") as edge:
            await greet(edge)
            held = [await upgraded(port) for _ in range(20)]
            assert await is_alive(port)
            assert await ended(held[0][0], 2)
            assert "bob" not in [one.edge for one in hub.gone]
            for _, writer in held:
                writer.close()

    asyncio.run(play())


@pytest.mark.parametrize(
    "flood",
    [masked(b"", 9), masked(b"", 10), masked(b"", 2, is_last=False) + masked(b"", 0, is_last=False)],
    ids=["pings", "pongs", "empty parts"],
)
def test_a_flood_of_small_frames_is_ended(hub: MemoryHub, flood: bytes) -> None:
    async def play() -> None:
        async with serving(hub) as port:
            reader, writer = await upgraded(port)
            if flood[0] == 2:
                writer.write(flood[:6] + flood[6:] * 3000)
            else:
                writer.write(flood * 3000)
            assert await ended(reader, 3)
            writer.close()

    asyncio.run(play())


def test_an_address_that_floods_is_kept_away_for_some_time_and_others_are_not(
    hub: MemoryHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strangers, "AWAY_SECONDS", 0.5)

    async def play() -> None:
        async with serving(hub, counts_loopback=True) as port:
            reader, writer = await upgraded(port)
            writer.write(masked(b"", 9) * 100)
            assert await ended(reader, 3)
            again = await asyncio.open_connection("127.0.0.1", port)
            assert await ended(again[0], 0.3)
            other = await asyncio.open_connection("127.0.0.1", port, local_addr=("127.0.0.2", 0))
            assert not await ended(other[0], 0.1)
            await asyncio.sleep(0.5)
            late = await asyncio.open_connection("127.0.0.1", port)
            assert not await ended(late[0], 0.1)
            for one in (writer, again[1], other[1], late[1]):
                one.close()

    asyncio.run(play())


def test_behind_a_proxy_a_flood_keeps_away_the_address_that_it_tells(hub: MemoryHub) -> None:
    async def play() -> None:
        async with serving(hub) as port, httpx.AsyncClient(verify=False, trust_env=False) as client:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(UPGRADE.replace(b"guess", b"alice\r\nX-Forwarded-For: 203.0.113.7"))
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
            writer.write(masked(b"", 10) * 100)
            assert await ended(reader, 3)
            writer.close()

            async def asked(address: str) -> int:
                headers = {"X-Forwarded-For": address, "Authorization": "Bearer guess"}
                return (await client.get(f"http://127.0.0.1:{port}/v1/blobs/{'0' * 64}", headers=headers)).status_code

            assert await asked("203.0.113.7") == 429
            assert await asked("203.0.113.8") == 401

    asyncio.run(play())


def test_an_edge_with_many_messages_in_its_own_time_is_no_flood(
    hub: MemoryHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded, "FRAMES_AT_ONCE", 20.0)
    monkeypatch.setattr(guarded.GuardedWebSocket, "_messages_left", 20.0)

    async def play() -> None:
        async with serving(hub) as port, session(f"127.0.0.1:{port}") as edge:
            said = await greet(edge)
            for step in range(60):
                await edge.send(said.send(ms.Progress(round=1, step=step, steps=60)))
                await asyncio.sleep(0.012)
            await asyncio.sleep(0.1)
            assert len(hub.heard) == 60

    asyncio.run(play())


# --- handshakes of one address -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("203.0.113.7", "203.0.113.7", True),
        ("203.0.113.7", "203.0.113.8", False),
        ("::ffff:203.0.113.7", "203.0.113.7", True),
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("not an address", "", True),
    ],
)
def test_of_ipv6_a_whole_site_counts_as_one_address(one: str, other: str, is_same: bool) -> None:
    assert (network_of(one) == network_of(other)) == is_same


def test_an_address_may_connect_often_at_once_and_then_so_often_a_second() -> None:
    now = 0.0
    handshakes = Handshakes(lambda: now)
    assert [handshakes.may("203.0.113.7") for _ in range(300)].count(True) == strangers.HANDSHAKES_AT_ONCE
    assert handshakes.may("203.0.113.8")
    now = 2.0
    assert [handshakes.may("203.0.113.7") for _ in range(300)].count(True) == 2 * strangers.HANDSHAKES_A_SECOND
    now = 1e6
    assert [handshakes.may("203.0.113.7") for _ in range(300)].count(True) == strangers.HANDSHAKES_AT_ONCE
    handshakes.keep_away("203.0.113.7")
    now += strangers.AWAY_SECONDS
    assert not handshakes.may("203.0.113.7")
    assert handshakes.may("203.0.113.8")
    now += 1.0
    assert handshakes.may("203.0.113.7")


def test_fifty_edges_behind_one_router_come_in_with_five_connections_each() -> None:
    handshakes = Handshakes(lambda: 0.0)
    assert all(handshakes.may("203.0.113.7") for _ in range(50 * 5))


def test_addresses_are_forgotten_so_that_a_million_of_them_cost_what_some_cost() -> None:
    handshakes = Handshakes(lambda: 0.0)
    for number in range(strangers.MAX_ADDRESSES + 1000):
        handshakes.may(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(handshakes._buckets) == strangers.MAX_ADDRESSES


def test_connections_of_one_address_beyond_the_bound_are_ended_and_others_are_heard(
    hub: MemoryHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strangers, "HANDSHAKES_AT_ONCE", 5)
    monkeypatch.setattr(strangers, "HANDSHAKES_A_SECOND", 0.001)

    async def play() -> None:
        async with serving(hub, counts_loopback=True) as port:
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(6)]
            assert await ended(held[5][0], 2)
            assert not await ended(held[0][0], 0.1)
            other = await asyncio.open_connection("127.0.0.1", port, local_addr=("127.0.0.2", 0))
            other[1].write(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
            assert (await other[0].readline()).endswith(b"200 OK\r\n")
            for _, writer in (*held, other):
                writer.close()

    asyncio.run(play())


def test_behind_a_proxy_on_this_machine_the_address_that_it_tells_counts(
    hub: MemoryHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strangers, "HANDSHAKES_AT_ONCE", 3)
    monkeypatch.setattr(strangers, "HANDSHAKES_A_SECOND", 0.001)

    async def play() -> None:
        async with serving(hub) as port, httpx.AsyncClient(verify=False, trust_env=False) as client:

            async def asked(address: str, token: str = "guess") -> int:
                headers = {"X-Forwarded-For": address, "Authorization": f"Bearer {token}"}
                return (await client.get(f"http://127.0.0.1:{port}/v1/blobs/{'0' * 64}", headers=headers)).status_code

            assert [await asked("203.0.113.7") for _ in range(5)] == [401, 401, 401, 429, 429]
            assert await asked("203.0.113.8") == 401
            assert await asked("203.0.113.7", "alice") == 404  # who has a token is not one of those who guess
            assert await is_alive(port)

    asyncio.run(play())


# --- few descriptors -------------------------------------------------------------------------------------------------

AT_48_DESCRIPTORS = """
import asyncio, resource, sys
from pathlib import Path
from fedsoda_hub.serving.listener import Listener
from tests.hub.serving.test_listener import MemoryHub
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
async def main():
    listener = Listener("127.0.0.1", 0)
    await listener.open(MemoryHub(Path("/nothing")).parts)
    print(listener.port, flush=True)
    await listener.broken()
asyncio.run(main())
"""


@pytest.fixture
def few_descriptors(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """The port of a hub with 48 descriptors, and the file of what it says."""
    log = tmp_path / "stderr"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", AT_48_DESCRIPTORS], stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT
        ) as process,
    ):
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline()), log
        finally:
            process.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="limits of descriptors are POSIX's")
def test_sixty_silent_connections_at_48_descriptors_leave_the_hub_alive_and_its_log_short(
    few_descriptors: tuple[int, Path],
) -> None:
    port, log = few_descriptors
    held = []
    try:
        for _ in range(60):
            one = socket.create_connection(("127.0.0.1", port), 5)
            held.append(one)
        for _ in range(5):
            assert asyncio.run(is_alive(port))
    finally:
        for one in held:
            one.close()
    assert asyncio.run(is_alive(port))
    said = log.read_text()
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 1, said


# --- loopback --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "client", ["::ffff:127.0.0.1", "::ffff:7f00:1", "::1", "0:0:0:0:0:0:0:1", "::1%lo", "127.1.2.3"]
)
def test_loopback_in_every_spelling_is_loopback(hub: MemoryHub, client: str) -> None:
    assert ask(hub, "/v1/status", (client, 4711), "") == 200


@pytest.mark.parametrize("client", ["::ffff:10.0.0.1", "::127.0.0.1", "fe80::1", "localhost", "127.0.0.1.evil", ""])
def test_what_only_looks_like_loopback_is_not(hub: MemoryHub, client: str) -> None:
    assert ask(hub, "/v1/status", (client, 4711), "") == 401


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
@pytest.mark.parametrize("headers", [{}, {"X-Forwarded-For": "203.0.113.7"}, {"X-Real-IP": "203.0.113.7"}])
def test_a_port_for_both_families_knows_loopback_and_a_proxy_on_this_machine(
    hub: MemoryHub, headers: dict[str, str]
) -> None:
    async def play() -> None:
        async with serving(hub, host="::") as port, httpx.AsyncClient(verify=False, trust_env=False) as client:
            for host in ("127.0.0.1", "[::1]"):
                found = await client.get(f"http://{host}:{port}/v1/status", headers=headers)
                assert found.status_code == (401 if headers else 200), host

    asyncio.run(play())
