"""Measure what thousands of connections cost a hub, honest ones and hostile ones: memory, CPU, and how long others wait.

    python scripts/bench_trust_resources.py [--quick]

The hub is a daemon in a process of its own, with the real ledger, port and round machine; only torch is stood in for. Bounds
of addresses hold on loopback as well. The other side is `hostile_peers.py`'s.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

import msgspec
from hostile_peers import LAYOUT, floods, raise_limit
from small_manifest import small_manifest

from fedsoda_edge.ports import TorchPort
from fedsoda_edge.protocol import messages as ms
from fedsoda_hub.federation import jobs
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.serving import connection, guarded, listener, spool, strangers
from fedsoda_hub.serving.daemon import Daemon
from fedsoda_hub.settings.open_run import OpenRun, RunOpened
from fedsoda_hub.settings.run import read_settings

KIB_A_CONNECTION = 48.0  # of the hub's resident memory above idle
KIB_A_HOSTILE = 256.0  # most of it what lies between a blob and a reader that does not read
HEALTH_SECONDS = 0.1  # at the 99th percentile
LOOK_SECONDS = 0.01  # between two looks at the clock on the hub's loop
ASKER_SECONDS = 0.04  # between two questions: its own address may ask 32 times a second, too
ASKER_NICE = -5  # of who asks /healthz, where that is allowed: its own wait for a core is not the hub's
CPU_RATIO = 1.5  # of CPU per round and edge, from the small federation to the large one
SHARD = bytes(1 << 20)
VIEW = bytes(8 << 20)  # more than all buffers on the way of one connection
DEFECT = "FEDSODA_BENCH_DEFECT"  # names the check that is taken out of the hub of a child process
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # CPU is measured, and not how fast a disk syncs
ROOT = Path(__file__).resolve().parent.parent


# --- the hub --------------------------------------------------------------------------------------------------------


class HashTorch:
    """In the place of the process that owns torch: blobs are hashes of the jobs."""

    rss_bytes = peak_rss_bytes = 0
    pid: int | None = 1

    def __init__(self, run_dir: Path) -> None:
        self._run = RunDirectory(run_dir)

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def call(self, call: Any, on_progress: Any = None) -> Any:
        return RunOpened(1) if isinstance(call, OpenRun) else await asyncio.to_thread(self._answer, call)

    def _answer(self, job: jobs.Job) -> jobs.JobResult:
        if isinstance(job, jobs.Prepare):
            self._run.bundle.mkdir(exist_ok=True)
            (self._run.bundle / "norm.safetensors").write_bytes(SHARD)
            view = self._put(VIEW)
            prepared = jobs.PreparedSubLLM(
                manifest=self._put(small_manifest(LAYOUT, SHARD)),
                adapter_view=view,
                emulator_view=view,
                public_kl={"aligned": 0.1},
            )
            return jobs.PrepareResult(sub_llms=(prepared,), master=view)
        assert isinstance(job, jobs.Aggregate)
        name = hashlib.sha256(msgspec.json.encode(job)).digest()
        step = jobs.ViewStep(view=self._put(b"view" + name), delta=self._put(b"delta" + name))
        return jobs.AggregateResult(master=self._put(b"master" + name), steps=(step,), moments=None, cross_term=None)

    def _put(self, data: bytes) -> ms.Digest:
        return ms.Digest(self._run.blobs.put(data))


async def _serve(directory: Path, num_edges: int, rounds: int, stall_seconds: float, tls: str) -> None:
    """Serve a run of so many edges until stdin ends; say port and tokens, then answer each line with what it costs now."""
    (directory / "public.txt").write_text("public")
    (directory / "run.toml").write_text(
        'name = "small"\nmodel = "no-model"\n[lora]\nrank = 2\n[public]\ntext = "public.txt"\n[method]\n'
        f"realign_every = 0\n[rounds]\ncount = {rounds}\nmin_edges = {num_edges}\ncohort = {num_edges}\nquorum = 1.0\n"
        f'[wire]\ncodec = "bf16"\nstall_seconds = {stall_seconds}\n[listen]\nport = 0\n'
        f'[tls]\nmode = "{tls}"\n'
    )
    settings = read_settings(directory / "run.toml")
    torch = cast(TorchPort, HashTorch(settings.run_dir))
    daemon = Daemon.open(settings, lambda _: None, torch=torch)
    secrets = [f"fs1-{number:05d}" for number in range(num_edges)]
    row = "INSERT INTO tokens (edge, sha256, device) VALUES (?, ?, ?)"
    daemon.disk.ledger.database.write(
        *((row, (f"e{secret[4:]}", hashlib.sha256(secret.encode()).hexdigest(), secret)) for secret in secrets)
    )
    stop: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    with mock.patch.object(listener, "Server", partial(SERVER, counts_loopback=True)):
        serving = asyncio.create_task(daemon.serve(stop, exit_when_done=False))
        while not daemon.url or not daemon.disk.directory.address.exists():
            if serving.done():
                raise serving.exception() or RuntimeError("the hub ended before it served")
            await asyncio.sleep(0.01)
        lags: list[float] = []
        watching = asyncio.create_task(_watch(lags))
        daemon.disk.key.sign("manifest", b"")  # loads once what the first Welcome would, which is of no connection
        print(json.dumps({"url": daemon.url, "tokens": secrets}), flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            usage = resource.getrusage(resource.RUSAGE_SELF)
            said, lags[:] = list(lags), []
            print(
                json.dumps(
                    {
                        "rss": _rss_bytes(),
                        "cpu": usage.ru_utime + usage.ru_stime,
                        "spooled": daemon.uploads.spooled_bytes,
                        "greeted": len(daemon.roster.connected),
                        "lags": said,
                    }
                ),
                flush=True,
            )
        watching.cancel()
        stop.set_result("SIGTERM")
        await serving


async def _watch(lags: list[float]) -> None:
    """Note again and again by how many seconds the loop is late."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LOOK_SECONDS
        await asyncio.sleep(LOOK_SECONDS)
        lags.append(max(0.0, loop.time() - due))


SERVER = listener.Server


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Hub:
    """A hub in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        said = json.loads(self._line())
        self.port = int(said["url"].rpartition(":")[2])
        self.tokens: list[str] = said["tokens"]

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def cpu_seconds(self) -> float:
        """Return the CPU time of the hub's process, without asking it (Linux's clock of another process)."""
        return time.clock_gettime((~self._process.pid << 3) | 2)

    def queued_seconds(self) -> float:
        """Return how long the thread of the hub's loop was ready to run and had no core (Linux's schedstat)."""
        return _queued_seconds(f"/proc/{self._process.pid}/schedstat")

    def cost(self) -> dict[str, Any]:
        """Resident bytes, CPU seconds, bytes of uploads under way, edges that were greeted, lags since the last call."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._line())
        return found


def _queued_seconds(path: str) -> float:
    return int(Path(path).read_text().split()[1]) / 1e9


@contextlib.contextmanager
def hub_of(
    num_edges: int, rounds: int, defect: str, *, stall_seconds: float = 20.0, tls: bool = False
) -> Iterator[Hub]:
    """Serve a run of so many edges in a child process."""
    mode = "on" if tls else "off"
    with tempfile.TemporaryDirectory(prefix="fedsoda-trust-", dir=IN_MEMORY) as directory:
        process = subprocess.Popen(
            [sys.executable, __file__, "--serve", directory, *map(str, (num_edges, rounds, stall_seconds)), mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, DEFECT: defect, "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "2"},
        )
        try:
            yield Hub(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def others(
    kind: str, port: int, tokens: list[str], value: float, *, tls: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """Run the other side in a child process."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "hostile_peers.py"), kind, str(port), str(value)] + ["tls"] * tls,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(tokens) + "\n")
    process.stdin.flush()
    try:
        yield process
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# --- what is measured -----------------------------------------------------------------------------------------------


class Waited(NamedTuple):
    """The wait for /healthz, from the connect on. seconds: by the clock.

    on_core_seconds: less what the hub's loop and the asker were ready and had no core, since other processes had them all.
    cpu_seconds: how long the hub computed meanwhile, in all its threads.
    """

    seconds: float
    on_core_seconds: float
    cpu_seconds: float


def health(hub: Hub) -> Waited:
    """Ask /healthz; infinite where it does not answer."""

    def queued() -> float:
        return hub.queued_seconds() + _queued_seconds("/proc/thread-self/schedstat")

    started, computed, waited = time.monotonic(), hub.cpu_seconds(), queued()
    answer = b""
    try:
        with socket.create_connection(("127.0.0.1", hub.port), 30) as asked:
            asked.sendall(b"GET /healthz HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            while piece := asked.recv(4096):
                answer += piece
    except OSError:
        answer = b""
    if b'"fedsoda"' not in answer:
        return Waited(float("inf"), float("inf"), float("inf"))
    seconds = time.monotonic() - started
    return Waited(seconds, max(0.0, seconds - (queued() - waited)), hub.cpu_seconds() - computed)


def honest_cost(num_edges: int, rounds: int, defect: str, *, tls: bool = False) -> dict[str, float]:
    """Return KiB of the hub's memory for each greeted connection, and CPU milliseconds per round and edge."""
    with hub_of(num_edges, rounds, defect, tls=tls) as hub:
        idle = hub.cost()
        with others("honest", hub.port, hub.tokens, rounds, tls=tls) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            greeted = hub.cost()
            while greeted["greeted"] < num_edges:
                time.sleep(0.1)
                greeted = hub.cost()
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline().strip() == "played"
            played = hub.cost()
    return {
        "kib_a_connection": (greeted["rss"] - idle["rss"]) / num_edges / 1024,
        "cpu_ms_a_round_and_edge": (played["cpu"] - greeted["cpu"]) * 1000 / rounds / num_edges,
        "kib_a_connection_after_rounds": (played["rss"] - idle["rss"]) / num_edges / 1024,
    }


def under_fire(num_connections: int, seconds: float, defect: str) -> dict[str, Any]:
    """Return how long /healthz takes while so many connections do their worst, and what the hub holds meanwhile."""
    with hub_of(num_connections, 1, defect) as hub:
        idle, waited, lags, most, spooled = hub.cost(), list[Waited](), list[float](), 0.0, 0.0
        with others("hostile", hub.port, hub.tokens, seconds) as process:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "besieged"
            until = time.monotonic() + seconds
            with _preferred():
                while time.monotonic() < until and process.poll() is None:
                    waited.append(health(hub))
                    cost = hub.cost()
                    lags += cost["lags"]
                    most, spooled = max(most, cost["rss"]), max(spooled, cost["spooled"])
                    time.sleep(ASKER_SECONDS)
        return {
            "asked": len(waited),
            **{
                f"health_p{round(100 * share)}_{name}ms": percentile(
                    [float(getattr(one, field)) for one in waited], share
                )
                for name, field in (("", "seconds"), ("on_core_", "on_core_seconds"), ("cpu_", "cpu_seconds"))
                for share in (0.5, 0.99)
            },
            "loop_late_p50_ms": percentile(lags, 0.5),
            "loop_late_p99_ms": percentile(lags, 0.99),
            "kib_a_hostile_connection": round((most - idle["rss"]) / num_connections / 1024, 1),
            "spooled_bytes": spooled,
            "load": round(os.getloadavg()[0], 1),
        }


@contextlib.contextmanager
def _preferred() -> Iterator[None]:
    """Let this thread have a core before others, where that is allowed."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, ASKER_NICE)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)


def percentile(seconds: list[float], share: float) -> float:
    """Return the milliseconds that so large a share stays below."""
    return round(1000 * sorted(seconds)[min(len(seconds) - 1, int(len(seconds) * share))], 1)


def measure(quick: bool) -> dict[str, object]:
    """Measure a federation and a siege; count what keeps its bound."""
    defect = os.environ.get(DEFECT, "")
    small, large, seconds = (50, 300, 4.0) if quick else (100, 2_000, 40.0)
    few = honest_cost(small, 2, defect)
    many = honest_cost(large, 2, defect)
    encrypted = honest_cost(large, 2, defect, tls=True)
    with hub_of(1, 1, defect, stall_seconds=2.0) as hub:
        flood = asyncio.run(floods(hub.port, hub.tokens[0]))
    siege = under_fire(large, seconds, defect)
    ratio = many["cpu_ms_a_round_and_edge"] / few["cpu_ms_a_round_and_edge"]
    bounds = [
        ("KiB of the hub's memory for a greeted connection", many["kib_a_connection"], KIB_A_CONNECTION),
        ("the same, with TLS", encrypted["kib_a_connection"], KIB_A_CONNECTION),
        (f"CPU of a round and edge, {large} edges to {small}", ratio, CPU_RATIO),
        (
            "ms until /healthz answers under fire, p99, without waiting for a core",
            siege["health_p99_on_core_ms"],
            1000 * HEALTH_SECONDS,
        ),
        ("KiB of the hub's memory for a hostile connection", siege["kib_a_hostile_connection"], KIB_A_HOSTILE),
        ("bytes on disk of uploads that no round waits for", siege["spooled_bytes"], 0.0),
        (
            "connections of one address that are answered of 600",
            flood["answered_of_one_address"],
            flood["allowed_of_one_address"],
        ),
        ("bytes of an 8 MiB blob for one who does not read", flood["blob_bytes_unread_too_long"], 7.5 * 2**20),
    ]
    wrong = [f"{what}: {found:.1f}, and at most {most:.1f} are right" for what, found, most in bounds if found > most]
    return {
        "tried": len(bounds),
        "right": len(bounds) - len(wrong),
        "wrong": wrong,
        "connections": large,
        "cpu_ratio": round(ratio, 2),
        **{f"{name}_of_{small}": round(value, 2) for name, value in few.items()},
        **{name: round(value, 2) for name, value in many.items()},
        **{f"{name}_with_tls": round(value, 2) for name, value in encrypted.items()},
        **flood,
        **siege,
    }


# --- defects: checks that are taken out of the hub of the child process -----------------------------------------------


def _whole_blob(blob: Any) -> bytes:
    blob._file.seek(blob.offset)
    piece: bytes = blob._file.read()
    blob.offset += len(piece)
    return piece


async def _passed_in_time(self: Any, frame: bytes) -> None:
    """Wait for a reader without end."""
    await self._channel.send_bytes(frame)


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """Take one check out of this process."""
    with contextlib.ExitStack() as taken:
        match name:
            case "blobs in pieces":
                taken.enter_context(mock.patch.object(connection._Lending, "read", _whole_blob))
                taken.enter_context(mock.patch("fedsoda_edge.protocol.codec.MAX_CHUNK_BYTES", 1 << 30))
            case "ending who does not read":
                taken.enter_context(mock.patch.object(connection.Connection, "_pass", _passed_in_time))
                taken.enter_context(mock.patch.object(guarded.GuardedWebSocket, "keepalive_timeout", return_value=None))
            case "handshakes of one address":
                taken.enter_context(mock.patch.object(strangers.Handshakes, "may", return_value=True))
            case "useless uploads":
                taken.enter_context(mock.patch.object(spool.Spools, "open", _open_all(spool.Spools.open)))
            case _:
                assert not name, name
        yield


def _open_all(original: Any) -> Any:
    return lambda self, start, most_bytes, _: original(self, start, most_bytes, None)


@contextlib.contextmanager
def _planted(name: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, {DEFECT: name}):
        yield


def _plant(name: str) -> Callable[[], AbstractContextManager[None]]:
    return lambda: _planted(name)


DEFECTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    name: _plant(name)
    for name in ("blobs in pieces", "ending who does not read", "handshakes of one address", "useless uploads")
}


def main() -> None:
    """Measure, or be the hub of a child process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="300 connections")
    parser.add_argument("--serve", nargs=5, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    raise_limit()
    if asked.serve:
        directory, num_edges, rounds, stall, tls = asked.serve
        with _without(os.environ.get(DEFECT, "")):
            asyncio.run(_serve(Path(directory), int(num_edges), int(rounds), float(stall), tls))
    else:
        print(json.dumps(measure(asked.quick), indent=1))


if __name__ == "__main__":
    main()
