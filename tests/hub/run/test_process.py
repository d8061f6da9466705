"""What a process of a run noted last stays to be read, and an end is final whatever comes after it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import cast, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsoda_edge.ports import SystemClock
from fedsoda_hub.run.process import LENGTH, Noted, ProcessNote, read_note
from fedsoda_hub.run.status import TERMINAL, HubState, RunningJob

STATES = cast("tuple[HubState, ...]", get_args(HubState))


def test_a_note_says_who_works_on_the_run_and_how_that_ended(tmp_path: Path) -> None:
    path = tmp_path / "hub.json"
    assert read_note(path) is None
    note = ProcessNote(path, SystemClock(), "preparing")
    assert read_note(path) is None  # nothing works on the run yet
    note.begin()
    note.working(RunningJob(job="prepare", stage="aligning", done=1, total=2))
    noted = read_note(path)
    assert noted is not None
    assert (noted.hub.state, noted.hub.pid, noted.hub.directory) == ("preparing", os.getpid(), str(tmp_path))
    assert noted.work == RunningJob(job="prepare", stage="aligning", done=1, total=2)
    note.become("serving")
    note.end("failed", 3, "the disk is full", "DiskFull")
    noted = read_note(path)
    assert noted is not None
    ended = noted.hub
    assert (ended.state, ended.status, ended.reason, ended.code) == ("failed", 3, "the disk is full", "DiskFull")
    assert noted.work is None
    assert ended.ended_at is not None


def test_a_note_never_grows_so_that_a_full_disk_keeps_no_end_from_it(tmp_path: Path) -> None:
    path = tmp_path / "hub.json"
    note = ProcessNote(path, SystemClock(), "serving")
    note.begin()
    before = path.stat()
    assert before.st_size == LENGTH
    note.end("failed", 1, "\N{CJK UNIFIED IDEOGRAPH-4E00}" * 100_000)
    after = path.stat()
    assert (after.st_size, after.st_ino) == (LENGTH, before.st_ino)


@given(st.lists(st.tuples(st.sampled_from(["become", "working", "end", "begin"]), st.sampled_from(STATES))))
def test_nothing_leaves_a_terminal_state(
    tmp_path_factory: pytest.TempPathFactory, deeds: list[tuple[str, HubState]]
) -> None:
    path = tmp_path_factory.mktemp("note") / "hub.json"
    note = ProcessNote(path, SystemClock(), "preparing")
    note.begin()
    ended: HubState | None = None
    for deed, state in deeds:
        if deed == "become" and state not in TERMINAL:
            note.become(state)
        elif deed == "end" and state in TERMINAL:
            note.end(state, 0, deed)
            ended = ended or state
        elif deed == "working":
            note.working(RunningJob(job="prepare"))
        elif deed == "begin":
            note.begin()
        noted = read_note(path)
        assert noted is not None
        if ended is not None:
            assert (note.now.state, noted.hub.state) == (ended, ended)


PROCESS = """
import os, sys
from pathlib import Path
from fedsoda_edge.ports import SystemClock
from fedsoda_hub.run.process import ProcessNote
ProcessNote(Path(sys.argv[1]), SystemClock(), "serving").begin()
os.kill(os.getpid(), 9)
"""


def test_a_process_that_was_killed_is_known_by_its_silence(tmp_path: Path) -> None:
    path = tmp_path / "hub.json"
    subprocess.run([sys.executable, "-c", PROCESS, path], check=False)
    noted = read_note(path)
    assert noted is not None
    assert noted.hub.state == "killed"
    # Another process has its number by now.
    noted = msgspec.json.decode(path.read_bytes(), type=Noted)
    ours = msgspec.structs.replace(noted, hub=msgspec.structs.replace(noted.hub, pid=os.getpid(), started_at=1.0))
    path.write_bytes(msgspec.json.encode(ours))
    found = read_note(path)
    assert found is not None
    assert found.hub.state == "killed"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"hub": {"state": "asleep", "pid": 1}}'])
def test_a_note_that_cannot_be_read_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "hub.json").write_bytes(content)
    assert read_note(tmp_path / "hub.json") is None
