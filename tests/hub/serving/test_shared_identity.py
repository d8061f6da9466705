"""A FEDSODA_HOME that was copied to another machine: the device that is connected stays, the copy is refused with words."""

from __future__ import annotations

import asyncio
import logging
import shutil
from pathlib import Path

import msgspec
import pytest

from fedsoda_edge.errors import RefusedByHub
from fedsoda_edge.join.conversation import Conversation
from fedsoda_edge.join.home import Home
from fedsoda_edge.join.inspect import hello as hello_of
from fedsoda_edge.join.patience import Patience
from fedsoda_edge.network.hub_transport import HubTransport
from fedsoda_edge.protocol import messages as ms
from fedsoda_hub.settings.run import RunSettings
from tests.hub.serving.test_daemon import connected, serving, write_run
from tests.joins import Deaf
from tests.skipping_clock import SkippingClock


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    return write_run(tmp_path / "run")


WHY = "two devices share one identity: a is connected from another machine, or from another copy of its FEDSODA_HOME"


def test_the_copy_is_refused_for_now_and_the_first_is_not_disturbed(
    tmp_path: Path,
    settings: RunSettings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = Home(tmp_path / "home")
    first.device_id()
    shutil.copytree(first.directory, tmp_path / "copy")
    copy = Home(tmp_path / "copy")
    assert copy.device_id() == first.device_id()

    async def talk() -> None:
        async with serving(settings) as hub:
            token = hub.token("a")
            async with connected(hub.url, token) as old:
                await old.say(hello_of(first))
                await old.hear(ms.Welcome)
                for _ in range(3):
                    async with connected(hub.url, token) as late:
                        await late.say(hello_of(copy))
                        refusal = await late.hear(ms.Refusal)
                        assert (refusal.retry, refusal.fatal) == (True, True)
                        assert refusal.reason.startswith(WHY)
                        assert await late.is_hung_up_on()
                await old.say(ms.Ready(num_examples=3))  # the first is still heard
                async with connected(
                    hub.url, token
                ) as again:  # the same directory: `plan`, `leave`, a join after kill -9
                    await again.say(hello_of(first))
                    await again.hear(ms.Welcome)
                    assert await old.is_hung_up_on()

    caplog.set_level(logging.WARNING, logger="fedsoda_hub.serving")
    asyncio.run(talk())
    told = [record.getMessage() for record in caplog.records if "share the identity" in record.getMessage()]
    assert told == ["two devices share the identity of a; the one that came later is refused"]


def test_two_joins_of_one_identity_make_few_connections_and_the_later_one_ends_with_status_5(
    tmp_path: Path,
    settings: RunSettings,
) -> None:
    homes = [Home(tmp_path / name) for name in ("home", "copy")]
    homes[0].device_id()
    shutil.copytree(homes[0].directory, homes[1].directory)
    clock = SkippingClock()
    greetings = 0

    def hello(home: Home) -> ms.Hello:
        nonlocal greetings
        greetings += 1
        return hello_of(home)

    async def talk() -> None:
        async with serving(settings) as hub:
            token = hub.token("a")
            first, late = (
                Conversation(
                    HubTransport(hub.url, token),
                    lambda home=home: hello(home),  # type: ignore[misc]
                    lambda _: None,
                    clock,
                    Patience(clock, None),
                    Deaf(),
                )
                for home in homes
            )
            await first.greet()
            with pytest.raises(RefusedByHub, match=WHY) as refused:
                await late.greet(Patience(clock, None))
            assert refused.value.exit_status == 5
            await first.send(ms.Ready(num_examples=1))
            await first.close()
            await late.close()

    asyncio.run(talk())
    assert greetings < 40
    assert 40 < clock.slept < 60


def test_a_device_that_does_not_say_where_it_is_replaces_its_old_connection(
    tmp_path: Path,
    settings: RunSettings,
) -> None:
    said = hello_of(Home(tmp_path / "home"))

    async def talk() -> None:
        async with serving(settings) as hub:
            token = hub.token("a")
            async with connected(hub.url, token) as old, connected(hub.url, token) as new:
                await old.say(said)
                await old.hear(ms.Welcome)
                await new.say(msgspec.structs.replace(said, place=""))
                await new.hear(ms.Welcome)
                assert await old.is_hung_up_on()

    asyncio.run(talk())
