"""What left a device is listed whatever happened then: answers, crashes, torn lines, full disks, larger and larger files."""

from __future__ import annotations

import asyncio
import os
import stat
import sys
from pathlib import Path

import msgspec
import pytest
from attacks_on_receipts import START, TRUE, handed_in, receipt
from small_hostile import KEY, MALLORY, RUN

from fedsoda_edge.errors import DiskFull, UsageProblem
from fedsoda_edge.join import receipts as log_module
from fedsoda_edge.join.receipts import (
    AnswerCame,
    Departure,
    HubNamed,
    LinesCounted,
    MessageSent,
    ReceiptLog,
    departures,
)
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.signatures import as_text, fingerprint
from fedsoda_edge.protocol.statements import sign

URL = "https://hub.example.org"
FACTS = ms.DeviceFacts(ram_bytes=8, vram_bytes=0, disk_bytes=9, threads=2, accelerator="")
HELLO = ms.Hello(protocol=1, software="fedsoda", device_id="d", device=FACTS)
NAMED = HubNamed(at=2.0, hub=URL, run=RUN, run_name="triage", edge="clinic-7", key=as_text(KEY.public))


def sent(message: ms.EdgeMessage, at: float = 3.0, size: int = 6, key: str = NAMED.key) -> MessageSent:
    return MessageSent(
        at=at, hub=URL, message=message, bytes=size, run=RUN, run_name="triage", edge="clinic-7", key=key
    )


def answered(message: ms.Receipt | ms.Refusal, at: float = 4.0) -> AnswerCame:
    return AnswerCame(at=at, run=RUN, message=message)


@pytest.fixture
def log(tmp_path: Path) -> ReceiptLog:
    return ReceiptLog(tmp_path / "home" / "receipts.jsonl")


def listed(log: ReceiptLog) -> list[Departure]:
    return departures(ReceiptLog(log.path).lines()[0])  # as another process reads it


def test_a_hello_is_listed_with_the_hub_that_answered_it(log: ReceiptLog) -> None:
    log.add(MessageSent(at=1.0, hub=URL, message=HELLO, bytes=70))
    assert (listed(log)[0].hub_key, listed(log)[0].run) == (None, None)
    log.add(NAMED)
    [hello] = listed(log)
    assert (hello.what, hello.hub, hello.run, hello.run_id) == ("hello", URL, "triage", RUN)
    assert hello.hub_key == fingerprint(KEY.public)
    assert hello.at == "1970-01-01T00:00:01Z"
    assert msgspec.json.decode(hello.said, type=ms.Hello | ms.Leave) == HELLO
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("answer", "key", "wanted"),
    [
        (receipt(), NAMED.key, "verified"),
        (receipt(signed=None), NAMED.key, "forged"),
        (receipt(signed=sign(MALLORY, TRUE)), NAMED.key, "forged"),
        (receipt(msgspec.structs.replace(TRUE, num_examples=99)), NAMED.key, "forged"),
        (receipt(signed=None), "", "unsigned"),
        (ms.Refusal(round=2, reason="round 2 is closed"), NAMED.key, "refused"),
        (None, NAMED.key, "none"),
    ],
)
def test_an_update_is_listed_with_what_was_answered(
    log: ReceiptLog, answer: ms.Receipt | ms.Refusal | None, key: str, wanted: str
) -> None:
    log.add_or_raise(sent(START, key=key))
    if answer is not None:
        log.add(answered(answer))
    [update] = listed(log)
    assert (update.what, update.round, update.num_examples, update.loss) == ("update", 2, 12, 0.5)
    assert (update.bytes, update.digest) == (6, START.digest)
    assert update.answer == wanted
    assert bool(update.reason) == (wanted in ("refused", "forged"))
    assert (update.receipt is None) == (not isinstance(answer, ms.Receipt) or answer.signed is None)


def test_an_update_that_was_cut_and_sent_again_is_listed_twice(log: ReceiptLog) -> None:
    log.add(sent(START, 3.0))
    log.add(sent(START, 5.0))
    log.add(answered(receipt(), 6.0))
    assert [one.answer for one in listed(log)] == ["none", "verified"]


def test_an_answer_of_another_run_or_round_is_not_taken_for_this_one(log: ReceiptLog) -> None:
    log.add(sent(START))
    log.add(AnswerCame(at=4.0, run="other", message=receipt()))
    log.add(answered(ms.Refusal(round=1, reason="closed")))
    assert listed(log)[0].answer == "none"


def test_runs_are_chosen_by_name_or_id(log: ReceiptLog) -> None:
    log.add(sent(START))
    lines, _ = log.lines()
    assert len(departures(lines, "triage")) == len(departures(lines, RUN)) == 1
    assert departures(lines, "other") == []


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_that_a_crash_cut_spoils_no_other(log: ReceiptLog, cut: int) -> None:
    log.add(sent(START, 3.0))
    log.add(answered(receipt()))
    log.path.write_bytes(log.path.read_bytes()[:-cut])
    ReceiptLog(log.path).add(sent(START, 5.0))
    lines, unread = log.lines()
    assert [type(line) for line in lines] == [MessageSent, AnswerCame, MessageSent][: 3 if cut == 1 else 1] + (
        [MessageSent] if cut > 1 else []
    )
    assert unread == (cut > 1)


def test_lines_of_a_later_release_are_counted_and_left_in_place(log: ReceiptLog) -> None:
    log.add(sent(START))
    with log.path.open("ab") as file:
        file.write(b'{"line":"teleported","at":9}\n\xff\xfe\n')
    log.add(answered(receipt()))
    lines, unread = log.lines()
    assert ([type(line) for line in lines], unread) == ([MessageSent, AnswerCame], 2)


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux")
def test_on_a_full_disk_an_update_does_not_leave_and_the_rest_is_noted_later(
    log: ReceiptLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = log.path
    log.path = Path("/dev/full")
    log.add(sent(ms.Ready(num_examples=3)))  # kept in memory
    with pytest.raises(DiskFull, match="nothing leaves that is not noted") as full:
        log.add_or_raise(sent(START))
    assert full.value.exit_status == 3
    log.path = path
    log.add_or_raise(sent(START, 9.0))
    assert [(one.what, one.at[-3:-1]) for one in listed(log)] == [("ready", "03"), ("update", "09")]


def test_a_line_that_the_disk_took_in_part_is_taken_back(log: ReceiptLog, monkeypatch: pytest.MonkeyPatch) -> None:
    log.add(sent(ms.Ready(num_examples=3)))
    before, write = log.path.read_bytes(), os.write
    with monkeypatch.context() as small:
        small.setattr(os, "write", lambda handle, data: write(handle, data[:20]))
        with pytest.raises(DiskFull):
            log.add_or_raise(sent(START))
    assert log.path.read_bytes() == before


def test_what_a_full_disk_made_it_forget_is_said(log: ReceiptLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "MAX_WAITING", 3)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as small:
        small.setattr(os, "open", full)
        for number in range(5):
            log.add(sent(ms.Paused(reason=str(number))))
    log.add(sent(ms.Resumed()))
    found = listed(log)
    assert [one.what for one in found] == ["counted", "paused", "paused", "resumed"]
    assert msgspec.json.decode(found[0].said) == {"lost on a full disk": 3}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_file_that_may_not_be_written_stops_what_would_leave(log: ReceiptLog) -> None:
    log.add(sent(ms.Resumed()))
    log.path.chmod(0o400)
    with pytest.raises(UsageProblem, match="cannot be written to"):
        log.add(sent(ms.Resumed()))


def test_a_large_file_keeps_updates_and_answers_and_counts_the_rest(
    log: ReceiptLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "KEPT_LINES", 10)
    for _ in range(3):
        for number in range(20):
            log.add(sent(ms.Progress(round=number, step=1, steps=2)))
        log.add(sent(START))
        log.add(answered(receipt()))
    monkeypatch.setattr(log_module, "MAX_BYTES", 100)
    before = listed(log)
    log.shorten()
    log.shorten()
    after = listed(log)
    assert [one for one in after if one.what == "update"] == [one for one in before if one.what == "update"]
    counted = [line for line in log.lines()[0] if isinstance(line, LinesCounted)]
    late = sum(one.what == "progress" for one in after)
    assert sum(line.lines["progress"] for line in counted) + late == 60
    assert len(after) < 20
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600


def test_a_small_file_is_left_as_it_is(log: ReceiptLog) -> None:
    log.shorten()
    log.add(sent(START))
    before = log.path.read_bytes()
    log.shorten()
    assert log.path.read_bytes() == before


def test_a_conversation_notes_the_update_before_it_leaves_and_the_receipt(tmp_path: Path) -> None:
    assert asyncio.run(handed_in(tmp_path, receipt())) == ""
    found = listed(ReceiptLog(tmp_path / "receipts.jsonl"))
    assert [(one.what, one.answer) for one in found] == [("hello", None), ("update", "verified")]
    assert {one.hub_key for one in found} == {fingerprint(KEY.public)}


def test_a_forged_receipt_is_listed_as_one(tmp_path: Path) -> None:
    assert "sent by the next join" in asyncio.run(handed_in(tmp_path, receipt(signed=sign(MALLORY, TRUE))))
    assert [one.answer for one in listed(ReceiptLog(tmp_path / "receipts.jsonl"))] == [None, "forged"]
