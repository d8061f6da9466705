"""A join stands aside for its owner and goes on with the same bits: `pause`, `resume`, `finish` of a running join."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import psutil
import pytest

from fedsoda_edge import testing
from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.edge import Edge, Participation, agent_of
from fedsoda_edge.events import as_json
from fedsoda_edge.join.home import Home
from fedsoda_edge.ports import Clock, SystemClock, TorchPort
from fedsoda_edge.ports import child as child_process
from fedsoda_edge.ports.child import Child
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.codec import decode
from fedsoda_edge.testing import ScriptedHub
from tests.edge.cli.test_cli import Device, Ran
from tests.joins import ports_of_commands
from tests.schema import EDGE
from tests.test_schemas import ROWS, meanwhile, run
from tests.worker_here import WorkerHere

LONG = msgspec.structs.replace(testing.LOCAL, epochs=30, max_steps=60)
OTHERS = ms.UpdateStart(
    round=1,
    base=ms.Digest("0" * 64),
    alignment=0,
    digest=ms.Digest("0" * 64),
    bytes=1,
    codec="int8",
    num_examples=1,
    loss=0.5,
)


class ToldHub(ScriptedHub):
    """Rounds of 60 steps, none while `is_idle`; `said` is what it heard, less chunks and progress."""

    def __init__(self, bundle: Path, rounds: int = 1, *, is_idle: bool = False) -> None:
        super().__init__(rounds, bundle=bundle, local=LONG)
        self.said: list[ms.Message] = []
        self.is_idle = is_idle

    async def send(self, frame: bytes) -> None:
        message = decode(frame)[0]
        if not isinstance(message, ms.UpdateChunk | ms.Progress):
            self.said.append(message)
        await super().send(frame)

    async def connect(self) -> None:
        self._loop = asyncio.get_running_loop()
        await super().connect()

    def _offer(self) -> None:
        if not self.is_idle:
            super()._offer()

    def offer(self) -> None:
        """Offer the next round, from any thread."""
        self._loop.call_soon_threadsafe(self._offer)

    @property
    def kinds(self) -> list[str]:
        return [type(message).__name__ for message in self.said]

    def hang_up(self) -> None:
        """End the connection, from any thread."""
        self._loop.call_soon_threadsafe(self._out.put_nowait, None)


class StoppedWallClock(SystemClock):
    """Its owner sets it back again and again: durations must not come from it."""

    def wall(self) -> float:
        return 0.0


class Join(threading.Thread):
    """The loop of a user's script, with the events that it was told. worker: None: a process, as a user has it."""

    def __init__(
        self,
        hub: ToldHub,
        data: Path,
        *,
        worker: TorchPort | None = None,
        clock: Clock | None = None,
        pause_on: str = "",
    ) -> None:
        super().__init__(daemon=True)
        self.hub, self.events, self.failure = hub, list[dict[str, Any]](), list[BaseException]()
        say = lambda event: self.events.append(as_json(event))  # noqa: E731
        edge, rows = Edge(hub, device="cpu"), LocalData.from_jsonl(data)
        self.agent = agent_of(edge, rows, say, pause_on=pause_on, worker=worker, clock=clock)

    def run(self) -> None:
        try:
            with Participation(self.agent, 0) as participation:
                for offer in participation:
                    offer.submit(offer.train())
        except BaseException as failure:
            self.failure.append(failure)

    def has(self, kind: str, **values: Any) -> bool:
        wanted = {"event": kind, **values}
        return any(wanted.items() <= event.items() for event in self.events)

    def until(self, condition: Callable[[], object]) -> None:
        until(lambda: condition() or self.failure)
        assert not self.failure, self.failure

    def ended(self) -> None:
        self.join(timeout=60)
        assert not self.is_alive()
        assert not self.failure


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def workers() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "fedsoda_edge.worker" in child.cmdline():
                found.append(child)
    return found


def held_in_mid_round() -> psutil.Process:
    """The worker, stopped in the middle of its round, of which it has saved something."""
    until(lambda: list((Home().directory / "runs").glob("*/checkpoint/*.safetensors")))
    [worker] = workers()
    worker.suspend()
    return worker


@contextlib.contextmanager
def let_go_when(condition: Callable[[], object], worker: psutil.Process) -> Iterator[None]:
    def let_go() -> None:
        until(condition)
        worker.resume()

    thread = threading.Thread(target=let_go)
    thread.start()
    yield
    thread.join()


@pytest.fixture(scope="module")
def calm(scripted: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the update of a join that nobody disturbed."""
    directory = tmp_path_factory.mktemp("calm")
    (directory / "visits.jsonl").write_text(ROWS)
    hub = ToldHub(scripted)
    with mock.patch.dict("os.environ", FEDSODA_HOME=str(directory / "home")):
        join = Join(hub, directory / "visits.jsonl")
        join.start()
        join.ended()
    return hub.updates[0].digest


@pytest.fixture
def device(tmp_path: Path) -> Device:
    (tmp_path / "visits.jsonl").write_text(ROWS)
    return Device(tmp_path)


def report(command: str, ran: Ran) -> dict[str, Any]:
    assert ran.status == 0, ran.err
    return EDGE.report(command, ran.out)


# -- pause and resume -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_round_that_is_paused_in_its_middle_ends_with_the_bits_of_a_calm_one(
    device: Device, scripted: Path, calm: str
) -> None:
    hub = ToldHub(scripted)
    join = Join(hub, device.directory / "visits.jsonl")
    join.start()
    worker = held_in_mid_round()
    with let_go_when(lambda: join.has("paused") or join.agent.is_paused, worker):
        ran = device.run("pause", "--json")
        paused = report("pause", ran)
        assert (paused["state"], paused["reason"], paused["seconds"], paused["round"]) == (
            "paused", "by its owner", None, 1,
        )  # fmt: skip
        assert paused["freed_bytes"] > 50e6
        assert ran.err.startswith("paused by its owner: the worker ended and freed ")
        assert ran.err.endswith(" MiB\n")
        assert not worker.is_running()
    assert workers() == []
    assert hub.kinds == ["Hello", "Ready", "Paused"]
    told = device.run("status")
    assert told.err.startswith("paused by its owner (pid ")

    hub.hang_up()  # a connection that begins in a pause says so, and no Ready
    join.until(lambda: join.has("reconnected"))
    assert hub.kinds[3:] == ["Hello", "Paused"]
    assert device.run("status").err.startswith("paused by its owner (pid ")
    assert join.is_alive()
    assert workers() == []

    resumed = report("resume", device.run("resume", "--json"))
    assert (resumed["state"], resumed["was_paused"], resumed["round"]) == ("running", True, 1)
    join.ended()
    assert hub.kinds[5:] == ["Ready", "UpdateStart"]
    assert hub.updates[0].digest == calm
    assert [event for event in join.events if event["event"] in ("paused", "resumed")] == [
        {"event": "paused", "reason": "by its owner", "seconds": None},
        {"event": "resumed"},
    ]
    after = [event["step"] for event in join.events[join.events.index({"event": "resumed"}) :] if "step" in event]
    assert after[0] > 1  # from its checkpoint, not from the beginning
    for event in join.events:
        EDGE.check_event(event)
    assert list(Home().control.glob("*")) == []


def test_a_pause_for_some_time_ends_by_itself(device: Device, scripted: Path) -> None:
    hub = ToldHub(scripted, is_idle=True)
    join = Join(hub, device.directory / "visits.jsonl", worker=WorkerHere(), clock=StoppedWallClock())
    join.start()
    join.until(lambda: hub.kinds == ["Hello", "Ready"])
    ran = run("fedsoda-edge", "pause", "--for", "1s", "--json")
    assert 0.9 < EDGE.report("pause", ran.out)["seconds"] <= 1.0
    join.until(lambda: join.has("resumed"))
    assert hub.kinds == ["Hello", "Ready", "Paused", "Resumed"]
    assert run("fedsoda-edge", "finish").status == 0
    join.ended()


def test_a_round_that_ended_during_the_pause_gives_way_to_the_one_that_is_offered(
    device: Device, scripted: Path
) -> None:
    hub, worker = ToldHub(scripted, rounds=2, is_idle=True), WorkerHere()
    join = Join(hub, device.directory / "visits.jsonl", worker=worker)
    join.start()
    join.until(lambda: hub.kinds == ["Hello", "Ready"])
    assert run("fedsoda-edge", "pause").status == 0
    assert (worker.num_started, worker.pid) == (1, None)  # it was there, and makes room
    hub.is_idle = False
    hub.offer()  # it was on its way when the pause began
    join.until(lambda: join.agent.in_hand == 1)  # the script blocks in train()
    hub.updates.append(OTHERS)  # the hub closes round 1 with the updates of others
    hub.offer()
    join.until(lambda: join.has("offer", round=2))
    assert not join.has("training")
    assert run("fedsoda-edge", "resume").status == 0
    join.ended()
    assert join.has("notice", message="round 1 is over; training round 2 instead")
    assert hub.kinds == ["Hello", "Ready", "Paused", "Resumed", "UpdateStart"]
    assert [update.round for update in hub.updates] == [1, 2]


def test_rules_pause_a_join_before_it_says_that_it_is_ready(device: Device, scripted: Path) -> None:
    hub = ToldHub(scripted, rounds=0)
    hour = time.localtime().tm_hour
    rule = f"hours={hour}-{(hour + 2) % 24}"
    join = Join(hub, device.directory / "visits.jsonl", pause_on=rule, worker=WorkerHere())
    join.start()
    join.until(lambda: join.has("paused", reason=f"{rule[6:]} h", seconds=None))
    join.until(lambda: hub.kinds == ["Hello", "Paused"])
    assert device.run("status").err.startswith(f"paused: {rule[6:]} h (pid ")
    assert run("fedsoda-edge", "resume").status == 0  # the owner goes before the rule
    join.ended()  # hub: Ready, and that all rounds are over
    assert hub.kinds == ["Hello", "Paused", "Ready"]


# -- finish ---------------------------------------------------------------------------------------------


def joined(hub: ToldHub, device: Device, worker: TorchPort | None = None) -> Ran:
    with ports_of_commands(hub, worker):
        ran = run(
            "fedsoda-edge", "join", "http://hub", "--data", device.directory / "visits.jsonl", "--jsonl",
            "--device", "cpu", FEDSODA_TOKEN="t",
        )  # fmt: skip
    return Ran(ran.status, ran.out, "")


@pytest.mark.slow
def test_finish_ends_a_pause_hands_in_the_round_in_hand_and_leaves(
    device: Device, scripted: Path, calm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_process, "END_SECONDS", 0.2)
    hub, answers = ToldHub(scripted, rounds=5), list[Ran]()

    def finish() -> None:
        worker = held_in_mid_round()
        assert (
            report("pause", device.run("pause", "--json"))["round"] == 1
        )  # a worker that does not end in time is killed
        assert not worker.is_running()
        answers.append(device.run("finish", "--json"))

    with meanwhile(finish):
        ran = joined(hub, device, Child("fedsoda_edge.worker", {"FEDSODA_CONFINE": "0"}))
    assert ran.status == 0
    events = EDGE.events(ran.out)
    assert [done["accepted"] for done in events[-1]["rounds"]] == [True]
    assert hub.kinds == ["Hello", "Ready", "Paused", "Resumed", "UpdateStart", "Leave"]
    assert hub.updates[0].digest == calm
    done = report("finish", answers[0])
    assert (done["state"], done["round"]) == ("finishing", 1)
    assert answers[0].err == "this device finishes round 1, hands it in, and then leaves\n"


def test_finish_without_a_round_in_hand_leaves_at_once(device: Device, scripted: Path) -> None:
    hub, answers = ToldHub(scripted, is_idle=True), list[Ran]()

    def finish() -> None:
        until(lambda: "Ready" in hub.kinds)
        answers.append(device.run("finish"))

    with meanwhile(finish):
        ran = joined(hub, device)
    assert ran.status == 0
    assert EDGE.events(ran.out)[-1]["rounds"] == []
    assert hub.kinds == ["Hello", "Ready", "Leave"]
    assert (answers[0].status, answers[0].err) == (0, "no round is in hand, so this device leaves now\n")


# -- wrong use ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["pause", "resume", "finish"])
def test_a_home_without_a_join_has_nothing_to_pause(tmp_path: Path, command: str) -> None:
    ran = run("fedsoda-edge", command, "--json")
    assert ran.status == 2
    assert json.loads(ran.out)["message"] == (
        f"no join runs in {tmp_path / 'home'}; start one with fedsoda-edge join, or set FEDSODA_HOME to that of the join"
    )
    assert not (tmp_path / "home").exists()


def test_wrong_options_are_told_before_anything_is_done(tmp_path: Path) -> None:
    def message(*words: str) -> str:
        ran = run("fedsoda-edge", *words, "--json")
        assert ran.status == 2
        return str(json.loads(ran.out)["message"])

    Home().lock()
    assert message("pause", "--for", "soon") == "--for 'soon' is not a time; write it as 90s, 30m, 1h or 7d"
    assert message("join", "http://h", "--data", "none", "--pause-on", "gpu") == (
        "--pause-on gpu is not known; choose battery, gpu-busy or hours=FROM-TO (0 to 24, as in hours=9-17 or hours=22-6)"
    )
