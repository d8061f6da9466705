"""`doctor` walks the way to the hub as a join would, and stops where it is blocked, with what to do."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import msgspec
import psutil
import pytest

from fedsoda_edge.join import doctor
from fedsoda_edge.join.doctor import DoctorStep, examine
from fedsoda_edge.join.home import Home
from fedsoda_edge.ports import Clock, SystemClock
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.calls import Call, ProgressT, ResultT
from fedsoda_edge.protocol.commands import Confinement, Examine, Examined
from tests.edge.network.test_hub_transport import DATA, DIGEST, RUN_IS_OVER, SmallHub, listening
from tests.worker_here import WorkerHere

DEVICE = ["Python", "torch", "GPU", "NF4", "memory", "CPU", "disk"]


class Looks(WorkerHere):
    """The worker's own answer is tested below; it is not made for every step."""

    async def call(
        self, call: Call[ResultT, ProgressT], on_progress: Callable[[ProgressT], None] | None = None
    ) -> ResultT:
        assert isinstance(call, Examine)
        return Examined(torch="2.13", threads=2, device="cpu", dtype="float32", accelerator="", nf4_problem="")  # type: ignore[return-value]


def examined(
    url: str | None,
    directory: Path,
    clock: Clock | None = None,
    *,
    pin: str | None = None,
    insecure_http: bool = False,
) -> AsyncIterator[DoctorStep]:
    """The checks with `directory / "token"`."""
    home = Home(directory / "home")
    return examine(url, directory / "token", home, pin=pin, insecure_http=insecure_http, worker=Looks(), clock=clock)


async def all_of(checks: AsyncIterator[DoctorStep]) -> list[DoctorStep]:
    return [check async for check in checks if not (check.passed and check.name in ("proxy", "GPU memory"))]


def walked(tmp_path: Path, url: str | None, token: str = "good") -> list[DoctorStep]:
    (tmp_path / "token").write_text(token)
    return asyncio.run(all_of(examined(url, tmp_path)))


def test_without_a_hub_the_device_alone_is_looked_at(tmp_path: Path) -> None:
    found = walked(tmp_path, None)
    assert [check.name for check in found] == DEVICE
    assert all(check.passed for check in found)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (
            Confinement(network="seccomp", files="Landlock 4"),
            "the worker has no network (seccomp); no paths but its own (Landlock 4)",
        ),
        (
            Confinement(network="seccomp", missing=("it may read all files of this user: Landlock is switched off",)),
            "the worker has no network (seccomp); it may read all files of this user: Landlock is switched off",
        ),
        (Confinement(missing=("this system has no means",)), "the worker is not confined: this system has no means"),
    ],
)
def test_what_the_worker_gave_up_is_a_step_of_its_own(tmp_path: Path, found: Confinement, says: str) -> None:
    class Confined(Looks):
        async def call(self, call: Any, on_progress: Any = None) -> Any:
            return msgspec.structs.replace(await super().call(call, on_progress), confinement=found)

    async def look() -> list[DoctorStep]:
        return [step async for step in examine(None, None, Home(tmp_path / "home"), worker=Confined())]

    [step] = [step for step in asyncio.run(look()) if step.name == "confinement"]
    assert (step.passed, step.detail) == (True, says)


@pytest.mark.parametrize(
    ("url", "steps", "sentence", "status"),
    [
        ("http://h:99999", ["address"], "is not the address of a hub", 2),
        ("http://hub.invalid", ["address"], "is plain HTTP to another machine", 2),
        ("https://hub.invalid", ["DNS"], "check its spelling", 3),
        ("http://127.0.0.1:9", ["DNS", "TCP"], "check that the hub runs and that the port is open", 3),
    ],
)
def test_it_stops_at_the_step_that_fails(
    tmp_path: Path, url: str, steps: list[str], sentence: str, status: int
) -> None:
    found = walked(tmp_path, url)[len(DEVICE) :]
    assert [check.name for check in found] == steps
    last = found[-1]
    assert not last.passed
    assert sentence in f"{last.detail}; {last.fix}"
    assert last.exit_status == status


def test_a_token_that_the_hub_does_not_know_is_the_step_that_fails(tmp_path: Path) -> None:
    async def knock() -> list[DoctorStep]:
        (tmp_path / "token").write_text("unknown")
        async with listening(SmallHub(tmp_path)) as url:
            return await all_of(examined(url, tmp_path))

    found = asyncio.run(knock())[len(DEVICE) :]
    assert [check.name for check in found] == ["DNS", "TCP", "TLS", "HTTP", "clock", "token"]
    assert [check.passed for check in found] == [True] * 5 + [False]
    assert found[-1].exit_status == 5
    assert found[-1].detail.endswith(
        "the hub does not know this token: it is of another run, which another hub serves, or was made before a reset that lost it"
    )
    assert found[-1].fix == (
        "compare the address with the one that came with the token, or ask the hub's owner for a new one"
    )


class Behind(SystemClock):
    def wall(self) -> float:
        return super().wall() - 3600


def test_a_clock_that_is_wrong_fails_though_the_steps_continue(tmp_path: Path) -> None:
    async def knock() -> list[DoctorStep]:
        (tmp_path / "token").write_text("good")
        async with listening(SmallHub(tmp_path, RUN_IS_OVER)) as url:
            return await all_of(examined(url, tmp_path, Behind()))

    found = {check.name: check for check in asyncio.run(knock())}
    assert not found["clock"].passed
    assert re.fullmatch(r"(3599|3600|3601) s behind the hub's", found["clock"].detail)
    assert found["clock"].fix.startswith("set this device's clock")
    assert found["token"].passed


def test_a_hub_that_refuses_the_greeting_is_quoted(tmp_path: Path) -> None:
    async def knock() -> list[DoctorStep]:
        (tmp_path / "token").write_text("good")
        refusal = ms.Refusal(round=0, reason="another device holds this token; ask for one of your own", fatal=True)
        async with listening(SmallHub(tmp_path, refusal)) as url:
            return await all_of(examined(url, tmp_path))

    last = asyncio.run(knock())[-1]
    assert (last.name, last.passed, last.exit_status) == ("fits", False, 5)
    assert "another device holds this token" in last.detail


@pytest.mark.parametrize("file", ["there", "gone"])
def test_the_bandwidth_is_measured_and_no_connection_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    (tmp_path / DIGEST).write_bytes(DATA)

    async def look_at(*_: Any) -> Any:
        largest = DIGEST if file == "there" else "0" * 64
        memory = SimpleNamespace(message="fits", parts=[])
        return SimpleNamespace(source="m", memory=memory, disk_needed=0, largest_file=largest)

    async def knock() -> tuple[list[DoctorStep], list[Any]]:
        (tmp_path / "token").write_text("good")
        async with listening(SmallHub(tmp_path)) as url:
            checks, port = await all_of(examined(url, tmp_path)), urlsplit(url).port
            sockets = psutil.Process().net_connections("tcp")
            return checks, [socket for socket in sockets if socket.raddr and socket.raddr.port == port]

    monkeypatch.setattr(doctor, "look_at", look_at)
    checks, left = asyncio.run(knock())
    assert (checks[-1].name, checks[-1].passed) == ("bandwidth", file == "there")
    assert left == []


def test_the_worker_sees_a_gradient_through_nf4() -> None:
    found = asyncio.run(WorkerHere().call(Examine()))
    assert found.nf4_problem == ""
    assert found.threads >= 1
