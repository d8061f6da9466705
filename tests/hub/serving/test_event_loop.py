"""Nothing durable is written, and no table is scanned, on the loop that all edges share: real rounds of three edges."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedsoda_edge.errors import DiskFull
from fedsoda_edge.ports.disk import BlobStore
from fedsoda_edge.protocol import messages as ms
from fedsoda_hub.run.database import Database
from fedsoda_hub.run.ledger import Ledger, RoundTraffic
from fedsoda_hub.run.tokens import Tokens
from fedsoda_hub.serving import hearing, roster
from fedsoda_hub.serving.traffic import Traffic
from tests.hub.serving.test_daemon import Hub, joined, play, serving, update, write_run

TABLES: dict[str, dict[str, Any]] = {"rounds": {"count": 3, "min_edges": 3, "cohort": 3, "quorum": 1.0}}


def is_on_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


@contextlib.contextmanager
def watched(patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is written durably or scanned on the thread of a running loop, with the calls that led there."""
    found: list[str] = []

    def noting(original: Callable[..., Any], what: str) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            calls = traceback.extract_stack()
            is_child = any(call.name == "answer" for call in calls)  # what stands in for the process that owns torch
            if is_on_loop() and not is_child:
                found.append(f"{what}\n{''.join(calls.format())}")
            return original(*args, **kwargs)

        return noted

    with patch.context() as patched:
        for name in ("fsync", "fdatasync"):
            if hasattr(os, name):
                patched.setattr(os, name, noting(getattr(os, name), name))
        patched.setattr(Database, "write", noting(Database.write, "a statement that syncs"))
        patched.setattr(Database, "read", noting(Database.read, "a statement that may scan"))
        patched.setattr(BlobStore, "verify", noting(BlobStore.verify, "a blob is read whole"))
        yield found


async def rounds_of_three(hub: Hub, patch: pytest.MonkeyPatch) -> list[str]:
    with watched(patch) as found:
        values = {"a": 0.5, "b": 0.25, "c": 0.125}
        tokens = {name: await asyncio.to_thread(hub.token, name) for name in values}
        playing = asyncio.create_task(play(hub, tokens, values, 3))
        async with httpx.AsyncClient(verify=False, trust_env=False, base_url=hub.url) as client:
            assert (await client.get("/v1/status")).status_code == 200
            assert (await client.get("/metrics")).status_code == 200
        await playing
        await hub.until("run_ended")
    return found


def test_rounds_of_three_edges_write_and_scan_nothing_on_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def talk() -> list[str]:
        async with serving(write_run(tmp_path, **TABLES)) as hub:
            return await rounds_of_three(hub, monkeypatch)

    assert asyncio.run(talk()) == []


def test_a_token_that_is_bound_on_the_loop_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def here(call: Callable[..., Any], *args: Any) -> Any:
        return call(*args)

    class OnLoop:
        to_thread = staticmethod(here)

        def __getattr__(self, name: str) -> Any:
            return getattr(asyncio, name)

    monkeypatch.setattr(roster, "asyncio", OnLoop())

    async def talk() -> list[str]:
        async with serving(write_run(tmp_path, **TABLES)) as hub:
            return await rounds_of_three(hub, monkeypatch)

    found = asyncio.run(talk())
    assert len([one for one in found if one.startswith("a statement that syncs")]) == 3  # one for each first Hello


# --- what waits for nothing --------------------------------------------------------------------------------


def test_a_look_up_waits_for_neither_a_write_nor_a_scan(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    secret = ledger.tokens.create("a")
    for busy in (ledger.database._writer, ledger.database._reader):
        assert busy is not ledger.database._finder
        busy.lock.acquire()
    found: list[Any] = []
    looking = threading.Thread(target=lambda: found.append(ledger.tokens.find(secret)))
    looking.start()
    looking.join(5)
    for busy in (ledger.database._writer, ledger.database._reader):
        busy.lock.release()
    ledger.close()
    assert found
    assert found[0].edge == "a"


def test_look_ups_of_tokens_use_an_index_and_a_bound_one_is_not_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.tokens.create("a")
    for column in ("sha256", "edge"):
        plan = ledger.database.read(
            f"EXPLAIN QUERY PLAN SELECT edge, device, revoked FROM tokens WHERE {column} = ?", ("a",)
        )
        assert all("SEARCH" in str(row[-1]) and "SCAN" not in str(row[-1]) for row in plan), plan
    assert ledger.tokens.bind(ms.EdgeId("a"), "laptop")
    before = ledger.database.read("SELECT total_changes()")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Database, "write", lambda *_: pytest.fail("it is bound already"))
        assert ledger.tokens.bind(ms.EdgeId("a"), "laptop")
        assert not ledger.tokens.bind(ms.EdgeId("a"), "phone")
    assert ledger.database.read("SELECT total_changes()") == before
    ledger.close()


def test_traffic_that_finds_the_disk_full_is_written_by_the_next_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, a = Ledger(None), ms.EdgeId("a")
    ledger.add_traffic(a, 1, 1, 2)
    traffic = Traffic(ledger)
    original, problems = Ledger.add_all_traffic, [DiskFull("full")]

    def sometimes(self: Ledger, rows: Any) -> None:
        if problems:
            raise problems.pop()
        original(self, rows)

    monkeypatch.setattr(Ledger, "add_all_traffic", sometimes)

    async def play() -> None:
        traffic.add(a, 1, 10, 20)
        await traffic.flush()
        assert ledger.traffic() == [RoundTraffic("a", 1, 1, 2)]
        traffic.add(a, 1, 100, 0)
        traffic.add(a, 2, 5, 6)
        await traffic.flush()

    asyncio.run(play())
    assert ledger.traffic() == [RoundTraffic("a", 1, 111, 22), RoundTraffic("a", 2, 5, 6)]
    assert traffic.travelled == (116, 28) == ledger.travelled()


def test_a_snapshot_takes_the_place_of_the_one_before() -> None:
    ledger = Ledger(None)
    state = ledger.replay()
    for _ in range(3):
        ledger.snapshot(state)
    assert len(ledger.database.read("SELECT seq FROM snapshot")) == 1
    assert ledger.replay() == state


# --- an edge that says more than the hub can do ------------------------------------------------------------


def test_an_edge_that_says_much_is_heard_only_as_fast_as_it_is_handled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0

    async def talk() -> None:
        nonlocal most
        async with serving(write_run(tmp_path, rounds={"min_edges": 1, "count": 1})) as hub:
            tokens = {name: hub.token(name) for name in "ab"}
            async with joined(hub.url, tokens["a"]) as a, joined(hub.url, tokens["b"], "phone") as b:
                offer = await a.hear(ms.RoundOffer)
                handling = asyncio.Event()
                perform = hub.daemon.decisions._perform

                async def slow(*args: Any) -> bool:
                    await handling.wait()
                    return await perform(*args)

                monkeypatch.setattr(hub.daemon.decisions, "_perform", slow)
                for _ in range(200):
                    await b.say(ms.Paused(reason="flood"))
                await asyncio.sleep(0.2)
                most = hub.daemon.inbox.qsize()
                handling.set()
                await a.upload(offer, update(0.5))
                await a.hear(ms.Receipt)
                await hub.until("run_ended")

    asyncio.run(talk())
    assert 0 < most <= hearing.MAX_UNHEARD


def test_tokens_are_looked_up_by_name_without_reading_all(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(None)
    for name in ("a", "b"):
        ledger.tokens.create(name)
    monkeypatch.setattr(Tokens, "all", lambda _: pytest.fail("a scan"))
    assert ledger.tokens.bind(ms.EdgeId("b"), "laptop")
    ledger.tokens.rebind("b")
    ledger.tokens.revoke("a")
    ledger.tokens.create("a")
