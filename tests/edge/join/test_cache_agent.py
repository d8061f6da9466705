"""A join leaves no border states behind, unless its owner keeps the key: then the next join sweeps nothing. A worker
that dies goes on where it was."""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.edge import Edge
from fedsoda_edge.errors import WorkerFailed
from fedsoda_edge.testing import LOCAL, ScriptedHub
from fedsoda_edge.worker.training import num_steps
from tests.joins import joining
from tests.worker_here import WorkerHere

NUM_ROWS = 8


@pytest.fixture
def data(tmp_path: Path) -> LocalData:
    rows = [{"prompt": f"visit {i}", "completion": "home" if i % 2 else "ward"} for i in range(NUM_ROWS)]
    path = tmp_path / "visits.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return LocalData(path)


@dataclass
class Joined:
    events: list[dict[str, Any]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    files_during: set[str] = field(default_factory=set)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]


def join(
    home: Path,
    data: LocalData,
    scripted: Path,
    rounds: int,
    *,
    dies: int = 0,
    worker: WorkerHere | None = None,
    **options: Any,
) -> Joined:
    """Take part to the end."""
    hub, joined = ScriptedHub(rounds=rounds, bundle=scripted), Joined()
    edge, worker = Edge(hub, home=home, threads=1, **options), worker or WorkerHere(dies=dies)
    with joining(edge, data, joined.events.append, worker=worker) as participation:
        for offer in participation:
            update = offer.train()
            joined.files_during |= {path.name.partition("-")[0] for path in borders(home)}
            joined.digests.append(update.digest)
            assert offer.submit(update)
    assert len(hub.updates) == rounds
    return joined


def borders(home: Path) -> set[Path]:
    return set(home.glob("runs/*/border/*"))


def test_a_join_that_ended_leaves_neither_border_states_nor_a_key(
    tmp_path: Path, data: LocalData, scripted: Path
) -> None:
    home = tmp_path / "home"
    left = home / "runs" / "killed" / "border" / "border-0.cache"  # by a join that was killed: nobody has its key
    left.parent.mkdir(parents=True)
    left.write_bytes(b"sealed")
    joined = join(home, data, scripted, rounds=2)
    assert joined.files_during == {"border"}
    [swept] = joined.of("swept")  # once for both rounds: the alignment stayed
    assert (swept["num_kept"], swept["num_damaged"]) == (NUM_ROWS, 0)
    assert swept["kept_bytes"] > NUM_ROWS * 2 * 64
    steps = [(event["done"], event["total"]) for event in joined.of("sweep")]
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]
    assert not list(home.glob("runs/*/border"))
    assert not (home / "cache.key").exists()
    assert not list(home.glob("runs/*/checkpoint/*"))


def test_with_its_key_kept_the_next_join_sweeps_nothing_and_trains_the_same(
    tmp_path: Path, data: LocalData, scripted: Path
) -> None:
    home = tmp_path / "home"
    first = join(home, data, scripted, rounds=1, keep_cache_key=True)
    key = (home / "cache.key").read_bytes()
    held = {path: path.read_bytes() for path in borders(home)}
    assert stat.S_IMODE((home / "cache.key").stat().st_mode) == 0o600
    assert len(held) == 1
    assert first.of("sweep")
    for path in home.glob("runs/*/residual*"):
        path.unlink()  # so that the second join hands in what the first did
    second = join(home, data, scripted, rounds=1, keep_cache_key=True)
    assert second.of("sweep") == []
    assert second.of("swept")[0]["num_kept"] == NUM_ROWS
    assert second.digests == first.digests
    assert (home / "cache.key").read_bytes() == key
    assert {path: path.read_bytes() for path in borders(home)} == held


@pytest.mark.parametrize("dies", [1, 2])
def test_a_worker_that_died_is_started_again_and_hands_in_the_same_update(
    tmp_path: Path, data: LocalData, scripted: Path, dies: int
) -> None:
    calm = join(tmp_path / "calm", data, scripted, rounds=1)
    joined = join(tmp_path / "home", data, scripted, rounds=1, dies=dies)
    assert joined.digests == calm.digests
    assert len(joined.of("swept")) == 1 + dies
    assert joined.of("sweep") == calm.of("sweep")  # states are kept: only the first worker swept
    assert [said["message"] for said in joined.of("notice")][:dies] == [
        "the worker was killed; it is started again"
    ] * dies
    [trained] = joined.of("trained")
    assert trained["num_steps"] == num_steps(NUM_ROWS, LOCAL)


def test_a_worker_that_dies_thrice_in_a_round_ends_the_join(tmp_path: Path, data: LocalData, scripted: Path) -> None:
    with pytest.raises(WorkerFailed, match="the worker was killed"):
        join(tmp_path / "home", data, scripted, rounds=1, dies=3)
    assert not list((tmp_path / "home").glob("runs/*/border"))
