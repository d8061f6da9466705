"""Blobs that no view, receipt or open round needs are deleted, and never one that is needed, wherever the hub is killed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedsoda_edge.ports.disk import BlobStore, sha256
from fedsoda_edge.protocol import messages as ms
from fedsoda_hub.federation.state import LedgerState
from fedsoda_hub.run.ledger import Ledger
from fedsoda_hub.serving.uploads import Uploads, needed_blobs
from tests.hub.federation.test_rounds import RULES, Run, compute
from tests.hub.serving.test_daemon import LAYOUT, joined, outcome, serving, update, write_run
from tests.hub.serving.test_uploads import arrived


class Disk(Run):
    """A run whose digests are files: jobs write their results, updates are stored, and the store is tidied as a hub does."""

    def __init__(self, directory: Path, rounds: int, names: str = "abc") -> None:
        self.blobs = BlobStore(directory / "blobs")
        self.uploads = Uploads(self.blobs, "bf16", directory / "uploads")
        self.names = names
        self.loop = asyncio.new_event_loop()
        self.most = 0
        super().__init__(rules(rounds))

    def put(self, digest: str) -> None:
        self.blobs.directory.mkdir(parents=True, exist_ok=True)
        self.blobs.path(digest).write_bytes(b"x")

    def finish_job(self, *, settle: bool = True) -> None:
        for made in digests_in(compute(self.jobs[0])):
            self.put(made)
        super().finish_job(settle=False)
        self.loop.run_until_complete(self.uploads.tidy(self.state, ()))
        there = set(self.blobs.digests())
        assert needed_blobs(self.state) <= there
        self.most = max(self.most, len(there))
        if settle:
            self._settle()

    def play(self, rounds: int) -> None:
        self.ready(*self.names)
        for _ in range(rounds):
            for name in self.names:
                came = self.update(name)
                self.put(came.digest)
                self.do(came)

    def close(self) -> None:
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


def rules(rounds: int) -> Any:
    return replace(RULES, count=rounds, min_edges=3, realign_every=2)


def digests_in(result: Any) -> set[str]:
    """All digests that a result names, whatever its type."""
    if isinstance(result, str):
        return {result} if len(result) == 64 else set()
    if isinstance(result, tuple):
        return {one for part in result for one in digests_in(part)}
    return {one for name in getattr(result, "__struct_fields__", ()) for one in digests_in(getattr(result, name))}


def test_the_disk_of_200_rounds_is_that_of_a_few(tmp_path: Path) -> None:
    few, many = Disk(tmp_path / "few", 10), Disk(tmp_path / "many", 200)
    few.play(10)
    many.play(200)
    assert (len(few.state.losses), len(many.state.losses)) == (10, 200)
    assert many.most == few.most
    assert many.most <= 40
    few.close()
    many.close()


def test_the_ledger_of_200_rounds_has_one_snapshot(tmp_path: Path) -> None:
    ledger, state = Ledger(tmp_path / "ledger.sqlite"), LedgerState()
    for number in range(200):
        state.losses.append(float(number))
        ledger.snapshot(state)
    assert ledger.database.read("SELECT COUNT(*) FROM snapshot") == [(1,)]
    ledger.close()


def test_what_an_export_may_still_read_is_kept_for_one_round_more(tmp_path: Path) -> None:
    run = Disk(tmp_path, 10)
    run.play(3)
    first = run.state.master
    run.play(1)
    assert run.blobs.has(first)
    run.play(1)
    assert not run.blobs.has(first)
    run.close()


# --- a hub that is killed ---------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


def steps(monkeypatch: pytest.MonkeyPatch, die_at: int) -> Callable[[], int]:
    """Count what is appended, stored, snapshot and deleted; end the process before the `die_at`-th of these."""
    count = 0

    def dying(owner: type, method: str) -> None:
        original = getattr(owner, method)

        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == die_at:
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, method, step)

    for owner, method in ((Ledger, "append"), (Ledger, "snapshot"), (BlobStore, "adopt"), (BlobStore, "delete")):
        dying(owner, method)
    return lambda: count


VALUES = {"a": 0.5, "b": 0.25}
TABLES: dict[str, dict[str, Any]] = {"rounds": {"count": 3, "min_edges": 2, "quorum": 1.0}}


async def whole_run(directory: Path) -> None:
    settings = write_run(directory, **TABLES)
    async with serving(settings, exit_when_done=True) as hub:
        known = {token.edge for token in hub.daemon.disk.ledger.tokens.all()}
        tokens = {}
        for name in VALUES:
            secret = directory / f"{name}.token"
            if name not in known:
                secret.write_text(hub.token(name))
            tokens[name] = secret.read_text()
        playing = asyncio.create_task(resumed(hub, tokens))
        await asyncio.wait({playing, hub.running}, return_when=asyncio.FIRST_COMPLETED)
        playing.cancel()
        await asyncio.gather(playing, return_exceptions=True)
        async with asyncio.timeout(15):  # where a connection's task died of it, the server drops that and the hub stays
            await hub.running


async def resumed(hub: Any, tokens: dict[str, str]) -> None:
    """Edges that answer every offer, whichever round the hub is in."""

    async def one(name: str) -> None:
        async with joined(hub.url, tokens[name], name) as device:
            while True:
                message = await device.hear(ms.Message)
                if isinstance(message, ms.RoundOffer):
                    await device.upload(message, update(VALUES[name] + message.round))
                elif isinstance(message, ms.Farewell):
                    return

    await asyncio.gather(*(one(name) for name in tokens))


@pytest.mark.slow
def test_a_hub_that_is_killed_between_any_two_steps_ends_with_the_same_result_and_no_more_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        counted = steps(patch, 0)
        asyncio.run(whole_run(tmp_path / "calm"))
        total = counted()
    calm = write_run(tmp_path / "calm", **TABLES)
    wanted, files = outcome(calm), stored(tmp_path / "calm")
    assert total > 20
    for die_at in range(4, total, max(1, total // 6)):
        directory = tmp_path / str(die_at)
        with monkeypatch.context() as patch:
            steps(patch, die_at)
            with pytest.raises((Killed, BaseExceptionGroup, TimeoutError)):
                asyncio.run(whole_run(directory))
        (directory / "small.run" / "uploads").mkdir(exist_ok=True)
        (directory / "small.run" / "uploads" / "7").write_bytes(b"half an update")
        (directory / "small.run" / "blobs" / f"{'0' * 64}.1.part").write_bytes(b"half a blob")
        asyncio.run(whole_run(directory))
        settings = write_run(directory, **TABLES)
        assert outcome(settings) == wanted
        assert needed_blobs(replayed(settings)) <= stored(directory)
        assert len(stored(directory)) <= len(files)
        assert list((directory / "small.run" / "uploads").glob("*")) == []
        assert not list((directory / "small.run" / "blobs").glob("*.part"))


def replayed(settings: Any) -> LedgerState:
    ledger = Ledger(settings.run_dir / "ledger.sqlite")
    state = ledger.replay()
    ledger.close()
    return state


def stored(directory: Path) -> set[str]:
    return set(BlobStore(directory / "small.run" / "blobs").digests())


def test_bytes_that_come_again_while_they_are_deleted_are_stored(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path / "blobs")
    uploads = Uploads(blobs, "bf16", tmp_path / "uploads")
    digest = blobs.put(update(0.5))
    deleting, may_go_on = asyncio.Event(), asyncio.Event()

    async def play() -> None:
        loop = asyncio.get_running_loop()
        original = blobs.delete

        def slowly(name: str) -> None:
            loop.call_soon_threadsafe(deleting.set)
            asyncio.run_coroutine_threadsafe(may_go_on.wait(), loop).result()
            original(name)

        object.__setattr__(blobs, "delete", slowly)
        tidying = asyncio.create_task(uploads.tidy(LedgerState(), ()))
        await deleting.wait()
        taking = asyncio.create_task(uploads.take(arrived(uploads, update(0.5)), LAYOUT))
        await asyncio.sleep(0.05)
        assert not taking.done()
        may_go_on.set()
        await tidying
        assert await taking is None

    asyncio.run(play())
    assert sha256(blobs.get(digest)) == digest
