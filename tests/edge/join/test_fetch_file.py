"""Bundle files by digest: a cut download goes on, wrong bytes end with a sentence, what is here stays here."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from fedsoda_edge.errors import BlobCorrupt, DiskFull, HubUnreachable, ProtocolViolation
from fedsoda_edge.join.download import fetch_file
from fedsoda_edge.ports import Transport
from fedsoda_edge.ports.store import FileStore

DATA = bytes(range(256)) * 4  # 1024 bytes
DIGEST = hashlib.sha256(DATA).hexdigest()
WRONG = DATA[:-1] + b"!"
CUT = HubUnreachable("the download broke off", "HTTP")


class Downloads:
    """A Transport that plays one script per fetch: pieces, and an exception where the transfer breaks off."""

    url = "a script"

    def __init__(self, *scripts: list[bytes | Exception]) -> None:
        self._scripts = list(scripts)
        self.asked: list[tuple[str, int]] = []
        self.pieces_read = self.up = self.down = 0

    async def fetch(self, digest: str, offset: int) -> AsyncIterator[bytes]:
        self.asked.append((digest, offset))
        for piece in self._scripts.pop(0):
            if isinstance(piece, Exception):
                raise piece
            self.pieces_read += 1
            yield piece

    async def connect(self) -> None: ...
    async def send(self, frame: bytes) -> None: ...
    async def frames(self) -> AsyncIterator[bytes]:
        for frame in list[bytes]():
            yield frame

    async def close(self) -> None: ...


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def fetch(
    store: FileStore, hub: Transport, size: int = len(DATA), progress: Callable[[int], None] = lambda _: None
) -> Path:
    return asyncio.run(fetch_file(store, hub, DIGEST, size, progress))


def names(store: FileStore) -> list[str]:
    return sorted(path.name for path in store.directory.iterdir())


def test_a_download_that_broke_off_goes_on_where_it_stopped(store: FileStore) -> None:
    hub = Downloads([DATA[:300], DATA[300:500], CUT], [DATA[500:]])
    with pytest.raises(HubUnreachable):
        fetch(store, hub)
    again = FileStore(store.directory)  # the next start of the program
    assert again.held_bytes([(DIGEST, len(DATA))]) == 500
    path = fetch(again, hub)
    assert hub.asked == [(DIGEST, 0), (DIGEST, 500)]
    assert path.read_bytes() == DATA
    assert names(store) == [DIGEST]


def test_a_download_that_broke_off_after_its_last_byte_asks_for_nothing_more(store: FileStore) -> None:
    hub = Downloads([DATA, CUT])
    with pytest.raises(HubUnreachable):
        fetch(store, hub)
    assert fetch(store, hub).read_bytes() == DATA
    assert hub.asked == [(DIGEST, 0)]


def test_the_final_name_appears_only_with_all_verified_bytes(store: FileStore) -> None:
    seen = list[bool]()
    hub = Downloads([DATA[:300], DATA[300:]])
    fetch(store, hub, progress=lambda _: seen.append(store.has(DIGEST)))
    assert seen == [False] * 3
    assert store.has(DIGEST)


def test_progress_counts_every_byte_once_also_those_from_before_a_cut(store: FileStore) -> None:
    hub, came = Downloads([DATA[:300], CUT], [DATA[300:700], DATA[700:]]), list[int]()
    with pytest.raises(HubUnreachable):
        fetch(store, hub)
    fetch(store, hub, progress=came.append)
    assert came == [300, 400, 324]


def test_a_file_that_is_here_is_not_fetched_again(store: FileStore) -> None:
    hub, came = Downloads([DATA]), list[int]()
    fetch(store, hub)
    assert fetch(store, hub, progress=came.append).read_bytes() == DATA
    assert hub.asked == [(DIGEST, 0)]
    assert came == [len(DATA)]
    assert store.held_bytes([(DIGEST, len(DATA)), ("0" * 64, 77)]) == len(DATA)


def test_a_file_that_the_disk_damaged_is_fetched_again(store: FileStore) -> None:
    hub = Downloads([DATA], [DATA])
    fetch(store, hub).write_bytes(WRONG)
    assert fetch(store, hub).read_bytes() == DATA
    assert hub.asked == [(DIGEST, 0), (DIGEST, 0)]


def test_wrong_bytes_are_fetched_once_more_from_the_start(store: FileStore) -> None:
    hub = Downloads([WRONG], [DATA])
    assert fetch(store, hub).read_bytes() == DATA
    assert hub.asked == [(DIGEST, 0), (DIGEST, 0)]


def test_a_part_that_the_disk_damaged_costs_one_whole_download(store: FileStore) -> None:
    hub = Downloads([DATA[:300], CUT], [DATA[300:]], [DATA])
    with pytest.raises(HubUnreachable):
        fetch(store, hub)
    [part] = store.directory.iterdir()
    part.write_bytes(b"?" * 300)
    assert fetch(store, hub).read_bytes() == DATA
    assert hub.asked == [(DIGEST, 0), (DIGEST, 300), (DIGEST, 0)]


def test_wrong_bytes_twice_end_with_both_digests_and_nothing_on_the_disk(store: FileStore) -> None:
    hub = Downloads([WRONG], [WRONG], [DATA])
    with pytest.raises(BlobCorrupt) as failure:
        fetch(store, hub)
    assert str(failure.value) == (
        f"a file of the bundle came twice with digest {hashlib.sha256(WRONG).hexdigest()[:12]} instead of {DIGEST[:12]}; "
        "ask the hub's owner to check the run's bundle directory"
    )
    assert failure.value.exit_status == 1
    assert names(store) == []
    assert len(hub.asked) == 2


def test_a_body_that_ends_early_is_a_cut_which_is_kept_and_continued(store: FileStore) -> None:
    hub = Downloads([DATA[:300]], [DATA[300:]])
    with pytest.raises(HubUnreachable, match=r"ended after 300 of 1024 bytes; join again, which continues it") as cut:
        fetch(store, hub)
    assert cut.value.exit_status == 3
    assert not store.has(DIGEST)
    assert store.held_bytes([(DIGEST, len(DATA))]) == 300
    assert fetch(store, hub).read_bytes() == DATA
    assert hub.asked == [(DIGEST, 0), (DIGEST, 300)]


def test_more_bytes_than_announced_are_refused_without_reading_on(store: FileStore) -> None:
    hub = Downloads([DATA[:600], DATA[600:], b"one too many", *[DATA] * 1000])
    with pytest.raises(BlobCorrupt) as failure:
        fetch(store, hub)
    assert str(failure.value) == (
        f"the hub sends more than the 1024 bytes that {DIGEST[:12]} has; "
        "ask the hub's owner to check the run's bundle directory"
    )
    assert hub.pieces_read == 3
    assert not store.has(DIGEST)
    assert sum(path.stat().st_size for path in store.directory.iterdir()) <= len(DATA)


def test_a_part_that_is_larger_than_the_file_is_thrown_away(store: FileStore) -> None:
    hub = Downloads([DATA[:300], CUT], [DATA])
    with pytest.raises(HubUnreachable):
        fetch(store, hub)
    [part] = store.directory.iterdir()
    part.write_bytes(DATA + b"?")
    assert store.held_bytes([(DIGEST, len(DATA))]) == len(DATA)  # never more than there is to fetch
    assert fetch(store, hub).read_bytes() == DATA
    assert hub.asked == [(DIGEST, 0), (DIGEST, 0)]


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux")
def test_a_full_disk_says_how_far_it_came_and_may_be_tried_again(store: FileStore) -> None:
    hub = Downloads([DATA[:300], CUT], [DATA])
    with pytest.raises(HubUnreachable):
        fetch(store, hub)
    [part] = store.directory.iterdir()
    part.unlink()
    part.symlink_to("/dev/full")
    with pytest.raises(DiskFull) as failure:
        fetch(store, hub)
    assert str(failure.value) == (
        f"the disk of {store.directory} is full: 1,024 of 1,024 bytes of a file of the bundle are here; free 0 bytes and what "
        "the files after it need, then join again"
    )
    assert failure.value.exit_status == 3
    assert not store.has(DIGEST)


@pytest.mark.parametrize("digest", ["../../.bashrc", "", DIGEST.upper(), DIGEST + "0"])
def test_no_name_but_a_digest_reaches_the_disk_or_the_hub(store: FileStore, digest: str) -> None:
    hub = Downloads([DATA])
    with pytest.raises(ProtocolViolation, match="is not a sha256"):
        asyncio.run(fetch_file(store, hub, digest, len(DATA)))
    assert hub.asked == []
    assert not store.directory.exists()
