"""Count hostile files that crash a process, are taken, write outside the store, load code or take too long.

    cd scripts && python -c "import bench_trust_artifacts as b, json; print(json.dumps(b.measure(quick=False), indent=1))"

Each file is read by the product's own readers in a child process under RLIMIT_AS, whose audit hook hears what it loads, starts,
opens for writing and connects to; a watched directory is compared before and after. Each must be refused in one sentence of
the error tree within SECONDS; some may be taken, where that does no harm.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))

from trust_artifacts_list import artifacts
from trust_artifacts_make import Artifact

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 10.0  # of a processor that one file may take
HANG_SECONDS = 120.0  # without a word of a child, after which it is ended; other programs may have the machine
STEERING = "\n\r\x1b\x07\x9b\u202e\u2066\u2028"
MOST_SENTENCE = 1500  # characters


def measure(quick: bool) -> dict[str, Any]:
    """Let all hostile files be read, and count those with which all was right.

    Returns:
        tried, right, wrong (sentences), by room how many were tried, and the longest time that one took.
    """
    with tempfile.TemporaryDirectory(prefix="hostile-") as made:
        watched, files = Path(made) / "watched", Path(made) / "files"
        for directory in (watched / "store", files):
            directory.mkdir(parents=True)
        _start("base", files, watched).wait(180)
        listed = list(artifacts(watched, is_quick=quick))
        counts: dict[str, Any] = {"tried": len(listed)}
        wrong: list[str] = []
        longest = 0.0
        for room in ("agent", "torch"):
            mine = [one for one in listed if (one.room == "agent") == (room == "agent")]
            counts[room] = len(mine)
            before = outside(watched)
            for one, report in read(room, mine, files, watched):
                longest = max(longest, report["seconds"])
                if problem := problem_of(one, report):
                    wrong.append(f"{one.kind}, {one.name}: {problem}")
            wrong += [f"{room}: {path} was written outside the store" for path in sorted(outside(watched) - before)]
        return counts | {
            "right": len(listed) - min(len(listed), len(wrong)),
            "wrong": wrong[:20],
            "longest_seconds": round(longest, 2),
        }


def problem_of(one: Artifact, report: dict[str, Any]) -> str:
    """Say what is wrong about how a file was read; "": nothing."""
    if report["heard"]:
        return f"the process {report['heard'][0]}"
    if report["how"] in ("raised", "ended", "hung"):
        return f"{report['how']} {report['sentence'][:160]}"
    if report["how"] == "taken" and not one.harmless:
        return "it was taken"
    sentence = report["sentence"]
    if len(sentence) > MOST_SENTENCE or any(letter in sentence for letter in STEERING):
        return f"the sentence is endless, or steers a terminal: {sentence[:60]!r}"
    return f"it took {report['seconds']:.1f} s" if report["seconds"] > SECONDS else ""


def outside(watched: Path) -> set[str]:
    """List what lies in the watched directory outside the store, with sizes."""
    found = set()
    for path in watched.rglob("*"):
        if not path.is_relative_to(watched / "store"):
            found.add(f"{path.relative_to(watched)} {path.stat().st_size if path.is_file() else ''}")
    return found


def _start(room: str, files: Path, watched: Path, number: int = 0) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HOME": str(watched / "store"),
        "RUST_BACKTRACE": "0",
    }
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(watched / "store"),
        "FEDSODA_HOME": str(watched / "store" / "home"),
    }
    child = Path(__file__).with_name("trust_artifacts_child.py")
    return subprocess.Popen(
        [sys.executable, str(child), room, str(files / f"list{number}"), str(watched)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        cwd=watched,
    )


def read(
    room: str, listed: Sequence[Artifact], files: Path, watched: Path
) -> Iterator[tuple[Artifact, dict[str, Any]]]:
    """Let a child read one file after the other; where it ends or hangs, another goes on behind that file."""
    at = 0
    while at < len(listed):
        lines = []
        for number, one in enumerate(listed[at:], start=at):
            path = files / f"{room}{number}"
            if one.data and not path.exists():
                path.write_bytes(one.data)
            case = {"number": number, "kind": one.kind, "path": str(path) if one.data else "", "with": one.with_}
            lines.append(json.dumps(case))
        (files / f"list{at}").write_text("\n".join(lines))
        child = _start(room, files, watched, at)
        try:
            for report in _reports(child):
                yield listed[report["number"]], report
                at = report["number"] + 1
                (files / f"{room}{at - 1}").unlink(missing_ok=True)
            if at < len(listed):
                how = "hung" if child.poll() is None else "ended"
                status = f"with status {child.poll()}" if how == "ended" else f"for {HANG_SECONDS:g} s"
                yield listed[at], {"how": how, "sentence": status, "seconds": 0.0, "heard": []}
                at += 1
        finally:
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()


def _reports(child: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """Yield what the child reports until it ends, or is silent for too long."""
    assert child.stdout is not None
    os.set_blocking(child.stdout.fileno(), False)
    text, until = "", time.monotonic() + 3 * HANG_SECONDS  # it imports first
    with selectors.DefaultSelector() as waiting:
        waiting.register(child.stdout, selectors.EVENT_READ)
        while time.monotonic() < until:
            if not waiting.select(1.0):
                continue
            piece = os.read(child.stdout.fileno(), 1 << 16)
            if not piece:
                child.wait()
                return
            text += piece.decode()
            *whole, text = text.split("\n")
            for line in whole:
                until = time.monotonic() + HANG_SECONDS
                report = json.loads(line)
                if "begins" not in report:
                    yield report


@contextlib.contextmanager
def _planted(name: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, {"FEDSODA_TRUST_DEFECT": name}):
        yield


def _defect(name: str) -> Callable[[], AbstractContextManager[None]]:
    return lambda: _planted(name)


# What each takes out of the product is in `trust_artifacts_defects`.
DEFECTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "artifacts: names of blobs are not looked at": _defect("names"),
    "artifacts: panics of libraries are not caught": _defect("panics"),
}
