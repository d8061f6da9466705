"""The hub's own TLS: 1.3 alone, a key that stays, certificates that are renewed while edges are connected. Real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import socket
import ssl
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from websockets.asyncio.client import connect

from fedsoda_edge.edge import Edge
from fedsoda_edge.errors import HubUnreachable, RefusedByHub, UsageProblem
from fedsoda_edge.network import tls as edge_tls
from fedsoda_edge.network.hub_transport import HubTransport
from fedsoda_edge.network.tls import Trust, pin_of, pin_text, read_pin
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.session import Upload
from fedsoda_hub.cli.display import _sentence
from fedsoda_hub.events import HubEvent, Listening
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.reset import reset
from fedsoda_hub.serving import certificates, tls
from fedsoda_hub.serving.listener import Server, bind
from fedsoda_hub.serving.ordering import ask_running_hub
from fedsoda_hub.serving.strangers import ConnectionLimits
from fedsoda_hub.serving.tls import Encryption, WayIn, way_in
from fedsoda_hub.settings.run import RunSettings, read_settings
from tests.edge.network.certificates import new_authority, new_key, new_rsa_key, write_certificate
from tests.hub.serving.test_daemon import serving as serving_daemon
from tests.hub.serving.test_daemon import write_run
from tests.hub.serving.test_listener import SHARD, SHARD_DIGEST, STATUS, MemoryHub, greet, until

NOW = datetime.now(UTC)


def settings_of(directory: Path, listen: str = 'host = "127.0.0.1"', tls_table: str = 'mode = "on"') -> RunSettings:
    """A run in `directory` whose model is never opened."""
    directory.mkdir(exist_ok=True)
    (directory / "public.txt").write_text("public")
    (directory / "run.toml").write_text(
        f'name = "small"\nmodel = "no-model"\n[public]\ntext = "public.txt"\n[listen]\n{listen}\n[tls]\n{tls_table}\n'
    )
    return read_settings(directory / "run.toml")


@pytest.fixture
def hub(tmp_path: Path) -> MemoryHub:
    (tmp_path / "shard").write_bytes(SHARD)
    return MemoryHub(tmp_path / "shard")


@contextlib.asynccontextmanager
async def serving(
    hub: MemoryHub, encryption: Encryption | None, limits: ConnectionLimits | None = None
) -> AsyncIterator[int]:
    server, taken = Server(hub.parts, hub.defects.append, limits, encryption), bind("127.0.0.1", 0)
    running = asyncio.create_task(server.serve(sockets=[taken]))
    await server.has_started.wait()
    try:
        yield taken.getsockname()[1]
    finally:
        server.should_exit = True
        await running
        taken.close()
        assert hub.defects == []


def play(
    hub: MemoryHub,
    encryption: Encryption,
    talk: Callable[[int], Awaitable[None]],
    limits: ConnectionLimits | None = None,
) -> None:
    async def both() -> None:
        async with serving(hub, encryption, limits) as port:
            await talk(port)

    asyncio.run(both())


async def shown(port: int) -> x509.Certificate:
    """The certificate that a new connection gets."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    return x509.load_der_x509_certificate(found)


# --- one port, encrypted ---------------------------------------------------------------------------------------------


def test_an_edge_that_pins_the_hubs_key_talks_and_fetches_and_others_are_refused(
    hub: MemoryHub, tmp_path: Path
) -> None:
    encryption = Encryption(settings_of(tmp_path / "run"))

    async def talk(port: int) -> None:
        url = f"https://127.0.0.1:{port}"
        edge = HubTransport(url, "alice", Trust(encryption.shown.pin))
        await edge.connect()
        assert b"".join([piece async for piece in edge.fetch(SHARD_DIGEST, 0)]) == SHARD
        await edge.close()
        with pytest.raises(RefusedByHub, match="was revoked"):
            await HubTransport(url, "mallory", Trust(encryption.shown.pin)).connect()
        with pytest.raises(HubUnreachable, match=r"CERTIFICATE_VERIFY_FAILED.*join with the pin that it prints"):
            await HubTransport(url, "alice").connect()
        with pytest.raises(HubUnreachable, match=r"speaks TLS, and http://.* is plain HTTP; write https://"):
            await HubTransport(f"http://127.0.0.1:{port}", "alice").connect()

    play(hub, encryption, talk)


def test_a_file_larger_than_every_buffer_comes_whole(hub: MemoryHub, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    hub.shard.write_bytes(data)
    encryption = Encryption(settings_of(tmp_path / "run"))

    async def talk(port: int) -> None:
        edge = HubTransport(f"https://127.0.0.1:{port}", "alice", Trust(encryption.shown.pin))
        assert b"".join([piece async for piece in edge.fetch(SHARD_DIGEST, 1000)]) == data[1000:]
        await edge.close()

    play(hub, encryption, talk)


def test_an_upload_of_many_records_reaches_the_hub_whole(hub: MemoryHub, tmp_path: Path) -> None:
    data = os.urandom(hub.max_update_bytes)
    digest = ms.Digest(hashlib.sha256(data).hexdigest())
    start = ms.UpdateStart(
        round=1,
        digest=digest,
        bytes=len(data),
        codec="int8",
        base=ms.Digest("b" * 64),
        alignment=0,
        num_examples=1,
        loss=0.5,
    )
    encryption = Encryption(settings_of(tmp_path / "run"))

    async def talk(port: int) -> None:
        async with connect(
            f"wss://127.0.0.1:{port}/v1/session",
            ssl=edge_tls.pinned(encryption.shown.pin),
            additional_headers={"Authorization": "Bearer alice"},
            compression=None,
            proxy=None,
        ) as socket:
            said = await greet(socket)
            await socket.send(said.send(ms.Ready(num_examples=1)))
            await socket.send(said.send(start))
            for offset in range(0, len(data), 1 << 18):
                chunk = ms.UpdateChunk(digest=digest, offset=offset)
                await socket.send(said.send(chunk, data[offset : offset + (1 << 18)]))
            await until(lambda: any(isinstance(heard, Upload) for heard in hub.heard))

    play(hub, encryption, talk)
    assert Upload(start, data) in hub.heard


def test_only_tls_1_3_is_spoken(hub: MemoryHub, tmp_path: Path) -> None:
    async def talk(port: int) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("127.0.0.1", port, ssl=context)
        context.maximum_version = ssl.TLSVersion.MAXIMUM_SUPPORTED
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        assert writer.get_extra_info("ssl_object").version() == "TLSv1.3"
        writer.transport.abort()

    play(hub, Encryption(settings_of(tmp_path / "run")), talk)


def test_plain_http_on_the_port_is_answered_with_a_sentence(hub: MemoryHub, tmp_path: Path) -> None:
    async def talk(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
        found = await asyncio.wait_for(reader.read(), 10)
        assert found.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert found.endswith(b"\r\n\r\nThis hub speaks TLS: write https:// instead of http://.\n")
        writer.close()

    play(hub, Encryption(settings_of(tmp_path / "run")), talk)


# --- strangers -------------------------------------------------------------------------------------------------------


def test_who_does_not_finish_a_handshake_is_bounded_as_strangers_are(hub: MemoryHub, tmp_path: Path) -> None:
    encryption = Encryption(settings_of(tmp_path / "run"))
    limits = ConnectionLimits(None)
    limits.strangers = limits.of_address = 3
    context = edge_tls.pinned(encryption.shown.pin)
    words = [b"", b"\x16\x03\x01", b"\x16\x03\x01\x02\x00\x01\x00"]

    async def talk(port: int) -> None:
        opened = []
        for number in range(6):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(words[number % 3])
            opened.append((reader, writer))
            await asyncio.sleep(0.02)
        for reader, _ in opened[:3]:  # the oldest made room
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 5) == b""
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)  # who comes next is heard
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 200")
        for _, writer in opened:
            writer.close()

    play(hub, encryption, talk, limits)


def test_a_handshake_that_stays_silent_ends_in_time(
    hub: MemoryHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tls, "HANDSHAKE_SECONDS", 0.2)
    caplog.set_level(logging.WARNING)

    async def talk(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()

    play(hub, Encryption(settings_of(tmp_path / "run")), talk)
    assert "gone without a TLS handshake (1)" in caplog.text


def test_a_hub_that_ends_does_not_wait_for_handshakes(hub: MemoryHub, tmp_path: Path) -> None:
    async def talk(port: int) -> None:
        await asyncio.open_connection("127.0.0.1", port)
        await asyncio.sleep(0.05)

    started = datetime.now(UTC)
    play(hub, Encryption(settings_of(tmp_path / "run")), talk)
    assert datetime.now(UTC) - started < timedelta(seconds=4)


# --- keys and certificates -------------------------------------------------------------------------------------------


def test_the_key_is_made_once_for_its_owner_alone_and_stays_also_after_a_reset(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "run")
    directory = RunDirectory(settings.run_dir)
    first = way_in(settings)  # a link may be made before the hub ever serves
    assert stat.S_IMODE(directory.tls_key.stat().st_mode) == 0o600
    key = load_pem_private_key(directory.tls_key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp256r1"
    assert first.tls_pin == pin_of(key.public_key())
    for _ in range(2):
        encryption = Encryption(settings)
        assert encryption.shown.pin == first.tls_pin
        assert read_pin(directory.tls_pin.read_text()) == first.tls_pin
        reset(directory)


@pytest.mark.parametrize("damaged", [b"", b"not a key", "cut", "rsa"])
def test_a_damaged_key_is_refused_and_not_made_anew(tmp_path: Path, damaged: bytes | str) -> None:
    settings = settings_of(tmp_path / "run")
    path = RunDirectory(settings.run_dir).tls_key
    certificates.own_key(path)
    if damaged == "rsa":
        path.write_bytes(write_certificate(tmp_path / "rsa", "h", key=new_rsa_key())[1].read_bytes())
    else:
        path.write_bytes(path.read_bytes()[:100] if isinstance(damaged, str) else damaged)
    before = path.read_bytes()
    with pytest.raises(
        UsageProblem, match=r"does not hold a key over P-256: it was cut or changed; put it back from a copy"
    ):
        Encryption(settings)
    assert path.read_bytes() == before


def test_a_certificate_names_where_the_hub_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "_outward", lambda host: "10.1.2.3" if host == "0.0.0.0" else host)
    listen = 'host = "0.0.0.0"\npublic_url = "https://hub.example.org:444/fl"'
    leaf = Encryption(settings_of(tmp_path / "run", listen)).shown.leaf
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["hub.example.org", "localhost"]
    found = {str(address) for address in names.get_values_for_type(x509.IPAddress)}
    assert found == {"127.0.0.1", "::1", "0.0.0.0", "10.1.2.3"}


def test_the_systems_own_rules_accept_the_certificate_where_it_is_trusted(hub: MemoryHub, tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "run")
    encryption = Encryption(settings)

    async def talk(port: int) -> None:
        context = ssl.create_default_context(cafile=RunDirectory(settings.run_dir).tls_certificate)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        _, writer = await asyncio.open_connection("localhost", port, ssl=context, family=socket.AF_INET)
        writer.transport.abort()

    play(hub, encryption, talk)


def test_a_renewal_reaches_new_connections_and_disturbs_nobody(hub: MemoryHub, tmp_path: Path) -> None:
    encryption = Encryption(settings_of(tmp_path / "run"))
    pin = encryption.shown.pin

    async def talk(port: int) -> None:
        first = await shown(port)
        async with connect(
            f"wss://127.0.0.1:{port}/v1/session",
            ssl=edge_tls.pinned(pin),
            additional_headers={"Authorization": "Bearer alice"},
            compression=None,
            proxy=None,
        ) as old:
            encryption.refresh(NOW + timedelta(days=59))
            assert await shown(port) == first  # nothing is due yet
            encryption.refresh(NOW + timedelta(days=61))
            second = await shown(port)
            assert second != first
            assert second.not_valid_after_utc > first.not_valid_after_utc + timedelta(days=60)
            assert pin_of(second.public_key()) == pin_of(first.public_key()) == pin
            await greet(old)  # the connection from before goes on
            edge = HubTransport(f"https://127.0.0.1:{port}", "bob", Trust(pin))
            await edge.connect()
            await edge.close()
        assert (
            x509.load_pem_x509_certificate(
                RunDirectory(settings_of(tmp_path / "run").run_dir).tls_certificate.read_bytes()
            )
            == second
        )

    play(hub, encryption, talk)


def test_the_hub_looks_by_itself(hub: MemoryHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "LOOK_SECONDS", 0.01)
    encryption = Encryption(settings_of(tmp_path / "run"))
    monkeypatch.setattr(certificates, "RENEWED", certificates.VALID)  # due at once

    async def talk(port: int) -> None:
        first = await shown(port)
        keeping = asyncio.create_task(encryption.keep())
        async with asyncio.timeout(10):
            while await shown(port) == first:
                await asyncio.sleep(0.01)
        keeping.cancel()

    play(hub, encryption, talk)


# --- an owner's own --------------------------------------------------------------------------------------------------

OWN = 'certificate = "own/certificate.pem"\nkey = "own/key.pem"'


def test_files_that_change_on_disk_are_picked_up_and_broken_ones_are_told_once(
    hub: MemoryHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = tmp_path / "run" / "own"
    (tmp_path / "run").mkdir()
    caplog.set_level(logging.WARNING)
    write_certificate(own, "h", days=(-1, 30))
    settings = settings_of(tmp_path / "run", tls_table=OWN)
    encryption = Encryption(settings)

    async def talk(port: int) -> None:
        first = await shown(port)
        write_certificate(own, "h", key=new_rsa_key(), days=(-1, 60))  # a key of another kind too
        encryption.refresh(datetime.now(UTC))
        second = await shown(port)
        assert second != first
        assert isinstance(second.public_key(), type(new_rsa_key().public_key()))
        assert read_pin(RunDirectory(settings.run_dir).tls_pin.read_text()) == pin_of(second.public_key())
        kept = (own / "key.pem").read_bytes()
        write_certificate(own, "h")
        (own / "key.pem").write_bytes(kept)  # as between the two steps of a renewal
        for _ in range(3):
            encryption.refresh(datetime.now(UTC))
        assert await shown(port) == second

    play(hub, encryption, talk)
    [said] = [record.getMessage() for record in caplog.records if "TLS:" in record.getMessage()]
    assert "is not the key of the first certificate" in said
    assert "the hub keeps its certificate until" in said


def test_a_certificate_that_is_not_renewed_is_complained_of_before_it_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    write_certificate(tmp_path / "run" / "own", "h", days=(-1, 20))
    encryption = Encryption(settings_of(tmp_path / "run", tls_table=OWN))
    caplog.set_level(logging.WARNING)
    encryption.refresh(NOW + timedelta(days=12))
    assert not caplog.records
    for day in (14, 15, 16):
        encryption.refresh(NOW + timedelta(days=day))
    assert [record.getMessage().rpartition("; ")[2] for record in caplog.records] == ["renew it"]


def _break(how: str, own: Path, tmp_path: Path) -> None:
    certificate, key = write_certificate(own, "h")
    if how == "missing certificate":
        certificate.unlink()
    elif how == "missing key":
        key.unlink()
    elif how == "no certificate":
        certificate.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    elif how == "empty":
        certificate.write_text("")
    elif how == "no key":
        key.write_text("hello")
    elif how == "another key":
        key.write_bytes(write_certificate(tmp_path / "other", "h")[1].read_bytes())
    elif how == "passphrase":
        write_certificate(own, "h", password=b"secret")
    elif how == "expired":
        write_certificate(own, "h", days=(-90, -1))
    elif how == "not yet":
        write_certificate(own, "h", days=(1, 90))
    elif how == "a directory":
        certificate.unlink()
        certificate.mkdir()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing certificate", r"\[tls\] certificate: .*certificate\.pem cannot be read \(No such file"),
        ("missing key", r"\[tls\] key: .*key\.pem cannot be read \(No such file"),
        ("a directory", r"\[tls\] certificate: .* cannot be read \(Is a directory\)"),
        ("no certificate", r"holds no certificate that can be read"),
        ("empty", r"holds no certificate that can be read; .*of certbot, fullchain\.pem"),
        ("no key", r"\[tls\] key: .* holds no private key that can be read; .*of certbot, privkey\.pem"),
        ("another key", r"key\.pem is not the key of the first certificate in .*certificate\.pem; name the two"),
        ("passphrase", r"has a passphrase, .* write the key without one \(openssl pkey"),
        ("expired", r"certificate\.pem expired 20\d\d-.* UTC, and it is 20\d\d-.* UTC; renew it"),
        ("not yet", r"certificate\.pem is not valid before 20\d\d-.* UTC, and it is 20\d\d-"),
    ],
)
def test_what_a_hub_cannot_serve_with_is_refused_at_its_start(tmp_path: Path, how: str, words: str) -> None:
    (tmp_path / "run").mkdir()
    _break(how, tmp_path / "run" / "own", tmp_path)
    settings = settings_of(tmp_path / "run", tls_table=OWN)
    with pytest.raises(UsageProblem, match=words) as refused:
        Encryption(settings)
    assert refused.value.exit_status == 2
    assert "\n" not in str(refused.value)


def test_one_file_may_hold_certificate_and_key(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    certificate, key = write_certificate(tmp_path / "run" / "own", "h")
    certificate.write_bytes(key.read_bytes() + certificate.read_bytes())
    key.unlink()
    assert Encryption(settings_of(tmp_path / "run", tls_table='certificate = "own/certificate.pem"')).shown.pin


# --- where edges reach it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listen", "table", "addresses", "has_pin", "is_plain", "is_guess"),
    [
        ("", "", ("127.0.0.1:8470",), False, True, False),
        ('host = "::1"', "", ("[::1]:8470",), False, True, False),
        ("", 'mode = "on"', ("127.0.0.1:8470",), True, False, False),
        ('host = "0.0.0.0"', "", ("10.1.2.3:8470",), True, False, True),
        ('host = "::"\nport = 9', "", ("10.1.2.3:9",), True, False, True),
        ('host = "192.0.2.7"', "", ("192.0.2.7:8470",), True, False, False),
        ('host = "0.0.0.0"\npublic_url = "https://hub.org/fl/"', "", ("hub.org/fl",), True, False, False),
        ('host = "0.0.0.0"\npublic_url = "https://hub.org"', 'mode = "off"', ("hub.org",), False, False, False),
        ('public_url = "https://hub.org"', "", ("hub.org",), False, False, False),
        ('host = "0.0.0.0"\npublic_url = "http://h:1"', 'mode = "off"', ("h:1",), False, True, False),
    ],
)
def test_the_way_in_is_what_the_owner_wrote_or_a_guess(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    listen: str,
    table: str,
    addresses: tuple[str, ...],
    has_pin: bool,
    is_plain: bool,
    is_guess: bool,
) -> None:
    monkeypatch.setattr(tls, "_outward", lambda host: "10.1.2.3" if host in ("0.0.0.0", "::") else host)
    settings = settings_of(tmp_path / "run", listen, table)
    pin = certificates.own_pin(RunDirectory(settings.run_dir).tls_key) if has_pin else None
    assert way_in(settings) == WayIn(addresses, pin, is_plain, is_guess)


def test_a_way_that_nobody_can_know_is_refused_with_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match=r"a proxy is in front of the hub.* as \[listen\] public_url"):
        way_in(settings_of(tmp_path / "a", 'host = "0.0.0.0"', 'mode = "off"'))
    free = settings_of(tmp_path / "b", "port = 0")
    with pytest.raises(UsageProblem, match=r"port = 0 is known once the hub serves; start it first"):
        way_in(free)
    RunDirectory(free.run_dir).path.mkdir(exist_ok=True)
    RunDirectory(free.run_dir).address.write_text("https://127.0.0.1:4711")
    assert way_in(free).addresses == ("127.0.0.1:4711",)
    assert way_in(free, 12).addresses == ("127.0.0.1:12",)


def test_what_an_authority_vouches_for_is_not_pinned_and_what_vouches_for_itself_is(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    own = tmp_path / "run" / "own"
    write_certificate(own, "h", authority=new_authority(tmp_path))
    settings = settings_of(tmp_path / "run", tls_table=OWN)
    assert way_in(settings).tls_pin is None
    key = new_key()
    write_certificate(own, "h", key=key)
    assert way_in(settings).tls_pin == pin_of(key.public_key())


def test_the_outward_address_is_one_of_this_machines() -> None:
    for host in ("0.0.0.0", "::"):
        assert tls._outward(host) not in ("", host)
    assert tls._outward("hub.org") == "hub.org"


@pytest.mark.parametrize(
    ("event", "lines"),
    [
        (
            Listening(url="http://127.0.0.1:1", run="r", public_url="http://127.0.0.1:1"),
            ["serving r at http://127.0.0.1:1"],
        ),
        (
            Listening(url="https://0.0.0.0:1", run="r", public_url="https://10.0.0.5:1", is_guess=True, pin="sha256/x"),
            [
                "serving r at https://0.0.0.0:1",
                "edges reach it at https://10.0.0.5:1 (a guess; [listen] public_url says it)",
                "its TLS key, for fedsoda-edge --pin: sha256/x",
            ],
        ),
        (
            Listening(url="http://0.0.0.0:1", run="r", is_behind_proxy=True),
            [
                "serving r at http://0.0.0.0:1",
                '[tls] mode = "off": this port speaks plain HTTP, and whoever reaches it reads tokens and updates; let only a '
                "proxy that speaks TLS reach it",
            ],
        ),
    ],
)
def test_the_start_says_where_edges_reach_the_hub_and_what_is_not_encrypted(event: HubEvent, lines: list[str]) -> None:
    assert _sentence(event).splitlines() == lines


# --- the hub's own commands ------------------------------------------------------------------------------------------


def test_the_owners_commands_reach_a_hub_that_speaks_tls(hub: MemoryHub, tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "run")
    directory = RunDirectory(settings.run_dir)

    async def talk(port: int) -> None:
        for host in ("127.0.0.1", "0.0.0.0"):
            directory.address.write_text(f"https://{host}:{port}")
            assert await asyncio.to_thread(ask_running_hub, directory) == STATUS

    play(hub, Encryption(settings), talk)
    assert ask_running_hub(directory) is None


def test_who_took_the_port_of_a_hub_that_was_killed_does_not_get_the_owners_secret(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "run")
    directory = RunDirectory(settings.run_dir)
    Encryption(settings)
    directory.admin_token.write_text("the-owners-secret")
    got = bytearray()

    async def impostor() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*write_certificate(tmp_path / "other", "127.0.0.1"))

        async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                got.extend(await reader.read(1 << 16))
            writer.close()

        server = await asyncio.start_server(listen, "127.0.0.1", 0, ssl=context)
        directory.address.write_text(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        assert await asyncio.to_thread(ask_running_hub, directory) is None
        server.close()

    asyncio.run(impostor())
    assert bytes(got) == b""


# --- the daemon ------------------------------------------------------------------------------------------------------


def test_a_run_that_is_served_with_tls_says_its_pin_and_is_reached_with_it(tmp_path: Path) -> None:
    settings = write_run(tmp_path, tls={"mode": "on"})
    directory = RunDirectory(settings.run_dir)

    async def talk() -> None:
        async with serving_daemon(settings) as served:
            [said] = [event for event in served.events if event["event"] == "listening"]
            assert served.url.startswith("https://127.0.0.1:")
            assert (said["url"], said["public_url"], said["is_guess"]) == (served.url, served.url, False)
            assert (said["pin"], said["is_behind_proxy"]) == (pin_text(certificates.own_pin(directory.tls_key)), False)
            (tmp_path / "a.token").write_text(served.token("a"))
            edge = Edge(served.url, token_file=tmp_path / "a.token", pin=said["pin"]).transport()
            await edge.connect()
            await edge.close()
            status = await asyncio.to_thread(ask_running_hub, directory)
            assert status is not None
            assert (status.run, status.url) == ("small", served.url)
        assert not directory.address.exists()

    asyncio.run(talk())


def test_a_certificate_that_cannot_be_used_ends_the_hub_before_it_prepares(tmp_path: Path) -> None:
    settings = write_run(tmp_path, tls={"certificate": "missing.pem"})

    async def talk() -> None:
        async with serving_daemon(settings) as served:
            with pytest.raises(UsageProblem, match=r"missing\.pem cannot be read"):
                await served.running
            assert not served.said("prepared")

    asyncio.run(talk())
