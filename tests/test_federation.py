"""A federation of real processes over loopback: it survives kill -9 of the hub and of an edge, bit for bit."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from fedsoda_edge.ports.disk import sha256_file
from fedsoda_hub.compute import Compute
from fedsoda_hub.events import HubEvent, Listening, as_json
from fedsoda_hub.federation.records import RoundOpened, UpdateAccepted
from fedsoda_hub.local.in_process import TorchThread
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import Ledger, opened
from fedsoda_hub.run.outcome import read_outcome
from fedsoda_hub.serving.daemon import Daemon
from fedsoda_hub.settings.run import read_settings
from tests.schema import EDGE, HUB

WORDS = ["cow", "hen", "bus", "car", "rice", "soup"]
ENVIRONMENT = {**os.environ, "FEDSODA_THREADS": "1", "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def write_run(directory: Path, model: Path, rounds: int = 3, edges: str = "ab") -> Path:
    directory.mkdir()
    (directory / "public.txt").write_text("The cat sat on the mat and the dog ran in the rain. " * 60)
    for edge in edges:
        rows = [
            {"prompt": f"{word} {i} {edge}", "completion": "yes" if i % 2 else "no"} for i, word in enumerate(WORDS * 3)
        ]
        (directory / f"{edge}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "eval.jsonl").write_text((directory / "a.jsonl").read_text())
    (directory / "run.toml").write_text(f"""
name = "t"
model = "{model}"
[method]
adapter_layers = 2
layers_per_group = 1
groups = 2
realign_every = 2
[lora]
rank = 4
alpha = 8
[public]
text = "public.txt"
sequences = 8
length = 32
[align]
steps = 4
realign_steps = 2
learning_rate = 1e-3
[rounds]
count = {rounds}
min_edges = 2
quorum = 1.0
[local]
epochs = 40
max_steps = 40
batch_size = 4
learning_rate = 5e-3
max_length = 64
[wire]
codec = "nf4"
[task]
eval_data = "eval.jsonl"
[listen]
port = {free_port()}
""")
    return directory / "run.toml"


class Federation:
    """Hub and edges of one directory, each a real process that can be killed and started again."""

    def __init__(self, run_file: Path, edges: str = "ab") -> None:
        self.run_file = run_file
        self.directory = run_file.parent
        self.processes: list[subprocess.Popen[str]] = []
        settings = read_settings(run_file)
        with opened(RunDirectory(settings.run_dir)) as ledger:
            for edge in edges:
                (self.directory / f"{edge}.token").write_text(ledger.tokens.create(edge))

    def run(self, module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", module, *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT)

    def _start(self, log: str, module: str, *arguments: str | Path, home: Path | None = None) -> subprocess.Popen[str]:
        environment = ENVIRONMENT | ({"FEDSODA_HOME": str(home)} if home else {})
        with (self.directory / log).open("a") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, arguments)],
                stdout=file,
                stderr=file,
                text=True,
                env=environment,
            )
        self.processes.append(process)
        return process

    def hub(self) -> subprocess.Popen[str]:
        return self._start("hub.log", "fedsoda_hub", "serve", self.run_file, "--exit-when-done", "--jsonl")

    def edge(self, name: str) -> subprocess.Popen[str]:
        port = next(line for line in self.run_file.read_text().splitlines() if line.startswith("port")).split()[-1]
        return self._start(
            f"{name}.log", "fedsoda_edge", "join", f"http://127.0.0.1:{port}", "--unattended", "--jsonl",
            "--token-file", self.directory / f"{name}.token", "--data", self.directory / f"{name}.jsonl",
            home=self.directory / f"home-{name}",
        )  # fmt: skip

    def events(self, log: str) -> list[dict[str, Any]]:
        lines = (self.directory / log).read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def check_events(self) -> None:
        """All that hub and edges said is as the packages' `schemas.json` have it."""
        for log in self.directory.glob("*.log"):
            for event in self.events(log.name):
                (HUB if log.name == "hub.log" else EDGE).check_event(event)

    def wait_for(self, log: str, **wanted: Any) -> None:
        until = time.monotonic() + 120
        while not any(all(event.get(k) == v for k, v in wanted.items()) for event in self.events(log)):
            assert time.monotonic() < until, f"{wanted} never came; {log}: {(self.directory / log).read_text()[-2000:]}"
            assert all(p.poll() in (None, 0, -9) for p in self.processes), (self.directory / log).read_text()[-2000:]
            time.sleep(0.02)

    def finish(self, *processes: subprocess.Popen[str]) -> None:
        for process in processes:
            assert process.wait(timeout=400) == 0

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture
def federations() -> Iterator[list[Federation]]:
    made: list[Federation] = []
    yield made
    for federation in made:
        federation.stop()


def worker_of(process: subprocess.Popen[str]) -> psutil.Process:
    [worker] = psutil.Process(process.pid).children()
    return worker


@pytest.mark.slow
@pytest.mark.timeout(1200)  # two whole federations, of two minutes on idle cores
def test_killing_hub_and_edge_in_mid_round_changes_no_bit(
    tmp_path: Path, tiny_llama: Path, federations: list[Federation]
) -> None:
    calm = Federation(write_run(tmp_path / "calm", tiny_llama))
    federations.append(calm)
    calm.finish(calm.hub(), calm.edge("a"), calm.edge("b"))

    rough = Federation(write_run(tmp_path / "rough", tiny_llama))
    federations.append(rough)
    hub, a, b = rough.hub(), rough.edge("a"), rough.edge("b")
    rough.wait_for("a.log", event="training", round=2)
    worker = worker_of(a)
    a.send_signal(signal.SIGKILL)
    a.wait()
    worker.wait(timeout=10)  # it ends when its parent's pipe closes: nothing stays on the device
    rough.wait_for("hub.log", event="update_accepted", round=2, edge="b")
    compute = worker_of(hub)
    hub.send_signal(signal.SIGKILL)
    hub.wait()
    compute.wait(timeout=10)
    rough.finish(rough.hub(), rough.edge("a"), b)

    ours, theirs = (read_outcome(f.directory / "t.run") for f in (rough, calm))
    assert ours.rounds == theirs.rounds == 3
    assert ours.master == theirs.master  # digests of the bytes
    assert ours.emulator_view == theirs.emulator_view
    assert ours.evaluation == theirs.evaluation
    for federation in (rough, calm):
        federation.check_events()
        federation.run("fedsoda_hub", "export", federation.run_file, "--to", federation.directory / "adapter")
    exported = [load_file(f.directory / "adapter" / "adapter_model.safetensors") for f in (rough, calm)]
    assert all((exported[0][name] == exported[1][name]).all() for name in exported[1])
    ledger = Ledger(rough.directory / "t.run" / "ledger.sqlite")
    accepted = [(r.round, r.edge) for r in ledger.records() if isinstance(r, UpdateAccepted)]
    ledger.close()
    assert sorted(accepted) == [(n, edge) for n in (1, 2, 3) for edge in ("a", "b")]  # none lost, none twice


@pytest.mark.slow
def test_who_joins_late_or_misses_rounds_holds_the_views_that_all_others_hold(
    tmp_path: Path, tiny_llama: Path, federations: list[Federation]
) -> None:
    """c joins after round 1; b is killed there and comes back more than three rounds later."""
    run_file = write_run(tmp_path / "run", tiny_llama, rounds=500, edges="abc")
    text = run_file.read_text().replace("quorum = 1.0", "quorum = 0.5\ndeadline_seconds = 4")
    run_file.write_text(text.replace('codec = "nf4"', 'codec = "nf4"\nstall_seconds = 4'))
    federation = Federation(run_file, "abc")
    federations.append(federation)
    hub, a, b = federation.hub(), federation.edge("a"), federation.edge("b")
    federation.wait_for("hub.log", event="round_closed", round=1)
    b.send_signal(signal.SIGKILL)
    b.wait()
    c = federation.edge("c")
    federation.wait_for("c.log", event="accepted")
    last = max(event["round"] for event in federation.events("hub.log") if event["event"] == "round_closed")
    federation.wait_for("hub.log", event="round_closed", round=last + 4)
    (federation.directory / "b.log").write_text("")
    b = federation.edge("b")
    federation.wait_for("b.log", event="accepted")
    for process in (a, b, c, hub):
        process.send_signal(signal.SIGTERM)
    federation.finish(a, b, c, hub)

    assert not [event for event in federation.events("hub.log") if event.get("how") == "refused"]
    ledger = Ledger(federation.directory / "t.run" / "ledger.sqlite")
    opened = {record.round: record for record in ledger.records() if isinstance(record, RoundOpened)}
    ledger.close()
    for edge in "abc":
        [run] = (federation.directory / f"home-{edge}" / "runs").iterdir()
        number = int((run / "adapter.number").read_text())
        assert number > last
        assert sha256_file(run / "adapter.safetensors") == opened[number].view
    came_back = next(event["round"] for event in federation.events("b.log") if event["event"] == "offer")
    assert came_back - 1 > 3


def test_the_agent_stays_small_and_learns_that_the_run_is_over(
    tmp_path: Path, tiny_llama: Path, federations: list[Federation]
) -> None:
    """The edge is a process with a worker of its own; the hub serves from here: torch is loaded here already."""
    run_file = write_run(tmp_path / "run", tiny_llama, rounds=1, edges="a")
    text = run_file.read_text().replace("min_edges = 2", "min_edges = 1").replace("max_steps = 40", "max_steps = 4")
    run_file.write_text(text)
    federation = Federation(run_file, "a")
    federations.append(federation)

    def say(event: HubEvent) -> None:
        HUB.check_event(as_json(event))
        if isinstance(event, Listening):
            federation.edge("a")

    async def serve() -> None:
        with TorchThread() as thread:
            daemon = Daemon.open(read_settings(run_file), say, torch=thread.port(lambda: Compute().answer))
            await daemon.serve(asyncio.get_running_loop().create_future(), exit_when_done=True)

    asyncio.run(serve())
    federation.finish(*federation.processes)
    federation.check_events()
    last = federation.events("a.log")[-1]
    assert last["terminal"] is True
    assert last["status"] == "ok"
    assert last["agent_peak_rss_bytes"] < 80e6
    assert last["bytes"]["up"] > 0
