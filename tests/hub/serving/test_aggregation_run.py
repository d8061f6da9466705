"""Each rule in a whole federation: daemon, sockets, ledger, agents and views are real, and torch works in this process.

What the numbers should be is `test_aggregation.py`'s; here: they get there, half travels, and no restart changes a bit.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.edge import Edge
from fedsoda_edge.join.receipts import ReceiptLog, departures
from fedsoda_edge.model import delta
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.ports.disk import BlobStore
from fedsoda_edge.protocol.coded import check, most_bytes, of_factor
from fedsoda_edge.protocol.manifest import TensorSpec
from fedsoda_hub.algorithms.aggregation.weighted_mean import CodedUpdate, weighted_mean
from fedsoda_hub.compute import Compute
from fedsoda_hub.events import HubEvent, Listening, RoundClosed, as_json
from fedsoda_hub.federation import records as rec
from fedsoda_hub.federation.schedule import trained_factor
from fedsoda_hub.local.in_process import TorchThread
from fedsoda_hub.run.ledger import Ledger
from fedsoda_hub.serving.daemon import Daemon
from fedsoda_hub.serving.first_of import first_of
from fedsoda_hub.settings.run import RunSettings
from tests.hub.runs import all_blobs_kept, make_run
from tests.hub.serving.test_daemon import records
from tests.joins import joining
from tests.schema import HUB

ROUNDS = 3
NAMES = ("a", "b")


@pytest.fixture
def make(tmp_path: Path, tiny_llama: Path, prepared: RunSettings) -> Any:
    """Settings of a run with this [aggregation], prepared already."""

    def made(name: str, codec: str, **aggregation: Any) -> RunSettings:
        settings = make_run(
            tmp_path / name,
            tiny_llama,
            rounds={"count": ROUNDS, "min_edges": 2, "quorum": 1.0},
            local={"batch_size": 4, "epochs": 2, "learning_rate": 5e-3},
            wire={"codec": codec},
            task={"eval_data": None},
            listen={"port": 0},
            aggregation=aggregation,
        )
        shutil.copytree(prepared.run_dir, settings.run_dir, ignore=shutil.ignore_patterns("blobs", "ledger*"))
        return settings

    return made


def take_part(url: str, directory: Path, name: str, token: str, max_rounds: int) -> int:
    """One edge to the run's end, or as long as it wants; bytes of its last update."""
    (directory / f"{name}.token").write_text(token)
    rows = [{"word": f"{name} {i}", "answer": "yes" if i % 3 else "no"} for i in range(8 if name == "a" else 6)]
    (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    edge = Edge(url, token_file=directory / f"{name}.token", home=directory / f"home-{name}", threads=1)
    size = 0
    with joining(edge, LocalData(directory / f"{name}.jsonl"), max_rounds=max_rounds) as participation:
        for offer in participation:
            update = offer.train()
            size = update.path.stat().st_size
            assert offer.submit(update)
    return size


def federate(settings: RunSettings, max_rounds: int = 0) -> list[int]:
    """Serve until the run is over, or until every edge has left after so many rounds; bytes of their last updates."""
    said: list[HubEvent] = []
    is_listening, has_closed = asyncio.Event(), asyncio.Event()  # the latter: as many rounds as edges take part in

    def say(event: HubEvent) -> None:
        said.append(event)
        if isinstance(event, Listening):
            is_listening.set()
        if isinstance(event, RoundClosed) and event.round == max_rounds:
            has_closed.set()

    async def serve(thread: TorchThread) -> list[int]:
        daemon = Daemon.open(settings, say, torch=thread.port(lambda: Compute().answer))
        tokens = daemon.disk.ledger.tokens
        known = {token.edge for token in tokens.all()}
        for name in NAMES:
            if name not in known:
                (settings.directory / f"{name}.secret").write_text(tokens.create(name))
        running = asyncio.create_task(daemon.run(exit_when_done=True))
        async with asyncio.timeout(120):
            await first_of(is_listening.wait(), asyncio.wait({running}))
            assert not running.done(), running.result()
            sizes = await asyncio.gather(
                *(
                    asyncio.to_thread(
                        take_part,
                        daemon.url,
                        settings.directory,
                        name,
                        (settings.directory / f"{name}.secret").read_text(),
                        max_rounds,
                    )
                    for name in NAMES
                )
            )
            if max_rounds:
                await has_closed.wait()
                running.cancel()
            await asyncio.wait([running])
        return sizes

    with TorchThread() as thread, all_blobs_kept():
        sizes = asyncio.run(serve(thread))
    for event in said:
        HUB.check_event(as_json(event))
    return sizes


def closed(settings: RunSettings) -> list[rec.RoundClosed]:
    found: list[rec.RoundClosed] = records(settings, rec.RoundClosed)
    return found


def layout_of(settings: RunSettings) -> tuple[TensorSpec, ...]:
    return Bundle.open(settings.run_dir / "bundle").manifest.lora.adapter


def lora(settings: RunSettings, digest: str) -> dict[str, Tensor]:
    return delta.from_bytes(BlobStore(settings.run_dir / "blobs").get(digest), layout_of(settings))


def moved(settings: RunSettings, before: str, after: str) -> set[str]:
    """The factors of which any tensor has other bits in the second view."""
    first, second = lora(settings, before), lora(settings, after)
    return {name[-1] for name in first if not torch.equal(first[name], second[name])}


@contextlib.contextmanager
def watching() -> Iterator[list[set[str]]]:
    """The factors of which what coding left over goes into an update, for each update that is coded."""
    seen: list[set[str]] = []
    original = delta.encode_with_feedback

    def watched(step: Any, residual: dict[str, Tensor] | None, *rest: Any) -> Any:
        seen.append({name[-1] for name, value in (residual or {}).items() if value.any()})
        return original(step, residual, *rest)

    with mock.patch.object(delta, "encode_with_feedback", watched):
        yield seen


@pytest.mark.parametrize(
    ("codec", "how", "left_over"),
    [
        ("nf4", {"rule": "fedavg"}, ["", "AB", "AB"]),
        ("nf4", {"rule": "ffa"}, ["", "B", "B"]),
        # A round of A brings back what is left of B too: it waits there for the next round of B.
        ("nf4", {"rule": "rolora", "optimizer": "fedavgm", "learning_rate": 0.5}, ["", "B", "AB"]),
        ("bf16", {"rule": "flexlora"}, ["", "", ""]),  # the gauge has turned since
        ("klt", {"rule": "rolora"}, ["", "B", "AB"]),
    ],
    ids=["fedavg", "ffa", "rolora", "flexlora", "klt and rolora"],
)
def test_a_run_by_each_rule(make: Any, codec: str, how: dict[str, Any], left_over: list[str]) -> None:
    settings = make("run", codec, **how)
    whole = most_bytes(layout_of(settings), codec)
    with watching() as seen:
        sizes = federate(settings)
    assert seen == [set(factors) for factors in left_over for _ in NAMES]
    rounds, blobs, layout = closed(settings), BlobStore(settings.run_dir / "blobs"), layout_of(settings)
    assert len(rounds) == ROUNDS
    assert len(records(settings, rec.UpdateAccepted)) == 2 * ROUNDS  # none was refused
    assert not records(settings, rec.EdgeAnswered)
    for name in NAMES:  # each edge has a receipt of each update, which the hub's key signed
        lines, _ = ReceiptLog(settings.directory / f"home-{name}" / "receipts.jsonl").lines()
        left = [one for one in departures(lines) if one.what == "update"]
        assert [(one.round, one.answer) for one in left] == [(number, "verified") for number in range(1, ROUNDS + 1)]
    factors = [trained_factor(how["rule"], number) for number in range(1, ROUNDS + 1)]
    for record in records(settings, rec.UpdateAccepted):
        check(blobs.get(record.digest), of_factor(layout, factors[record.round - 1]), codec)
    [prepared] = records(settings, rec.RunPrepared)
    views = [prepared.adapter_view, *(record.view for record in rounds)]
    for record, factor, before, after in zip(rounds, factors, views, views[1:], strict=False):
        assert moved(settings, before, after) == ({"A", "B"} if factor == "both" else {factor})
        check(blobs.get(record.delta), of_factor(layout, factor), codec)
    terms = [record.cross_term for record in rounds]
    if how["rule"] in ("ffa", "rolora"):
        assert terms == [0.0] * ROUNDS
        shares = [size / whole for size in sizes] + [len(blobs.get(record.delta)) / whole for record in rounds]
        assert all(0.35 < share < 0.65 for share in shares), shares  # A and B are not of one size
    else:
        assert all(term is not None and 0 < term < 1 for term in terms)
        assert set(sizes) == {whole}
    assert all((record.moments is not None) == ("optimizer" in how) for record in rounds)
    for name in NAMES:  # an edge that followed by deltas alone holds the view of the last round that it trained
        [held] = settings.directory.glob(f"home-{name}/runs/*/adapter.safetensors")
        assert delta.digest(delta.from_bytes(held.read_bytes(), layout)) == views[ROUNDS - 1]


def test_a_hub_that_stops_in_the_middle_has_the_moments_of_the_one_that_was_not(make: Any) -> None:
    calm, rough = make("calm", "nf4", optimizer="fedadam"), make("rough", "nf4", optimizer="fedadam")
    federate(calm)
    federate(rough, max_rounds=1)
    assert len(closed(rough)) == 1
    federate(rough)
    assert closed(rough) == closed(calm)
    before: dict[str, Tensor] = {}
    blobs, layout = BlobStore(calm.run_dir / "blobs"), layout_of(calm)
    for record in closed(calm):  # Algorithm 2, line 10, of arXiv 2003.00295
        updates = [
            CodedUpdate(one.edge, one.num_examples, partial(blobs.get, one.digest), {}, layout)
            for one in records(calm, rec.UpdateAccepted)
            if one.round == record.round
        ]
        assert record.moments is not None
        moments = load(blobs.get(record.moments))
        for name, mean in weighted_mean(updates, "nf4", max_weight=3.0).items():
            expected = 0.9 * before.get(f"{name}#m", torch.zeros_like(mean)) + 0.1 * mean
            torch.testing.assert_close(moments[f"{name}#m"], expected)
        before = moments


def test_a_ledger_from_before_there_were_moments_is_read(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    opened = {"record": "round_opened", "round": 1, "cohort": ["a"], "view": "v", "alignment": 0, "deadline_at": 1.0}
    accepted = {"record": "update_accepted", "round": 1, "edge": "a", "digest": "u", "num_examples": 1, "loss": 0.5}
    old = {"record": "round_closed", "round": 1, "master": "w", "view": "v", "delta": "d"}
    prepared = {"record": "prepared", "manifest": "m", "adapter_view": "v", "emulator_view": "e", "public_kl": {}}
    for record in (prepared, opened, accepted, old):
        ledger.database.write(("INSERT INTO log (record) VALUES (?)", (msgspec.json.encode(record),)))
    state = ledger.replay()
    assert (state.master, state.moments, state.measured.cross_terms) == ("w", None, {})
    ledger.close()
