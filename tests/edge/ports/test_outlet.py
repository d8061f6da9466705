"""What cannot be said changes nothing: a command whose stdout or stderr is broken ends as it would have ended.

Each case is a process of its own with a real descriptor: closed, on a full disk, without a reader, with one that sleeps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedsoda_edge.ports import outlet

# A command that says a lot on both streams, prints past them, opens a file, and ends with what it was to end with.
COMMAND = """
import sys, os
import typer
from fedsoda_edge.ports.console import finish, line_out, note, reporting, run, show
from fedsoda_edge.errors import UsageProblem
app = typer.Typer()
@app.command()
def work(lines: int, how: str, data: str):
    with reporting("json" in how.split(), "jsonl" in how, False):
        with open(data, "w") as file:
            for number in range(lines):
                note(f"line {number} \\u00e9")
                line_out('{"event": %d}' % number)
            print("a library", flush=False)
            show("a table")
            file.write("done")
        if "fail" in how:
            raise UsageProblem("no")
        finish({"status": "ok"}, "json" in how.split(), "jsonl" in how)
run(app)
"""


def start(tmp_path: Path, lines: int, how: str, *, shell: str = "", **streams: int) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", COMMAND, str(lines), how, str(tmp_path / "data")]
    if shell:
        words = ["sh", "-c", f'"$@" {shell}', "sh", *words]
    return subprocess.Popen(words, **streams)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "shell", [">&-", "2>&-", ">&- 2>&- <&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>/dev/full"]
)
@pytest.mark.parametrize(("how", "status"), [("jsonl", 0), ("json fail", 2)])
def test_closed_and_full_streams_change_no_exit_status_and_reach_no_file(
    tmp_path: Path, shell: str, how: str, status: int
) -> None:
    process = start(tmp_path, 300, how, shell=shell, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert (tmp_path / "data").read_text() == "done"  # not a line more: its descriptor was no standard stream's
    assert b"Traceback" not in out + err
    if "2>" not in shell:
        assert b"line 299" in err
        assert b"lines of stdout were lost" in err or ">&-" in shell


def test_a_reader_that_is_gone_changes_nothing(tmp_path: Path) -> None:
    read, write = os.pipe()
    process = start(tmp_path, 300, "jsonl", stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    os.close(read)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, (tmp_path / "data").read_text()) == (0, "done")
    assert b"lines of stdout were lost" in err
    assert b"Traceback" not in err


def test_a_reader_that_sleeps_holds_up_no_work_and_is_left_behind_at_the_end(tmp_path: Path) -> None:
    read, write = os.pipe()
    process = start(tmp_path, 30_000, "jsonl", stdout=write, stderr=subprocess.DEVNULL)
    os.close(write)
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "data").read_text() == "done"
    os.close(read)


def test_a_result_waits_for_its_reader(tmp_path: Path) -> None:
    read, write = os.pipe()
    process = start(tmp_path, 3000, "json", stdout=write, stderr=subprocess.DEVNULL)
    os.close(write)
    time.sleep(1)
    with os.fdopen(read, "rb") as file:
        lines = file.read().splitlines()
    assert process.wait(timeout=60) == 0
    assert json.loads(lines[-1])["status"] == "ok"
    assert len([line for line in lines if b"event" in line]) == 3000


def test_what_was_lost_is_said_by_the_next_line_that_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    is_full = True

    class Stream:
        encoding = "utf-8"

        def write(self, text: str) -> None:
            if is_full:
                raise OSError(28, "No space left on device")
            written.append(text)

        def flush(self) -> None:
            pass

    monkeypatch.setattr(sys, "stderr", Stream())
    err = outlet.Outlet("stderr")
    for number in range(3):
        err.say(f"{number}\n")
    assert err.lost == 3
    is_full = False
    err.say("3\n")
    err.say("4\n")
    assert written == ["(3 lines were lost here: No space left on device)\n3\n", "4\n"]


def test_a_queue_that_nobody_empties_drops_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    monkeypatch.setattr(outlet, "MOST_WAITING", 10)
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "__stdout__", stream)
        monkeypatch.setattr(sys, "stdout", stream)
        out = outlet.Outlet("stdout")
        out.begin(stream)
        began = time.monotonic()
        for _ in range(100):
            out.say("x" * 65536)
        assert time.monotonic() - began < 1
        assert out.lost > 80
        out.end(0.1)
        os.close(read)
