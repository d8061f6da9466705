"""What a service manager hears, on a real datagram socket: ready, alive while the loop is, what is done, stopping."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsoda_edge.errors import DiskFull
from fedsoda_edge.ports.service import MAX_STATUS_BYTES, Supervisor
from tests.manager import Manager

SHORT = 0.04  # seconds of a watchdog


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify"))
    yield made
    made.close()


async def nothing() -> str:
    return ""


def test_ready_is_said_once_and_the_status_is_one_line_of_a_length_that_is_taken(
    manager: Manager, tmp_path: Path
) -> None:
    supervisor = Supervisor(str(tmp_path / "notify"))
    supervisor.ready()
    supervisor.ready()
    supervisor.does("round 3:\n  é of 2")
    supervisor.does("é" * 5000)
    supervisor.stopping()
    ready, status, long, stopping = manager.heard()
    assert (ready, status, stopping) == ("READY=1", "STATUS=round 3: é of 2", "STOPPING=1")
    assert MAX_STATUS_BYTES - 2 <= len(long.removeprefix("STATUS=").encode()) <= MAX_STATUS_BYTES


def test_an_abstract_name_is_reached() -> None:
    name = f"fedsoda-test-{os.getpid()}"
    manager = Manager(b"\0" + name.encode())
    Supervisor(f"@{name}").ready()
    assert manager.heard() == ["READY=1"]
    manager.close()


def test_a_path_that_is_longer_than_a_sockets_is_reached(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d" * 60] * 3)
    deep.mkdir(parents=True)
    with contextlib.chdir(deep):
        manager = Manager("notify")
    Supervisor(str(deep / "notify")).ready()
    assert manager.heard() == ["READY=1"]
    manager.close()


@pytest.mark.parametrize("address", ["", "@", "vsock:2:1", "/nobody/listens/here"])
def test_where_nobody_listens_nothing_happens(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    supervisor = Supervisor.taken()
    supervisor.ready()
    asyncio.run(asyncio.wait_for(supervisor.attend(nothing), 1) if address[:1] != "/" else nothing())


def test_a_manager_that_reads_nothing_holds_nobody_up(manager: Manager, tmp_path: Path) -> None:
    supervisor = Supervisor(str(tmp_path / "notify"))
    began = time.monotonic()
    for _ in range(5000):
        supervisor.does("x")
    assert time.monotonic() - began < 2
    assert len(manager.heard()) < 5000


@pytest.mark.parametrize(
    ("microseconds", "pid", "is_watched"),
    [
        ("40000", "", True),
        ("40000", "this process", True),
        ("40000", "1", False),  # another process of the service is meant
        ("0", "", False),
        ("-5", "", False),
        ("soon", "", False),
        ("", "", False),
    ],
)
def test_the_loop_says_that_it_lives_where_this_process_is_watched(
    monkeypatch: pytest.MonkeyPatch, manager: Manager, tmp_path: Path, microseconds: str, pid: str, is_watched: bool
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", microseconds)
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "this process" else pid)
    supervisor = Supervisor.taken()
    with contextlib.suppress(TimeoutError):
        asyncio.run(asyncio.wait_for(supervisor.attend(nothing), 3.5 * SHORT))
    beats = manager.heard().count("WATCHDOG=1")
    assert (2 <= beats <= 8) if is_watched else beats == 0  # 8, where each is half the time apart


def test_a_loop_that_hangs_says_nothing(manager: Manager, tmp_path: Path) -> None:
    async def work() -> tuple[int, int]:
        attending = asyncio.create_task(Supervisor(str(tmp_path / "notify"), SHORT).attend(nothing))
        await asyncio.sleep(3 * SHORT)
        before = len(manager.heard())
        time.sleep(5 * SHORT)  # the hang
        during = len(manager.heard())
        attending.cancel()
        return before, during

    before, during = asyncio.run(work())
    assert before >= 2
    assert during == 0


def test_a_status_that_cannot_be_had_is_asked_again_and_the_watchdog_goes_on(
    monkeypatch: pytest.MonkeyPatch, manager: Manager, tmp_path: Path
) -> None:
    monkeypatch.setattr("fedsoda_edge.ports.service.STATUS_SECONDS", SHORT)
    answers: list[str | Exception] = [DiskFull("no space"), OSError("gone"), "back", "back", "on"]

    async def sentence() -> str:
        answer = answers.pop(0) if answers else "on"
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def work() -> list[str]:
        attending = asyncio.create_task(Supervisor(str(tmp_path / "notify"), SHORT).attend(sentence))
        heard: list[str] = []
        async with asyncio.timeout(20):
            while "STATUS=on" not in heard:
                await asyncio.sleep(SHORT)
                heard += manager.heard()
        attending.cancel()
        return heard

    heard = asyncio.run(work())
    assert [line for line in heard if line.startswith("STATUS=")] == ["STATUS=back", "STATUS=on"]
    assert heard.count("WATCHDOG=1") >= 5


def test_children_do_not_get_the_managers_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.setenv(name, str(tmp_path / "notify"))
    Supervisor.taken()
    shown = "import os; print([n for n in os.environ if 'NOTIFY' in n or 'WATCHDOG' in n])"
    child = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True)
    assert child.stdout == "[]\n"
