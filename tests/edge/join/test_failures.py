"""Each part of a join fails in turn, while a round trains and while an update waits for its answer: the join ends with
that reason, or continues in a way that is written here. It never hangs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.edge import Edge
from fedsoda_edge.errors import (
    DiskFull,
    FedSODAError,
    HubUnreachable,
    ProtocolViolation,
    RefusedByHub,
    UsageProblem,
    WorkerFailed,
)
from fedsoda_edge.join import control
from fedsoda_edge.join.home import Home
from fedsoda_edge.ports import Clock
from fedsoda_edge.protocol import commands as cmd
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.calls import Call, ProgressT, ResultT
from fedsoda_edge.protocol.session import Upload
from fedsoda_edge.testing import ScriptedHub
from tests.full_disk import full_disk_for
from tests.hurried_clock import HurriedClock
from tests.joins import joining
from tests.skipping_clock import SkippingClock
from tests.test_schemas import ROWS
from tests.worker_here import WorkerHere

SECONDS = 30  # a join that takes longer hangs
FULL = DiskFull("the disk is full; free space there, then try again")
STEP = cmd.TrainingStep(step=1, steps=2, loss=0.5, tokens_per_second=9.5)


class Hub(ScriptedHub):
    """Does `trouble` at the moment, once: "train": it hears of progress; "upload": an update is here, which has no answer."""

    def __init__(self, bundle: Path, moment: str, trouble: Callable[[Hub], None]) -> None:
        super().__init__(rounds=1, bundle=bundle)
        self._moment = moment
        self._trouble = trouble
        self._has_happened = False
        self.hello: ms.Refusal | FedSODAError | None = None  # instead of a Welcome

    async def connect(self) -> None:
        if isinstance(self.hello, FedSODAError):
            raise self.hello
        await super().connect()

    async def send(self, frame: bytes) -> None:
        if isinstance(self.hello, ms.Refusal):
            self._session.receive(frame)
            self.say(self.hello)
            return
        if self._has_happened or self._moment == "never":
            await super().send(frame)
            return
        match self._session.receive(frame):
            case ms.Hello():
                self.say(self._welcome())
            case ms.Ready():
                self._offer()
            case ms.Progress() if self._moment == "train":
                self.happen()
            case Upload():
                self.happen()

    def happen(self) -> None:
        self._has_happened = True
        self._trouble(self)

    def say(self, message: ms.HubMessage) -> None:
        self._say(message)

    def raw(self, frame: bytes | None) -> None:
        self._out.put_nowait(frame)


class Worker(WorkerHere):
    """At the moment "train" its training does not end by itself after the first step."""

    def __init__(self, moment: str) -> None:
        super().__init__()
        self._is_stuck = moment == "train"

    async def call(
        self, call: Call[ResultT, ProgressT], on_progress: Callable[[ProgressT], None] | None = None
    ) -> ResultT:
        if isinstance(call, cmd.Train) and self._is_stuck:
            assert on_progress is not None
            on_progress(STEP)  # type: ignore[arg-type]
            await asyncio.Event().wait()
        return await super().call(call, on_progress)


@dataclass
class Ended:
    error: list[BaseException] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]


def take_part(hub: Hub, worker: WorkerHere, data: Path, clock: Clock | None = None) -> Ended:
    """Join as a user's script does; asserts that it ends."""
    ended = Ended()

    def script() -> None:
        try:
            edge = Edge(hub, device="cpu")
            with joining(edge, LocalData(data), ended.events.append, worker=worker, clock=clock) as participation:
                for offer in participation:
                    offer.submit(offer.train())
        except BaseException as error:
            ended.error.append(error)

    thread = threading.Thread(target=script, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert not thread.is_alive(), f"the join hangs after {ended.events[-1:]}"
    assert not Home().is_in_use()
    return ended


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "visits.jsonl"
    path.write_text(ROWS)
    return path


# --- what reads the hub ----------------------------------------------------------------------------------------------


def breaks_the_rules(hub: Hub) -> None:
    hub.raw(b"\xff")


def revokes(hub: Hub) -> None:
    hub.say(ms.Refusal(reason="this token was revoked", fatal=True))


def refuses_to_reconnect(hub: Hub) -> None:
    hub.hello = ms.Refusal(reason="this token was revoked", fatal=True)
    hub.raw(None)


@pytest.mark.parametrize("moment", ["train", "upload"])
@pytest.mark.parametrize(
    ("trouble", "error", "sentence"),
    [
        (breaks_the_rules, ProtocolViolation, ""),
        (revokes, RefusedByHub, "the hub refused: this token was revoked"),
        (refuses_to_reconnect, RefusedByHub, "the hub refused: this token was revoked"),
    ],
)
def test_what_the_hub_does_wrong_ends_the_join(
    scripted: Path, data: Path, moment: str, trouble: Callable[[Hub], None], error: type[FedSODAError], sentence: str
) -> None:
    hub = Hub(scripted, moment, trouble)
    [failure] = take_part(hub, Worker(moment), data).error
    assert type(failure) is error
    assert sentence in str(failure)


def refuses_the_token(hub: Hub) -> None:
    hub.hello = RefusedByHub("the hub refused: the token of clinic-7 was revoked")
    hub.raw(None)


def is_gone(hub: Hub) -> None:
    hub.hello = HubUnreachable("TCP: nothing answers", "TCP")
    hub.raw(None)


def loses_its_certificates(hub: Hub) -> None:
    hub.hello = UsageProblem("SSL_CERT_FILE names nothing")
    hub.raw(None)


@pytest.mark.parametrize("moment", ["train", "upload"])
@pytest.mark.parametrize(
    ("trouble", "status", "sentence"),
    [
        (refuses_the_token, 5, "was revoked"),
        (is_gone, 3, "TCP: nothing answers"),  # after ten minutes
        (loses_its_certificates, 2, "SSL_CERT_FILE"),
    ],
)
def test_a_reconnect_that_fails_for_good_ends_the_join_with_its_status(
    scripted: Path, data: Path, moment: str, trouble: Callable[[Hub], None], status: int, sentence: str
) -> None:
    hub = Hub(scripted, moment, trouble)
    [failure] = take_part(hub, Worker(moment), data, SkippingClock()).error
    assert isinstance(failure, FedSODAError)
    assert failure.exit_status == status
    assert sentence in str(failure)


@pytest.mark.parametrize("moment", ["train", "upload"])
def test_something_between_that_answers_for_the_hub_is_waited_for(scripted: Path, data: Path, moment: str) -> None:
    def goes_away(hub: Hub) -> None:
        hub.hello = HubUnreachable("answers HTTP 403, and not the hub itself but something between", "HTTP")
        hub.raw(None)

    class ComesBack(Hub):
        tries = 0

        async def connect(self) -> None:
            self.tries += self.hello is not None
            if self.tries > 3:
                self.hello = None
            await super().connect()

    class Slow(Worker):
        """Its training ends some time after its first step."""

        async def call(
            self, call: Call[ResultT, ProgressT], on_progress: Callable[[ProgressT], None] | None = None
        ) -> ResultT:
            if isinstance(call, cmd.Train) and self._is_stuck:
                assert on_progress is not None
                on_progress(STEP)  # type: ignore[arg-type]
                self._is_stuck = False
            return await super().call(call, on_progress)

    ended = take_part(ComesBack(scripted, moment, goes_away), Slow(moment), data, HurriedClock())
    assert (ended.error, len(ended.of("accepted"))) == ([], 1)


def hangs_up(hub: Hub) -> None:
    hub.raw(None)


def test_a_lost_connection_is_made_again_and_the_update_sent_again(scripted: Path, data: Path) -> None:
    hub = Hub(scripted, "upload", hangs_up)
    ended = take_part(hub, WorkerHere(), data)
    assert (ended.error, len(ended.of("reconnected")), len(ended.of("accepted"))) == ([], 1, 1)


class NoRoom(Hub):
    """Its disk is full when the first update comes: it may come again."""

    async def send(self, frame: bytes) -> None:
        said = self._session.receive(frame)
        match said:
            case ms.Hello():
                self.say(self._welcome())
            case ms.Ready():
                self._offer()
            case Upload() if not self.refused:
                self.refused.append(said.start)
                self.say(ms.Refusal(round=said.start.round, reason="the disk is full", retry=True))
            case Upload():
                self.updates.append(said.start)
                self.say(ms.Receipt(round=said.start.round, digest=said.start.digest))
                self._offer()

    def __init__(self, bundle: Path) -> None:
        super().__init__(bundle, "never", hangs_up)
        self.refused: list[ms.UpdateStart] = []


class Sleeps(HurriedClock):
    """Notes how long was slept while the hub had the update not yet."""

    def __init__(self, hub: NoRoom) -> None:
        super().__init__()
        self.hub, self.between = hub, list[float]()

    async def sleep(self, seconds: float) -> None:
        if self.hub.refused and not self.hub.updates:
            self.between.append(seconds)
        await super().sleep(seconds)


def test_an_update_that_the_hub_has_no_room_for_is_sent_again_after_some_seconds(scripted: Path, data: Path) -> None:
    hub = NoRoom(scripted)
    clock = Sleeps(hub)
    ended = take_part(hub, WorkerHere(), data, clock)
    assert (ended.error, hub.updates) == ([], hub.refused)
    assert [event["reason"] for event in ended.of("retrying")] == ["the disk is full"]
    assert any(0 < seconds < 1 for seconds in clock.between)


@pytest.mark.parametrize(("moment", "last"), [("train", None), ("upload", "the run ended before the hub answered")])
def test_a_run_that_ends_meanwhile_ends_the_join_without_an_error(
    scripted: Path, data: Path, moment: str, last: str | None
) -> None:
    def farewell(hub: Hub) -> None:
        hub.say(ms.Farewell(rounds=1, reason="all rounds are done"))

    hub = Hub(scripted, moment, farewell)
    ended = take_part(hub, Worker(moment), data)
    assert ended.error == []
    assert len(ended.of("farewell")) == 1
    if last is not None:
        assert ended.events[-1]["message"].startswith(last)


# --- the other parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["train", "upload"])
def test_a_pause_watcher_that_fails_ends_the_join(
    scripted: Path, data: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def unreadable(_: Path) -> list[control.Request]:
        raise PermissionError("control cannot be read")

    hub = Hub(scripted, moment, lambda _: monkeypatch.setattr(control, "requests", unreadable))
    [failure] = take_part(hub, Worker(moment), data).error
    assert isinstance(failure, PermissionError)


class NextBundle(Hub):
    """Its first offer names another bundle, of which it cannot deliver a byte."""

    def _say(self, message: ms.HubMessage) -> None:
        if isinstance(message, ms.RoundOffer):
            message = msgspec.structs.replace(message, manifest=ms.BlobRef(digest=ms.Digest("1" * 64), bytes=9))
        super()._say(message)

    async def fetch(self, digest: str, offset: int) -> AsyncIterator[bytes]:
        if digest == "1" * 64:
            raise HubUnreachable("HTTP: the download broke off", "HTTP")
        async for piece in super().fetch(digest, offset):
            yield piece


def test_a_bundle_that_a_round_needs_and_does_not_get_ends_the_join(scripted: Path, data: Path) -> None:
    hub = NextBundle(scripted, "never", hangs_up)
    [failure] = take_part(hub, WorkerHere(), data, SkippingClock()).error
    assert isinstance(failure, HubUnreachable)


def test_a_worker_that_dies_again_and_again_ends_the_join(scripted: Path, data: Path) -> None:
    hub = Hub(scripted, "never", hangs_up)
    [failure] = take_part(hub, WorkerHere(dies=3), data).error
    assert isinstance(failure, WorkerFailed)


def test_a_worker_that_dies_while_an_update_waits_is_not_missed(scripted: Path, data: Path) -> None:
    worker = WorkerHere()

    def die(hub: Hub) -> None:
        worker.pid = None
        hangs_up(hub)

    ended = take_part(Hub(scripted, "upload", die), worker, data)
    assert (ended.error, len(ended.of("accepted"))) == ([], 1)


@pytest.mark.parametrize(
    ("file", "is_sent"), [("meta.json", False), ("residual.round", True)], ids=["after training", "after the receipt"]
)
def test_a_disk_that_is_full_ends_the_join_and_the_next_hands_in_what_was_trained(
    scripted: Path, data: Path, file: str, is_sent: bool
) -> None:
    hub = Hub(scripted, "never", hangs_up)
    with full_disk_for(file):
        [failure] = take_part(hub, WorkerHere(), data).error
    assert isinstance(failure, DiskFull)
    assert file in str(failure)
    assert [update.round for update in hub.updates] == [1] * is_sent
    again = Hub(scripted, "never", hangs_up)
    ended = take_part(again, WorkerHere(), data)
    assert ended.error == []
    assert len(ended.of("trained")) == (not is_sent)  # what was committed is handed in before anything is trained
    assert [update.round for update in again.updates] == [1]


class FailsToSweep(WorkerHere):
    """Its sweep fails when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.may_fail = asyncio.Event()

    async def call(
        self, call: Call[ResultT, ProgressT], on_progress: Callable[[ProgressT], None] | None = None
    ) -> ResultT:
        if isinstance(call, cmd.Sweep):
            await self.may_fail.wait()
            raise FULL
        return await super().call(call, on_progress)


def test_an_early_sweep_that_fails_ends_the_join_when_a_round_waits_for_it(scripted: Path, data: Path) -> None:
    worker = FailsToSweep()

    class OffersFirst(Hub):
        def _say(self, message: ms.HubMessage) -> None:
            super()._say(message)
            if isinstance(message, ms.RoundOffer):
                asyncio.get_running_loop().call_later(0.05, worker.may_fail.set)

    [failure] = take_part(OffersFirst(scripted, "never", hangs_up), worker, data).error
    assert failure == FULL


def test_an_early_sweep_that_fails_while_an_update_waits_ends_the_join(scripted: Path, data: Path) -> None:
    """The update is one that an earlier join left: its answer is waited for while the data is swept."""
    with full_disk_for("residual.round"):
        take_part(Hub(scripted, "never", hangs_up), WorkerHere(), data)
    worker = FailsToSweep()
    [failure] = take_part(Hub(scripted, "upload", lambda _: worker.may_fail.set()), worker, data).error
    assert failure == FULL


def test_a_join_that_is_refused_ends_with_the_reason_before_any_worker_is_asked(scripted: Path, data: Path) -> None:
    hub = Hub(scripted, "never", hangs_up)
    hub.hello = ms.Refusal(reason="this token was revoked", fatal=True)
    worker = WorkerHere()
    [failure] = take_part(hub, worker, data).error
    assert (str(failure), worker.calls) == ("the hub refused: this token was revoked", [])


# --- what is on the disk, and what is submitted ----------------------------------------------------------------------


def test_an_update_that_was_left_and_is_damaged_is_not_sent(scripted: Path, data: Path) -> None:
    with full_disk_for("residual.round"):
        take_part(Hub(scripted, "never", hangs_up), WorkerHere(), data)
    [update] = Home().directory.glob("runs/*/pending/update")
    update.write_bytes(b"?" * update.stat().st_size)
    hub = Hub(scripted, "never", hangs_up)
    ended = take_part(hub, WorkerHere(), data)
    assert ended.error == []
    assert "the update of round 1 from an earlier join is damaged on disk, so it is not sent" in [
        event["message"] for event in ended.of("notice")
    ]
    assert len(ended.of("trained")) == 1
