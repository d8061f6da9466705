"""A daemon on real sockets signs its Welcome, its receipts and where its mirrors are, with the key of the run's directory."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path

import pytest

from fedsoda_edge.errors import BlobCorrupt, UsageProblem
from fedsoda_edge.ports.disk import sha256
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.statements import BundleStatement, ReceiptStatement, read
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.keys import signing_key
from fedsoda_hub.serving.mirrored import write_files
from fedsoda_hub.settings.run import RunSettings
from tests.hub.serving.test_daemon import SHARD, connected, hello, manifest, serving, serving_two, update, write_run

MIRROR = "https://cdn.example.org/small/"


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    return write_run(tmp_path, blobs={"mirrors": [MIRROR]})


def test_a_welcome_is_signed_by_the_key_in_the_runs_directory_over_restarts(settings: RunSettings) -> None:
    async def greet() -> ms.Welcome:
        async with serving(settings) as hub, connected(hub.url, hub.token(f"a{len(said)}")) as edge:
            await edge.say(hello("laptop"))
            return await edge.hear(ms.Welcome)

    said = list[ms.Welcome]()
    said += [asyncio.run(greet())]
    said += [asyncio.run(greet())]
    path = RunDirectory(settings.run_dir).signing_key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = signing_key(path).public
    for welcome in said:
        assert welcome.signed is not None
        statement = read(welcome.signed, key, BundleStatement)
        assert (statement.run_id, statement.version) == (welcome.run_id, 1)
        assert statement.manifests == (welcome.manifest,)
        assert statement.manifests[0].digest == sha256(manifest())
        assert statement.mirrors == (MIRROR,)


def test_a_receipt_is_signed_also_when_it_is_sent_again(settings: RunSettings) -> None:
    async def talk() -> None:
        async with serving_two(settings) as (_, a, b):
            offer = await b.hear(ms.RoundOffer)
            for _ in range(2):
                await b.upload(offer, update(0.5))
                receipt = await b.hear(ms.Receipt)
                assert receipt.signed is not None
                key = signing_key(RunDirectory(settings.run_dir).signing_key).public
                found = read(receipt.signed, key, ReceiptStatement)
                assert (found.round, found.edge, found.digest) == (1, "b", sha256(update(0.5)))
                assert found.num_examples >= 1
            await a.hear(ms.RoundOffer)

    asyncio.run(talk())


# --- fedsoda-hub bundle ------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(settings: RunSettings) -> RunSettings:
    async def serve() -> None:
        async with serving(settings):
            pass

    asyncio.run(serve())
    return settings


def test_the_files_for_mirrors_are_what_edges_ask_for_by_digest(prepared: RunSettings, tmp_path: Path) -> None:
    to = tmp_path / "cdn"
    written = write_files(prepared, to)
    assert {path.name: path.read_bytes() for path in to.iterdir()} == {
        sha256(SHARD): SHARD,
        sha256(manifest()): manifest(),
    }
    assert (written.files, written.bytes, written.copied) == (2, len(SHARD) + len(manifest()), 2)


def test_what_is_there_stays_and_what_is_damaged_is_written_again(prepared: RunSettings, tmp_path: Path) -> None:
    to = tmp_path / "cdn"
    write_files(prepared, to)
    kept, damaged = to / sha256(manifest()), to / sha256(SHARD)
    before = kept.stat().st_mtime_ns
    damaged.write_bytes(SHARD[:-1])
    assert write_files(prepared, to).copied == 1
    assert kept.stat().st_mtime_ns == before
    assert damaged.read_bytes() == SHARD


def test_a_damaged_bundle_is_not_given_to_mirrors(prepared: RunSettings, tmp_path: Path) -> None:
    [shard] = [path for path in RunDirectory(prepared.run_dir).bundle.iterdir() if path.read_bytes() == SHARD]
    shard.write_bytes(b"?" * len(SHARD))
    with pytest.raises(BlobCorrupt, match="has digest"):
        write_files(prepared, tmp_path / "cdn")
    assert not list((tmp_path / "cdn").glob("*.part"))
    shard.unlink()
    with pytest.raises(BlobCorrupt, match="is missing"):
        write_files(prepared, tmp_path / "cdn")


def test_a_run_that_is_not_prepared_has_no_files(settings: RunSettings, tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match="has not been started"):
        write_files(settings, tmp_path / "cdn")
