"""Try who can take a hub's place on the wire: peers of every kind, on every way that an edge goes, over real sockets.

A try is right where a peer that holds the pinned key is reached, and any other is refused and has got no byte of the token.
Further tries are of addresses in plain HTTP, of each protocol at the other's port, and of a hub that renews its certificate.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from small_network import SmallProxy

from fedsoda_edge.errors import FedSODAError, HubUnreachable, UsageProblem
from fedsoda_edge.network import checks, route, tls
from fedsoda_edge.network.hub_transport import HubTransport
from fedsoda_edge.network.route import Route
from fedsoda_edge.network.tls import Trust, pin_of
from fedsoda_hub.serving import certificates
from fedsoda_hub.serving.tls import Encryption
from fedsoda_hub.settings.run import read_settings

TOKEN = "fs1-the-token-that-nobody-else-may-see"
NAME = "hub.internal"  # which only the proxy knows
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR")
MAX_WRONG = 20


@dataclass
class Count:
    """The tries so far. wrong: a sentence for each that went wrong."""

    tried: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, what: str, is_right: bool) -> None:
        self.tried += 1
        if not is_right:
            self.wrong.append(what)


# --- peers -----------------------------------------------------------------------------------------------------------


def _certificate(
    directory: Path,
    key: ec.EllipticCurvePrivateKey,
    host: str = NAME,
    days: tuple[int, int] = (-1, 1),
    signer: ec.EllipticCurvePrivateKey | None = None,
) -> tuple[Path, Path]:
    """Write a certificate and its key. signer: the key of the authority; None: it signs itself."""
    directory.mkdir()
    now = datetime.now(UTC)
    issuer = host if signer is None else "authority"
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=host == "authority", path_length=None), critical=True)
        .sign(signer or key, hashes.SHA256())
    )
    files = directory / "certificate.pem", directory / "key.pem"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


@dataclass
class Peer:
    """A server that speaks TLS and remembers what came in it. is_hub: whether the pinned key is its own."""

    name: str
    files: tuple[Path, Path]
    is_hub: bool
    newest: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED
    got: bytearray = field(default_factory=bytearray)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        """Serve; the port."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.maximum_version = self.newest
        context.load_cert_chain(*self.files)
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=context)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            self.got += await reader.read(1 << 16)
            writer.write(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            await writer.drain()
        writer.close()


def _peers(directory: Path, key: ec.EllipticCurvePrivateKey, authority: ec.EllipticCurvePrivateKey) -> list[Peer]:
    def other() -> ec.EllipticCurvePrivateKey:
        return ec.generate_private_key(ec.SECP256R1())

    return [
        Peer("the hub", _certificate(directory / "a", key), True),
        Peer("the hub, expired", _certificate(directory / "b", key, days=(-90, -1)), True),
        Peer("the hub, not valid yet", _certificate(directory / "c", key, days=(1, 90)), True),
        Peer("the hub, of another name", _certificate(directory / "d", key, host="another.name"), True),
        Peer("the hub's key in TLS 1.2", _certificate(directory / "e", key), False, ssl.TLSVersion.TLSv1_2),
        Peer("another key", _certificate(directory / "f", other()), False),
        Peer("another key, expired", _certificate(directory / "g", other(), days=(-90, -1)), False),
        Peer("a middle that the system trusts", _certificate(directory / "h", other(), signer=authority), False),
        Peer("a trusted middle in TLS 1.2", _certificate(directory / "i", other(), signer=authority), False,
             ssl.TLSVersion.TLSv1_2),
    ]  # fmt: skip


# --- ways ------------------------------------------------------------------------------------------------------------


async def _converse(url: str, trust: Trust) -> None:
    edge = HubTransport(url, TOKEN, trust)
    try:
        await edge.connect()
    finally:
        await edge.close()


async def _download(url: str, trust: Trust) -> None:
    edge = HubTransport(url, TOKEN, trust)
    try:
        async for _ in edge.fetch("0" * 64, 0):
            pass
    finally:
        await edge.close()


async def _look(url: str, trust: Trust) -> None:
    await checks.check_tls(Route.to(url, trust=trust))


async def _ask_blocking(url: str, trust: Trust) -> None:
    context = Route.to(url, trust=trust).tls
    assert context is not None

    def ask() -> None:
        httpx.get(url, headers={"Authorization": f"Bearer {TOKEN}"}, verify=context, timeout=10)

    try:
        await asyncio.to_thread(ask)
    except httpx.ConnectError as error:
        raise HubUnreachable(str(error), "TLS") from error


WAYS = {"conversation": _converse, "download": _download, "doctor": _look, "blocking": _ask_blocking}


async def _try_peers(count: Count, directory: Path, is_quick: bool) -> None:
    key, authority = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    os.environ["SSL_CERT_FILE"] = str(_certificate(directory / "authority", authority, host="authority")[0])
    trust = Trust(pin_of(key.public_key()))
    for _ in range(1 if is_quick else 5):
        for peer in _peers(Path(tempfile.mkdtemp(dir=directory)), key, authority):
            async with peer.serving() as port:
                with SmallProxy(names={NAME: port}) as proxy:
                    for through in ("", f"http://127.0.0.1:{proxy.port}"):
                        os.environ.pop("https_proxy", None)
                        if through:
                            os.environ["https_proxy"] = through
                        url = f"https://{NAME if through else '127.0.0.1'}:{port}"
                        for name, way in WAYS.items():
                            await _try_one(
                                count, peer, f"{name}{' through a proxy' if through else ''}", way, url, trust
                            )
                os.environ.pop("https_proxy", None)


async def _try_one(count: Count, peer: Peer, name: str, way: object, url: str, trust: Trust) -> None:
    assert callable(way)
    peer.got.clear()
    at_tls = False
    try:
        await way(url, trust)
    except FedSODAError as error:
        at_tls = isinstance(error, HubUnreachable) and error.step in ("TLS", "proxy")
    await asyncio.sleep(0.01)
    has_token = TOKEN.encode() in peer.got
    sends = name.startswith(("conversation", "download", "blocking"))
    if peer.is_hub:
        count.add(f"{peer.name} is not reached: {name}", not at_tls and has_token == sends)
    else:
        count.add(f"{peer.name} is taken for the hub: {name}", at_tls and not peer.got)


# --- plain HTTP, and each protocol at the other's port ----------------------------------------------------------------

BEYOND = ("http://10.0.0.5:8470", "http://hub.example.org", "http://[fd00::1]:8470", "http://127.0.0.1.example.org",
          "http://localhost.example.org", "http://[::ffff:10.0.0.5]", "HTTP://10.0.0.5")  # fmt: skip
HERE = ("http://127.0.0.1:8470", "http://localhost:8470", "http://[::1]:8470", "127.0.0.1:8470")


def _try_addresses(count: Count) -> None:
    for urls, proxies in ((BEYOND, ("", "http://127.0.0.1:3128")), (HERE, ("http://proxy.example.org:3128",))):
        for url in urls:
            for proxy in proxies:
                try:
                    Route.to(url, {"http_proxy": proxy})
                    is_refused = False
                except UsageProblem:
                    is_refused = True
                count.add(f"plain HTTP leaves this machine: {url} {proxy}", is_refused)
                allowed = Route.to(url, {"http_proxy": proxy}, Trust(insecure_http=True)).scheme == "http"
                count.add(f"plain HTTP is not allowed though it was asked for: {url}", allowed)
    for url in HERE:
        count.add(f"plain HTTP on this machine is refused: {url}", Route.to(url, {}).scheme == "http")
    for url in ("10.0.0.5:8470", "hub.example.org"):
        count.add(f"an address without a scheme is not https://: {url}", Route.to(url, {}).scheme == "https")


async def _try_other_protocols(count: Count, directory: Path) -> None:
    files = _certificate(directory / "tls", ec.generate_private_key(ec.SECP256R1()))
    async with Peer("TLS", files, False).serving() as port:
        await _expect(count, f"http://127.0.0.1:{port}", Trust(), "write https:// instead of http://")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.extend(await reader.read(1 << 16))
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    heard = bytearray()
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    for trust in (Trust(), Trust(bytes(32))):
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await _expect(count, url, trust, "answers in plain HTTP, not in TLS")
    server.close()
    count.add("the token reaches a port without TLS", TOKEN.encode() not in heard)


async def _expect(count: Count, url: str, trust: Trust, words: str) -> None:
    said = "nothing"
    try:
        await _converse(url, trust)
    except FedSODAError as error:
        said = str(error)
    count.add(f"{url.partition('://')[0]} at the other's port is told as: {said}", words in said)


# --- a hub that renews -----------------------------------------------------------------------------------------------


def _try_renewals(count: Count, directory: Path, is_quick: bool) -> None:
    directory.mkdir()
    (directory / "public.txt").write_text("public")
    (directory / "run.toml").write_text('name = "r"\nmodel = "m"\n[public]\ntext = "public.txt"\n[tls]\nmode = "on"\n')
    settings = read_settings(directory / "run.toml")
    pin = certificates.own_pin(settings.run_dir / "tls.key")
    now = datetime.now(UTC)
    for start in range(3 if is_quick else 20):
        hub = Encryption(settings)
        count.add(f"start {start} has another key", hub.shown.pin == pin)
        for day in range(0, 400, 20):
            when = now + timedelta(days=day)
            hub.refresh(when)
            count.add(f"day {day}: another key", hub.shown.pin == pin)
            is_valid = hub.shown.leaf.not_valid_before_utc <= when < hub.shown.valid_until
            count.add(f"day {day}: the certificate has ended", is_valid)


# --- all of it -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _no_variables() -> Iterator[None]:
    kept = {name: value for name, value in os.environ.items() if name.lower() not in [v.lower() for v in VARIABLES]}
    with mock.patch.dict(os.environ, kept, clear=True):
        yield


def measure(quick: bool) -> dict[str, object]:
    """Count the tries and those that ended as they must."""
    count = Count()
    with tempfile.TemporaryDirectory() as made, _no_variables():
        directory = Path(made)

        async def play() -> None:
            await _try_peers(count, directory, quick)
            await _try_other_protocols(count, directory)

        asyncio.run(play())
        _try_addresses(count)
        _try_renewals(count, directory / "run", quick)
    right = count.tried - len(count.wrong)
    return {"tried": count.tried, "right": right, "wrong": count.wrong[:MAX_WRONG], "ways": len(WAYS) * 2}


def _with_any_key() -> AbstractContextManager[object]:
    return mock.patch.object(tls, "_check_key", return_value=None)


def _with_authorities() -> AbstractContextManager[object]:
    return mock.patch.object(tls, "pinned", side_effect=lambda _: tls.trusted(os.environ))


def _with_tls_1_2() -> AbstractContextManager[object]:
    real = tls.pinned

    def older(pin: bytes) -> ssl.SSLContext:
        context = real(pin)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context

    return mock.patch.object(tls, "pinned", older)


def _with_plain_http() -> AbstractContextManager[object]:
    return mock.patch.object(route, "_check_plain", return_value=None)


def _with_a_new_key_each_time() -> AbstractContextManager[object]:
    real = certificates.own_key

    def anew(path: Path) -> ec.EllipticCurvePrivateKey:
        path.unlink(missing_ok=True)
        return real(path)

    return mock.patch.object(certificates, "own_key", anew)


def _without_renewal() -> AbstractContextManager[object]:
    return mock.patch.object(Encryption, "_is_fresh", return_value=True)


DEFECTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "the pinned key is not compared": _with_any_key,
    "a pin is forgotten where an authority vouches": _with_authorities,
    "TLS 1.2 is spoken to a pinned hub": _with_tls_1_2,
    "plain HTTP leaves the machine": _with_plain_http,
    "a renewal makes a new key": _with_a_new_key_each_time,
    "certificates are not renewed": _without_renewal,
}
