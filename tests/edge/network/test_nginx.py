"""A hub behind a real nginx: below a path, with its buffers and timeouts, without Upgrade headers, behind a redirect."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsoda_edge.errors import HubUnreachable
from fedsoda_edge.join.doctor import DoctorStep
from fedsoda_edge.network import checks
from fedsoda_edge.network.hub_transport import HubTransport
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.codec import decode, encode
from fedsoda_hub.serving import listener
from tests.edge.join.test_doctor import all_of, examined
from tests.edge.network.test_hub_transport import DATA, DIGEST, HELLO, SmallHub, failure_of, fetched, listening
from tests.edge.network.test_proxies import no_variables  # noqa: F401
from tests.on_port import runs_on_port

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin:/opt/homebrew/bin")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(NGINX is None, reason="nginx is not installed")]

UPGRADE = 'proxy_http_version 1.1; proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection "upgrade";'
CONFIGURATION = """
worker_processes 1; daemon off; master_process off;
error_log {directory}/error.log warn; pid {directory}/nginx.pid;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
    server {{ listen 127.0.0.1:{port}; {server} }}
}}
"""


@contextlib.contextmanager
def nginx(directory: Path, server: str) -> Iterator[int]:
    """Run nginx with this server block; give its port. No process of it is left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    configuration = directory / "nginx.conf"
    configuration.write_text(CONFIGURATION.format(directory=directory, port=port, server=server))
    assert NGINX is not None
    with runs_on_port([NGINX, "-c", str(configuration), "-p", str(directory)], port):
        yield port


@pytest.fixture
def hub(tmp_path: Path) -> SmallHub:
    (tmp_path / DIGEST).write_bytes(DATA)
    (tmp_path / "token").write_text("good")
    return SmallHub(tmp_path, ms.Refusal(reason="this run is over", fatal=True))


def located(url: str, location: str = "/", more: str = UPGRADE) -> str:
    return f"location {location} {{ proxy_pass {url}/; {more} }}"


def test_below_a_path_conversation_download_and_doctor_work(hub: SmallHub, tmp_path: Path) -> None:
    async def play() -> list[DoctorStep]:
        async with listening(hub) as inner:
            with nginx(tmp_path, located(inner, "/fl/triage/")) as port:
                edge = HubTransport(f"http://127.0.0.1:{port}/fl/triage/", "good")
                await edge.connect()
                await edge.send(encode(HELLO))
                assert [type(decode(frame)[0]) async for frame in edge.frames()] == [ms.Refusal]
                assert hashlib.sha256(await fetched(edge, 0)).hexdigest() == DIGEST
                assert await fetched(edge, 2_000_001) == DATA[2_000_001:]
                await edge.close()
                with pytest.raises(HubUnreachable, match="answers HTTP 404, which no hub does"):
                    await checks.check_http(HubTransport(f"http://127.0.0.1:{port}", "good").route)
                return await all_of(examined(edge.url, tmp_path))

    found = {check.name: check.passed for check in asyncio.run(play())}
    assert all(found[name] for name in ("DNS", "TCP", "TLS", "HTTP", "clock", "token"))


def test_without_the_headers_of_an_upgrade_it_is_said_that_websockets_are_not_let_through(
    hub: SmallHub, tmp_path: Path
) -> None:
    async def play() -> None:
        async with listening(hub) as inner:
            for more in ("", "proxy_http_version 1.1;"):
                with nginx(tmp_path, located(inner, more=more)) as port:
                    url = f"http://127.0.0.1:{port}"
                    failure = await failure_of(HubTransport(url, "good"))
                    assert str(failure).startswith(
                        f"a hub answers at {url}, but websockets are not let through (HTTP 404)"
                    )
                    assert failure.exit_status == 3

    asyncio.run(play())


def test_a_quiet_conversation_outlives_the_timeouts_of_a_proxy(
    hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "PING_SECONDS", 0.3)  # to a timeout of 1 s as 10 s to one of 60
    hub = SmallHub(tmp_path, welcome())

    async def play() -> None:
        async with listening(hub) as inner:
            with nginx(
                tmp_path, located(inner, more=f"{UPGRADE} proxy_read_timeout 1s; proxy_send_timeout 1s;")
            ) as port:
                edge = HubTransport(f"http://127.0.0.1:{port}", "good")
                await edge.connect()
                await edge.send(encode(HELLO))
                frames = edge.frames()
                assert isinstance(decode(await anext(frames))[0], ms.Welcome)
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(2.5):
                        await anext(frames)
                await edge.send(encode(ms.Ready(num_examples=1)))  # the connection is open still
                await edge.close()

    asyncio.run(play())


def welcome() -> ms.Welcome:
    blob = ms.BlobRef(digest=ms.Digest(DIGEST), bytes=len(DATA))
    return ms.Welcome(
        protocol=1, run_id="r", run_name="r", edge=ms.EdgeId("a"), manifest=blob, rounds=1, rounds_done=0,
        template=None, max_length=8, codec="int8", seed=0, stall_seconds=60.0,
    )  # fmt: skip


def test_a_hub_that_is_away_behind_nginx_is_something_between(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with nginx(tmp_path, located(f"http://127.0.0.1:{taken.getsockname()[1]}")) as port:
            failure = asyncio.run(failure_of(HubTransport(f"http://127.0.0.1:{port}", "good")))
    assert isinstance(failure, HubUnreachable)
    assert "answers HTTP 502, and not the hub itself but something between" in str(failure)


def test_a_redirect_is_told_with_where_to_join(tmp_path: Path) -> None:
    with nginx(tmp_path, "return 301 https://hub.example.org$request_uri;") as port:
        failure = asyncio.run(failure_of(HubTransport(f"http://127.0.0.1:{port}/fl", "good")))
        assert str(failure) == f"http://127.0.0.1:{port}/fl redirects to https://hub.example.org/fl: join there"


@pytest.mark.parametrize(
    "more", ["gzip on; gzip_types *; gzip_min_length 1;", "proxy_buffering off;", "proxy_max_temp_file_size 0;"]
)
def test_buffers_and_compression_change_no_byte(hub: SmallHub, tmp_path: Path, more: str) -> None:
    async def play() -> None:
        async with listening(hub) as inner:
            with nginx(tmp_path, located(inner, more=f"{UPGRADE} {more}")) as port:
                edge = HubTransport(f"http://127.0.0.1:{port}", "good")
                assert await fetched(edge, 0) == DATA
                assert await fetched(edge, 1_000_001) == DATA[1_000_001:]
                await edge.close()

    asyncio.run(play())
