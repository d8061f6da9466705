"""An edge may ask for the files of this run's bundles and for the views in force, and for no other byte of the disk."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fedsoda_edge.ports.disk import sha256
from fedsoda_edge.protocol.messages import BlobRef, Digest
from fedsoda_hub.federation import records as rec
from fedsoda_hub.federation.state import HeldView, LedgerState, ServedSubLLM
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.serving.shelf import Shelf
from tests.hub.serving.test_daemon import LAYOUT, OTHER, SHARD, manifest


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "small.run")
    directory.bundle.mkdir(parents=True)
    (directory.bundle / "norm.safetensors").write_bytes(SHARD)
    return directory


def stored(directory: RunDirectory, data: bytes) -> Digest:
    return Digest(directory.blobs.put(data))


def prepared(manifest: Digest, view: Digest) -> rec.RunPrepared:
    return rec.RunPrepared(manifest=manifest, public_kl={}, adapter_view=view, emulator_view=view)


def stocked(directory: RunDirectory) -> tuple[Shelf, LedgerState, Digest]:
    """A shelf of a run whose largest sub-LLM has `manifest()`."""
    first, view = stored(directory, manifest()), stored(directory, b"a view")
    state = LedgerState(
        sub_llms=(ServedSubLLM(manifest=first, public_kl={}, adapter=HeldView(view), emulator=HeldView(view)),)
    )
    shelf = Shelf(directory, state)
    assert not shelf.stocked.is_set()
    shelf.follow([prepared(first, view)])
    assert shelf.stocked.is_set()
    return shelf, state, view


def test_files_of_the_bundle_lie_where_its_manifest_says(directory: RunDirectory) -> None:
    shelf, state, _ = stocked(directory)
    assert shelf.bundle_file(sha256(SHARD)) == directory.bundle / "norm.safetensors"
    assert shelf.bundle_file(state.largest.manifest) == directory.blobs.path(state.largest.manifest)
    assert shelf.ref(state.largest.manifest) == BlobRef(digest=state.largest.manifest, bytes=len(manifest()))
    assert shelf.layout(0, "both") == LAYOUT
    assert shelf.layout(0, "A") == LAYOUT[:1]


def test_a_blob_that_no_view_in_force_names_is_not_given_away(directory: RunDirectory) -> None:
    shelf, _, view = stocked(directory)
    update = stored(directory, b"what clinic-7 sent")
    assert directory.blobs.has(update)
    assert asyncio.run(shelf.run_blob(update)) is None
    assert shelf.bundle_file(update) is None
    assert asyncio.run(shelf.run_blob(view)) == directory.blobs.path(view)
    for unknown in ("0" * 64, "../small.run/ledger.sqlite", "norm.safetensors"):
        assert shelf.bundle_file(unknown) is None
        assert asyncio.run(shelf.run_blob(unknown)) is None


def test_a_bundle_that_was_in_force_before_can_still_be_fetched(directory: RunDirectory) -> None:
    shelf, state, view = stocked(directory)
    before, drawn = state.largest.manifest, stored(directory, manifest(OTHER))
    held = HeldView(view)
    state.sub_llms = (ServedSubLLM(manifest=drawn, public_kl={}, adapter=held, emulator=held),)
    shelf.follow([rec.Repruned(round=2, manifest=drawn, master=view, view=view)])
    assert shelf.layout(0, "both") == OTHER
    assert {shelf.bundle_file(digest) for digest in (before, drawn)} == {
        directory.blobs.path(before), directory.blobs.path(drawn),
    }  # fmt: skip
    assert shelf.lent_blobs == {before, drawn}
    third = stored(directory, manifest(OTHER) + b" ")
    state.sub_llms = (ServedSubLLM(manifest=third, public_kl={}, adapter=held, emulator=held),)
    records = [
        rec.Repruned(round=number, manifest=one, master=view, view=view) for number, one in ((2, drawn), (3, third))
    ]
    shelf.follow(records[1:])
    assert shelf.lent_blobs == {drawn, third}
    assert shelf.bundle_file(before) is None
    directory.blobs.delete(before)
    again = Shelf(directory, state)
    again.follow([prepared(before, view), *records])  # a restart: what was deleted is not read
    assert again.lent_blobs == {drawn, third}


def test_records_that_name_no_bundle_change_nothing(directory: RunDirectory) -> None:
    shelf = Shelf(directory, LedgerState())
    shelf.follow([rec.DeadlinePassed(round=1)])
    assert not shelf.stocked.is_set()
