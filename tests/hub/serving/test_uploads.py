"""What arrives is checked before it is stored, and deleted once no accepted update, view or receipt has its bytes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fedsoda_edge.errors import DiskFull
from fedsoda_edge.ports.disk import BlobStore, sha256
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.session import Upload, chunks
from fedsoda_hub.federation.state import Collected, HeldView, LedgerState, ServedSubLLM
from fedsoda_hub.serving.uploads import Uploads
from tests.full_disk import full_disk_for
from tests.hub.serving.test_daemon import LAYOUT, OTHER, update

DATA = update(0.5)
DIGEST = ms.Digest(sha256(DATA))
EDGE = ms.EdgeId("a")
UPDATE = Collected(round=1, digest=DIGEST, num_examples=3, loss=0.5)


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


@pytest.fixture
def uploads(blobs: BlobStore) -> Uploads:
    return Uploads(blobs, "bf16", blobs.directory.with_name("uploads"))


def announced(data: bytes = DATA, codec: str = "bf16") -> ms.UpdateStart:
    return ms.UpdateStart(
        round=1,
        base=ms.Digest("0" * 64),
        alignment=0,
        digest=ms.Digest(sha256(data)),
        bytes=len(data),
        codec=codec,
        num_examples=3,
        loss=0.5,
    )


def taken(uploads: Uploads, data: bytes = DATA, codec: str = "bf16", layout: Any = LAYOUT) -> str | None:
    return asyncio.run(uploads.take(arrived(uploads, data, codec), layout))


def arrived(uploads: Uploads, data: bytes = DATA, codec: str = "bf16", why_useless: str | None = None) -> Upload:
    start = announced(data, codec)
    place = uploads.gather(start, 1 << 20, why_useless)
    for _, piece in chunks(data):
        place.add(bytes(piece))
    assert place.digest() == start.digest
    return Upload(start, place.whole(), place)


def forget_refused(uploads: Uploads, state: LedgerState = LedgerState()) -> None:
    asyncio.run(uploads.forget_refused(state))


@pytest.mark.parametrize(
    ("data", "codec", "layout", "problem"),
    [
        (DATA, "int8", LAYOUT, "the update is coded as int8, but this run codes as bf16"),
        (DATA[:-1], "bf16", LAYOUT, ""),
        (DATA, "bf16", OTHER, "layers.0.self_attn.q_proj.lora_A"),
    ],
    ids=["another codec", "cut short", "other layers"],
)
def test_what_is_not_as_the_run_has_it_is_not_stored(
    uploads: Uploads, blobs: BlobStore, data: bytes, codec: str, layout: Any, problem: str
) -> None:
    found = taken(uploads, data, codec, layout)
    assert found
    assert problem in found
    assert not blobs.has(sha256(data))
    assert (uploads.num_unjudged, uploads.spooled_bytes) == (0, 0)


def test_an_upload_is_kept_until_it_is_judged_and_no_longer_where_it_was_refused(
    uploads: Uploads, blobs: BlobStore
) -> None:
    assert taken(uploads) is None
    forget_refused(uploads)
    assert (uploads.num_unjudged, blobs.get(DIGEST)) == (1, DATA)
    uploads.judged(EDGE, DIGEST, LedgerState())
    forget_refused(uploads)
    assert (uploads.num_unjudged, blobs.has(DIGEST)) == (0, False)


def sub_llm(view: ms.Digest) -> ServedSubLLM:
    return ServedSubLLM(
        manifest=ms.Digest("m"), public_kl={}, adapter=HeldView(view), emulator=HeldView(ms.Digest("e"))
    )


@pytest.mark.parametrize(
    "state",
    [
        LedgerState(accepted={EDGE: UPDATE}),
        LedgerState(receipts={EDGE: UPDATE}),
        LedgerState(master=DIGEST),
        LedgerState(moments=DIGEST),
        LedgerState(phase="idle", round=1, sub_llms=(sub_llm(DIGEST),)),
    ],
    ids=["accepted", "receipt", "master", "moments", "view"],
)
def test_bytes_that_the_run_needs_stay(uploads: Uploads, blobs: BlobStore, state: LedgerState) -> None:
    assert taken(uploads) is None
    uploads.judged(EDGE, DIGEST, state)
    forget_refused(uploads, state)
    assert blobs.get(DIGEST) == DATA


def test_a_blob_that_was_there_before_is_never_deleted(uploads: Uploads, blobs: BlobStore) -> None:
    blobs.put(DATA)
    assert taken(uploads) is None
    uploads.judged(EDGE, DIGEST, LedgerState())
    forget_refused(uploads)
    assert blobs.has(DIGEST)


def test_the_same_bytes_of_two_edges_stay_until_both_are_judged(uploads: Uploads, blobs: BlobStore) -> None:
    for _ in range(2):
        assert taken(uploads) is None
    uploads.judged(EDGE, DIGEST, LedgerState())
    forget_refused(uploads)
    assert (uploads.num_unjudged, blobs.has(DIGEST)) == (1, True)
    uploads.judged(EDGE, DIGEST, LedgerState())
    forget_refused(uploads)
    assert not blobs.has(DIGEST)


def test_a_full_disk_leaves_nothing_that_waits_for_a_judgement(uploads: Uploads, blobs: BlobStore) -> None:
    with full_disk_for(DIGEST), pytest.raises(DiskFull):
        taken(uploads)
    assert (uploads.num_unjudged, blobs.has(DIGEST)) == (0, False)
    forget_refused(uploads)
    assert taken(uploads) is None
    assert blobs.has(DIGEST)
