"""The hub's child does a round's arithmetic as FedAvg's pseudocode and docs/protocol.md (p4-views) write it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from fedsoda_edge.errors import DataProblem
from fedsoda_edge.model import delta
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.ports.child import Child
from fedsoda_edge.ports.disk import BlobStore
from fedsoda_edge.protocol.messages import Digest, EdgeId
from fedsoda_hub.compute import Compute
from fedsoda_hub.federation import jobs
from fedsoda_hub.federation.jobs import AcceptedUpdate, Aggregate, AggregateResult
from fedsoda_hub.settings.open_run import OpenRun
from fedsoda_hub.settings.run import RunSettings
from tests.edge.model.test_bundle import random_lora


def quiet(progress: msgspec.Struct) -> None:
    """Say nothing of a job's progress."""


def opened(settings: RunSettings, codec: str, **aggregation: Any) -> Compute:
    compute = Compute()
    wire = msgspec.structs.replace(settings.wire, codec=codec)
    how = msgspec.structs.replace(settings.aggregation, **aggregation)
    compute.open(OpenRun(settings=msgspec.structs.replace(settings, wire=wire, aggregation=how)))
    return compute


def test_evaluation_data_that_cannot_be_judged_is_known_when_the_run_is_opened(
    prepared: RunSettings, tmp_path: Path
) -> None:
    """Not after the last round, and also where a run that was begun gets other data."""
    rows = tmp_path / "rows.jsonl"
    task = msgspec.structs.replace(prepared.task, eval_data=str(rows))
    call = OpenRun(settings=msgspec.structs.replace(prepared, task=task))
    for text, message in (
        ('{"word": "the", "answr": "yes"}', "'answer'.*answr, word"),
        ("", "no rows|empty"),
        (json.dumps({"word": "rain " * 999, "answer": "yes"}), "1 of 1 questions are longer than the model's"),
    ):
        rows.write_text(text)
        with pytest.raises(DataProblem, match=message):
            Compute().open(call)
    rows.write_text('{"word": "the", "answer": "yes"}')
    Compute().open(call)


def adapter_like(settings: RunSettings, seed: int) -> dict[str, Tensor]:
    spec = Bundle.open(settings.run_dir / "bundle").manifest.lora
    made = random_lora(spec, seed)
    return {item.name: made[item.name] for item in spec.adapter}


@pytest.mark.parametrize("codec", ["int8", "nf4", "bf16", "nf4-weight"])
def test_a_round_moves_master_and_view_as_the_pseudocode_says(prepared: RunSettings, codec: str) -> None:
    spec = Bundle.open(prepared.run_dir / "bundle").manifest.lora
    blobs = BlobStore(prepared.run_dir / "blobs")
    master, view = adapter_like(prepared, 1), adapter_like(prepared, 2)
    updates = {
        "b": (30, adapter_like(prepared, 3)),
        "a": (10, adapter_like(prepared, 4)),
        "c": (1000, adapter_like(prepared, 5)),
    }
    coded = {edge: delta.encode(tensors, codec) for edge, (_, tensors) in updates.items()}
    base = Digest(blobs.put(delta.to_bytes(view)))
    accepted = tuple(
        AcceptedUpdate(edge=EdgeId(edge), num_examples=count, digest=Digest(blobs.put(coded[edge])), view=base)
        for edge, (count, _) in updates.items()
    )
    job = Aggregate(
        trains="both",
        master=Digest(blobs.put(delta.to_bytes(master))),
        moments=None,
        views=(base,),
        updates=accepted,
    )
    compute = opened(prepared, codec)
    found = compute.aggregate(job, quiet)
    [step] = found.steps

    counts = {"a": 10.0, "b": 30.0, "c": 90.0}  # c is capped at 3 x the median
    decoded = {edge: delta.decode(coded[edge], spec.adapter, codec) for edge in "abc"}
    new_master = delta.from_bytes(blobs.get(found.master), spec.adapter)
    new_view = delta.from_bytes(blobs.get(step.view), spec.adapter)
    sent = delta.decode(blobs.get(step.delta), spec.adapter, codec)
    is_whole = codec == "nf4-weight"  # weights travel, not deltas: nothing of the old ones is left
    for name, before in master.items():
        mean = sum(counts[e] / 130 * decoded[e][name].double() for e in "abc")
        expected = mean if is_whole else before.double() + mean
        torch.testing.assert_close(new_master[name].double(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(new_view[name], sent[name] if is_whole else view[name] + sent[name])
        coded_values = new_master[name] if is_whole else new_master[name] - view[name]
        worst = (new_master[name] - new_view[name]).abs().max() / coded_values.abs().max()
        assert worst <= {"int8": 1 / 200, "bf16": 1 / 256, "nf4": 0.2, "nf4-weight": 0.2}[codec]
    assert compute.aggregate(msgspec.structs.replace(job, updates=accepted[::-1]), quiet) == found


def test_the_child_computes_what_this_process_does(prepared: RunSettings) -> None:
    """`fedsoda_hub.compute` as the daemon starts it: a process with the same answers."""
    blobs = BlobStore(prepared.run_dir / "blobs")
    view, coded = adapter_like(prepared, 2), delta.encode(adapter_like(prepared, 3), "int8")
    base = Digest(blobs.put(delta.to_bytes(view)))
    update = AcceptedUpdate(edge=EdgeId("a"), num_examples=3, digest=Digest(blobs.put(coded)), view=base)
    job = Aggregate(trains="both", master=base, moments=None, views=(base,), updates=(update,))

    async def ask() -> AggregateResult:
        child = Child("fedsoda_hub.compute", {"FEDSODA_THREADS": "1"})
        try:
            wire = msgspec.structs.replace(prepared.wire, codec="int8")
            await child.call(OpenRun(settings=msgspec.structs.replace(prepared, wire=wire)))
            return await child.call(job)
        finally:
            await child.close()

    assert asyncio.run(ask()) == opened(prepared, "int8").aggregate(job, quiet)


# --- robust rules -------------------------------------------------------------------------------------------------------


def spoiled_round(compute: Compute, settings: RunSettings, codec: str, num_edges: int) -> Aggregate:
    """A round of edges that agree somewhat, of which the last sends the reverse, 50 times as long."""
    view, common = adapter_like(settings, 0), adapter_like(settings, 99)
    start = Digest(compute.blobs.put(delta.to_bytes(view)))
    accepted = []
    for at in range(num_edges):
        own = adapter_like(settings, at + 1)
        factor = -50.0 if at == num_edges - 1 else 1.0
        step = {name: 0.1 * factor * (common[name] + 0.3 * own[name]) for name in view}
        blob = Digest(compute.blobs.put(delta.encode(step, codec)))
        accepted.append(AcceptedUpdate(edge=EdgeId(f"edge-{at:03d}"), num_examples=10, digest=blob, view=start))
    return Aggregate(trains="both", master=start, moments=None, views=(start,), updates=tuple(accepted))


@pytest.mark.parametrize("rule", ["fedavg", "flexlora"])
@pytest.mark.parametrize("robust", ["none", "clip", "krum", "centered-clip", "trimmed", "median"])
def test_who_spoils_a_round_is_in_its_result_and_by_a_robust_rule_not_in_the_master(
    prepared: RunSettings, rule: str, robust: str
) -> None:
    if rule == "flexlora" and robust in ("trimmed", "median"):
        return  # refused by combine.py
    codec = "bf16" if rule == "flexlora" else "int8"
    compute = opened(prepared, codec, rule=rule, robust=robust)
    job = spoiled_round(compute, prepared, codec, 6)
    found = compute.aggregate(job, quiet)
    *honest, bad = found.standings
    assert [one.edge for one in found.standings] == [one.edge for one in job.updates]
    assert bad.norm > 20 * max(one.norm for one in honest)
    if robust == "none":
        assert bad.cosine is not None
        assert bad.cosine > 0.9  # the mean is the attacker's
        assert all(one.cosine is not None and one.cosine < 0 for one in honest)
        return
    assert all(one.cosine is not None and one.cosine > 0.5 for one in honest)
    assert bad.cosine is not None
    assert bad.cosine < (-0.5 if rule == "fedavg" else 0.5)  # B A of steps that long is no longer the reverse
    if robust == "median":
        assert bad.kept is None
    else:
        assert bad.kept is not None
        assert bad.kept < 0.1 < 0.2 < min(one.kept or 0.0 for one in honest)


def test_where_krum_has_too_few_updates_the_hub_says_what_merges_them(prepared: RunSettings) -> None:
    said: list[msgspec.Struct] = []
    compute, other = opened(prepared, "int8", robust="krum"), opened(prepared, "int8", robust="clip")
    job = spoiled_round(compute, prepared, "int8", 4)
    assert compute.aggregate(job, said.append) == other.aggregate(job, quiet)
    [left_out] = said
    assert left_out == jobs.LeftOut(
        stage="no krum", why="4 updates of the 5 that it needs; this round's are merged by clip"
    )


def test_a_round_of_many_edges_records_those_that_are_farthest(
    prepared: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "MAX_STANDINGS", 3)
    compute = opened(prepared, "int8", robust="clip")
    found = compute.aggregate(spoiled_round(compute, prepared, "int8", 8), quiet)
    assert len(found.standings) == 3
    assert "edge-007" in [one.edge for one in found.standings]
    assert [one.edge for one in found.standings] == sorted(one.edge for one in found.standings)
