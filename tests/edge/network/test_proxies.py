"""Through a proxy the conversation, the downloads and `doctor` go one way, and what fails there names it. Real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from small_network import Answers, SmallProxy, answer

from fedsoda_edge.errors import FedSODAError, HubUnreachable
from fedsoda_edge.join.doctor import DoctorStep
from fedsoda_edge.network import checks
from fedsoda_edge.network.hub_transport import HubTransport
from fedsoda_edge.network.tls import Trust
from tests.edge.join.test_doctor import DEVICE, all_of, examined
from tests.edge.network.certificates import write_certificate
from tests.edge.network.test_hub_transport import DATA, DIGEST, SmallHub, failure_of, fetched, listening

PLAIN = Trust(insecure_http=True)
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def hub(tmp_path: Path) -> SmallHub:
    (tmp_path / DIGEST).write_bytes(DATA)
    (tmp_path / "token").write_text("good")
    return SmallHub(tmp_path)


async def used(url: str) -> tuple[bytes, Exception | None]:
    """Open the conversation and fetch the file; what came, and what went wrong."""
    edge = HubTransport(url, "good", PLAIN)
    try:
        await edge.connect()
        return await fetched(edge, 0), None
    except FedSODAError as error:
        return b"", error
    finally:
        await edge.close()


def steps(checks: list[DoctorStep]) -> dict[str, DoctorStep]:
    return {check.name: check for check in checks[len(DEVICE) - 1 :]}


@pytest.mark.parametrize(
    ("variable", "value", "asked"),
    [
        (
            "http_proxy",
            "http://127.0.0.1:{port}",
            ["CONNECT hub.internal:8470", "GET http://hub.internal:8470/v1/blobs/"],
        ),
        ("HTTP_PROXY", "127.0.0.1:{port}", ["CONNECT hub.internal:8470", "GET http://hub.internal:8470/v1/blobs/"]),
        (
            "all_proxy",
            "http://127.0.0.1:{port}/",
            ["CONNECT hub.internal:8470", "GET http://hub.internal:8470/v1/blobs/"],
        ),
        ("all_proxy", "socks5://127.0.0.1:{port}", ["SOCKS5 hub.internal:8470", "SOCKS5 hub.internal:8470"]),
        ("ALL_PROXY", "socks5h://127.0.0.1:{port}", ["SOCKS5 hub.internal:8470", "SOCKS5 hub.internal:8470"]),
        ("all_proxy", "socks://127.0.0.1:{port}/", ["SOCKS5 hub.internal:8470", "SOCKS5 hub.internal:8470"]),
    ],
)
def test_a_name_that_only_the_proxy_knows_is_reached_by_conversation_download_and_doctor(
    hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, asked: list[str]
) -> None:
    async def play() -> None:
        async with listening(hub) as url:
            with SmallProxy(names={"hub.internal": int(url.rpartition(":")[2])}) as proxy:
                monkeypatch.setenv(variable, value.format(port=proxy.port))
                assert await used("http://hub.internal:8470") == (DATA, None)
                assert [line[: len(want)] for line, want in zip(proxy.asked, asked, strict=True)] == asked
                proxy.asked.clear()
                found = steps(await all_of(examined("http://hub.internal:8470", tmp_path, insecure_http=True)))
                assert all(found[name].passed for name in ("DNS", "TCP", "TLS", "HTTP", "clock", "token"))
                assert found["DNS"].detail == "127.0.0.1, of the proxy"
                assert len(proxy.asked) >= 2

    asyncio.run(play())


def test_doctor_names_the_proxy_and_its_variable_first(
    hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play() -> None:
        async with listening(hub) as url:
            with SmallProxy() as proxy:
                monkeypatch.setenv("http_proxy", f"http://me:s3cret@127.0.0.1:{proxy.port}")
                shown = [check async for check in examined(url, tmp_path)]
                [step] = [check for check in shown if check.name == "proxy"]
                assert step == DoctorStep("proxy", True, f"http://127.0.0.1:{proxy.port} (http_proxy)")
                assert not any("s3cret" in f"{check}" for check in shown)

    asyncio.run(play())


@pytest.mark.parametrize(
    "environment",
    [
        {"https_proxy": "http://127.0.0.1:9"},
        {"http_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.0/8,::1,fe80::/10"},
    ],
)
def test_an_address_that_no_proxy_is_for_is_reached_directly_by_both(
    hub: SmallHub, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    async def play() -> None:
        async with listening(hub) as url:
            assert await used(url) == (DATA, None)

    asyncio.run(play())


def test_a_proxy_that_wants_a_password_gets_it_from_its_variable_or_is_named(
    hub: SmallHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play() -> None:
        async with listening(hub) as url:
            with SmallProxy(password="me:p@ss#1") as proxy:
                monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
                told = (
                    f"the proxy http://127.0.0.1:{proxy.port} (http_proxy) asks for user and password (HTTP 407); write "
                    "them into http_proxy, as in http://user:password@host:port"
                )
                assert await used(url) == (b"", HubUnreachable(told, "proxy"))
                with pytest.raises(HubUnreachable, match="asks for user and password"):
                    await anext(HubTransport(url, "good").fetch(DIGEST, 0))
                monkeypatch.setenv("http_proxy", f"http://me:p@ss#1@127.0.0.1:{proxy.port}")
                assert await used(url) == (DATA, None)

    asyncio.run(play())


@pytest.mark.parametrize(("scheme", "why"), [("http", "HTTP 403"), ("socks5", "")])
def test_a_proxy_that_refuses_is_named_with_what_it_said(
    hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, why: str
) -> None:
    async def play() -> None:
        async with listening(hub) as url:
            with SmallProxy(refuses=403) as proxy:
                monkeypatch.setenv("all_proxy", f"{scheme}://127.0.0.1:{proxy.port}")
                _, error = await used(url)
                assert isinstance(error, HubUnreachable)
                assert f":{proxy.port} (all_proxy) does not connect to 127.0.0.1:{url.rpartition(':')[2]}" in str(error)
                assert why in str(error)
                assert "add 127.0.0.1 to no_proxy" in str(error)
                assert error.step == "proxy"
                last = (await all_of(examined(url, tmp_path)))[-1]
                assert (last.name, last.passed, last.exit_status) == ("proxy", False, 3)

    asyncio.run(play())


@pytest.mark.parametrize("scheme", ["http", "socks5h"])
def test_a_dead_proxy_is_named_and_not_the_hub(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    with socket.socket() as taken:  # bound but not listening
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        monkeypatch.setenv("all_proxy", f"{scheme}://127.0.0.1:{port}")
        failure = asyncio.run(failure_of(HubTransport("http://hub.internal:8470", "good", PLAIN)))
    assert str(failure).startswith(f"TCP: the proxy {scheme}://127.0.0.1:{port} (all_proxy) does not answer (")
    assert str(failure).endswith("); check all_proxy, or add hub.internal to no_proxy if it can be reached without")


def test_a_proxy_whose_name_has_no_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "proxy.invalid:3128")
    failure = asyncio.run(failure_of(HubTransport("http://hub.internal:8470", "good", PLAIN)))
    assert str(failure).startswith("DNS: the name of the proxy http://proxy.invalid:3128 (http_proxy) has no address (")


# --- what answers instead of a hub -----------------------------------------------------------------------------------


def told(url: str) -> str:
    _, error = asyncio.run(used(url))
    return str(error)


@pytest.mark.parametrize(
    ("location", "sentence"),
    [
        ("https://hub.example.org{path}", "{url} redirects to https://hub.example.org: join there"),
        ("https://hub.example.org/fl{path}?x=1", "{url} redirects to https://hub.example.org/fl: join there"),
        ("/moved{path}", "{url} redirects to {url}/moved: join there"),
        (
            "http://wifi.example/login?from=hub",
            "{url} redirects to http://wifi.example/login, where no hub is; if this network has a sign-in page, sign in, "
            "else check the address",
        ),
    ],
)
def test_a_redirect_is_told_with_where_to_join(location: str, sentence: str) -> None:
    def redirect(head: str) -> bytes:
        return answer("301 Moved", Location=location.format(path=head.split(" ")[1]))

    with Answers(redirect) as server:
        url = f"http://127.0.0.1:{server.port}"
        assert told(url) == sentence.format(url=url)

        async def fetch() -> None:
            await anext(HubTransport(url, "good").fetch(DIGEST, 0))

        with pytest.raises(HubUnreachable) as failure:
            asyncio.run(fetch())
        assert str(failure.value) == sentence.format(url=url)


PORTAL = b"<!DOCTYPE html><html><body>Welcome to Hotel WiFi</body></html>"


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/octet-stream", ""])
def test_a_portals_page_is_neither_a_hub_nor_a_file(kind: str) -> None:
    page = answer("200 OK", PORTAL, **({"Content_Type": kind} if kind else {}))

    async def pieces(url: str) -> list[bytes]:
        return [piece async for piece in HubTransport(url, "good").fetch(DIGEST, 0)]

    with Answers(lambda _: page) as server:
        url = f"http://127.0.0.1:{server.port}"
        with pytest.raises(HubUnreachable, match=r"answers, but not as a hub does .*sign in"):
            asyncio.run(checks.check_http(HubTransport(url, "good").route))
        with pytest.raises(HubUnreachable, match=r"answers, but not as a hub does .*sign in"):
            asyncio.run(pieces(url))


@pytest.mark.parametrize("headers", [{"Content_Range": "bytes 0-99/3000000"}, {"Content_Encoding": "gzip"}])
def test_a_part_that_is_not_the_one_asked_for_is_not_taken(headers: dict[str, str]) -> None:
    with Answers(lambda _: answer("206 Partial Content", DATA[:100], **headers)) as server:
        edge = HubTransport(f"http://127.0.0.1:{server.port}", "good")
        with pytest.raises(HubUnreachable, match="something between changes the files"):
            asyncio.run(fetched(edge, 1000))


def test_what_came_before_a_cut_within_the_first_piece_is_given() -> None:
    whole = answer("200 OK", DATA, Content_Type="application/octet-stream")
    head = whole.index(b"\r\n\r\n") + 4
    came = list[bytes]()

    async def fetch(port: int) -> None:
        async for piece in HubTransport(f"http://127.0.0.1:{port}", "good").fetch(DIGEST, 0):
            came.append(piece)

    with Answers(lambda _: whole[: head + 1000]) as server, pytest.raises(HubUnreachable, match="broke off"):
        asyncio.run(fetch(server.port))
    assert b"".join(came) == DATA[:1000]


# --- certificates ----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def behind_tls(directory: Path, host: str, port: int) -> AsyncIterator[tuple[int, Path]]:
    """The port of a server that speaks TLS as this host and passes bytes on to a port; and its certificate."""
    certificate, key = write_certificate(directory, host)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while piece := await source.read(1 << 16):
            sink.write(piece)
        sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, onward), pump(onward_reader, writer), return_exceptions=True)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    yield server.sockets[0].getsockname()[1], certificate
    server.close()


def test_a_hub_whose_ca_the_environment_names_is_reached_also_through_a_proxy(
    hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play() -> None:
        async with (
            listening(hub) as inner,
            behind_tls(tmp_path, "hub.internal", int(inner.rpartition(":")[2])) as (port, certificate),
        ):
            with SmallProxy(names={"hub.internal": port}) as proxy:
                monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
                url = f"https://hub.internal:{port}"
                _, error = await used(url)
                assert "CERTIFICATE_VERIFY_FAILED" in str(error)
                assert str(error).endswith("where a CA of your own signed it, name its certificates in SSL_CERT_FILE")
                monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
                assert await used(url) == (DATA, None)
                until = await checks.check_tls(HubTransport(url, "good").route)
                assert until is not None
                assert until.valid_until.endswith("GMT")
                assert set(proxy.asked) == {f"CONNECT hub.internal:{port}"}

    asyncio.run(play())


def test_a_proxy_that_speaks_tls_itself_is_used_by_both(
    hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play() -> None:
        async with listening(hub) as url:
            with SmallProxy() as proxy:
                async with behind_tls(tmp_path, "localhost", proxy.port) as (port, certificate):
                    monkeypatch.setenv("http_proxy", f"https://localhost:{port}")
                    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
                    assert await used(url) == (DATA, None)
                    assert [line.split(" ")[0] for line in proxy.asked] == ["CONNECT", "GET"]

    asyncio.run(play())
