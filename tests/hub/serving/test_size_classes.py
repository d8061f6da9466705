"""Smaller sub-LLMs beside the largest: some of its shards, an alignment of their own, and an edge takes what fits."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
import torch

from fedsoda_edge import events as ev
from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.device.facts import read_device
from fedsoda_edge.device.fit import Limits
from fedsoda_edge.edge import Edge
from fedsoda_edge.errors import DiskFull, UsageProblem
from fedsoda_edge.join import size_class
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.ports.store import FileStore
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.needs import SHORTEST
from fedsoda_hub.federation.records import Realigned, UpdateAccepted
from fedsoda_hub.plan import plan_report
from fedsoda_hub.run.ledger import Ledger
from fedsoda_hub.settings.run import RunSettings, read_settings, settings_for_plan
from tests.hub.runs import make_run, prepare
from tests.schema import EDGE, HUB
from tests.test_federation import Federation, write_run

METHOD = {"groups": 1, "classes": [2]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> RunSettings:
    settings = make_run(tmp_path_factory.mktemp("classes"), tiny_llama, method=METHOD)
    prepare(settings)
    return settings


def bundles(settings: RunSettings) -> list[Bundle]:
    return [Bundle.open(settings.run_dir / "bundle", number) for number in (0, 1)]


def test_an_edge_takes_the_largest_that_its_disk_has_room_for(tmp_path: Path, run: RunSettings) -> None:
    fetched: list[str] = []
    manifests = [run.run_dir / "bundle" / name for name in ("manifest.json", "manifest.1.json")]
    refs = [ms.BlobRef(digest=ms.Digest(path.name), bytes=path.stat().st_size) for path in manifests]

    async def fetch(ref: ms.BlobRef) -> Path:
        fetched.append(ref.digest)
        return run.run_dir / "bundle" / ref.digest

    welcome: Any = mock.Mock(manifest=refs[0], emulator=None, smaller=(ms.SizeClass(manifest=refs[1], emulator=None),))
    large, small = (bundle.manifest.needs.disk_bytes for bundle in bundles(run))
    assert small < large

    def taken(disk: int) -> int:
        facts = msgspec.structs.replace(
            read_device(tmp_path), disk_bytes=disk, ram_bytes=1 << 34, vram_bytes=0, accelerator=""
        )
        said: list[ev.JoinEvent] = []
        with mock.patch.object(size_class, "read_device", return_value=facts):
            found = asyncio.run(
                size_class.take(
                    welcome, fetch, FileStore(tmp_path / "store"), tmp_path, "cpu", SHORTEST, Limits(), said.append
                )
            )
        assert found.disk_needed == (large, small)[found.number]
        assert [type(event) for event in said] == [ev.Notice] * found.number
        return found.number

    assert (taken(large), taken(large - 1), taken(small)) == (0, 1, 1)
    assert fetched == [path.name for path in (manifests[0], *manifests, *manifests)]
    with pytest.raises(DiskFull, match="of disk free, the bundle needs"):
        taken(small - 1)


def test_the_plan_foretells_every_class(tiny_llama: Path, run: RunSettings) -> None:
    report = plan_report(str(tiny_llama), run)
    [foretold] = report.smaller
    small = bundles(run)[1]
    assert (foretold.groups, foretold.kept_layers) == (2, len(small.plan.kept))
    assert foretold.bundle_bytes == sum(file.bytes for file in small.manifest.files)
    assert foretold.edge_disk_bytes == small.manifest.needs.disk_bytes
    assert report.ours.bundle_bytes == sum(file.bytes for file in bundles(run)[0].manifest.files)


@pytest.mark.parametrize("classes", [[1], [3, 2], [2, 2], [2, 3, 4, 5]])
def test_classes_ascend_from_the_largest(classes: list[int]) -> None:
    with pytest.raises(
        UsageProblem, match=r"\[method\] classes = .*; it must be at most 3 numbers, ascending, each above"
    ):
        settings_for_plan("m", method={"groups": 1, "layers_per_group": 1, "classes": classes})


def test_only_fedsoda_has_classes() -> None:
    with pytest.raises(
        UsageProblem, match=r'\[method\] classes = \[5\] beside .*"fedbiot" .* or write name = "fedsoda"'
    ):
        settings_for_plan("m", method={"name": "fedbiot", "classes": [5]})


@pytest.mark.slow
def test_edges_of_two_classes_train_one_adapter(tmp_path: Path, tiny_llama: Path) -> None:
    """A hub as it is; one edge has a disk that the largest sub-LLM does not fit on."""
    run_file = write_run(tmp_path / "run", tiny_llama, rounds=2)
    text = (
        run_file.read_text()
        .replace("groups = 2", "groups = 1\nclasses = [2]")
        .replace("max_steps = 40", "max_steps = 5")
    )
    run_file.write_text(text)
    federation = Federation(run_file)
    try:
        hub = federation.hub()
        federation.wait_for("hub.log", event="prepared")
        settings = read_settings(run_file)
        large, small = (bundle.manifest.needs.disk_bytes for bundle in bundles(settings))
        facts = msgspec.structs.replace(read_device(tmp_path), disk_bytes=(small + large) // 2)
        big = federation.edge("b")
        said: list[dict[str, Any]] = []
        edge = Edge(
            f"http://127.0.0.1:{settings.listen.port}", token_file=run_file.parent / "a.token", home=tmp_path / "home-a"
        )
        with (
            mock.patch.object(size_class, "read_device", return_value=facts),
            edge.join(LocalData(run_file.parent / "a.jsonl"), on_event=said.append) as participation,
        ):
            for offer in participation:
                assert offer.submit(offer.train())
        federation.finish(hub, big)
        for log, outputs in (("hub.log", HUB), ("b.log", EDGE)):
            for event in federation.events(log):
                outputs.check_event(event)
    finally:
        federation.stop()
    assert [event["size_class"] for event in said if event["event"] == "device"] == [1]
    assert [event["size_class"] for event in federation.events("b.log") if event["event"] == "device"] == [0]
    with contextlib.closing(Ledger(settings.run_dir / "ledger.sqlite")) as ledger:
        records = list(ledger.records())
    accepted = [(record.round, record.edge) for record in records if isinstance(record, UpdateAccepted)]
    assert sorted(accepted) == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]
    [realigned] = [record for record in records if isinstance(record, Realigned)]
    assert len(realigned.smaller) == 1
    missing = set(bundles(settings)[0].plan.kept) - set(bundles(settings)[1].plan.kept)
    shards = {file.name: file.sha256 for file in bundles(settings)[0].manifest.files}
    held = {path.name for path in (tmp_path / "home-a").rglob("*") if path.is_file()}
    assert not held & {shards[f"layers.{number}.safetensors"] for number in missing}


def test_each_class_has_a_border_map_of_its_own(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"word": "cat {number}"}}\n' for number in range(60)))
    like: dict[str, dict[str, Any]] = {
        "public": {"like_task": "prompts.jsonl"},
        "align": {"border_map": "ridge", "steps": 0, "realign_steps": 0},
    }
    settings = make_run(tmp_path, tiny_llama, method=METHOD, **like)
    prepare(settings)
    first, second = (Bundle.open(settings.run_dir / "bundle", at).emulator_lora()["border.D"] for at in (0, 1))
    assert not torch.equal(first, second)
