"""What an owner sees at a glance is what the status and the receipts of the home say, and nothing of the data."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from fedsoda_edge.join import glance
from fedsoda_edge.join.glance import MEASURE_SECONDS, RECEIPT_SECONDS, Looking, Sent, sum_of
from fedsoda_edge.join.home import Home
from fedsoda_edge.join.receipts import AnswerCame, AnyLine, LinesCounted, MessageSent, ReceiptLog, departures
from fedsoda_edge.join.status import JoinStatus
from fedsoda_edge.protocol import messages as ms

D = ms.Digest("d" * 64)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def sent(number: int, *, digest: ms.Digest = D, size: int = 1000) -> MessageSent:
    start = ms.UpdateStart(
        round=number, base=D, alignment=0, digest=digest, bytes=size, codec="nf4", num_examples=3, loss=0.5
    )
    return MessageSent(
        at=60.0 * number, hub="http://h", message=start, bytes=size, run="r", run_name="triage", edge="e"
    )


def receipt(number: int) -> AnswerCame:
    return AnswerCame(at=60.0 * number, run="r", message=ms.Receipt(round=number, digest=D))


def refusal(number: int) -> AnswerCame:
    return AnswerCame(at=60.0 * number, run="r", message=ms.Refusal(round=number, reason="closed"))


def test_what_left_is_summed_up_by_what_was_answered() -> None:
    progress = MessageSent(at=1.0, hub="http://h", message=ms.Progress(round=1, step=1, steps=2), bytes=0, run="r")
    lines: list[AnyLine] = [
        LinesCounted(at=1.0, lines={"progress": 40, "ready": 2}),
        *(sent(1), receipt(1), progress, sent(2), refusal(2), sent(3)),
    ]
    assert sum_of(departures(lines)) == Sent(
        updates=3, update_bytes=3000, unsigned=1, refused=1, unanswered=1, others=43, last_at="1970-01-01T00:03:00Z"
    )


def test_an_update_that_was_sent_again_is_one_update_and_all_its_bytes_left() -> None:
    found = sum_of(departures([sent(1), sent(1), receipt(1)]))
    assert (found.updates, found.update_bytes, found.unsigned, found.unanswered) == (1, 2000, 1, 0)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path)
    made.make_directories()
    return made


def wrote(home: Home, **values: object) -> None:
    found = JoinStatus(hub="http://h:1", run="triage", edge="clinic-7")
    for name, value in values.items():
        setattr(found, name, value)
    home.status.write_bytes(msgspec.json.encode(found))


def facts(now: glance.Glance) -> dict[str, str]:
    return {fact.about: fact.said for fact in now.facts}


def test_a_join_in_a_round(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "is_in_use", lambda: True)
    wrote(
        home, state="training", round=3, rounds=20, step=40, steps=100, loss=0.52, due_at=1840.0, worker_bytes=2 << 30
    )
    ReceiptLog(home.receipts).add(sent(1))
    ReceiptLog(home.receipts).add(receipt(1))
    now = Looking(home, Clock(), lambda: 1000.0).look()
    assert (now.headline, now.tone, now.running, now.progress) == ("training", "busy", True, 0.4)
    found = facts(now)
    assert found["run"] == "triage, as clinic-7"
    assert found["round"] == "3 of 20, step 40 of 100, loss 0.520"
    assert found["until"].endswith(", in 14 min")
    assert found["memory"].startswith("worker 2.00 GiB, ")
    assert found["earned"] == "1 round with the hub's receipt, not signed"
    assert found["sent"].startswith("1 update, 1000 B; 0 small messages; no text, last at ")


@pytest.mark.parametrize(
    ("values", "is_running", "headline", "tone"),
    [
        ({"state": "the run is over"}, False, "the run is over", "over"),
        ({"state": "stopped"}, False, "stopped", "over"),
        ({"state": "stopped", "last_error": "the disk is full"}, False, "stopped", "trouble"),
        ({"state": "training"}, False, "ended unexpectedly: it was killed, or the machine ended it for lack of memory", "trouble"),
        ({"state": "paused", "paused": "on battery"}, True, "paused: on battery", "paused"),
        ({"state": "paused", "paused": "by its owner", "paused_until": 1600.0}, True, "paused by its owner, for another 10 min", "paused"),
        ({"state": "reconnecting", "last_error": "TCP"}, True, "reconnecting", "trouble"),
        ({"state": "waiting for a round"}, True, "waiting for a round", "waiting"),
    ],
)  # fmt: skip
def test_what_a_join_does_is_said_as_status_says_it(
    home: Home, monkeypatch: pytest.MonkeyPatch, values: dict[str, object], is_running: bool, headline: str, tone: str
) -> None:
    monkeypatch.setattr(home, "is_in_use", lambda: is_running)
    wrote(home, **values)
    now = Looking(home, Clock(), lambda: 1000.0).look()
    assert (now.headline, now.tone, now.progress) == (headline, tone, None)


def test_a_home_in_which_nothing_ever_ran(home: Home) -> None:
    now = Looking(home).look()
    assert (now.headline, now.running) == ("no join has run here yet", False)
    assert facts(now)["sent"] == "nothing has left this device"


def test_nothing_is_read_again_that_did_not_change_and_a_fallen_home_is_no_matter(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, read = Clock(), list[int]()
    original = ReceiptLog.lines

    def counting(log: ReceiptLog) -> object:
        read.append(1)
        return original(log)

    monkeypatch.setattr(ReceiptLog, "lines", counting)
    log, looking = ReceiptLog(home.receipts), Looking(home, clock)
    log.add(sent(1))
    for _ in range(3):
        looking.look()
        clock.now += RECEIPT_SECONDS
    assert len(read) == 1
    log.add(receipt(1))
    looking.look()
    assert len(read) == 2
    clock.now += MEASURE_SECONDS
    os.rmdir(home.temporary)
    looking.look()


def test_before_the_first_update_only_small_messages_left(home: Home) -> None:
    ReceiptLog(home.receipts).add(MessageSent(at=1.0, hub="http://h", message=ms.Ready(num_examples=3), bytes=0))
    found = facts(Looking(home).look())
    assert (found["earned"], found["sent"]) == ("no receipt yet", "no update yet; 1 small message; no text")


def test_what_others_wrote_is_one_line(home: Home) -> None:
    wrote(home, state="stopped", run="a\x1b[2Jb\nc", last_error="x" * 5000)
    found = facts(Looking(home).look())
    assert "\x1b" not in found["run"]
    assert "\n" not in found["run"]
    assert len(found["trouble"]) <= 400
