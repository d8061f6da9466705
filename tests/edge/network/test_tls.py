"""A pinned key is what decides: whoever holds another one gets no byte, whoever vouches for it. Real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from small_network import SmallProxy, answer

from fedsoda_edge.errors import FedSODAError, HubUnreachable, UsageProblem
from fedsoda_edge.network import checks, tls
from fedsoda_edge.network.hub_transport import HubTransport
from fedsoda_edge.network.tls import Trust, pin_of, pin_text, read_pin, shortened
from tests.edge.join.test_doctor import all_of, examined
from tests.edge.network.certificates import PrivateKey, new_authority, new_key, new_rsa_key, write_certificate
from tests.edge.network.test_hub_transport import DATA, DIGEST, SmallHub, answering, fetched, listening

TOKEN = "fs1-the-secret-of-clinic-7"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@dataclass
class Peer:
    """A server that speaks TLS, writes down what it gets, and lets it on to a hub where there is one."""

    files: tuple[Path, Path]
    onward: int | None = None
    oldest: bool = False
    got: bytearray = field(default_factory=bytearray)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        """The port; the files may be others for later connections."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if self.oldest:
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(*self.files)
        self.context = context
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=context)
        yield server.sockets[0].getsockname()[1]
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            if self.onward is None:
                while piece := await reader.read(1 << 16):
                    self.got += piece
            else:
                inner, outer = await asyncio.open_connection("127.0.0.1", self.onward)
                await asyncio.gather(self._pump(reader, outer, self.got), self._pump(inner, writer, bytearray()))
        writer.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, seen: bytearray) -> None:
        with contextlib.suppress(OSError):
            while piece := await source.read(1 << 16):
                seen += piece
                sink.write(piece)
        with contextlib.suppress(OSError):
            sink.close()


def pinning(key: PrivateKey) -> Trust:
    return Trust(pin_of(key.public_key()))


async def tried(url: str, trust: Trust, token: str = TOKEN) -> list[Exception | bytes]:
    """What conversation and download give: the file's bytes, or why not."""
    found: list[Exception | bytes] = []
    for of_files in (False, True):
        edge = HubTransport(url, token, trust)
        try:
            if of_files:
                found.append(await fetched(edge, 0))
            else:
                await edge.connect()
                found.append(b"connected")
        except FedSODAError as error:
            found.append(error)
        finally:
            await edge.close()
    return found


@pytest.fixture
def hub(tmp_path: Path) -> SmallHub:
    (tmp_path / DIGEST).write_bytes(DATA)
    return SmallHub(tmp_path)


ALL_WELL = [b"connected", DATA]


# --- a wrong peer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [new_key, new_rsa_key])
def test_another_key_is_refused_with_both_pins_and_gets_no_byte(tmp_path: Path, make: type[PrivateKey]) -> None:
    ours, theirs = new_key(), make()

    async def play() -> None:
        peer = Peer(write_certificate(tmp_path / "peer", "127.0.0.1", key=theirs))
        async with peer.serving() as port:
            (tmp_path / "token").write_text(TOKEN)
            url, trust = f"https://127.0.0.1:{port}", pinning(ours)
            found = await tried(url, trust)
            for error in found:
                assert isinstance(error, HubUnreachable)
                assert error.step == "TLS"
                assert str(error) == (
                    f"TLS: 127.0.0.1:{port} shows the key {shortened(pin_of(theirs.public_key()))}, and "
                    f"{shortened(pin_of(ours.public_key()))} is pinned, so it is not the hub that the pin is of, or that hub "
                    "has lost its key; nothing was sent to it: try another network, and ask the hub's owner for the pin that "
                    "the hub prints at its start"
                )
            assert trust.pin is not None
            last = (await all_of(examined(url, tmp_path, pin=pin_text(trust.pin))))[-1]
            assert (last.name, last.passed, last.exit_status) == ("TLS", False, 3)
            assert bytes(peer.got) == b""
            of_peer = tls.pinned(pin_of(theirs.public_key()))  # and it would have heard
            _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=of_peer)
            writer.write(TOKEN.encode())
            writer.close()
            await writer.wait_closed()
            assert bytes(peer.got) == TOKEN.encode()

    asyncio.run(play())


def test_a_man_in_the_middle_whom_the_system_trusts_gets_the_token_of_nobody_who_pins(
    hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, of_hub = new_authority(tmp_path), new_key()
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))

    async def play() -> None:
        async with listening(hub) as plain:
            peer = Peer(
                write_certificate(tmp_path / "peer", "hub.internal", authority=authority),
                onward=int(plain.rpartition(":")[2]),
            )
            async with peer.serving() as port:
                with SmallProxy(names={"hub.internal": port}) as proxy:
                    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
                    url = f"https://hub.internal:{port}"
                    for error in await tried(url, pinning(of_hub), "good"):
                        assert isinstance(error, HubUnreachable)
                        assert f"shows the key {'sha256/'}" in str(error)
                        assert f"and {shortened(pin_of(of_hub.public_key()))} is pinned" in str(error)
                    assert bytes(peer.got) == b""
                    assert await tried(url, Trust(), "good") == ALL_WELL  # it is a perfect middle for who trusts it
                    assert b"Bearer good" in peer.got

    asyncio.run(play())


def test_a_server_that_knows_only_tls_1_2_is_refused_though_it_holds_the_key(tmp_path: Path) -> None:
    key = new_key()

    async def play() -> None:
        peer = Peer(write_certificate(tmp_path / "peer", "127.0.0.1", key=key), oldest=True)
        async with peer.serving() as port:
            for error in await tried(f"https://127.0.0.1:{port}", pinning(key)):
                assert isinstance(error, HubUnreachable)
                assert str(error).startswith(
                    f"TLS: 127.0.0.1:{port} speaks an older TLS than 1.3, which a hub whose key is"
                )
            assert bytes(peer.got) == b""

    asyncio.run(play())


# --- the right peer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "days"),
    [("another.host", (-1, 1)), ("127.0.0.1", (-90, -30)), ("127.0.0.1", (30, 90))],
    ids=["of another name", "expired", "not valid yet"],
)
def test_a_certificate_of_the_pinned_key_is_good_whatever_else_it_says(
    hub: SmallHub, tmp_path: Path, host: str, days: tuple[float, float]
) -> None:
    key = new_key()

    async def play() -> None:
        async with listening(hub) as plain:
            files = write_certificate(tmp_path / "peer", host, key=key, days=days)
            async with Peer(files, onward=int(plain.rpartition(":")[2])).serving() as port:
                url = f"https://127.0.0.1:{port}"
                assert await tried(url, pinning(key), "good") == ALL_WELL
                found = await checks.check_tls(HubTransport(url, "good", pinning(key)).route)
                assert found is not None
                assert found.pin == pin_of(key.public_key())

    asyncio.run(play())


def test_a_certificate_that_is_swapped_changes_nothing_and_a_key_that_is_swapped_everything(
    hub: SmallHub, tmp_path: Path
) -> None:
    key = new_key()

    async def play() -> None:
        async with listening(hub) as plain:
            peer = Peer(write_certificate(tmp_path / "peer", "h", key=key), onward=int(plain.rpartition(":")[2]))
            async with peer.serving() as port:
                url = f"https://127.0.0.1:{port}"
                assert await tried(url, pinning(key), "good") == ALL_WELL
                peer.context.load_cert_chain(*write_certificate(tmp_path / "peer", "h2", key=key, days=(-1, 400)))
                assert await tried(url, pinning(key), "good") == ALL_WELL
                peer.got.clear()
                peer.context.load_cert_chain(*write_certificate(tmp_path / "peer", "h"))
                found = await tried(url, pinning(key), "good")
                assert all(isinstance(error, HubUnreachable) and "is pinned, so" in str(error) for error in found)
                assert bytes(peer.got) == b""

    asyncio.run(play())


def test_through_a_proxy_that_speaks_tls_itself_the_pin_is_of_the_hub_and_not_of_the_proxy(
    hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, authority = new_key(), new_authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))

    async def play() -> None:
        async with listening(hub) as plain:
            files = write_certificate(tmp_path / "peer", "x", key=key)
            async with Peer(files, onward=int(plain.rpartition(":")[2])).serving() as port:
                with SmallProxy(names={"hub.internal": port}) as proxy:
                    front = Peer(
                        write_certificate(tmp_path / "front", "localhost", authority=authority), onward=proxy.port
                    )
                    async with front.serving() as at:
                        monkeypatch.setenv("https_proxy", f"https://localhost:{at}")
                        url = f"https://hub.internal:{port}"
                        assert await tried(url, pinning(key), "good") == ALL_WELL
                        assert b"good" not in front.got
                        other = await tried(url, pinning(new_key()), "good")
                        assert all(
                            isinstance(error, HubUnreachable) and "is pinned, so" in str(error) for error in other
                        )

    asyncio.run(play())


# --- the context by itself -------------------------------------------------------------------------------------------


class Blocking:
    """A TLS server on a blocking socket, for one connection. got: what came in it."""

    def __init__(self, files: tuple[Path, Path]) -> None:
        self.got = b""
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*files)
        self._taken = socket.create_server(("127.0.0.1", 0))
        self.port = self._taken.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Blocking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(10)
        self._taken.close()

    def _serve(self) -> None:
        raw, _ = self._taken.accept()
        with contextlib.suppress(OSError), self._context.wrap_socket(raw, server_side=True) as encrypted:
            self.got = encrypted.recv(1 << 16)
            encrypted.sendall(answer("200 OK", b"here"))


@pytest.mark.parametrize("is_right", [True, False])
@pytest.mark.parametrize("way", ["httpx", "a handshake by itself", "write", "sendall"])
def test_no_blocking_use_of_the_context_sends_a_byte_to_another_key(tmp_path: Path, way: str, is_right: bool) -> None:
    key = new_key()
    context = tls.pinned(pin_of((key if is_right else new_key()).public_key()))

    def use(port: int) -> None:
        if way == "httpx":
            headers = {"Token": TOKEN}
            found = httpx.get(f"https://127.0.0.1:{port}", headers=headers, verify=context, trust_env=False)
            assert found.content == b"here"
            return
        is_late = way != "a handshake by itself"
        with (
            socket.create_connection(("127.0.0.1", port)) as raw,
            context.wrap_socket(raw, do_handshake_on_connect=not is_late) as encrypted,
        ):
            send = encrypted.write if way == "write" else encrypted.sendall
            send(TOKEN.encode())

    with Blocking(write_certificate(tmp_path, "h", key=key)) as peer:
        if is_right:
            use(peer.port)
        else:
            with pytest.raises((httpx.ConnectError, tls.WrongKey)) as failure:
                use(peer.port)
            assert isinstance(tls.tls_failure(failure.value), tls.WrongKey)
    assert (TOKEN.encode() in peer.got) == is_right


@pytest.mark.parametrize("is_right", [True, False])
def test_over_memory_too_the_first_write_looks_at_the_key(tmp_path: Path, is_right: bool) -> None:
    key = new_key()
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(*write_certificate(tmp_path, "h", key=key))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    client = tls.pinned(pin_of((key if is_right else new_key()).public_key())).wrap_bio(to_client, to_server)
    failures: list[BaseException] = []

    def both() -> None:
        for side in (lambda: client.write(TOKEN.encode()), server.do_handshake):
            with contextlib.suppress(ssl.SSLWantReadError):
                try:
                    side()
                except tls.WrongKey as failure:
                    failures.append(failure)

    both()
    both()
    assert bool(failures) != is_right
    received = b""
    with contextlib.suppress(ssl.SSLWantReadError):
        server.do_handshake()
        received = server.read()
    assert received == (TOKEN.encode() if is_right else b"")


# --- the other protocol ----------------------------------------------------------------------------------------------


def test_http_to_a_port_of_tls_is_told_to_write_https(tmp_path: Path) -> None:
    async def play() -> None:
        async with Peer(write_certificate(tmp_path, "h")).serving() as port:
            edge = HubTransport(f"http://127.0.0.1:{port}", TOKEN)
            with pytest.raises(HubUnreachable) as failure:
                await edge.connect()
            assert str(failure.value) == (
                f"TLS: 127.0.0.1:{port} speaks TLS, and http://127.0.0.1:{port} is plain HTTP; write https:// instead of http://"
            )
            assert failure.value.step == "TLS"

    asyncio.run(play())


@pytest.mark.parametrize("trust", [Trust(), Trust(bytes(32))])
def test_https_to_a_port_of_plain_http_is_told_so_and_nothing_of_the_token_is_sent(trust: Trust) -> None:
    heads: list[str] = []

    def remember(head: str) -> bytes:
        heads.append(head)
        return answer("400 Bad Request")

    async def play() -> None:
        async with answering(remember) as port:
            [error, _] = await tried(f"https://127.0.0.1:{port}", trust)
            assert isinstance(error, HubUnreachable)
            assert str(error).startswith(f"TLS: 127.0.0.1:{port} answers in plain HTTP, not in TLS (")
            assert ("write http://" in str(error)) == (trust.pin is None)

    asyncio.run(play())
    assert heads
    assert not any(TOKEN in head for head in heads)


# --- pins as they are written ----------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is the oracle")
@pytest.mark.parametrize("make", [new_key, new_rsa_key])
def test_a_pin_is_what_openssl_makes_of_a_certificate(tmp_path: Path, make: type[PrivateKey]) -> None:
    key = make()
    certificate, _ = write_certificate(tmp_path, "h", key=key)
    run = subprocess.run(
        f"openssl x509 -in '{certificate}' -noout -pubkey | openssl pkey -pubin -outform der | openssl dgst -sha256 -hex",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert pin_of(key.public_key()).hex() == run.stdout.split()[-1]


PIN = bytes(range(200, 232))


@pytest.mark.parametrize(
    "written",
    [
        "sha256/yMnKy8zNzs/Q0dLT1NXW19jZ2tvc3d7f4OHi4+Tl5uc=",
        "sha256//yMnKy8zNzs/Q0dLT1NXW19jZ2tvc3d7f4OHi4+Tl5uc=",
        'pin-sha256="yMnKy8zNzs/Q0dLT1NXW19jZ2tvc3d7f4OHi4+Tl5uc="',
        "SHA256:yMnKy8zNzs/Q0dLT1NXW19jZ2tvc3d7f4OHi4+Tl5uc",
        "yMnKy8zNzs_Q0dLT1NXW19jZ2tvc3d7f4OHi4-Tl5uc",
        PIN.hex(),
        f"sha256:{PIN.hex(':').upper()}",
        f" sha256/{PIN.hex()}\n",
    ],
)
def test_a_pin_is_read_as_tools_write_it(written: str) -> None:
    assert read_pin(written) == PIN
    assert read_pin(pin_text(PIN)) == PIN


@pytest.mark.parametrize(
    "written",
    [
        "",
        "sha256/",
        "sha1/yMnKy8zNzs/Q0dLT1NU=",
        "sha256/yMnKy8zNzs",
        PIN.hex()[:-2],
        PIN.hex() + "00",
        "sha256/" + "é" * 43,
    ],
)
def test_what_is_no_pin_is_refused_with_what_one_looks_like(written: str) -> None:
    with pytest.raises(UsageProblem, match=r"is not one; copy it as the hub prints it at its start: pin='sha256/'"):
        read_pin(written)
