"""The hub's child does a round's arithmetic as FedAvg's pseudocode and docs/protocol.md (p4-views) write it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

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
from fedsoda_hub.federation.jobs import AcceptedUpdate, Aggregate, AggregateResult
from fedsoda_hub.settings.open_run import OpenRun
from fedsoda_hub.settings.run import RunSettings
from tests.edge.model.test_bundle import random_lora


def opened(settings: RunSettings, codec: str) -> Compute:
    compute = Compute()
    wire = msgspec.structs.replace(settings.wire, codec=codec)
    compute.open(OpenRun(settings=msgspec.structs.replace(settings, wire=wire)))
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
    found = compute.aggregate(job)
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
    assert compute.aggregate(msgspec.structs.replace(job, updates=accepted[::-1])) == found


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

    assert asyncio.run(ask()) == opened(prepared, "int8").aggregate(job)
