"""Runs in the middle of their life, for the owner's page: a ledger as a hub leaves it, and the hub that goes on with it."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from fedsoda_edge.ports.disk import BlobStore, sha256
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.manifest import BundleManifest, Group, LayerPlan
from fedsoda_edge.protocol.messages import Digest, EdgeId
from fedsoda_hub.federation import records as rec
from fedsoda_hub.federation.jobs import EvaluateResult, Standing
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import Ledger, RoundTraffic
from fedsoda_hub.settings.run import RunSettings
from tests.hub.serving import test_daemon as daemons

SPAN = 17_000.0  # seconds from the first record to the last
KL = {"pruned": 0.619, "quantized": 0.631, "aligned": 0.386}


def plan(layers: int = 24, removed: int = 3, groups: int = 4) -> LayerPlan:
    """A plan of a model of so many layers: groups of removed ones, and an adapter of the last three."""
    border = layers - 3
    distances = tuple(
        tuple(
            round(0.04 + 0.011 * gap + 0.05 * math.exp(-low / 3) + 0.004 * math.sin(low * gap), 4)
            for gap in range(1, border - low)
        )
        for low in range(border - 1)
    )
    starts = range(2, 2 + groups * (removed + 1), removed + 1)
    made = [Group(start, tuple(range(start + 1, start + 1 + removed)), 0.1) for start in starts]
    gone = {layer for group in made for layer in group.removed}
    kept = tuple(layer for layer in range(layers) if layer not in gone)
    mapping = tuple((group.start, kept.index(group.start)) for group in made)
    return LayerPlan(layers, tuple(range(border, layers)), kept, tuple(made), mapping, distances)


def fill(
    settings: RunSettings,
    *,
    edges: list[str],
    closed: int,
    cohort: int = 10**9,
    is_open: bool = False,
    is_over: bool = False,
    eval_every: int = 2,
    traffic: bool = True,
) -> None:
    """Write the ledger, blobs and manifest of a run with so many closed rounds.

    Args:
        cohort: how many edges each round invites. is_open: whether another round is open, with a third of its updates.
    """
    chance = random.Random(1)
    directory = RunDirectory(settings.run_dir)
    blobs = directory.blobs
    shown = msgspec.json.decode(daemons.manifest(), type=BundleManifest)
    data = msgspec.json.encode(msgspec.structs.replace(shown, plan=plan()))
    directory.bundle.mkdir(parents=True)
    (directory.bundle / "norm.safetensors").write_bytes(daemons.SHARD)
    directory.manifest.write_bytes(data)
    adapter, emulator, update = (put(blobs, name) for name in (b"adapter", b"emulator", b"update"))
    records: list[rec.AnyRecord] = [
        rec.RunStarted(run_id="0123456789abcdef", fixed=settings.fixed()),
        rec.RunPrepared(manifest=put(blobs, data), adapter_view=adapter, emulator_view=emulator, public_kl=KL),
    ]
    rows: list[RoundTraffic] = []
    view = adapter
    for number in range(1, closed + is_open + 1):
        names = tuple(EdgeId(name) for name in sorted(chance.sample(edges, min(cohort, len(edges)))))
        due = time.time() + 900
        records.append(rec.RoundOpened(round=number, cohort=names, view=view, alignment=0, deadline_at=due))
        given = []
        for place, edge in enumerate(names):
            if number > closed and place % 3:
                continue
            if number <= closed and place and chance.random() < 0.06:
                records.append(rec.EdgeAnswered(round=number, edge=edge, how="declined"))
                continue
            given.append(edge)
            loss = 2.2 * math.exp(-number / (0.3 * max(6, closed))) + 0.55 + chance.gauss(0, 0.05)
            examples = chance.randrange(20, 400)
            records.append(
                rec.UpdateAccepted(round=number, edge=edge, digest=update, num_examples=examples, loss=max(0.01, loss))
            )
            if traffic:
                rows.append(
                    RoundTraffic(edge, number, chance.randrange(30_000, 40_000), chance.randrange(34_000, 42_000))
                )
        if number > closed:
            break
        standings = tuple(
            Standing(
                edge=edge, norm=round(chance.uniform(0.4, 1.3), 4), cosine=round(chance.uniform(0.2, 0.9), 3), kept=None
            )
            for edge in given
        )
        master, view, delta = (put(blobs, f"{name} {number}".encode()) for name in ("master", "view", "delta"))
        records.append(rec.RoundClosed(round=number, master=master, view=view, delta=delta, standings=standings))
        if number % eval_every == 0 or (is_over and number == closed):
            grown = 1 - math.exp(-number / (0.35 * max(6, closed)))
            figures = {"full": 0.774, "sub_llm": 0.55 + 0.27 * grown, "plug_in": 0.66 + 0.19 * grown}
            losses: dict[str, float | None] = dict.fromkeys(figures, 0.5)
            result = EvaluateResult(accuracy=figures, loss=losses, num_examples=872)
            records.append(rec.Evaluated(round=number, result=result))
    if is_over:
        records.append(rec.RunEnded(rounds=closed))
    begun = time.time() - SPAN - 60
    ledger = Ledger(directory.ledger)
    ledger.database.write(
        *(
            (
                "INSERT INTO log (record, at) VALUES (?, ?)",
                (msgspec.json.encode(record), begun + SPAN * at / len(records)),
            )
            for at, record in enumerate(records)
        )
    )
    ledger.add_all_traffic(rows)
    ledger.snapshot(ledger.replay())
    ledger.close()


def put(blobs: BlobStore, data: bytes) -> Digest:
    return Digest(blobs.put(data))


def let_in(settings: RunSettings, names: list[str]) -> dict[str, str]:
    """Give each name a token, by name; each was seen once."""
    ledger = Ledger(RunDirectory(settings.run_dir).ledger)
    tokens = {name: ledger.tokens.create(name) for name in names}
    for at, name in enumerate(names):
        ledger.tokens.bind(EdgeId(name), f"device of {name}")
        ledger.edges.note_seen({EdgeId(name): time.time() - 600 * (1 + at)})
    ledger.close()
    return tokens


def let_in_at_once(settings: RunSettings, names: list[str]) -> None:
    """Note a token for each name that nobody has, in one step: each of its own would wait for the disk."""
    ledger = Ledger(RunDirectory(settings.run_dir).ledger)
    ledger.database.write(
        *(
            ("INSERT INTO tokens (edge, sha256, device) VALUES (?, ?, ?)", (name, sha256(name.encode()), name))
            for name in names
        )
    )
    ledger.edges.note_seen({EdgeId(name): time.time() - 600 for name in names})
    ledger.close()


@contextlib.asynccontextmanager
async def served(
    settings: RunSettings,
    connected: dict[str, str],
    *,
    facts: dict[str, ms.DeviceFacts] | None = None,
    **torch: Any,
) -> AsyncIterator[tuple[daemons.Hub, dict[str, daemons.Device]]]:
    """The run's hub, to which these edges are connected: name to token. facts: of their devices, by name."""
    async with contextlib.AsyncExitStack() as stack:
        hub = await stack.enter_async_context(daemons.serving(settings, **torch))
        devices = {}
        for name, token in connected.items():
            device = await stack.enter_async_context(daemons.connected(hub.url, token))
            hello = daemons.hello(f"device of {name}")
            await device.say(msgspec.structs.replace(hello, device=(facts or {}).get(name, hello.device)))
            await device.hear(ms.Welcome)
            await device.say(ms.Ready(num_examples=3))
            devices[name] = device
        yield hub, devices


def a_run(directory: Path, **rounds: Any) -> RunSettings:
    """Settings of a run for `fill`."""
    return daemons.write_run(directory, rounds={"count": 20, "min_edges": 2, "deadline_seconds": 1800.0, **rounds})
