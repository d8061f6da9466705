"""A script that does not take every offer: it leaves, breaks off, raises, or forgets the `with` block. It never hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast
from unittest import mock

import msgspec
import pytest

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.edge import Edge, Participation
from fedsoda_edge.errors import HubUnreachable, UsageProblem
from fedsoda_edge.join import control
from fedsoda_edge.join.home import Home
from fedsoda_edge.protocol import commands as cmd
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.calls import Call, ProgressT, ResultT
from fedsoda_edge.protocol.codec import decode
from fedsoda_edge.testing import ScriptedHub
from tests.test_schemas import ROWS
from tests.worker_here import WorkerHere

SECONDS = 30


class Hub(ScriptedHub):
    """Notes what it hears; `go_away` hangs up and answers no more."""

    def __init__(self, bundle: Path, rounds: int = 2) -> None:
        super().__init__(rounds)
        self._bundle = bundle
        self.heard: list[str] = []
        self.is_away = False

    async def connect(self) -> None:
        if self.is_away:
            raise HubUnreachable("TCP: nothing answers", "TCP")
        await super().connect()

    async def send(self, frame: bytes) -> None:
        self.heard.append(type(decode(frame)[0]).__name__)
        await super().send(frame)

    def go_away(self) -> None:
        self.is_away = True
        self._out.put_nowait(None)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "visits.jsonl"
    path.write_text(ROWS)
    return path


def made(hub: ScriptedHub, data: Path, worker: WorkerHere | None = None) -> Participation:
    with mock.patch("fedsoda_edge.edge.Child", return_value=worker or WorkerHere()):
        return Edge(hub, device="cpu").join(LocalData(data))


def run(script: Callable[[], object]) -> BaseException | None:
    """Run a user's script; asserts that it ends. Returns what it raised."""
    raised = list[BaseException]()

    def guarded() -> None:
        try:
            script()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert not thread.is_alive(), "the script hangs"
    assert not Home().is_in_use()
    return raised[0] if raised else None


def test_leaving_within_the_loop_ends_it_though_the_hub_is_away(scripted: Path, data: Path) -> None:
    hub, offered = Hub(scripted), list[int]()

    def script() -> None:
        with made(hub, data) as participation:
            for offer in participation:
                offered.append(offer.round_number)
                hub.go_away()
                participation.leave("the owner sold the device")

    assert run(script) is None
    assert offered == [1]


def test_leaving_within_the_loop_tells_the_hub_and_ends_it(scripted: Path, data: Path) -> None:
    hub = Hub(scripted)

    def script() -> None:
        with made(hub, data) as participation:
            for offer in participation:
                offer.submit(offer.train())
                participation.leave("one round is enough")

    assert run(script) is None
    assert (hub.heard[-1], len(hub.updates)) == ("Leave", 1)


def test_breaking_out_of_the_loop_frees_the_home_and_says_nothing(scripted: Path, data: Path) -> None:
    hub, worker = Hub(scripted), WorkerHere()

    def script() -> None:
        with made(hub, data, worker) as participation:
            for _ in participation:
                break

    assert run(script) is None
    assert (hub.heard, worker.pid) == (["Hello", "Ready"], None)


def test_an_error_within_the_loop_is_the_scripts_own_and_frees_the_home(scripted: Path, data: Path) -> None:
    hub, worker = Hub(scripted), WorkerHere()

    def script() -> None:
        with made(hub, data, worker) as participation:
            for offer in participation:
                offer.train()
                raise ValueError("the script's own")

    assert str(run(script)) == "the script's own"
    assert worker.pid is None


@pytest.mark.parametrize("use", [lambda p: next(iter(p)), lambda p: p.leave("no more")], ids=["offers", "leave"])
def test_a_participation_is_used_within_its_block(
    scripted: Path, data: Path, use: Callable[[Participation], object]
) -> None:
    participation = made(Hub(scripted), data)
    sentence = r"this join has not begun, or is over; use it within `with edge\.join\(\.\.\.\) as participation:`"
    for _ in range(2):  # before the block and after it
        error = run(lambda: use(participation))
        assert isinstance(error, UsageProblem)
        with pytest.raises(UsageProblem, match=sentence):
            raise error
        with participation if not participation.report["run"] else mock.MagicMock():
            pass


class SameBytes(WorkerHere):
    """Every round comes to the same coded delta, as it does where nothing can be learnt."""

    async def call(
        self, call: Call[ResultT, ProgressT], on_progress: Callable[[ProgressT], None] | None = None
    ) -> ResultT:
        if isinstance(call, cmd.Train):
            call = cast("Call[ResultT, ProgressT]", msgspec.structs.replace(call, round=1, residual=None))
        return await super().call(call, on_progress)


def test_two_rounds_with_the_same_bytes_are_two_updates(scripted: Path, data: Path) -> None:
    hub = Hub(scripted)

    def script() -> None:
        with made(hub, data, SameBytes()) as participation:
            for offer in participation:
                assert offer.submit(offer.train())

    assert run(script) is None
    first, second = hub.updates
    assert (first.round, second.round) == (1, 2)
    assert first.digest == second.digest


class PausedMeanwhile(Hub):
    """Its device is paused while the join connects, and resumed when the hub has heard of that."""

    async def connect(self) -> None:
        await super().connect()
        control.ask(Home().control, "pause")

    async def send(self, frame: bytes) -> None:
        await super().send(frame)
        if isinstance(decode(frame)[0], ms.Paused):
            control.ask(Home().control, "resume")


def test_a_join_that_begins_in_a_pause_tells_the_hub_at_once(scripted: Path, data: Path) -> None:
    """Else the round that it was invited to before would wait for it until its deadline."""
    hub = PausedMeanwhile(scripted, rounds=1)

    def script() -> None:
        with made(hub, data) as participation:
            for offer in participation:
                offer.submit(offer.train())

    assert run(script) is None
    assert hub.heard[:3] == ["Hello", "Paused", "Ready"]
