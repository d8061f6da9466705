"""Devices join a hub by link over loopback, with the real commands around a real port: what a link is worth, and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import InvalidStatus

from fedsoda_edge.edge import Edge
from fedsoda_edge.errors import HubUnreachable, RefusedByHub
from fedsoda_edge.join.conversation import Conversation
from fedsoda_edge.join.doctor import examine
from fedsoda_edge.join.home import Home
from fedsoda_edge.join.identity import device_key
from fedsoda_edge.join.inspect import hello as hello_of
from fedsoda_edge.join.patience import Patience
from fedsoda_edge.network.hub_transport import HubTransport
from fedsoda_edge.ports import SystemClock
from fedsoda_edge.ports.disk import sha256
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.join_link import JoinLink, read_link
from fedsoda_edge.protocol.signatures import SigningKey, fingerprint
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import opened_to_read
from fedsoda_hub.serving.admission import LOOK_SECONDS
from fedsoda_hub.settings.run import RunSettings, read_settings
from tests.edge.join.test_doctor import Looks
from tests.hub.serving.test_daemon import SHARD, Hub, connected, hello, serving, until, write_run
from tests.joins import Deaf


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    return write_run(tmp_path / "run")


async def command(module: str, *arguments: str | Path, stdin: str = "", **environment: str) -> tuple[int, str, str]:
    """Run a command as a process: (exit status, stdout, stderr)."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        *map(str, arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
    )
    out, err = await process.communicate(stdin.encode())
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def invite(settings: RunSettings, name: str) -> str:
    """The link that `fedsoda-hub invite` prints."""
    status, out, err = await command("fedsoda_hub", "invite", settings.path, "--name", name)
    assert status == 0, err
    [line] = out.splitlines()
    return line


def conversation(link: str, home: Path) -> tuple[Conversation, HubTransport]:
    transport = Edge(link, home=home).transport()
    assert isinstance(transport, HubTransport)
    clock = SystemClock()
    return Conversation(
        transport, lambda: hello_of(Home(home)), lambda _: None, clock, Patience(clock, 5.0), Deaf()
    ), transport


@contextlib.asynccontextmanager
async def joined(link: str, home: Path) -> AsyncIterator[ms.Welcome]:
    talk, _ = conversation(link, home)
    try:
        yield await talk.greet()
    finally:
        await talk.close()


def test_two_devices_join_by_link_over_a_restart_and_a_used_link_lets_in_its_device_alone(
    tmp_path: Path, settings: RunSettings
) -> None:
    ann, bob, thief = (tmp_path / name for name in ("ann", "bob", "thief"))

    async def life() -> None:
        async with serving(settings) as hub:
            keep_port(settings, hub)
            run = read_settings(settings.path)
            links = dict(zip("ab", await asyncio.gather(invite(run, "ann"), invite(run, "bob")), strict=True))
            async with joined(links["a"], ann) as first, joined(links["b"], bob) as second:
                assert (first.edge, second.edge) == ("ann", "bob")
        async with serving(read_settings(settings.path)):
            # The hub's memory is gone, the links are used: each device comes back by itself, nobody else does.
            async with joined(links["a"], ann) as again:
                assert again.edge == "ann"
            by_file = tmp_path / "bob.link"
            by_file.write_text(f"{links['b']}\n")
            (stolen, _, why), (left, _, said) = await asyncio.gather(
                command("fedsoda_edge", "leave", links["a"], FEDSODA_HOME=str(thief)),
                command("fedsoda_edge", "leave", "--link-file", by_file, "--debug", FEDSODA_HOME=str(bob)),
            )
            assert (stolen, left) == (5, 0), (why, said)
            mine, its = (fingerprint(device_key(Home(home)).public) for home in (thief, ann))
            assert f"by the device {its}, and this one is {mine}" in why
            for link in links.values():
                assert secret_of(link) not in why + said

    asyncio.run(life())
    assert [path.stat().st_mode & 0o777 for path in (ann / "device.key", settings.run_dir / "hub.key")] == [0o600] * 2
    with opened_to_read(RunDirectory(settings.run_dir)) as ledger:
        known = ledger.edges.all()
    assert [(edge.edge, edge.kind, edge.used) for edge in known] == [("ann", "link", True), ("bob", "link", True)]
    assert all(edge.first_seen and edge.last_seen and edge.first_seen <= edge.last_seen for edge in known)


def port_of(hub: Hub) -> int:
    return int(hub.url.rpartition(":")[2])


def keep_port(settings: RunSettings, hub: Hub) -> None:
    """Let the RUN.toml name the port that the hub took."""
    path = Path(settings.path)
    path.write_text(path.read_text().replace("port = 0", f"port = {port_of(hub)}"))


def secret_of(link: str) -> str:
    return link.partition("s=")[2].partition("&")[0]


def link_for(hub: Hub, name: str, *addresses: str) -> str:
    """A link as the command makes it, without a process."""
    from fedsoda_edge.protocol.proof import invitation_key

    daemon = hub.daemon
    key = SigningKey((daemon.disk.directory.signing_key).read_bytes())
    secret = os.urandom(24)
    daemon.disk.ledger.devices.invite(name, invitation_key(secret).public, daemon._clock.wall() + 60)
    return str(JoinLink(addresses or (f"127.0.0.1:{port_of(hub)}",), key.public, secret, None, True))


def test_files_of_the_bundle_come_with_the_ticket_and_after_it_has_ended_with_the_next(
    tmp_path: Path, settings: RunSettings
) -> None:
    async def life() -> None:
        async with serving(settings) as hub:
            _, transport = conversation(link_for(hub, "ann"), tmp_path / "home")
            await transport.connect()
            tickets = hub.daemon.admission.tickets
            for _ in range(2):
                assert b"".join([piece async for piece in transport.fetch(sha256(SHARD), 0)]) == SHARD
                for token in tickets.held():
                    tickets.end(token.edge, token.key)
            await transport.close()

    asyncio.run(life())


def test_of_several_addresses_the_first_that_answers_is_taken_and_it_is_the_first_next_time(
    tmp_path: Path, settings: RunSettings
) -> None:
    async def life() -> None:
        async with serving(settings) as hub:
            there = f"127.0.0.1:{port_of(hub)}"
            link = link_for(hub, "ann", "127.0.0.1:9", "127.0.0.1:1", there)
            _, transport = conversation(link, tmp_path / "home")
            assert [route.address for route in transport.routes] == ["127.0.0.1:9", "127.0.0.1:1", there]
            await transport.connect()
            assert transport.url == f"http://{there}"
            await transport.close()
            _, transport = conversation(link, tmp_path / "home")
            assert [route.address for route in transport.routes] == [there, "127.0.0.1:9", "127.0.0.1:1"]
        with pytest.raises(HubUnreachable) as nowhere:
            await transport.connect()
        assert str(nowhere.value).startswith("no address of the hub can be used: TCP: nothing answers at 127.0.0.1:")
        assert transport.url == f"http://{there}"

    asyncio.run(life())


def test_another_hub_at_the_address_is_told_nothing(tmp_path: Path, settings: RunSettings) -> None:
    async def life() -> None:
        async with serving(settings) as hub:
            link = read_link(link_for(hub, "ann"))
            other = JoinLink(link.addresses, SigningKey(b"o" * 32).public, link.secret, None, True)
            _, transport = conversation(str(other), tmp_path / "home")
            with pytest.raises(HubUnreachable, match="the join link is for a hub with") as refused:
                await transport.connect()
            assert refused.value.step == "auth"
            assert hub.daemon.disk.ledger.devices.all()[0].key is None

    asyncio.run(life())


@pytest.mark.parametrize("what", ["revoke", "rebind"])
def test_a_running_hub_ends_the_connection_of_who_is_shut_out_by_another_process(
    tmp_path: Path, settings: RunSettings, what: str
) -> None:
    async def life() -> None:
        async with serving(settings) as hub:
            keep_port(settings, hub)
            talk, _ = conversation(link_for(hub, "ann"), tmp_path / "home")
            await talk.greet()
            heard = asyncio.create_task(anext(talk.messages()))
            other = hub.token("b")
            async with connected(hub.url, other) as kept, connected(hub.url, hub.token("c")) as ended:
                for edge in (kept, ended):
                    await edge.say(hello("x"))
                    await edge.hear(ms.Welcome)
                status, out, err = await command("fedsoda_hub", what, settings.path, "ann")
                assert status == 0, err
                assert bool(out) == (what == "rebind")
                assert (await command("fedsoda_hub", "revoke", settings.path, "c"))[0] == 0
                await until(lambda: hub.clock.sleeps(LOOK_SECONDS))
                hub.clock.wake(LOOK_SECONDS)
                with pytest.raises(
                    RefusedByHub, match="ann was shut out" if what == "revoke" else "gave ann to another"
                ):
                    await asyncio.wait_for(heard, 10)
                assert "the token of c was revoked" in (await ended.hear(ms.Refusal)).reason
                assert await ended.is_hung_up_on()
                await kept.say(ms.Ready(num_examples=1))
                await hub.until("edge_left", edge="ann")
            with pytest.raises(RefusedByHub):
                await talk.greet()
            await talk.close()
            assert hub.daemon.roster.connected == set()

    asyncio.run(life())


def test_a_copy_of_a_home_is_refused_while_the_first_is_connected(tmp_path: Path, settings: RunSettings) -> None:
    async def life() -> None:
        async with serving(settings) as hub:
            link = link_for(hub, "ann")
            async with joined(link, tmp_path / "home"):
                shutil.copytree(tmp_path / "home", tmp_path / "copy")
                talk, _ = conversation(link, tmp_path / "copy")
                with pytest.raises(RefusedByHub, match="two devices share one identity: ann is connected from another"):
                    await talk.greet()
                await talk.close()

    asyncio.run(life())


def test_a_proof_is_a_small_post_and_a_ticket_that_never_was_opens_nothing(settings: RunSettings) -> None:
    async def life() -> None:
        async with serving(settings) as hub, httpx.AsyncClient(trust_env=False) as client:
            answer = await client.post(f"{hub.url}/v1/proof", content=b"x" * 5000)
            assert (answer.status_code, answer.json()) == (413, {"reason": "a proof has at most 4096 bytes"})
            assert (await client.get(f"{hub.url}/v1/proof")).status_code == 405
            with pytest.raises(InvalidStatus) as refused:
                async with connected(hub.url, "fk1-guessed"):
                    pass
            body = json.loads(refused.value.response.body or b"")
            assert body == {"reason": "this device's ticket has ended; join again"}

    asyncio.run(life())


def test_doctor_goes_to_the_address_that_answers_and_proves_the_device(tmp_path: Path, settings: RunSettings) -> None:
    async def life() -> list[tuple[str, bool]]:
        found = []
        async with serving(settings) as hub:
            link = read_link(link_for(hub, "ann", "127.0.0.1:9", f"127.0.0.1:{port_of(hub)}"))
            steps = examine(link, None, Home(tmp_path / "home"), worker=Looks())
            async with contextlib.aclosing(steps):  # type: ignore[type-var]
                async for step in steps:
                    found.append((step.name, step.passed))
                    if step.name == "join link":
                        break
        return found

    found = asyncio.run(life())
    assert found[found.index(("address", True)) :] == [
        (name, True) for name in ("address", "proxy", "DNS", "TCP", "TLS", "HTTP", "clock", "join link")
    ]
