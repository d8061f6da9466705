"""The hub's daemon over real sockets, a real ledger and real signals; only torch's child process is stood in for."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import httpx
import msgspec
import pytest
from small_manifest import small_manifest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from fedsoda_edge.edge import Edge, look_at
from fedsoda_edge.errors import DiskFull, HubUnreachable, RefusedByHub, UsageProblem, WorkerFailed
from fedsoda_edge.ports import Clock, TorchPort
from fedsoda_edge.ports.disk import BlobStore, sha256
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.manifest import BundleManifest, TensorSpec
from fedsoda_edge.protocol.session import Blob, EdgeSession, chunks
from fedsoda_hub.events import HubEvent, HubSay, Listening, as_json
from fedsoda_hub.federation import events as ev
from fedsoda_hub.federation import jobs
from fedsoda_hub.federation import records as rec
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import Ledger
from fedsoda_hub.run.tokens import Tokens
from fedsoda_hub.serving.daemon import LINGER_SECONDS, Daemon
from fedsoda_hub.serving.decisions import DISK_RETRY_SECONDS
from fedsoda_hub.serving.listener import bind, listen
from fedsoda_hub.settings.open_run import OpenRun, RunOpened
from fedsoda_hub.settings.run import RunSettings, read_settings
from tests.hub.hand_clock import HandClock

M = TypeVar("M", bound=ms.Message)
J = TypeVar("J", bound=jobs.Job)
LAYOUT = (
    TensorSpec("layers.1.self_attn.q_proj.lora_A", (2, 8)),
    TensorSpec("layers.1.self_attn.q_proj.lora_B", (8, 2)),
)
SHARD = b"the norm of a small model"
TABLES: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "public": {"text": "public.txt"},
    "method": {"realign_every": 0},
    "rounds": {"count": 2, "min_edges": 2, "quorum": 0.5},
    "wire": {"codec": "bf16"},
    "listen": {"port": 0},
}


def write_run(directory: Path, **tables: dict[str, Any]) -> RunSettings:
    """Settings of a run of two edges in `directory`; `tables` change TABLES. Its model is never opened."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "public.txt").write_text("public")
    lines = ['name = "small"', 'model = "no-model"']
    for table in {**TABLES, **tables}:
        lines.append(f"[{table}]")
        lines += [f"{key} = {json.dumps(v)}" for key, v in {**TABLES.get(table, {}), **tables.get(table, {})}.items()]
    (directory / "run.toml").write_text("\n".join(lines))
    return read_settings(directory / "run.toml")


OTHER = tuple(TensorSpec(spec.name.replace("layers.1", "layers.0"), spec.shape) for spec in LAYOUT)


def manifest(layout: tuple[TensorSpec, ...] = LAYOUT) -> bytes:
    return small_manifest(layout, SHARD)


class Torch:
    """In the place of the child process that owns torch: jobs are answered with hashes of themselves."""

    rss_bytes = peak_rss_bytes = 0

    def __init__(self, run_dir: Path) -> None:
        self.bundle = RunDirectory(run_dir).bundle
        self.blobs = RunDirectory(run_dir).blobs
        self.pid: int | None = None
        self.calls: list[Any] = []
        self.problems: list[Exception] = []
        self.hangs_at: type[Any] | None = None
        self.num_smaller = 0
        self.has_other_layers = False  # in the smaller classes

    async def start(self) -> None:
        self.pid = 1

    async def call(self, call: Any, on_progress: Any = None) -> Any:
        self.calls.append(call)
        if isinstance(call, OpenRun):
            self.pid = 1
            return RunOpened(1)
        if self.hangs_at is not None and isinstance(call, self.hangs_at):
            await asyncio.Event().wait()
        if self.problems:
            self.pid = None
            raise self.problems.pop(0)
        return self.answer(call, on_progress)

    def answer(self, job: jobs.Job, on_progress: Any) -> jobs.JobResult:
        match job:
            case jobs.Prepare():
                return self._prepared()
            case jobs.Aggregate():
                steps = tuple(
                    jobs.ViewStep(view=self.put(job, "view", view), delta=self.put(job, "delta", view))
                    for view in job.views
                )
                return jobs.AggregateResult(master=self.put(job, "master"), steps=steps, moments=None, cross_term=None)
            case jobs.Reprune():
                drawn = tuple(
                    jobs.RepruneSubLLM(
                        manifest=self.stored(manifest(layout) + b"\n"), view=self.put(job, "view", layout[0].name)
                    )
                    for layout in (OTHER, LAYOUT)[: 1 + self.num_smaller]
                )
                return jobs.RepruneResult(master=job.master, sub_llms=drawn)
        raise AssertionError(f"no answer to {job}")

    def _prepared(self) -> jobs.PrepareResult:
        self.bundle.mkdir(exist_ok=True)
        (self.bundle / "norm.safetensors").write_bytes(SHARD)
        layout, view = (OTHER, b"other") if self.has_other_layers else (LAYOUT, b"adapter")
        described = [(manifest(), b"adapter", b"emulator")] + [
            (manifest(layout) + b" " * (1 + number), view, f"emulator {number}".encode())
            for number in range(self.num_smaller)
        ]
        sub_llms = tuple(
            jobs.PreparedSubLLM(
                manifest=self.stored(text),
                adapter_view=self.stored(adapter),
                emulator_view=self.stored(emulator),
                public_kl={"pruned": 0.3, "quantized": 0.2, "aligned": 0.1},
            )
            for text, adapter, emulator in described
        )
        return jobs.PrepareResult(sub_llms=sub_llms, master=sub_llms[0].adapter_view)

    def stored(self, data: bytes) -> ms.Digest:
        return ms.Digest(self.blobs.put(data))

    def put(self, job: jobs.Job, *what: str) -> ms.Digest:
        """A blob that depends on the job alone."""
        return self.stored(" ".join(what).encode() + msgspec.json.encode(job))

    async def close(self) -> None:
        self.pid = None

    def done(self, kind: type[J]) -> list[J]:
        return [call for call in self.calls if isinstance(call, kind)]


def opened(settings: RunSettings, say: HubSay, torch: Torch, clock: Clock | None = None) -> Daemon:
    return Daemon.open(settings, say, clock, torch=cast(TorchPort, torch))


@dataclasses.dataclass
class Hub:
    """A daemon that serves in this process; `events` is what it said."""

    daemon: Daemon
    torch: Torch
    clock: HandClock
    events: list[dict[str, Any]]
    running: asyncio.Task[None]

    @property
    def url(self) -> str:
        return self.daemon.url

    def token(self, edge: str) -> str:
        return self.daemon.disk.ledger.tokens.create(edge)

    def said(self, event: str, **values: Any) -> bool:
        return any(e["event"] == event and all(e.get(k) == v for k, v in values.items()) for e in self.events)

    async def until(self, event: str, **values: Any) -> None:
        await until(lambda: self.said(event, **values) or self.running.done())
        assert self.said(event, **values), self.events


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def serving_later(settings: RunSettings, *, exit_when_done: bool = False, **torch: Any) -> AsyncIterator[Hub]:
    """The daemon's own `run`, on real sockets, until the block ends or the daemon does."""
    events: list[dict[str, Any]] = []
    child, clock = Torch(settings.run_dir), HandClock()
    vars(child).update(torch)
    daemon = opened(settings, lambda event: events.append(as_json(event)), child, clock)
    hub = Hub(daemon, child, clock, events, asyncio.create_task(daemon.run(exit_when_done=exit_when_done)))
    try:
        yield hub
    finally:
        hub.running.cancel()
        await asyncio.wait([hub.running])


@contextlib.asynccontextmanager
async def serving(settings: RunSettings, *, exit_when_done: bool = False, **torch: Any) -> AsyncIterator[Hub]:
    """A daemon that listens, or has ended already."""
    async with serving_later(settings, exit_when_done=exit_when_done, **torch) as hub:
        await until(lambda: hub.said("listening") or hub.running.done())
        yield hub


@dataclasses.dataclass
class Device:
    """An edge's side of one real websocket: its conversation without a worker. `heard` is all that came."""

    socket: ClientConnection
    session: EdgeSession
    heard: list[ms.HubMessage | Blob]

    async def say(self, message: ms.EdgeMessage, payload: bytes | memoryview = b"") -> None:
        await self.socket.send(self.session.send(message, payload))

    async def hear(self, kind: type[M]) -> M:
        """The next message of that kind; others before it are remembered."""
        async with asyncio.timeout(10):
            while True:
                frame = await self.socket.recv()
                assert isinstance(frame, bytes)
                message = self.session.receive(frame)
                if message is not None:
                    self.heard.append(message)
                if isinstance(message, kind):
                    return message

    async def announce(self, offer: ms.RoundOffer, data: bytes, **other: Any) -> None:
        start = ms.UpdateStart(
            round=offer.round,
            base=offer.view.digest,
            alignment=offer.alignment,
            digest=ms.Digest(sha256(data)),
            bytes=len(data),
            codec="bf16",
            num_examples=3,
            loss=0.5,
        )
        await self.say(msgspec.structs.replace(start, **other))

    async def upload(self, offer: ms.RoundOffer, data: bytes, **other: Any) -> None:
        await self.announce(offer, data, **other)
        for offset, piece in chunks(data):
            await self.say(ms.UpdateChunk(digest=ms.Digest(sha256(data)), offset=offset), piece)

    async def is_hung_up_on(self) -> bool:
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionClosed):
                while True:
                    await self.socket.recv()
        return True


def hello(device: str, protocol: int = ms.PROTOCOL_VERSION) -> ms.Hello:
    facts = ms.DeviceFacts(ram_bytes=1, vram_bytes=0, disk_bytes=1, threads=1, accelerator="")
    return ms.Hello(protocol=protocol, software="test", device_id=device, device=facts)


@contextlib.asynccontextmanager
async def connected(url: str, token: str) -> AsyncIterator[Device]:
    """Before Hello."""
    headers = {"Authorization": f"Bearer {token}"}
    address = f"{url.replace('http', 'ws')}/v1/session"
    async with connect(address, additional_headers=headers, compression=None, proxy=None) as socket:
        yield Device(socket, EdgeSession(), [])


@contextlib.asynccontextmanager
async def joined(url: str, token: str, device: str = "laptop") -> AsyncIterator[Device]:
    """After Welcome and Ready."""
    async with connected(url, token) as edge:
        await edge.say(hello(device))
        await edge.hear(ms.Welcome)
        await edge.say(ms.Ready(num_examples=3))
        yield edge


@contextlib.asynccontextmanager
async def serving_two(settings: RunSettings) -> AsyncIterator[tuple[Hub, Device, Device]]:
    """The daemon and two edges that it asks for round 1."""
    async with (
        serving(settings) as hub,
        joined(hub.url, hub.token("a")) as a,
        joined(hub.url, hub.token("b"), "phone") as b,
    ):
        yield hub, a, b


def update(value: float, layout: tuple[TensorSpec, ...] = LAYOUT, codec: str = "bf16") -> bytes:
    """A coded update, every value the same: safetensors by hand, as `model/delta.py` writes it with torch."""
    header: dict[str, Any] = {"__metadata__": {"codec": codec}}
    body = b""
    for spec in layout:
        data = struct.pack("<f", value)[2:] * (spec.shape[0] * spec.shape[1])  # the upper half of a float is its bf16
        header[spec.name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def records(settings: RunSettings, kind: type[rec.Record]) -> list[Any]:
    ledger = Ledger(settings.run_dir / "ledger.sqlite")
    found = [record for record in ledger.records() if isinstance(record, kind)]
    ledger.close()
    return found


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    return write_run(tmp_path)


# --- one hub per run directory ---------------------------------------------------------------------------------------


def test_a_second_hub_on_the_same_run_directory_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "small.run")
    first = run.lock()
    with pytest.raises(UsageProblem, match=rf"small.run is in use by another hub \(pid {os.getpid()}\)") as refused:
        run.lock()
    assert refused.value.exit_status == 2
    first.release()
    run.lock().release()


def test_the_lock_goes_with_a_killed_hub(tmp_path: Path) -> None:
    program = (
        "import os, signal; from pathlib import Path; from fedsoda_hub.run.directory import RunDirectory\n"
        f"lock = RunDirectory(Path({str(tmp_path)!r})).lock(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", program], check=False)
    assert killed.returncode == -signal.SIGKILL
    RunDirectory(tmp_path).lock().release()


# --- size classes ----------------------------------------------------------------------------------------------------


def test_each_edge_is_offered_the_emulator_of_the_class_it_took(tmp_path: Path) -> None:
    async def talk() -> None:
        settings = write_run(tmp_path, rounds={"count": 1, "min_edges": 2})
        async with (
            serving(settings, num_smaller=2) as hub,
            connected(hub.url, hub.token("a")) as large,
            connected(hub.url, hub.token("b")) as small,
        ):
            for edge, size_class in ((large, 0), (small, 2)):
                await edge.say(hello(f"device {size_class}"))
                welcome = await edge.hear(ms.Welcome)
                classes = [ms.SizeClass(manifest=welcome.manifest, emulator=welcome.emulator), *welcome.smaller]
                assert [one.emulator and one.emulator.digest for one in classes] == [
                    ms.Digest(sha256(name)) for name in (b"emulator", b"emulator 0", b"emulator 1")
                ]
                assert [one.manifest.bytes - len(manifest()) for one in classes] == [0, 1, 2]
                await edge.say(ms.Ready(num_examples=3, size_class=size_class))
            for edge, name in ((large, b"emulator"), (small, b"emulator 1")):
                offer = await edge.hear(ms.RoundOffer)
                assert offer.emulator.digest == sha256(name)
                await edge.upload(offer, update(1.0))
                assert (await edge.hear(ms.Receipt)).round == 1  # of one round, whatever the class
            async with httpx.AsyncClient() as client:
                headers = {"Authorization": f"Bearer {hub.token('c')}"}
                for one in classes:
                    answer = await client.get(f"{hub.url}/v1/blobs/{one.manifest.digest}", headers=headers)
                    assert sha256(answer.content) == one.manifest.digest

    asyncio.run(talk())


def test_an_update_is_checked_against_the_layers_of_its_edges_class_also_after_a_draw(tmp_path: Path) -> None:
    """Class 0 trains layer 1 and class 1 layer 0; before round 2 they change places."""

    async def talk() -> None:
        settings = write_run(
            tmp_path,
            rounds={"count": 2, "min_edges": 2},
            method={"name": "fedpruner", "drop_layers": 1, "classes": [2], "reprune_every": 1},
        )
        async with (
            serving(settings, num_smaller=1, has_other_layers=True) as hub,
            connected(hub.url, hub.token("a")) as large,
            connected(hub.url, hub.token("b")) as small,
        ):
            for size_class, edge in enumerate((large, small)):
                await edge.say(hello(f"device {size_class}"))
                await edge.hear(ms.Welcome)
                await edge.say(ms.Ready(num_examples=3, size_class=size_class))
            first = [await edge.hear(ms.RoundOffer) for edge in (large, small)]
            assert [offer.view.digest for offer in first] == [sha256(b"adapter"), sha256(b"other")]
            assert [offer.manifest for offer in first] == [None, None]
            await large.upload(first[0], update(1.0))
            await large.hear(ms.Receipt)
            await small.upload(first[1], update(1.0))
            assert "the first that differs is 'layers.0" in (await small.hear(ms.Refusal)).reason
            second = [await edge.hear(ms.RoundOffer) for edge in (large, small)]
            assert all(offer.view.snapshot is None for offer in second)  # the new bundle's own
            named = [offer.manifest for offer in second]
            async with httpx.AsyncClient() as client:
                headers = {"Authorization": f"Bearer {hub.token('c')}"}
                for ref, layout in zip(named, (OTHER, LAYOUT), strict=True):
                    assert ref is not None
                    answer = await client.get(f"{hub.url}/v1/blobs/{ref.digest}", headers=headers)
                    assert msgspec.json.decode(answer.content, type=BundleManifest).lora.adapter == layout
            await large.upload(second[0], update(1.0, OTHER))
            await small.upload(second[1], update(1.0))
            assert [(await edge.hear(ms.Receipt)).round for edge in (large, small)] == [2, 2]
            async with connected(hub.url, hub.token("d")) as late:
                await late.say(hello("late"))
                welcome = await late.hear(ms.Welcome)
                assert [welcome.manifest, welcome.smaller[0].manifest] == named
        [accepted, *others] = records(settings, rec.UpdateAccepted)
        assert (accepted.edge, accepted.size_class) == ("a", 0)
        assert {(record.edge, record.size_class) for record in others} == {("a", 0), ("b", 1)}

    asyncio.run(talk())


def test_a_class_that_the_run_has_not_is_refused(tmp_path: Path) -> None:
    async def talk() -> None:
        async with serving(write_run(tmp_path), num_smaller=1) as hub, connected(hub.url, hub.token("a")) as edge:
            await edge.say(hello("laptop"))
            await edge.hear(ms.Welcome)
            await edge.say(ms.Ready(num_examples=3, size_class=2))
            refusal = await edge.hear(ms.Refusal)
            assert (refusal.fatal, refusal.reason) == (
                True,
                "this run has size classes 0 to 1, and the edge took 2; join again",
            )

    asyncio.run(talk())


# --- what may change on resume ---------------------------------------------------------------------------------------


PREPARED = rec.RunPrepared(
    manifest=ms.Digest("a" * 64),
    adapter_view=ms.Digest("b" * 64),
    emulator_view=ms.Digest("c" * 64),
    public_kl={"pruned": 0.1},
)


@contextlib.contextmanager
def started(settings: RunSettings) -> Iterator[Daemon]:
    """A daemon that has read its ledger and does not serve."""
    daemon = Daemon.open(settings, lambda _: None)
    yield daemon
    daemon.close()


def test_before_a_run_is_prepared_every_key_may_change_so_that_what_was_refused_can_be_corrected(
    tmp_path: Path,
) -> None:
    with started(write_run(tmp_path)) as daemon:
        run_id = daemon.machine.state.run_id
    changed = write_run(tmp_path, lora={"rank": 4}, local={"max_length": 77})
    for _ in range(2):
        with started(changed) as daemon:
            assert (daemon.machine.state.run_id, daemon.machine.state.fixed) == (run_id, changed.fixed())
    assert [record.fixed["[local] max_length"] for record in records(changed, rec.RunStarted)] == [512, 77]


def test_a_key_of_the_method_that_changed_is_refused_with_both_values_until_it_is_put_back(tmp_path: Path) -> None:
    settings = write_run(tmp_path)
    with started(settings) as daemon:
        run_id = daemon.machine.state.run_id
        daemon.disk.ledger.append(PREPARED)
    changed = write_run(tmp_path, lora={"rank": 4}, local={"epochs": 7})
    with pytest.raises(UsageProblem) as refused:
        Daemon.open(changed, lambda _: None)
    assert refused.value.exit_status == 2
    assert str(refused.value) == (
        "run.toml has changed since this run was prepared: [local] epochs: 1 when the run was prepared, 7 now; "
        "[lora] rank: 2 when the run was prepared, 4 now; restore the old values (only device, [rounds] count, quorum and "
        "deadline_seconds, [aggregation] robust and robust_share, [listen], [tls], [blobs], [notify], [report], [task] eval_data, "
        "eval_every, keep and metric may change), or begin again with "
        f"`fedsoda-hub reset {changed.path}`"
    )
    with started(write_run(tmp_path)) as daemon:  # the refused one holds neither lock nor ledger
        assert daemon.machine.state.run_id == run_id
    assert len(records(settings, rec.RunStarted)) == 1


def test_an_owner_who_sees_an_edge_spoil_the_model_may_set_a_robust_rule_and_take_it_back(tmp_path: Path) -> None:
    settings = write_run(tmp_path)
    with started(settings) as daemon:
        run_id = daemon.machine.state.run_id
        daemon.disk.ledger.append(PREPARED)
    for how in ({"robust": "trimmed", "robust_share": 0.3}, {}):
        with started(write_run(tmp_path, aggregation=how)) as daemon:
            assert daemon.machine.state.run_id == run_id
    logged = [record.values.get("robust") for record in records(settings, rec.SettingsChanged)]
    assert logged == [None, "trimmed", None]


def test_count_quorum_deadline_host_and_port_may_change_and_are_logged(tmp_path: Path) -> None:
    settings = write_run(tmp_path)
    for _ in range(2):  # unchanged: logged once
        with started(settings):
            pass
    free = {"count": 9, "quorum": 0.25, "deadline_seconds": 7.0}
    with started(write_run(tmp_path, rounds=free, listen={"host": "0.0.0.0", "port": 8471})) as daemon:
        assert (daemon.machine.rules.count, daemon.machine.rules.quorum) == (9, 0.25)
    logged = [{key: r.values[key] for key in (*free, "host", "port")} for r in records(settings, rec.SettingsChanged)]
    assert logged == [
        {"count": 2, "quorum": 0.5, "deadline_seconds": 3600, "host": "127.0.0.1", "port": 0},
        {"count": 9, "quorum": 0.25, "deadline_seconds": 7.0, "host": "0.0.0.0", "port": 8471},
    ]


# --- the port ----------------------------------------------------------------------------------------------------------


def test_a_port_in_use_ends_serve_with_status_2_before_any_work_and_lets_go_of_the_run(tmp_path: Path) -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        settings = write_run(tmp_path, listen={"port": port})

        async def talk() -> None:
            async with serving(settings) as hub:
                with pytest.raises(UsageProblem, match=f"127.0.0.1:{port} cannot be used") as refused:
                    await hub.running
                assert refused.value.exit_status == 2
                assert hub.torch.calls == []

        asyncio.run(talk())
    with started(write_run(tmp_path)):
        pass


def test_a_port_on_which_another_program_began_to_listen_meanwhile_is_refused() -> None:
    """Several may bind one port as long as none listens."""
    with bind("127.0.0.1", 0) as sooner, bind("127.0.0.1", sooner.getsockname()[1]) as later:
        listen(sooner)
        with pytest.raises(UsageProblem, match=r"cannot be used .* choose another port") as refused:
            listen(later)
    assert refused.value.exit_status == 2


# --- who may come in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [ms.PROTOCOL_VERSION + 1, 0])
def test_another_protocol_is_refused_with_both_versions(settings: RunSettings, protocol: int) -> None:
    async def talk() -> None:
        async with serving(settings) as hub, connected(hub.url, hub.token("a")) as edge:
            await edge.say(hello("laptop", protocol))
            refusal = await edge.hear(ms.Refusal)
            assert refusal.fatal
            assert f"this edge speaks {protocol}, the hub {ms.PROTOCOL_VERSION}; upgrade the older" in refusal.reason
            assert await edge.is_hung_up_on()
            assert hub.daemon.disk.ledger.tokens.all()[0].device is None  # the token is still anyone's

    asyncio.run(talk())


def test_the_same_device_connecting_again_replaces_its_old_connection(tmp_path: Path) -> None:
    settings = write_run(tmp_path, rounds={"min_edges": 1})

    async def talk() -> None:
        async with serving(settings) as hub:
            token = hub.token("a")
            async with joined(hub.url, token) as old:
                await old.hear(ms.RoundOffer)
                async with joined(hub.url, token) as new:
                    assert await old.is_hung_up_on()
                    offer = await new.hear(ms.RoundOffer)  # the open round again
                    await new.upload(offer, update(0.5))
                    assert (await new.hear(ms.Receipt)).round == 1
                    assert not hub.said("edge_gone")

    asyncio.run(talk())


def test_another_device_with_the_token_is_refused_and_its_edge_exits_with_status_5(
    tmp_path: Path, settings: RunSettings
) -> None:
    async def talk() -> None:
        async with serving(settings) as hub:
            token = hub.token("a")
            (tmp_path / "a.token").write_text(token)
            async with joined(hub.url, token, "laptop") as first:
                with pytest.raises(RefusedByHub) as refused:  # a real edge, whose FEDSODA_HOME makes it another device
                    await look_at(Edge(hub.url, token_file=tmp_path / "a.token"))
                assert refused.value.exit_status == 5
                assert str(refused.value) == (
                    "the hub refused: the token of a is already in use on another device, or on this one before it lost its "
                    "FEDSODA_HOME (a container needs a volume for it); ask the hub's owner for a token of your own, or for "
                    "`fedsoda-hub token rebind RUN.toml a`"
                )
                async with joined(hub.url, hub.token("b"), "phone"):
                    assert (await first.hear(ms.RoundOffer)).round == 1  # the first was not disturbed

    asyncio.run(talk())


def test_a_token_that_is_revoked_counts_from_the_next_connection_on(tmp_path: Path, settings: RunSettings) -> None:
    async def talk() -> None:
        async with serving(settings) as hub:
            (tmp_path / "a.token").write_text(hub.token("a"))
            other_process = Ledger(settings.run_dir / "ledger.sqlite")
            other_process.tokens.revoke("a")
            other_process.close()
            with pytest.raises(RefusedByHub, match="the token of a was revoked") as refused:
                await look_at(Edge(hub.url, token_file=tmp_path / "a.token"))
            assert refused.value.exit_status == 5

    asyncio.run(talk())


def test_edges_reach_the_bundle_and_the_open_views_and_nothing_else_of_the_run(settings: RunSettings) -> None:
    async def talk() -> None:
        async with serving(settings) as hub:
            token = hub.token("a")
            headers = {"Authorization": f"Bearer {token}"}
            async with (
                joined(hub.url, token) as a,
                joined(hub.url, hub.token("b"), "phone") as b,
                httpx.AsyncClient(verify=False, trust_env=False, headers=headers) as client,
            ):
                await b.upload(await b.hear(ms.RoundOffer), update(0.5))
                receipt = await b.hear(ms.Receipt)
                found = {}
                for name in (sha256(SHARD), sha256(manifest()), receipt.digest, "admin.token", "ledger.sqlite"):
                    answer = await client.get(f"{hub.url}/v1/blobs/{name}")
                    found[name] = answer.content if answer.status_code == 200 else answer.status_code
                assert list(found.values()) == [SHARD, manifest(), 404, 404, 404]
                await a.say(ms.BlobRequest(digest=receipt.digest))  # the update of another edge
                refusal = await a.hear(ms.Refusal)
                assert refusal.reason.startswith(f"this round has no blob {receipt.digest[:12]}")

    asyncio.run(talk())


# --- updates that are refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "other", "why"),
    [
        (update(float("nan")), {}, "lora_A has values that are not finite"),
        (update(float("inf")), {}, "lora_A has values that are not finite"),
        (update(0.5, (TensorSpec(LAYOUT[0].name, (2, 4)), LAYOUT[1])), {}, "48 bytes of tensors, the run needs 64"),
        (update(0.5, (LAYOUT[1], LAYOUT[0])), {}, "in the update, the run needs 32 bytes at 0"),
        (update(0.5, LAYOUT[:1]), {}, "the update has 1 tensors, the run has 2"),
        (update(0.5, (*LAYOUT, TensorSpec("\ud800", (1, 1)))), {}, "the first that differs is '\\ud800'"),
        (b"no safetensors at all", {}, "is damaged"),
        (update(0.5), {"codec": "int8"}, "the update is coded as int8, but this run codes as bf16"),
        (update(0.5), {"base": ms.Digest("f" * 64)}, f"the update starts from view {'f' * 12}, but round 1 from "),
        (update(0.5), {"alignment": 1}, "the update used alignment 1, but round 1 has 0"),
        (update(0.5), {"num_examples": 0}, "num_examples is 0, and must be 1 to 2147483648"),
        (update(0.5), {"num_examples": 2**31 + 1}, "num_examples is 2147483649"),
        (update(0.5), {"loss": None}, "the loss is not a number"),
        (update(0.5), {"round": 7}, "round 7 is closed; wait for the next offer"),
    ],
    ids=[
        "NaN",
        "infinity",
        "shape",
        "order",
        "a tensor missing",
        "a name that is not text",
        "bytes",
        "codec",
        "base",
        "alignment",
        "no examples",
        "too many",
        "loss",
        "round",
    ],
)
def test_an_update_that_cannot_be_used_is_refused_and_ends_nothing_else(
    settings: RunSettings, data: bytes, other: dict[str, Any], why: str
) -> None:
    async def talk() -> None:
        async with serving_two(settings) as (hub, a, b):
            offer = await a.hear(ms.RoundOffer)
            await a.upload(offer, data, **other)
            refusal = await a.hear(ms.Refusal)
            assert why in refusal.reason
            assert (refusal.round, refusal.retry, refusal.fatal) == (other.get("round", 1), False, False)
            await b.upload(await b.hear(ms.RoundOffer), update(0.25), num_examples=5)
            assert (await b.hear(ms.Receipt)).digest == sha256(update(0.25))
            if "round" in other:  # the open round still waits for a
                await a.say(ms.Decline(round=1, reason="busy"))
            assert await a.hear(ms.RoundClosed) == ms.RoundClosed(round=1, num_updates=1)
            [aggregated] = hub.torch.done(jobs.Aggregate)
            digest = ms.Digest(sha256(update(0.25)))
            assert aggregated.updates == (
                jobs.AcceptedUpdate(edge=ms.EdgeId("b"), num_examples=5, digest=digest, view=offer.view.digest),
            )
            assert (await a.hear(ms.RoundOffer)).round == 2  # a is asked again
            assert not any(isinstance(message, ms.Receipt) for message in a.heard)

    asyncio.run(talk())


def test_where_one_factor_trains_the_offer_says_so_and_an_update_of_both_is_refused(tmp_path: Path) -> None:
    settings = write_run(tmp_path, aggregation={"rule": "rolora"}, rounds={"min_edges": 1})
    lora_a, lora_b = LAYOUT[:1], LAYOUT[1:]

    async def talk() -> None:
        async with serving(settings) as hub, joined(hub.url, hub.token("a")) as a:
            offer = await a.hear(ms.RoundOffer)
            assert (offer.trains, offer.has_feedback) == ("B", True)
            await a.upload(offer, update(0.5))  # as an edge does that does not know of factors
            assert "the update has 2 tensors, the run has 1" in (await a.hear(ms.Refusal)).reason
            await a.socket.close()
            async with joined(hub.url, hub.token("b"), "phone") as b:
                await b.upload(await b.hear(ms.RoundOffer), update(0.5, lora_b))
                assert (await b.hear(ms.RoundClosed)).round == 1
                offer = await b.hear(ms.RoundOffer)
                assert (offer.round, offer.trains, offer.view.moved) == (2, "A", "B")
                await b.upload(offer, update(0.5, lora_a))
                assert (await b.hear(ms.Receipt)).round == 2

    asyncio.run(talk())


def test_of_refused_updates_no_blob_stays_but_one_that_the_run_has(settings: RunSettings) -> None:
    """An edge that sends the bytes of another's update, or of the hub's own, must not get them deleted."""

    async def talk() -> None:
        async with serving_two(settings) as (hub, a, b):
            before = set(hub.daemon.disk.directory.blobs.directory.iterdir())
            offer = await a.hear(ms.RoundOffer)
            await a.upload(offer, update(0.5))
            await a.hear(ms.Receipt)
            for data, other in ((update(0.5), {"loss": None}), (update(0.25), {"alignment": 1})):
                await b.upload(offer, data, **other)
                await b.hear(ms.Refusal)
            await b.upload(offer, update(0.75), round=7)
            await b.hear(ms.Refusal)
            await a.hear(ms.RoundClosed)  # b answered
            await a.hear(ms.RoundOffer)
            stored = {path.name for path in set(hub.daemon.disk.directory.blobs.directory.iterdir()) - before}
            state = hub.daemon.machine.state
            adapter = state.largest.adapter
            assert stored == {sha256(update(0.5)), state.master, adapter.digest, adapter.delta}
            assert hub.daemon.uploads.num_unjudged == 0

    asyncio.run(talk())


def test_a_refused_upload_of_what_the_run_had_before_deletes_nothing(settings: RunSettings) -> None:
    async def talk() -> None:
        async with serving(settings) as hub, joined(hub.url, hub.token("a")) as a:
            hub.daemon.disk.directory.blobs.put(update(0.125))
            async with joined(hub.url, hub.token("b"), "phone"):
                offer = await a.hear(ms.RoundOffer)
                await a.upload(offer, update(0.125), loss=None)
                await a.hear(ms.Refusal)
                await a.upload(offer, update(0.25), loss=None)
                await until(
                    lambda: not hub.daemon.disk.directory.blobs.has(sha256(update(0.25))) and hub.daemon.inbox.empty()
                )
                assert hub.daemon.disk.directory.blobs.has(sha256(update(0.125)))

    asyncio.run(talk())


def test_an_update_is_accepted_once_and_sent_again_gets_the_first_receipt(settings: RunSettings) -> None:
    async def talk() -> None:
        async with serving(settings) as hub:
            token = hub.token("a")
            async with joined(hub.url, hub.token("b"), "phone"):
                async with joined(hub.url, token) as a:
                    offer = await a.hear(ms.RoundOffer)
                    await a.upload(offer, update(0.5))
                    receipt = await a.hear(ms.Receipt)
                async with joined(hub.url, token) as a:  # say the receipt got lost
                    await a.upload(offer, update(0.5))
                    assert await a.hear(ms.Receipt) == receipt

    asyncio.run(talk())
    assert len(records(settings, rec.UpdateAccepted)) == 1


# --- deadlines -----------------------------------------------------------------------------------------------------------


def test_an_upload_in_progress_at_the_deadline_is_waited_for(settings: RunSettings) -> None:
    async def talk() -> None:
        async with serving_two(settings) as (hub, a, b):
            offer = await b.hear(ms.RoundOffer)
            await a.upload(await a.hear(ms.RoundOffer), update(0.5))
            await a.hear(ms.Receipt)
            data, digest = update(0.25), ms.Digest(sha256(update(0.25)))
            await b.announce(offer, data)
            await b.say(ms.UpdateChunk(digest=digest, offset=0), data[:10])
            await until(lambda: hub.daemon.machine.awaits_upload(ms.EdgeId("b")))
            hub.daemon.inbox.put_nowait(ev.DeadlineReached(1, hub.daemon.machine.state.deadline_at))
            await hub.until("deadline_passed", round=1)
            await b.say(ms.UpdateChunk(digest=digest, offset=10), data[10:])
            assert (await b.hear(ms.RoundClosed)).num_updates == 2

    asyncio.run(talk())


def test_an_upload_that_stalls_at_the_deadline_is_not_waited_for(tmp_path: Path) -> None:
    settings = write_run(tmp_path, wire={"stall_seconds": 0.1})

    async def talk() -> None:
        async with serving_two(settings) as (hub, a, b):
            await a.upload(await a.hear(ms.RoundOffer), update(0.5))
            await a.hear(ms.Receipt)
            await b.announce(await b.hear(ms.RoundOffer), update(0.25))
            hub.daemon.inbox.put_nowait(ev.DeadlineReached(1, hub.daemon.machine.state.deadline_at))
            assert (await a.hear(ms.RoundClosed)).num_updates == 1
            assert await b.is_hung_up_on()

    asyncio.run(talk())


def test_an_upload_that_stalls_is_not_waited_for_because_its_edge_says_other_things(tmp_path: Path) -> None:
    settings = write_run(tmp_path, wire={"stall_seconds": 0.3})

    async def talk() -> None:
        async with serving_two(settings) as (hub, a, b):
            await a.upload(await a.hear(ms.RoundOffer), update(0.5))
            await a.hear(ms.Receipt)
            await b.announce(await b.hear(ms.RoundOffer), update(0.25))
            hub.daemon.inbox.put_nowait(ev.DeadlineReached(1, hub.daemon.machine.state.deadline_at))
            async with asyncio.timeout(10):
                with contextlib.suppress(ConnectionClosed):
                    while True:
                        await b.say(ms.Progress(round=1, step=1, steps=2))
                        await asyncio.sleep(0.05)
            assert (await a.hear(ms.RoundClosed)).num_updates == 1

    asyncio.run(talk())


def test_words_of_an_edge_are_a_part_of_one_line_in_what_the_hub_says(tmp_path: Path) -> None:
    words = "no\nround 9 closed\x1b[2J\u202e" + "a" * 5000

    async def talk() -> None:
        async with serving_two(write_run(tmp_path)) as (hub, a, b):
            await a.hear(ms.RoundOffer)
            await a.say(ms.Decline(round=1, reason=words))
            await b.say(ms.Leave(reason=words))
            await hub.until("edge_left")
            for event in [one for one in hub.events if "reason" in one]:
                assert not {"\n", "\x1b", "\u202e"} & set(event["reason"])
                assert len(event["reason"]) < 500

    asyncio.run(talk())


# --- a full disk -----------------------------------------------------------------------------------------------------


def full_once(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, when: Callable[[Any], bool]) -> list[Any]:
    """The first call for which `when` holds finds the disk full; the calls that did."""
    original, met = getattr(owner, method), list[Any]()

    def sometimes(self: Any, argument: Any, *rest: Any) -> Any:
        if not met and when(argument):
            met.append(argument)
            raise DiskFull("the disk is full; free space there, then retry")
        return original(self, argument, *rest)

    monkeypatch.setattr(owner, method, sometimes)
    return met


async def free_space(hub: Hub, met: list[Any]) -> None:
    """Wait until the disk was found full, then let the time pass after which the hub tries again."""
    await until(lambda: met and hub.clock.sleeps(DISK_RETRY_SECONDS))
    hub.clock.wake(DISK_RETRY_SECONDS)


@pytest.mark.parametrize("place", ["ledger", "blobs"])
def test_an_update_that_finds_the_disk_full_gets_no_receipt_but_a_refusal_to_retry_and_the_run_goes_on(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    async def talk() -> None:
        async with serving_two(settings) as (hub, a, b):
            if place == "ledger":
                met = full_once(monkeypatch, Ledger, "append", lambda record: isinstance(record, rec.UpdateAccepted))
            else:
                met = full_once(monkeypatch, BlobStore, "adopt", lambda path: path.read_bytes() == update(0.5))
            offer = await a.hear(ms.RoundOffer)
            await a.upload(offer, update(0.5))
            answer = await a.hear(ms.Refusal)
            assert answer == ms.Refusal(round=1, reason="the disk is full; free space there, then retry", retry=True)
            assert not any(isinstance(message, ms.Receipt) for message in a.heard)
            assert (len(met), hub.daemon.machine.state.accepted) == (1, {})
            assert hub.said("disk_full")
            await a.upload(offer, update(0.5))
            assert (await a.hear(ms.Receipt)).digest == sha256(update(0.5))
            await b.upload(await b.hear(ms.RoundOffer), update(0.25))
            assert await b.hear(ms.RoundClosed) == ms.RoundClosed(round=1, num_updates=2)

    asyncio.run(talk())
    assert [record.edge for record in records(settings, rec.UpdateAccepted)] == ["a", "b"]


@pytest.mark.parametrize("record", [rec.RoundOpened, rec.RoundClosed, rec.RunPrepared])
def test_any_other_record_that_finds_the_disk_full_is_written_later_and_torch_works_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: type[rec.Record]
) -> None:
    met = full_once(monkeypatch, Ledger, "append", lambda written: isinstance(written, record))
    settings = write_run(tmp_path, rounds={"min_edges": 1, "count": 1})

    async def talk() -> None:
        async with serving_later(settings) as hub:
            freeing = asyncio.create_task(free_space(hub, met))
            await until(lambda: hub.said("listening"))
            async with joined(hub.url, hub.token("a")) as a:
                await a.upload(await a.hear(ms.RoundOffer), update(0.5))
                await a.hear(ms.Farewell)
            await freeing
            assert [type(message).__name__ for message in a.heard if not isinstance(message, ms.Farewell)] == [
                "Welcome", "RoundOffer", "Receipt", "RoundClosed"
            ]  # fmt: skip
            assert [type(call) for call in hub.torch.calls] == [OpenRun, jobs.Prepare, jobs.Aggregate]

    asyncio.run(talk())
    assert len(met) == 1
    assert len(records(settings, record)) == 1


def test_an_edge_that_greets_a_hub_with_a_full_disk_may_try_again(
    tmp_path: Path, settings: RunSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def talk() -> None:
        async with serving(settings) as hub:
            token = hub.token("a")
            (tmp_path / "a.token").write_text(token)
            full_once(monkeypatch, Tokens, "bind", lambda edge: edge == "a")
            with pytest.raises(HubUnreachable) as away:
                await look_at(Edge(hub.url, token_file=tmp_path / "a.token"))
            assert away.value.exit_status == 3
            assert hub.said("disk_full")
            async with joined(hub.url, token):
                pass

    asyncio.run(talk())
    assert "Traceback" not in caplog.text


# --- torch's child process -------------------------------------------------------------------------------------------


def test_a_compute_child_that_dies_is_started_again_and_does_its_job_again(tmp_path: Path) -> None:
    settings = write_run(tmp_path, rounds={"min_edges": 1})

    async def talk() -> None:
        killed = [WorkerFailed("killed", "out of memory"), WorkerFailed("killed", "out of memory")]
        async with serving(settings, problems=killed) as hub, joined(hub.url, hub.token("a")) as a:
            assert [type(call) for call in hub.torch.calls] == [OpenRun, jobs.Prepare] * 3
            assert (await a.hear(ms.RoundOffer)).round == 1

    asyncio.run(talk())


@pytest.mark.parametrize(
    ("problems", "status"),
    [([WorkerFailed("killed", "")] * 3, 1), ([UsageProblem("the text is too short")], 2), ([DiskFull("full")], 3)],
    ids=["dies three times", "settings", "disk full"],
)
def test_what_trying_again_cannot_repair_ends_the_hub_with_its_own_status(
    settings: RunSettings, problems: list[Any], status: int
) -> None:
    async def talk() -> None:
        async with serving(settings, problems=list(problems)) as hub:
            with pytest.raises(type(problems[0])) as failure:
                await hub.running
            assert failure.value.exit_status == status

    asyncio.run(talk())
    with started(settings):  # nothing is held
        pass


# --- the end ---------------------------------------------------------------------------------------------------------


async def play(hub: Hub, tokens: dict[str, str], values: dict[str, float], rounds: int) -> None:
    """Edges that answer every offer with an update, until the run is over."""

    async def one(name: str) -> None:
        async with joined(hub.url, tokens[name], name) as edge:
            for number in range(1, rounds + 1):
                offer = await edge.hear(ms.RoundOffer)
                assert offer.round == number
                await edge.upload(offer, update(values[name] + number))
                await edge.hear(ms.Receipt)
            await edge.hear(ms.Farewell)

    await asyncio.gather(*(one(name) for name in tokens))


def outcome(settings: RunSettings) -> tuple[str, str, list[float]]:
    ledger = Ledger(settings.run_dir / "ledger.sqlite")
    state = ledger.replay()
    ledger.close()
    assert state.phase == "ended"
    return state.master, state.largest.adapter.digest, state.losses


VALUES = {"a": 0.5, "b": 0.25}


@pytest.fixture
def calm(tmp_path: Path) -> tuple[str, str, list[float]]:
    """How two rounds end that nothing disturbs."""
    settings = write_run(tmp_path / "calm")

    async def talk() -> None:
        async with serving(settings, exit_when_done=True) as hub:
            await play(hub, {name: hub.token(name) for name in VALUES}, VALUES, 2)
            await asyncio.wait_for(hub.running, 10)

    asyncio.run(talk())
    return outcome(settings)


def test_a_hub_stopped_by_sigterm_in_mid_round_goes_on_where_it_was(
    tmp_path: Path, calm: tuple[str, str, list[float]]
) -> None:
    settings = write_run(tmp_path / "rough")
    tokens: dict[str, str] = {}

    async def first() -> None:
        async with serving(settings) as hub:
            tokens.update({name: hub.token(name) for name in VALUES})
            async with joined(hub.url, tokens["a"], "a") as a, joined(hub.url, tokens["b"], "b") as b:
                await a.upload(await a.hear(ms.RoundOffer), update(VALUES["a"] + 1))
                await a.hear(ms.Receipt)
                assert (settings.run_dir / "address").read_text() == hub.url
                os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.wait_for(hub.running, 10)  # ends as `serve` does with status 0
                assert await a.is_hung_up_on()
                assert await b.is_hung_up_on()
            assert hub.said("stopped", signal="SIGTERM")
            assert hub.torch.pid is None
        assert not (settings.run_dir / "address").exists()

    async def second() -> None:
        async with serving(settings, exit_when_done=True) as hub:
            state = hub.daemon.machine.state
            assert (state.phase, state.round, list(state.accepted)) == ("collecting", 1, ["a"])
            assert hub.torch.done(jobs.Prepare) == []
            async with joined(hub.url, tokens["a"], "a") as a:
                async with joined(hub.url, tokens["b"], "b") as b:
                    await b.upload(await b.hear(ms.RoundOffer), update(VALUES["b"] + 1))
                    assert (await b.hear(ms.RoundClosed)).num_updates == 2
                    offer = await a.hear(ms.RoundOffer)
                    assert offer.round == 2  # not offered round 1 again
                    await a.upload(offer, update(VALUES["a"] + 2))
                    await b.upload(await b.hear(ms.RoundOffer), update(VALUES["b"] + 2))
                    await b.hear(ms.Farewell)
                await a.hear(ms.Farewell)
            await asyncio.wait_for(hub.running, 10)

    asyncio.run(first())
    asyncio.run(second())
    assert outcome(settings) == calm


def test_torch_work_that_a_signal_broke_off_is_done_again(tmp_path: Path) -> None:
    settings = write_run(tmp_path, rounds={"min_edges": 1, "count": 1})
    tokens: list[str] = []
    merged: list[jobs.Aggregate] = []

    async def first() -> None:
        async with serving(settings, hangs_at=jobs.Aggregate) as hub:
            tokens.append(hub.token("a"))
            async with joined(hub.url, tokens[0]) as a:
                await a.upload(await a.hear(ms.RoundOffer), update(0.5))
                await until(lambda: hub.torch.done(jobs.Aggregate))
                os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.wait_for(hub.running, 10)
            merged.extend(hub.torch.done(jobs.Aggregate))

    async def second() -> None:
        async with serving(settings) as hub, joined(hub.url, tokens[0]) as a:
            await a.hear(ms.Farewell)
            merged.extend(hub.torch.done(jobs.Aggregate))

    asyncio.run(first())
    asyncio.run(second())
    assert len(merged) == 2
    assert merged[0] == merged[1]
    assert len(outcome(settings)[2]) == 1


def test_ctrl_c_ends_the_hub_as_an_interrupt_and_lets_go_of_the_run(settings: RunSettings) -> None:
    def interrupt(event: HubEvent) -> None:
        if isinstance(event, Listening):
            os.kill(os.getpid(), signal.SIGINT)

    daemon = opened(settings, interrupt, Torch(settings.run_dir))
    with pytest.raises(KeyboardInterrupt):  # exit status 130 (ports/console.py)
        asyncio.run(daemon.run(exit_when_done=False))
    with started(settings) as again:
        assert again.machine.state.phase == "idle"


def test_exit_when_done_lingers_until_every_edge_of_the_run_got_its_farewell(tmp_path: Path) -> None:
    settings = write_run(tmp_path, rounds={"count": 1})

    async def talk() -> None:
        async with serving(settings, exit_when_done=True) as hub:
            token = hub.token("a")
            hub.token("never-used")
            async with joined(hub.url, hub.token("b"), "phone") as b:
                async with joined(hub.url, token) as a:
                    await a.upload(await a.hear(ms.RoundOffer), update(0.5))
                    await a.hear(ms.Receipt)
                await b.upload(await b.hear(ms.RoundOffer), update(0.25))
                await b.hear(ms.Farewell)
            await until(lambda: hub.clock.sleeps(LINGER_SECONDS) or hub.running.done())
            assert not hub.running.done()
            async with joined(hub.url, token) as a:  # was away when the run ended
                assert await a.hear(ms.Farewell) == ms.Farewell(rounds=1, reason="the run is over")
            await asyncio.wait_for(hub.running, 10)

    asyncio.run(talk())


def test_edges_that_do_not_come_back_are_not_waited_for_longer_than_the_linger(tmp_path: Path) -> None:
    settings = write_run(tmp_path, rounds={"count": 1, "min_edges": 1})

    async def talk() -> None:
        async with serving(settings, exit_when_done=True) as hub:
            async with joined(hub.url, hub.token("a")) as a:
                await a.upload(await a.hear(ms.RoundOffer), update(0.5))
                await a.socket.close()
            await until(lambda: hub.clock.sleeps(LINGER_SECONDS))
            hub.clock.wake(LINGER_SECONDS)
            await asyncio.wait_for(hub.running, 10)

    asyncio.run(talk())


# --- the log ---------------------------------------------------------------------------------------------------------


def test_the_log_tells_frames_and_decisions_and_no_secret_and_no_text(
    settings: RunSettings, caplog: pytest.LogCaptureFixture
) -> None:
    secrets: list[str] = []

    async def talk() -> None:
        async with serving(settings) as hub:
            secrets.extend((hub.token("a"), hub.token("b"), hub.daemon.disk.admin_secret))
            async with joined(hub.url, secrets[0]) as a, joined(hub.url, secrets[1], "phone") as b:
                await a.upload(await a.hear(ms.RoundOffer), update(0.5))
                await a.hear(ms.Receipt)
                await b.say(ms.Decline(round=1, reason="private words"))
                await a.hear(ms.RoundClosed)

    with caplog.at_level("DEBUG", logger="fedsoda_hub.serving"):
        asyncio.run(talk())
    lines = [record.getMessage() for record in caplog.records if record.name == "fedsoda_hub.serving"]
    for wanted in ("< Hello", "> Welcome", "> RoundOffer round=1", "< UpdateStart round=1", "> Receipt round=1"):
        assert any(line.startswith(wanted) for line in lines), wanted
    for wanted in ("= run idle -> collecting", "= UpdateAccepted round=1", "= job aggregate waits -> runs"):
        assert wanted in lines
    assert not any(secret in caplog.text for secret in (*secrets, "private words", sha256(update(0.5))))


# --- telling ---------------------------------------------------------------------------------------------------------


def test_status_metrics_and_events_tell_the_round_and_who_is_in(settings: RunSettings) -> None:
    async def talk() -> None:
        async with (
            serving(settings) as hub,
            joined(hub.url, hub.token("a")) as a,
            joined(hub.url, hub.token("b"), "phone") as b,
            httpx.AsyncClient(verify=False, trust_env=False, base_url=hub.url) as client,
        ):
            hub.token("c")
            await a.upload(await a.hear(ms.RoundOffer), update(0.5))
            await b.hear(ms.RoundOffer)
            await b.say(ms.Progress(round=1, step=3, steps=40))
            await a.hear(ms.Receipt)
            await hub.until("edge_progress", edge="b", step=3)
            status = (await client.get("/v1/status")).json()
            assert (status["run"], status["phase"], status["round"], status["rounds"]) == ("small", "collecting", 1, 2)
            assert (status["cohort"], status["accepted"], status["url"]) == (["a", "b"], ["a"], hub.url)
            assert 0 < status["due_seconds"] <= 3600
            rows = {row["edge"]: (row["connected"], row["eligible"], row["step"]) for row in status["edges"]}
            assert rows == {"a": (True, True, None), "b": (True, True, 3), "c": (False, False, None)}
            metrics = (await client.get("/metrics")).text.splitlines()
            assert 'fedsoda_updates_total{outcome="accepted"} 1.0' in metrics
            assert 'fedsoda_edges{state="training"} 1.0' in metrics
            assert 'fedsoda_edges{state="idle"} 1.0' in metrics
            for event in hub.events:
                json.dumps(event, allow_nan=False)  # what `--jsonl` prints

    asyncio.run(talk())


def test_the_admin_token_was_never_readable_by_others(settings: RunSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    old = os.umask(0)
    changed: list[Any] = []
    monkeypatch.setattr(Path, "chmod", lambda *values: changed.append(values))
    try:
        with started(settings):
            assert (settings.run_dir / "admin.token").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(old)
    assert changed == []  # created so
