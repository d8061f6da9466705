"""Measure a first join over a slow link: download and compute overlap, so together they take hardly more than the longer.

The hub's own listener serves a random model's bundle through a proxy that limits the bytes a second, and a real
`fedsoda-edge join --max-rounds 1` trains one round. Arms, interleaved:

    download   every file of the bundle through the proxy, nothing else
    compute    a join whose store is full already: imports, sweep, training
    together   a join with an empty store

Without `--mbit` the link's speed makes download and compute equally long, where overlapping matters most. Training
cannot begin before the sub-emulator is swept, so it comes after the download: this bench is about joins whose compute
is mostly sweep. Exit status 1 when together is more than 1.15 x the longer + 3 s; with `--planted-defect` the hub does
not say which alignment is in force, so that the edge sweeps after the download, and it must fail. The speed of training is
left to `bench_edge.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import random_bundle  # beside this file
from random_bundle import Shape

from fedsoda_edge.join.download import fetch_file
from fedsoda_edge.network.hub_transport import HubTransport
from fedsoda_edge.ports.disk import sha256_file
from fedsoda_edge.ports.store import FileStore
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.manifest import BundleManifest, Group, parse_manifest
from fedsoda_edge.protocol.session import Gathered, InMemory, Upload
from fedsoda_hub.algorithms.pruning.layer_plan import make_plan
from fedsoda_hub.federation.state import LedgerState
from fedsoda_hub.run.status import LiveStatus, live_status, run_status
from fedsoda_hub.run.tokens import Token
from fedsoda_hub.serving.connection import Connection, Hub
from fedsoda_hub.serving.listener import Server, bind
from fedsoda_hub.serving.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent
FACTOR, SECONDS = 1.15, 3.0  # together at most FACTOR x the longer + SECONDS
PIECE_BYTES = 16 << 10
ADAPTER_LAYERS, VOCAB = 3, 2000


@dataclass(frozen=True)
class Geometry:
    """A model's size, and the data to sweep: `rows` rows of `words` words."""

    width: int
    layers: int
    rows: int
    words: int
    steps: int


GEOMETRIES = {
    "cpu": Geometry(512, 24, 64, 60, 2),
    "quick": Geometry(256, 12, 32, 30, 2),
}


def make(directory: Path, geometry: Geometry) -> None:
    """Make a random model's bundle and data."""
    plan = make_plan(geometry.layers, ADAPTER_LAYERS, [Group(start=2, removed=(3, 4), distance=0.1)])
    shape = Shape(geometry.width, geometry.layers, VOCAB, length=256)
    random_bundle.make(directory / "model", shape, plan, ("q_proj", "v_proj"), quantize_embedding=True, device="cpu")
    rows = [
        {
            "prompt": " ".join(f"w{3 + (7 * row + 13 * at) % (VOCAB - 3)}" for at in range(geometry.words)),
            "completion": "w5",
        }
        for row in range(geometry.rows)
    ]
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class OneRoundHub:
    """A hub of one round for every edge that comes, from the bundle's own views: all three sides that a `Hub` has."""

    stall_seconds = 60.0
    max_update_bytes = 1 << 26

    def __init__(self, bundle: Path, steps: int, *, tells_alignment: bool) -> None:
        self._manifest = bundle / "manifest.json"
        manifest = parse_manifest(self._manifest.read_bytes())
        self._digest = ms.Digest(sha256_file(self._manifest))
        self._files = {file.sha256: bundle / file.name for file in manifest.files} | {self._digest: self._manifest}
        self._views = {
            name: ms.ViewRef(
                digest=ms.Digest(manifest.file(f"{name}_lora.safetensors").sha256), delta=None, snapshot=None
            )
            for name in ("adapter", "emulator")
        }
        self._steps = steps
        self.metrics = Metrics()
        self._tells_alignment = tells_alignment

    async def prove(self, request: bytes) -> tuple[int, bytes]:
        return 403, b'{"reason": "this hub takes tokens alone"}'

    def token(self, secret: str) -> Token | None:
        return Token(ms.EdgeId("edge"), None, False)

    health = "serving"

    def is_admin(self, secret: str) -> bool:
        return False

    def bundle_file(self, digest: str) -> Path | None:
        return self._files.get(ms.Digest(digest))

    async def run_blob(self, digest: str) -> Path | None:
        return None

    async def status(self) -> LiveStatus:
        return live_status(run_status("bench", 1, [], LedgerState()), [])

    async def greet(self, connection: Connection, hello: ms.Hello) -> ms.Welcome | ms.Refusal:
        return ms.Welcome(
            protocol=ms.PROTOCOL_VERSION,
            run_id="bench",
            run_name="bench",
            edge=connection.edge,
            manifest=ms.BlobRef(digest=self._digest, bytes=self._manifest.stat().st_size),
            rounds=1,
            rounds_done=0,
            template=None,
            max_length=128,
            codec="nf4",
            seed=0,
            stall_seconds=self.stall_seconds,
            emulator=self._views["emulator"] if self._tells_alignment else None,
        )

    def gather(self, edge: ms.EdgeId, start: ms.UpdateStart) -> Gathered:
        return InMemory()

    async def said(self, connection: Connection, message: ms.EdgeMessage | Upload) -> None:
        match message:
            case ms.Ready():
                local = ms.LocalSettings(
                    epochs=1,
                    max_steps=self._steps,
                    batch_size=4,
                    learning_rate=1e-3,
                    weight_decay=0.0,
                    max_grad_norm=1.0,
                    proximal_mu=0.0,
                    max_length=128,
                )
                connection.send(
                    ms.RoundOffer(
                        round=1,
                        rounds=1,
                        view=self._views["adapter"],
                        alignment=0,
                        emulator=self._views["emulator"],
                        local=local,
                        due_seconds=3600.0,
                    )
                )
            case Upload():
                connection.send(ms.Receipt(round=1, digest=message.start.digest))
            case _:
                pass

    def ended(self, connection: Connection) -> None: ...


class Link:
    """A proxy for one port. bytes_per_second: the limit for all its connections together from the hub; 0: no limit."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.bytes_per_second = 0.0
        self._free_at = 0.0
        self._pumps: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass one connection through, until the hub ends it."""
        hub_reader, hub_writer = await asyncio.open_connection("127.0.0.1", self._port)
        up = asyncio.create_task(self._pump(reader, hub_writer, is_bound=False))
        self._pumps.add(up)
        up.add_done_callback(self._pumps.discard)
        await self._pump(hub_reader, writer, is_bound=True)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, is_bound: bool) -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await source.read(PIECE_BYTES):
                if is_bound and self.bytes_per_second:
                    now = time.monotonic()
                    self._free_at = max(now - 0.05, self._free_at) + len(piece) / self.bytes_per_second
                    if self._free_at > now:
                        await asyncio.sleep(self._free_at - now)
                sink.write(piece)
                await sink.drain()
        with contextlib.suppress(ConnectionError):
            sink.close()


def broke(defect: Exception) -> None:
    """Raise a defect of the hub's code where it happened."""
    raise defect


@contextlib.asynccontextmanager
async def behind_a_link(hub: OneRoundHub) -> AsyncIterator[tuple[Link, str]]:
    """Serve a hub behind a link; yield the link and the URL of its near end."""
    taken = bind("127.0.0.1", 0)
    server = Server(Hub(hub, hub, hub), broke)
    serving = asyncio.create_task(server.serve(sockets=[taken]))
    await server.has_started.wait()
    link = Link(taken.getsockname()[1])
    proxy = await asyncio.start_server(link.serve, "127.0.0.1", 0)
    try:
        yield link, f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
    finally:
        proxy.close()
        server.should_exit = True
        await serving
        taken.close()


async def download(url: str, manifest: BundleManifest, store: Path) -> float:
    """Download every file, and return the seconds that it takes."""
    transport, files = HubTransport(url, "t"), FileStore(store)
    began = time.monotonic()
    for file in manifest.files:
        await fetch_file(files, transport, file.sha256, file.bytes)
    seconds = time.monotonic() - began
    await transport.close()
    return seconds


async def join(url: str, data: Path, home: Path) -> tuple[float, dict[str, float]]:
    """Join for one round.

    Returns:
        the seconds from the command to the end of the first local round, and the times of the first and last events.
    """
    began, said = time.monotonic(), dict[str, float]()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fedsoda_edge", "join", url, "--data", data, "--max-rounds", "1", "--jsonl",
        "--device", "cpu", "--threads", "1",
        env={**os.environ, "FEDSODA_HOME": str(home), "FEDSODA_TOKEN": "t", "NO_PROXY": "*"},
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    while line := await process.stdout.readline():
        event = json.loads(line)
        at = round(time.monotonic() - began, 2)
        said.setdefault(f"first {event['event']}", at)
        said[f"last {event['event']}"] = at
    if await process.wait():
        raise SystemExit(f"the join failed: {event}")
    wanted = ("last download", "first sweep", "last sweep", "first training", "first trained")
    return said["first trained"], {name: said[name] for name in wanted if name in said}


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run all arms in turn, and return the figures and the check."""
    directory, geometry = Path(options.out), GEOMETRIES[options.geometry]
    make(directory, geometry)
    manifest = parse_manifest((directory / "model" / "bundle" / "manifest.json").read_bytes())
    size, data = sum(file.bytes for file in manifest.files), directory / "data.jsonl"
    hub = OneRoundHub(directory / "model" / "bundle", geometry.steps, tells_alignment=not options.planted_defect)
    seconds: dict[str, list[float]] = {"download": [], "compute": [], "together": []}
    timelines: list[dict[str, float]] = []
    async with behind_a_link(hub) as (link, url):
        with tempfile.TemporaryDirectory(dir=directory) as filled:
            await join(url, data, Path(filled))  # fills the store, and the page cache as well
            warm, _ = await join(url, data, Path(filled))
            link.bytes_per_second = options.mbit * 1e6 / 8 or size / warm
            for _ in range(options.repeats):
                with tempfile.TemporaryDirectory(dir=directory) as fresh:
                    seconds["download"].append(await download(url, manifest, Path(fresh)))
                seconds["compute"].append((await join(url, data, Path(filled)))[0])
                with tempfile.TemporaryDirectory(dir=directory) as fresh:
                    together, timeline = await join(url, data, Path(fresh))
                seconds["together"].append(together)
                timelines.append(timeline)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    bound = FACTOR * max(median["download"], median["compute"]) + SECONDS
    check = {
        "claim": f"together at most {FACTOR} x max(download, compute) + {SECONDS} s",
        "bound": bound,
        "together": median["together"],
        "holds": median["together"] <= bound,
    }
    return {
        "bench": "join",
        "geometry": {"name": options.geometry, **vars(geometry), "repeats": options.repeats},
        "planted_defect": options.planted_defect,
        "bundle_bytes": size,
        "mbit_per_second": link.bytes_per_second * 8 / 1e6,
        "seconds": seconds,
        "over_the_longer": median["together"] / max(median["download"], median["compute"]),
        "timelines": timelines,
        "checks": [check],
    }


def main() -> None:
    """Measure, print the result, and exit with 1 where the claim does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="cpu")
    parser.add_argument("--out", help="directory of bundle and homes; not given: bench-out/join-GEOMETRY")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of every arm")
    parser.add_argument(
        "--mbit", type=float, default=0.0, help="Mbit/s of the link; 0: so that download takes as long as compute"
    )
    parser.add_argument(
        "--planted-defect", action="store_true", help="the sweep waits for the download: the bench must fail"
    )
    options = parser.parse_args()
    options.out = options.out or str(ROOT / "bench-out" / f"join-{options.geometry}")
    result = asyncio.run(measure(options))
    print(json.dumps(result, indent=1))
    if not all(check["holds"] for check in result["checks"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
