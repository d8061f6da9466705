"""Hub and edges in one process compute what real processes on real sockets compute, bit for bit."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec.structs import replace

from fedsoda_edge import events as edge_events
from fedsoda_edge.errors import DataProblem
from fedsoda_hub.events import HubEvent, HubSay, UpdateAccepted
from fedsoda_hub.federation.records import Realigned, RoundClosed
from fedsoda_hub.local import in_process, processes
from fedsoda_hub.run.ledger import Ledger
from fedsoda_hub.settings.run import RunSettings
from fedsoda_hub.settings.toml import write_toml
from tests.hub.runs import WORDS, make_run

EDGES = ("a", "b")
THREAD = {"FEDSODA_THREADS": "1", "OMP_NUM_THREADS": "1"}


def make(directory: Path, model: Path) -> tuple[RunSettings, dict[str, Path]]:
    settings = make_run(
        directory,
        model,
        method={"realign_every": 1},
        align={"steps": 2, "realign_steps": 1},
        local={"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2},
        wire={"codec": "nf4"},
        task={"eval_data": None},
    )
    rounds = replace(settings.rounds, count=2, min_edges=2, quorum=1.0)
    settings = replace(settings, rounds=rounds, listen=replace(settings.listen, port=0))
    Path(settings.path).write_text(write_toml(settings))
    data = {}
    for number, name in enumerate(EDGES):
        data[name] = directory / f"{name}.jsonl"
        rows = [{"word": word, "answer": "yes" if i % (2 + number) else "no"} for i, word in enumerate(WORDS)]
        data[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return settings, data


def in_one_process(
    settings: RunSettings, data: dict[str, Path], say: HubSay, say_of: Callable[[str], edge_events.EventSink]
) -> None:
    async def run() -> None:
        stop = asyncio.get_running_loop().create_future()
        await in_process.federate(settings, data, settings.directory / "homes", stop, say, say_of)

    asyncio.run(run())


def history(settings: RunSettings) -> list[tuple[str, ...]]:
    """Digests of w, v and the emulator's view, in order."""
    with contextlib.closing(Ledger(settings.run_dir / "ledger.sqlite")) as ledger:
        records = ledger.records()
    return [
        (record.master, record.view, record.delta) if isinstance(record, RoundClosed) else (record.view, record.delta)
        for record in records
        if isinstance(record, RoundClosed | Realigned)
    ]


@dataclass
class Ran:
    """A run in one process, and what its edges said."""

    settings: RunSettings
    said: dict[str, list[edge_events.AnyEvent]]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Ran:
    settings, data = make(tmp_path_factory.mktemp("calm"), tiny_llama)
    ran = Ran(settings, {name: [] for name in EDGES})
    in_one_process(settings, data, lambda _: None, lambda name: ran.said[name].append)
    return ran


@pytest.mark.slow
def test_one_process_gives_the_bits_of_real_processes(calm: Ran, tmp_path: Path, tiny_llama: Path) -> None:
    theirs, data = make(tmp_path, tiny_llama)

    async def run() -> None:
        stop = asyncio.get_running_loop().create_future()
        homes = theirs.directory / "homes"
        await processes.federate(theirs, data, homes, stop, lambda _: None, lambda _: lambda _: None, THREAD, THREAD)

    asyncio.run(run())
    assert len(history(calm.settings)) == 4  # two rounds, a realignment before each
    assert history(calm.settings) == history(theirs)
    for name in EDGES:
        assert [event.round for event in calm.said[name] if isinstance(event, edge_events.Accepted)] == [1, 2]
        assert isinstance(calm.said[name][-1], edge_events.RunFinished)
    with (
        contextlib.closing(Ledger(calm.settings.run_dir / "ledger.sqlite")) as one,
        contextlib.closing(Ledger(theirs.run_dir / "ledger.sqlite")) as other,
    ):
        bytes_up = [sum(up for _, _, up, _ in ledger.traffic()) for ledger in (one, other)]
    assert bytes_up[0] == pytest.approx(bytes_up[1], rel=0.1)  # progress messages come by the clock


def test_no_worker_writes_checkpoints(calm: Ran) -> None:
    """None of them dies alone."""
    assert [event.num_steps for event in calm.said["a"] if isinstance(event, edge_events.RoundTrained)] == [3, 3]
    assert not list((calm.settings.directory / "homes").glob("*/runs/*/checkpoint"))


def test_what_was_stopped_goes_on_to_the_same_bits(calm: Ran, tmp_path: Path, tiny_llama: Path) -> None:
    """The hub fails when it hears of the first update of round 2, with the second one in training."""
    rough, data = make(tmp_path, tiny_llama)

    def fail(event: HubEvent) -> None:
        if isinstance(event, UpdateAccepted) and event.round == 2:
            raise KeyError("the hub is gone")

    with pytest.raises(KeyError, match="the hub is gone"):
        in_one_process(rough, data, fail, lambda _: lambda _: None)
    assert 2 <= len(history(rough)) < 4
    in_one_process(rough, data, lambda _: None, lambda _: lambda _: None)
    assert history(rough) == history(calm.settings)


def test_an_edge_that_fails_ends_the_run_with_its_own_words(tmp_path: Path, tiny_llama: Path) -> None:
    settings, data = make(tmp_path, tiny_llama)
    data["b"].write_text('{"word": "cow"}\n')
    with pytest.raises(DataProblem, match="no column 'answer'"):
        in_one_process(settings, data, lambda _: None, lambda _: lambda _: None)


def test_edges_share_an_adapter_and_nothing_that_was_trained(calm: Ran, tmp_path: Path, tiny_llama: Path) -> None:
    """b alone says the loss of its first round that it said after a had trained the same adapter."""
    settings, data = make(tmp_path, tiny_llama)
    settings = replace(settings, rounds=replace(settings.rounds, min_edges=1, count=1))
    alone: list[edge_events.AnyEvent] = []
    in_one_process(settings, {"b": data["b"]}, lambda _: None, lambda _: alone.append)
    first = [
        next(event.loss for event in said if isinstance(event, edge_events.RoundTrained))
        for said in (alone, calm.said["b"])
    ]
    assert first[0] == first[1]
