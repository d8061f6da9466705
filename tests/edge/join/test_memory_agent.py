"""A join trains the quickest way that its memory allows, goes on leaner where it runs out, and never mixes two ways in
a round that it takes up again."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
import torch

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.edge import Edge
from fedsoda_edge.errors import DeviceTooSmall, FedSODAError, OutOfMemory, UsageProblem, WorkerFailed
from fedsoda_edge.join import preparation, size_class, trainer
from fedsoda_edge.ports.disk import sha256_file
from fedsoda_edge.protocol import commands as cmd
from fedsoda_edge.protocol.calls import Call, ProgressT, ResultT
from fedsoda_edge.protocol.manifest import parse_manifest
from fedsoda_edge.protocol.messages import DeviceFacts
from fedsoda_edge.protocol.needs import KERNEL_BYTES, PROCESS_BYTES, SampleSizes, plans, shape_of
from fedsoda_edge.testing import LOCAL, ScriptedHub, make_bundle
from fedsoda_edge.worker.batches import SweptSamples
from fedsoda_edge.worker.training import num_steps
from tests.edge.join.test_cache_agent import Joined
from tests.joins import joining
from tests.schema import EDGE
from tests.worker_here import WorkerHere

MIB = 2**20
PROCESS = PROCESS_BYTES  # what the worker here says of itself: what a join reckons with before there is one
VOCABULARY = (
    1_000_000  # plans see that many ids: a dense head takes 244 MiB more than the process, a packed one 122 MiB
)
LITTLE, PLENTY = PROCESS + 310 * MIB, 16 * 1024 * MIB
TOO_SMALL = DeviceTooSmall("memory ran out on cpu; close other programs")
RAN_OUT = OutOfMemory("memory ran out during Train (MemoryError); end other programs")
NO_VRAM = DeviceTooSmall("memory ran out on cuda; close other programs")
KILLED = WorkerFailed("the process ended with status -9 (it was killed, most likely because memory ran out)", "", True)


def worker_here(*failures: FedSODAError, dies: int = 0) -> WorkerHere:
    """A worker whose `Train` calls fail so; no two of its processes are of one size."""
    return WorkerHere(*failures, dies=dies, process_bytes=lambda number: PROCESS + number * 4096)


class FullGPU(WorkerHere):
    """Its torch sees a GPU, whose memory runs out whichever way it trains there."""

    def __init__(self) -> None:
        super().__init__(process_bytes=lambda number: PROCESS + number * 4096)

    async def call(
        self, call: Call[ResultT, ProgressT], on_progress: Callable[[ProgressT], None] | None = None
    ) -> ResultT:
        if isinstance(call, cmd.Sweep) and call.memory.device != "cpu":
            raise NO_VRAM
        answer = await super().call(call, on_progress)
        return msgspec.structs.replace(answer, has_cuda=True) if isinstance(call, cmd.Open) else answer


class ManifestHub(ScriptedHub):
    """Notes what is fetched of the bundle."""

    def __init__(self, scripted: Path, rounds: int) -> None:
        super().__init__(rounds, bundle=scripted)
        self.fetched: list[str] = []

    async def fetch(self, digest: str, offset: int) -> AsyncIterator[bytes]:
        self.fetched.append(digest)
        async for piece in super().fetch(digest, offset):
            yield piece


@pytest.fixture
def data(tmp_path: Path) -> LocalData:
    rows = [{"prompt": f"visit {i}", "completion": "home" if i % 2 else "ward"} for i in range(8)]
    path = tmp_path / "visits.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return LocalData(path)


def has(ram: int, vram: int = 0) -> Any:
    """A device with so much memory free; without VRAM it has no GPU."""
    gpu = "RTX 4060" if vram else ""
    facts = DeviceFacts(ram_bytes=ram, vram_bytes=vram, disk_bytes=PLENTY, threads=1, accelerator=gpu)
    stack = contextlib.ExitStack()
    for module in (trainer, size_class):
        stack.enter_context(mock.patch.object(module, "read_device", return_value=facts))
    return stack


def join(
    home: Path,
    data: LocalData,
    scripted: Path,
    worker: WorkerHere,
    *,
    ram: int = PLENTY,
    vram: int = 0,
    rounds: int = 1,
    **options: Any,
) -> Joined:
    """Take part to the end; the worker's own peak, which is that of all tests, is not looked at."""
    hub, joined = ManifestHub(scripted, rounds), Joined()
    with (
        has(ram, vram),
        mock.patch("fedsoda_edge.worker.worker.peak_rss_bytes", return_value=0),
        mock.patch("fedsoda_edge.worker.worker.return_memory_at_once"),
        mock.patch.object(preparation, "shape_of", lambda manifest: replace(shape_of(manifest), vocab=VOCABULARY)),
        joining(Edge(hub, home=home, threads=1, **options), data, joined.events.append, worker=worker) as participation,
    ):
        for offer in participation:
            update = offer.train()
            joined.digests.append(update.digest)
            assert offer.submit(update)
    for event in joined.events:
        EDGE.check_event(event)
    return joined


def ways(joined: Joined) -> list[tuple[bool, bool, int]]:
    return [(plan["packed"], plan["recompute"], plan["micro_batch"]) for plan in joined.of("memory")]


def notices(joined: Joined) -> list[str]:
    return [event["message"] for event in joined.of("notice") if "What leaves" not in event["message"]]


DENSE, PACKED = (False, False, 4), (True, False, 4)
LEANER = "; training continues in a way that needs less memory"


# -- the way that is taken ------------------------------------------------------------------------------


def test_memory_decides_the_way_and_the_way_is_told_before_the_data_is(
    tmp_path: Path, data: LocalData, scripted: Path
) -> None:
    plenty = join(tmp_path / "plenty", data, scripted, worker_here())
    little = join(tmp_path / "little", data, scripted, worker_here(), ram=LITTLE)
    limited = join(tmp_path / "limited", data, scripted, worker_here(), max_ram=LITTLE)
    assert (ways(plenty), ways(little), ways(limited)) == ([DENSE], [PACKED], [PACKED])
    for joined, free in ((plenty, "16.0 GiB"), (little, "750 MiB"), (limited, "16.0 GiB")):
        [plan] = joined.of("memory")
        parts = {part["part"]: part["bytes"] for part in plan["parts"]}
        assert parts["the process, with its libraries"] == PROCESS + 4096 + KERNEL_BYTES
        assert f" of {free} free: " in plan["message"]
        kinds = [event["event"] for event in joined.events]
        assert kinds.index("device") < kinds.index("memory") < kinds.index("data")
    [limit] = limited.of("memory")
    assert next(part["bytes"] for part in limit["parts"] if part["part"] == "peak") <= LITTLE
    assert limited.digests == little.digests


def test_a_limit_below_every_way_ends_the_join_before_anything_but_the_manifest_is_fetched(
    tmp_path: Path, data: LocalData, scripted: Path
) -> None:
    hub = ManifestHub(scripted, rounds=1)
    edge = Edge(hub, home=tmp_path / "home", max_ram=200 * MIB, device="cpu")
    with pytest.raises(DeviceTooSmall) as failure, joining(edge, data, worker=worker_here()):
        pass
    assert failure.value.exit_status == 4
    assert str(failure.value).startswith("max_ram allows 200 MiB, the sub-LLM needs at least ")
    assert hub.fetched == [sha256_file(scripted / "manifest.json")]


def test_the_first_step_is_tried_with_the_longest_rows_which_are_swept_together(tmp_path: Path, scripted: Path) -> None:
    path = tmp_path / "visits.jsonl"
    rows = [{"prompt": "visit " * (1 + 3 * i % 8), "completion": "home"} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with mock.patch.object(SweptSamples, "expect", autospec=True) as expect:
        join(tmp_path / "home", LocalData(path), scripted, worker_here())
    tried, trained = (call.args[1] for call in expect.call_args_list)
    assert {len(rows[index]["prompt"].split()) for index in tried} == {5, 6, 7, 8}
    assert sorted(trained) == list(range(8))


# -- memory that runs out -------------------------------------------------------------------------------


def test_a_worker_for_which_memory_runs_out_goes_on_leaner_again_and_again(
    tmp_path: Path, data: LocalData, scripted: Path
) -> None:
    worker = worker_here(TOO_SMALL, RAN_OUT)
    joined = join(tmp_path / "home", data, scripted, worker, rounds=2)
    first, second, third = joined.of("memory")
    assert ways(joined)[0] == DENSE
    assert notices(joined) == [f"{TOO_SMALL}{LEANER}", f"{RAN_OUT}{LEANER}"]
    peaks = [next(part["bytes"] for part in plan["parts"] if part["part"] == "peak") for plan in (first, second, third)]
    assert peaks == sorted(set(peaks), reverse=True)
    assert worker.num_started == 3
    assert [trained["round"] for trained in joined.of("trained")] == [1, 2]  # the second as the first


def test_memory_that_runs_out_outside_of_a_step_is_told_as_such(
    tmp_path: Path, data: LocalData, scripted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, failures = torch.optim.AdamW.step, [torch.OutOfMemoryError("CUDA out of memory.")]

    def step(self: torch.optim.AdamW) -> Any:
        if failures:
            raise failures.pop()
        return plain(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    joined = join(tmp_path / "home", data, scripted, worker_here())
    assert len(ways(joined)) == 2
    [notice] = notices(joined)
    assert notice.startswith("memory ran out on cpu, where ")
    assert notice.endswith(LEANER)


def test_where_no_way_is_leaner_the_join_ends_with_status_4(tmp_path: Path, data: LocalData, scripted: Path) -> None:
    worker = worker_here(*[TOO_SMALL] * 20)
    with pytest.raises(DeviceTooSmall) as failure:
        join(tmp_path / "home", data, scripted, worker)
    assert failure.value.exit_status == 4
    assert str(failure.value) == str(TOO_SMALL)
    assert 1 < worker.num_started <= 12


def test_a_first_kill_is_taken_for_an_accident_and_a_second_for_a_lack_of_memory(
    tmp_path: Path, data: LocalData, scripted: Path
) -> None:
    once = join(tmp_path / "once", data, scripted, worker_here(KILLED))
    twice = join(tmp_path / "twice", data, scripted, worker_here(KILLED, KILLED))
    assert (ways(once), notices(once)) == ([DENSE], [f"{KILLED}; it is started again"])
    assert ways(twice)[0] == DENSE
    assert len(ways(twice)) == 2
    assert notices(twice) == [f"{KILLED}; it is started again", f"{KILLED}{LEANER}"]


def test_a_worker_that_fails_by_itself_is_not_short_of_memory(tmp_path: Path, data: LocalData, scripted: Path) -> None:
    failed = WorkerFailed("ValueError: no", "")
    joined = join(tmp_path / "home", data, scripted, worker_here(failed, failed))
    assert ways(joined) == [DENSE]
    assert notices(joined) == [f"{failed}; it is started again"] * 2


# -- a GPU ----------------------------------------------------------------------------------------------


def test_auto_goes_on_with_the_cpu_where_a_gpu_has_memory_for_no_way(
    tmp_path: Path, data: LocalData, scripted: Path
) -> None:
    joined = join(tmp_path / "home", data, scripted, FullGPU(), vram=PLENTY)
    *before, last = [plan["device"] for plan in joined.of("memory")]
    assert len(before) > 1
    assert (set(before), last) == ({"cuda"}, "cpu")
    assert notices(joined) == [f"{NO_VRAM}{LEANER}"] * len(before)
    assert ways(joined)[-1] == DENSE
    assert joined.digests == join(tmp_path / "cpu", data, scripted, worker_here()).digests


@pytest.mark.parametrize(("device", "ram"), [("cuda", PLENTY), ("auto", 100 * MIB)], ids=["asked for", "no RAM"])
def test_a_gpu_without_memory_ends_the_join_where_the_cpu_is_not_to_be_used_or_has_no_room(
    tmp_path: Path, data: LocalData, scripted: Path, device: str, ram: int
) -> None:
    with pytest.raises(DeviceTooSmall) as failure:
        join(tmp_path / "home", data, scripted, FullGPU(), ram=ram, vram=PLENTY, device=device)
    assert str(failure.value) == str(NO_VRAM)


def test_a_gpu_that_torch_cannot_use_is_none_unless_it_was_asked_for(
    tmp_path: Path, data: LocalData, scripted: Path
) -> None:
    with mock.patch("torch.cuda.is_available", return_value=False):
        joined = join(tmp_path / "auto", data, scripted, worker_here(), vram=PLENTY)
        assert [plan["device"] for plan in joined.of("memory")] == ["cpu"]
        with pytest.raises(
            UsageProblem, match="torch has no CUDA here; install a CUDA build of torch, or train with device='cpu'"
        ):
            join(tmp_path / "cuda", data, scripted, worker_here(), vram=PLENTY, device="cuda")


# -- a round that is taken up again ---------------------------------------------------------------------


def broken_off(home: Path, data: LocalData, scripted: Path, ram: int) -> None:
    """A join that ended in the middle of its round, of which something is saved."""
    with pytest.raises(WorkerFailed):
        join(home, data, scripted, worker_here(dies=3), ram=ram)
    until = time.monotonic() + 10
    while not list(home.glob("runs/*/checkpoint/round.*.safetensors")):  # a thread writes it
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_round_in_its_middle_goes_on_the_way_it_began_and_the_next_join_plans_anew(
    tmp_path: Path, data: LocalData, scripted: Path
) -> None:
    home = tmp_path / "home"
    calm = join(tmp_path / "calm", data, scripted, worker_here(), ram=LITTLE)
    broken_off(home, data, scripted, LITTLE)
    again = join(home, data, scripted, worker_here(), ram=PLENTY)
    assert ways(again) == [PACKED]
    assert again.digests == calm.digests
    assert ways(join(home, data, scripted, worker_here(), ram=PLENTY)) == [DENSE]


def test_a_round_in_its_middle_goes_on_another_way_where_its_own_has_no_room(
    tmp_path: Path, data: LocalData, scripted: Path
) -> None:
    broken_off(tmp_path / "home", data, scripted, PLENTY)
    again = join(tmp_path / "home", data, scripted, worker_here(), ram=LITTLE)
    assert ways(again) == [PACKED]
    assert len(again.digests) == 1


@pytest.mark.parametrize("left", ["", "{}", '{"packed": 1}'])
def test_a_plan_that_this_version_does_not_read_is_none(
    tmp_path: Path, data: LocalData, scripted: Path, left: str
) -> None:
    home = tmp_path / "home"
    broken_off(home, data, scripted, LITTLE)
    [kept] = home.glob("runs/*/memory.json")
    kept.write_text(left)
    assert ways(join(home, data, scripted, worker_here(), ram=PLENTY)) == [DENSE]


# -- a real worker --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_process_trains_below_a_limit_that_only_a_leaner_way_keeps(tmp_path: Path, data: LocalData) -> None:
    """Nothing is made up here: the process measures itself, and its first step, against --max-ram."""
    wide = tmp_path / "wide"
    make_bundle(wide, VOCABULARY)
    limit, hub, events = PROCESS_BYTES + 270 * MIB, ManifestHub(wide, rounds=1), list[dict[str, Any]]()
    manifest = parse_manifest((wide / "manifest.json").read_bytes())
    dense = [plan for plan in plans(shape_of(manifest), "cpu", SampleSizes(4, 2, 1)) if not plan.packed]
    assert min(plan.peak for plan in dense) > limit
    edge = Edge(hub, home=tmp_path / "home", device="cpu", threads=1, max_ram=limit)
    with edge.join(data, on_event=events.append) as participation:
        for offer in participation:
            assert offer.submit(offer.train())
        peak = participation.report["worker_peak_rss_bytes"]
    [plan] = [event for event in events if event["event"] == "memory"]
    assert plan["packed"]
    assert 0 < peak <= limit
    [trained] = [event for event in events if event["event"] == "trained"]
    assert trained["num_steps"] == num_steps(8, LOCAL)
