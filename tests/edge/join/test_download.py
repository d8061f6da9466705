"""A bundle is used while it comes: in the order of its use, layer by layer, over cuts, pauses, wrong bytes and kill -9."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import psutil
import pytest

from fedsoda_edge import events as ev
from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.errors import BlobCorrupt, HubUnreachable
from fedsoda_edge.join.download import Download, fetch_file, in_order
from fedsoda_edge.join.home import Home
from fedsoda_edge.join.patience import Patience
from fedsoda_edge.join.sources import Sources
from fedsoda_edge.network.hub_transport import HubTransport
from fedsoda_edge.ports import TorchPort
from fedsoda_edge.ports.child import Child
from fedsoda_edge.ports.store import FileStore, when_here
from fedsoda_edge.protocol import commands as cmd
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.calls import Call, ProgressT, ResultT
from fedsoda_edge.protocol.manifest import BundleManifest, parse_manifest
from tests.conftest import ROOT
from tests.edge.join.test_cache_agent import join as calm_join
from tests.edge.join.test_pause import Join, ToldHub, workers
from tests.edge.network.test_hub_transport import DATA, DIGEST, SmallHub, listening
from tests.skipping_clock import SkippingClock
from tests.test_schemas import ROWS, run
from tests.worker_here import KILLED, WorkerHere


class Gate(ToldHub):
    """Delivers a file when the test lets it; `spoilt` are sent wrong so many times. welcome: what its Welcome has else."""

    def __init__(self, bundle: Path, **welcome: Any) -> None:
        super().__init__(bundle)
        self.manifest = parse_manifest((bundle / "manifest.json").read_bytes())
        self._names = {file.sha256: file.name for file in self.manifest.files}
        self._free = threading.Semaphore(0)
        self._other = welcome
        self.asked: list[str] = []
        self.spoilt: dict[str, int] = {}

    def let(self, number: int = 100) -> None:
        self._free.release(number)

    def let_until(self, name: str) -> None:
        """All files before that one."""
        self.let([file.name for file in in_order(self.manifest)].index(name))

    def _welcome(self) -> ms.Welcome:
        return msgspec.structs.replace(super()._welcome(), **self._other)

    async def fetch(self, digest: str, offset: int) -> AsyncIterator[bytes]:
        name = self._names.get(digest, "manifest.json")
        self.asked.append(name)
        while name != "manifest.json" and not self._free.acquire(blocking=False):
            await asyncio.sleep(0.005)
        async for piece in super().fetch(digest, offset):
            if self.spoilt.get(name):
                self.spoilt[name] -= 1
                piece = bytes(len(piece))
            yield piece


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "visits.jsonl"
    path.write_text(ROWS)
    return path


@pytest.fixture(scope="module")
def late(scripted: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the update of a join that sweeps when its offer has come."""
    directory = tmp_path_factory.mktemp("late")
    (directory / "visits.jsonl").write_text(ROWS)
    hub = Gate(scripted, emulator=None)
    hub.let()
    with mock.patch.dict("os.environ", FEDSODA_HOME=str(directory / "home")):
        join = Join(hub, directory / "visits.jsonl", worker=WorkerHere())
        join.start()
        join.ended()
    kinds = [event["event"] for event in join.events]
    assert kinds.index("offer") < kinds.index("sweep")
    return hub.updates[0].digest


@contextlib.contextmanager
def joining(hub: Gate, data: Path, worker: TorchPort | None = None) -> Iterator[Join]:
    """A join to its end. worker: None: one of this process."""
    join = Join(hub, data, worker=worker or WorkerHere())
    join.start()
    yield join
    join.ended()


# -- the order ------------------------------------------------------------------------------------------


def test_files_come_in_the_order_of_their_use(scripted: Path) -> None:
    manifest = parse_manifest((scripted / "manifest.json").read_bytes())
    assert (manifest.plan.sub_emulator, manifest.plan.adapter) == ((0, 2), (3,))
    assert [file.name.removesuffix(".safetensors") for file in in_order(manifest)] == [
        "tokenizer.json", "tokenizer_config.json", "emulator_lora", "embedding",
        "layers.0", "layers.2", "layers.3", "adapter_lora", "norm", "head",
    ]  # fmt: skip
    assert sorted(file.name for file in in_order(manifest)) == sorted(file.name for file in manifest.files)


def test_a_layer_is_swept_before_the_next_is_delivered_and_no_bit_differs(
    scripted: Path, data: Path, late: str
) -> None:
    hub = Gate(scripted)
    with joining(hub, data) as join:
        hub.let_until("layers.0.safetensors")
        join.until(lambda: hub.asked[-1:] == ["layers.0.safetensors"])
        assert not join.has("sweep")
        hub.let(1)
        join.until(lambda: join.has("sweep", done=1, total=2))
        assert hub.asked[-1] == "layers.2.safetensors"
        hub.let(1)
        join.until(lambda: join.has("swept"))
        assert hub.asked[-1] == "layers.3.safetensors"
        assert hub.kinds == ["Hello"]  # not ready before the last file is verified
        hub.let()
    assert hub.updates[0].digest == late
    assert len([event for event in join.events if event["event"] == "swept"]) == 1
    assert hub.kinds == ["Hello", "Ready", "UpdateStart"]


def test_a_sweep_of_another_emulator_than_the_rounds_is_done_again(scripted: Path, data: Path, late: str) -> None:
    hub = Gate(scripted, emulator=ms.ViewRef(digest=ms.Digest("0" * 64), delta=None, snapshot=None))
    hub.let()
    with joining(hub, data) as join:
        pass
    assert hub.updates[0].digest == late
    assert join.has("trained")


def test_an_emulator_that_the_edge_does_not_hold_is_swept_with_the_offer(scripted: Path, data: Path) -> None:
    blob = ms.BlobRef(digest=ms.Digest("1" * 64), bytes=9)
    hub = Gate(scripted, emulator=ms.ViewRef(digest=ms.Digest("0" * 64), delta=blob, snapshot=blob))
    hub.let()
    with joining(hub, data) as join:
        pass
    kinds = [event["event"] for event in join.events]
    assert kinds.index("offer") < kinds.index("sweep")


def test_who_reads_a_file_waits_only_while_it_is_coming(tmp_path: Path) -> None:
    file, coming = tmp_path / "file", tmp_path / "coming"
    assert when_here(file, coming) == file  # not to be had: the reader's own error says so
    coming.touch()
    waiting = threading.Thread(target=when_here, args=(file, coming))
    waiting.start()
    waiting.join(timeout=0.1)
    assert waiting.is_alive()
    file.touch()
    waiting.join(timeout=10)
    assert not waiting.is_alive()


# -- what goes wrong on the way -------------------------------------------------------------------------


def test_a_shard_that_comes_wrong_once_is_fetched_again_while_the_sweep_waits(
    scripted: Path, data: Path, late: str
) -> None:
    hub = Gate(scripted)
    hub.spoilt["layers.2.safetensors"] = 1
    hub.let()
    with joining(hub, data):
        pass
    assert hub.asked.count("layers.2.safetensors") == 2
    assert hub.updates[0].digest == late


def test_a_shard_that_comes_wrong_twice_ends_the_join_and_the_sweep(scripted: Path, data: Path) -> None:
    hub = Gate(scripted)
    hub.spoilt["layers.2.safetensors"] = 2
    hub.let_until("layers.2.safetensors")
    worker = WorkerHere()
    join = Join(hub, data, worker=worker)
    join.start()
    join.until(lambda: join.has("sweep", done=1, total=2))
    hub.let()
    join.join(timeout=60)
    [failure] = join.failure
    assert isinstance(failure, BlobCorrupt)
    assert worker.pid is None
    assert list(Home().directory.glob("runs/*/border")) == []
    assert not FileStore(Home().store).has(hub.manifest.file("layers.2.safetensors").sha256)


def test_a_shard_that_the_disk_damaged_is_fetched_anew_before_the_sweep_meets_it(
    scripted: Path, data: Path, late: str
) -> None:
    for _ in range(2):
        hub = Gate(scripted)
        hub.let()
        with joining(hub, data):
            pass
        held = FileStore(Home().store).path(hub.manifest.file("layers.0.safetensors").sha256)
        held.write_bytes(bytes(held.stat().st_size))
    assert hub.asked == ["layers.0.safetensors"]
    assert hub.updates[0].num_examples


def test_a_connection_that_is_lost_during_the_download_is_made_again(scripted: Path, data: Path) -> None:
    hub = Gate(scripted)
    with joining(hub, data) as join:
        hub.let_until("layers.2.safetensors")
        join.until(lambda: join.has("sweep", done=1, total=2))
        hub.hang_up()
        join.until(lambda: join.has("reconnected"))
        assert hub.kinds == ["Hello", "Hello"]
        hub.let()
    assert hub.kinds == ["Hello", "Hello", "Ready", "UpdateStart"]


@pytest.mark.slow
def test_a_pause_in_the_middle_of_the_early_sweep_frees_the_worker_and_the_link(
    scripted: Path, data: Path, late: str
) -> None:
    hub = Gate(scripted)
    with joining(hub, data, Child("fedsoda_edge.worker", {"FEDSODA_CONFINE": "0"})) as join:
        hub.let_until("layers.2.safetensors")
        join.until(lambda: join.has("sweep", done=1, total=2))
        [worker] = workers()
        assert run("fedsoda-edge", "pause").status == 0
        assert not worker.is_running()
        assert workers() == []
        assert hub.kinds == ["Hello", "Paused"]
        asked = list(hub.asked)
        hub.let()
        assert run("fedsoda-edge", "resume").status == 0
    assert hub.asked[len(asked)] == "layers.2.safetensors"
    assert hub.kinds == ["Hello", "Paused", "Ready", "UpdateStart"]
    assert hub.updates[0].digest == late


def test_finish_during_the_download_leaves_at_once(scripted: Path, data: Path) -> None:
    hub, worker = Gate(scripted), WorkerHere()
    with joining(hub, data, worker) as join:
        hub.let_until("layers.2.safetensors")
        join.until(lambda: join.has("sweep", done=1, total=2))
        assert run("fedsoda-edge", "finish").status == 0
    assert hub.kinds == ["Hello", "Leave"]
    assert worker.pid is None


AGENT = """
import asyncio, json, sys
from pathlib import Path
from fedsoda_edge import Edge, LocalData
from tests.edge.join.test_download import Gate
hub = Gate(Path(sys.argv[1]))
hub.let_until("layers.2.safetensors")
say = lambda event: print(json.dumps(event), flush=True)
with Edge(hub, device="cpu").join(LocalData.from_jsonl(sys.argv[2]), on_event=say): pass
"""


@pytest.mark.slow
def test_an_agent_that_is_killed_in_the_middle_leaves_nothing_that_the_next_trips_over(
    scripted: Path, data: Path, late: str
) -> None:
    command = [sys.executable, "-c", AGENT, str(scripted), str(data)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "scripts")))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "sweep":
                break
        children = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert children
    assert not alive
    assert {path.suffix for path in Home().store.iterdir()} <= {"", ".part", ".coming"}
    hub = Gate(scripted)
    hub.let()
    with joining(hub, data):
        pass
    assert "layers.0.safetensors" not in hub.asked
    assert hub.updates[0].digest == late
    assert list(Home().directory.glob("runs/*/border")) == []
    assert {path.suffix for path in Home().store.iterdir()} == {""}


# -- cuts -----------------------------------------------------------------------------------------------


class Proxy:
    """Cuts each of the first connections after so many bytes from the hub; `down` are all that it let through."""

    def __init__(self, port: int, cuts: list[int]) -> None:
        self._port, self._cuts = port, cuts
        self.down = self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = self._cuts.pop(0) if self._cuts else 1 << 60
        self.connections += 1
        hub_reader, hub_writer = await asyncio.open_connection("127.0.0.1", self._port)

        async def up() -> None:
            while piece := await reader.read(1 << 16):
                hub_writer.write(piece)

        pump = asyncio.create_task(up())
        with contextlib.suppress(ConnectionError):
            while left and (piece := await hub_reader.read(min(left, 1 << 16))):
                left -= len(piece)
                self.down += len(piece)
                writer.write(piece)
                await writer.drain()
        pump.cancel()
        for end in (writer, hub_writer):
            end.close()


async def at_once(work: Callable[[], Any]) -> Any:
    return await work()


def fetched(directory: Path, cuts: list[int], *, unattended: bool = False) -> tuple[Proxy, list[ev.JoinEvent]]:
    """The file of `test_transport` through a proxy, by the product's own download; and what was said."""
    (directory / DIGEST).write_bytes(DATA)
    said: list[ev.JoinEvent] = []

    async def fetch() -> Proxy:
        async with listening(SmallHub(directory)) as url:
            proxy = Proxy(int(url.rpartition(":")[2]), cuts)
            async with await asyncio.start_server(proxy.serve, "127.0.0.1", 0) as server:
                hub = HubTransport(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "good")
                store = FileStore(directory / "store")
                clock = SkippingClock()
                patience = Patience.of(clock, unattended=unattended)
                download = Download(
                    Sources.only(hub),
                    store,
                    run=at_once,
                    say=said.append,
                    patience=patience,
                    clock=clock,
                    stall_seconds=60.0,
                )
                try:
                    path = await download.file(DIGEST, len(DATA))
                finally:
                    await hub.close()
            assert path.read_bytes() == DATA
        return proxy

    return asyncio.run(fetch()), said


def test_a_transfer_that_is_cut_in_the_middle_goes_on_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    proxy, said = fetched(tmp_path, [1_000_000, 1_500_000])
    assert proxy.connections == 3
    assert proxy.down < len(DATA) + 2000  # heads of answers: no byte that came is asked for again
    assert [type(event) for event in said] == [ev.Reconnecting] * 2


def test_a_transfer_that_does_not_move_is_given_up_after_ten_minutes_unless_nobody_attends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    with pytest.raises(HubUnreachable, match="broke off"):
        fetched(tmp_path, [1_000_000, *[10] * 1000])
    _, said = fetched(tmp_path, [10] * 200, unattended=True)
    assert [type(event) for event in said] == [ev.Reconnecting]  # once, not at every try
    (tmp_path / "other").mkdir()
    fetched(tmp_path / "other", [10] * 5)  # no byte of the file came, and it is tried again all the same


def test_all_files_come_by_one_connection(tmp_path: Path, scripted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    manifest: BundleManifest = parse_manifest((scripted / "manifest.json").read_bytes())
    (tmp_path / "files").mkdir()
    for file in manifest.files:
        (tmp_path / "files" / file.sha256).write_bytes((scripted / file.name).read_bytes())

    async def fetch() -> int:
        async with listening(SmallHub(tmp_path / "files")) as url:
            proxy = Proxy(int(url.rpartition(":")[2]), [])
            async with await asyncio.start_server(proxy.serve, "127.0.0.1", 0) as server:
                hub = HubTransport(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "good")
                store = FileStore(tmp_path / "store")
                for file in manifest.files:
                    await fetch_file(store, hub, file.sha256, file.bytes)
                await hub.close()
        return proxy.connections

    assert asyncio.run(fetch()) == 1


class DiesInItsFirstSweep(WorkerHere):
    async def call(
        self, call: Call[ResultT, ProgressT], on_progress: Callable[[ProgressT], None] | None = None
    ) -> ResultT:
        if isinstance(call, cmd.Sweep) and cmd.Sweep not in self.calls:
            self.calls.append(cmd.Sweep)
            await self.close()
            raise KILLED
        return await super().call(call, on_progress)


def test_a_worker_that_dies_in_the_early_sweep_is_started_again(tmp_path: Path, scripted: Path, data: Path) -> None:
    joined = calm_join(tmp_path / "home", LocalData(data), scripted, 1, worker=DiesInItsFirstSweep())
    assert [said["message"] for said in joined.of("notice")][:1] == ["the worker was killed; it is started again"]
    assert len(joined.of("swept")) == 1
