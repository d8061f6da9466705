"""Lines of logs: a line a fact with time and level, for the journal, as JSON, and in a private file that is rotated."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.ports.log_lines import LINES, LogChoices, RotatedFile, is_journal

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
SAID = [
    ("joined run triage", None, "joined"),
    ("no connection: TCP", "warning", "reconnecting"),
    ("error: the disk is full", None, ""),
    ("note: only one edge", None, ""),
    ("two\nlines \x1b[31m", None, ""),
]


def all_said() -> None:
    for text, level, event in SAID:
        LINES.say(text, level, event)  # type: ignore[arg-type]


def test_where_stderr_is_no_terminal_each_line_has_time_and_level(capsys: pytest.CaptureFixture[str]) -> None:
    with LINES.kept(LogChoices()):
        all_said()
    lines = capsys.readouterr().err.splitlines()
    assert all(re.match(TIME + " ", line) for line in lines)
    assert [line.partition("Z ")[2] for line in lines] == [
        "info: joined run triage",
        "warning: no connection: TCP",
        "error: the disk is full",
        "notice: only one edge",
        "info: two",
        "info: lines \ufffd[31m",
    ]
    LINES.say("error: x")  # afterwards as for people
    assert capsys.readouterr().err == "error: x\n"


def test_json_is_one_object_a_fact_that_names_its_event(capsys: pytest.CaptureFixture[str]) -> None:
    with LINES.kept(LogChoices("json")):
        all_said()
    found = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [{**one, "time": ""} for one in found][:3] == [
        {"time": "", "level": "info", "message": "joined run triage", "event": "joined"},
        {"time": "", "level": "warning", "message": "no connection: TCP", "event": "reconnecting"},
        {"time": "", "level": "error", "message": "the disk is full"},
    ]
    assert found[-1]["message"] == "two\nlines \ufffd[31m"
    assert all(re.fullmatch(TIME, one["time"]) for one in found)


def test_the_journal_gets_priorities_and_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
    with LINES.kept(LogChoices()):
        all_said()
    assert capsys.readouterr().err.splitlines() == [
        "<6>joined run triage",
        "<4>no connection: TCP",
        "<3>the disk is full",
        "<5>only one edge",
        "<6>two",
        "<6>lines \ufffd[31m",
    ]


@pytest.mark.parametrize("stream", ["", "1", "1:2", "a:b"])
def test_a_variable_that_names_another_stream_is_not_the_journal(monkeypatch: pytest.MonkeyPatch, stream: str) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", stream)  # it is inherited by who is started from a service with a pipe
    assert not is_journal()


def test_a_format_that_is_not_known_is_refused() -> None:
    with (
        pytest.raises(UsageProblem, match="'xml' is not known; choose auto, text or json"),
        LINES.kept(LogChoices("xml")),
    ):
        pass


def test_a_file_gets_all_and_only_its_owner_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "join.log"
    with LINES.kept(LogChoices("json", path)):
        all_said()
        LINES.drawn("a bar shows it", event="joined")
        LINES.beside_events("its event is on stdout", event="joined")
    assert [json.loads(line)["message"] for line in path.read_text().splitlines()][-2:] == [
        "a bar shows it",
        "its event is on stdout",
    ]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "a bar shows it" not in capsys.readouterr().err
    with LINES.kept(LogChoices(file=path)):
        LINES.beside_events("once more")
    assert path.read_text().endswith(" info: once more\n")
    assert capsys.readouterr().err == ""  # without a format, stdout has the event


def test_a_file_is_rotated_by_size_and_so_much_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "hub.log"
    file = RotatedFile(path, 30, 2)
    for number in range(10):
        file.write(f"line {number} of ten\n")  # 15 bytes
    file.close()
    lines = {each.name: each.read_text().split("\n")[:-1] for each in tmp_path.iterdir()}
    assert lines == {
        "hub.log": ["line 8 of ten", "line 9 of ten"],
        "hub.log.1": ["line 6 of ten", "line 7 of ten"],
        "hub.log.2": ["line 4 of ten", "line 5 of ten"],
    }
    assert {stat.S_IMODE(each.stat().st_mode) for each in tmp_path.iterdir()} == {0o600}


def test_a_line_that_is_longer_than_a_file_stays_whole_and_nothing_older_may_be_kept(tmp_path: Path) -> None:
    path = tmp_path / "hub.log"
    file = RotatedFile(path, 10, 0)
    for text in ("x" * 50, "y" * 50):
        file.write(f"{text}\n")
    file.close()
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"hub.log": "y" * 50 + "\n"}


def test_a_file_that_cannot_be_rotated_grows(tmp_path: Path) -> None:
    path = tmp_path / "hub.log"
    (tmp_path / "hub.log.1").mkdir()
    file = RotatedFile(path, 10, 1)
    file.write("first line\n")
    file.write("second line\n")
    file.close()
    assert path.read_text() == "first line\nsecond line\n"


def test_a_file_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # nobody reads it
    for path in (tmp_path / "nowhere" / "x.log", tmp_path, tmp_path / "pipe"):
        with pytest.raises(UsageProblem, match="cannot be written"), LINES.kept(LogChoices(file=path)):
            pass


@contextlib.contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    write = os.write

    def refused(descriptor: int, data: Any) -> int:
        if descriptor > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refused)
        yield


def test_a_full_disk_ends_nothing_and_the_lines_that_were_lost_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "join.log"
    with LINES.kept(LogChoices("json", path)):
        assert LINES._file is not None
        with full_disk(monkeypatch):
            for number in range(3):
                LINES.say(f"fact {number}")
            LINES._file.end()  # all of them were tried
        file = LINES._file._stream
        LINES._file.begin(file)
        LINES.say("there is space")
    lost, said = (json.loads(line) for line in path.read_text().splitlines())
    assert lost["message"] == "(3 lines were lost here: No space left on device)"
    assert lost["level"] == "warning"
    assert said["message"] == "there is space"
