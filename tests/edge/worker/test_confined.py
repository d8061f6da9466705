"""The worker's own process: a library in it that turns on its user reaches nobody and nothing, and training is as it was."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.edge import Edge, Participation, agent_of
from fedsoda_edge.errors import DataProblem
from fedsoda_edge.events import as_json
from fedsoda_edge.join.trainer import WORKER_MODULE, worker_environment
from fedsoda_edge.ports import landlock
from fedsoda_edge.ports.child import Child
from fedsoda_edge.ports.confine import Reach
from fedsoda_edge.protocol import commands as cmd
from fedsoda_edge.testing import ScriptedHub
from tests.conftest import ROOT
from tests.joins import joining

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has seccomp and Landlock")

# Stands in for a library that reads private rows: the worker imports it for the first row of a Parquet file.
HOSTILE = """
import json, os, socket, subprocess, sys
from pathlib import Path
from fedsoda_edge.errors import DataProblem

port, secret, row = int(os.environ["TRY_PORT"]), os.environ["TRY_SECRET"], os.environ["TRY_ROW"]
tried = {}

def attempt(name, do):
    try:
        do()
        tried[name] = "done"
    except (OSError, subprocess.SubprocessError) as error:
        tried[name] = type(error).__name__

def udp():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.sendto(b"text", ("127.0.0.1", port))

attempt("tcp", lambda: socket.create_connection(("127.0.0.1", port), 2))
attempt("tcp6", lambda: socket.create_connection(("::1", port), 2))
attempt("udp", udp)
attempt("dns", lambda: socket.getaddrinfo("hub.example.org", 80))
attempt("by a program", lambda: subprocess.run(
    [sys.executable, "-c", f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"],
    check=True, capture_output=True, timeout=30))
attempt("read", lambda: Path(secret).read_text())
attempt("write", lambda: Path(secret + ".new").write_text("x"))
attempt("write to the data", lambda: open(row, "ab"))
attempt("memory of the agent", lambda: open(f"/proc/{os.getppid()}/mem", "rb"))
attempt("read its own", lambda: Path(row).read_bytes())
raise DataProblem(json.dumps(tried))
"""


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def tried_in_a_worker(tmp_path: Path, port: int, reach: Reach) -> dict[str, str]:
    """Let a worker check rows with the hostile library; return what came of each of its attempts."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "pyarrow.py").write_text(HOSTILE)
    (tmp_path / "tmp").mkdir()
    variables = worker_environment(tmp_path / "tmp", reach) | {
        "PYTHONPATH": f"{tmp_path / 'lib'}{os.pathsep}{ROOT}",
        "TRY_PORT": str(port),
        "TRY_SECRET": str(tmp_path / "secret"),
        "TRY_ROW": str(tmp_path / "rows.parquet"),
    }

    async def check() -> str:
        worker = Child(WORKER_MODULE, variables)
        rows = cmd.Rows(path=str(tmp_path / "rows.parquet"), columns={}, prompt="{text}", completion="{label}")
        try:
            with pytest.raises(DataProblem) as failure:
                await worker.call(cmd.Check(rows=rows))
        finally:
            await worker.close()
        return failure.value.message

    (tmp_path / "rows.parquet").write_bytes(b"PAR1 private text")
    (tmp_path / "secret").write_text("secret")
    found: dict[str, str] = json.loads(asyncio.run(check()))
    return found


def test_a_library_in_the_worker_reaches_nobody_and_nothing_but_the_data(tmp_path: Path, listener: int) -> None:
    reach = Reach(reads=(str(tmp_path / "rows.parquet"),), may_use_gpu=False)
    tried = tried_in_a_worker(tmp_path, listener, reach)
    done = {name for name, result in tried.items() if result == "done"}
    try:
        landlock.version()
    except OSError:
        done -= {"read", "write", "write to the data", "memory of the agent"}
    assert done == {"read its own"}


def test_a_confined_worker_trains_to_the_same_bits_and_a_join_says_nothing_of_it(
    tmp_path: Path, scripted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data lies behind a link, and FEDSODA_HOME behind another one."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "far").mkdir()
    (tmp_path / "near").mkdir()
    rows = "".join(
        json.dumps({"prompt": f"case {at}", "completion": "yes" if at % 2 else "no"}) + "\n" for at in range(8)
    )
    (tmp_path / "far" / "rows.jsonl").write_text(rows)
    (tmp_path / "near" / "rows.jsonl").symlink_to(tmp_path / "far" / "rows.jsonl")
    (tmp_path / "other disk").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "other disk")
    data = LocalData.from_jsonl(tmp_path / "near" / "rows.jsonl")
    said: list[dict[str, object]] = []
    hub = ScriptedHub(rounds=1, bundle=scripted)
    agent = agent_of(
        Edge(hub, home=tmp_path / "home", device="cpu", threads=1), data, lambda event: said.append(as_json(event))
    )
    digests = []
    with Participation(agent, 0) as participation:
        for offer in participation:
            update = offer.train()
            digests.append(update.digest)
            offer.submit(update)
    here = ScriptedHub(rounds=1, bundle=scripted)
    with joining(Edge(here, home=tmp_path / "here", device="cpu", threads=1), data) as participation:
        for offer in participation:
            update = offer.train()
            digests.append(update.digest)
            offer.submit(update)
    assert len(digests) == 2
    assert digests[0] == digests[1]
    assert [
        event["message"] for event in said if event["event"] == "notice" and "confined" in str(event["message"])
    ] == []
