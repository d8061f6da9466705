"""[lora] ranks: each size class trains LoRA of a rank of its own, and the hub takes the SVD of the mean of what they add."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load
from torch import Tensor

from fedsoda_edge import events as edge_events
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model import delta
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.ports.disk import BlobStore
from fedsoda_hub.federation import records as rec
from fedsoda_hub.plan import plan_report
from fedsoda_hub.run.outcome import read_outcome
from fedsoda_hub.settings.run import RunSettings, settings_for_plan
from fedsoda_hub.settings.toml import write_toml
from tests.hub.preparation.test_repruning import METHOD, SMALL_EDGE, federate, recorded
from tests.hub.runs import make_run

RANKS = (4, 2)
ALPHA = 8.0
SODA = {"groups": 1, "classes": [2], "realign_every": 2}
PRUNER = METHOD  # drawn again before round 3


def make(directory: Path, model: Path, method: dict[str, Any]) -> RunSettings:
    align = (
        {"steps": 2, "realign_steps": 1}
        if method is SODA
        else {"steps": None, "realign_steps": None, "border_map": None}
    )
    settings = make_run(
        directory,
        model,
        method=method,
        align=align,
        lora={"rank": RANKS[0], "alpha": ALPHA, "ranks": list(RANKS)},
        local={"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2},
        wire={"codec": "bf16"},
        aggregation={"rule": "flexlora"},
        rounds={"count": 3, "min_edges": 2, "quorum": 1.0},
        listen={"port": 0},
    )
    Path(settings.path).write_text(write_toml(settings))
    return settings


@dataclass
class Ran:
    settings: RunSettings
    said: dict[str, list[edge_events.AnyEvent]]


@pytest.fixture(
    scope="module", params=[SODA, pytest.param(PRUNER, marks=pytest.mark.slow)], ids=["fedsoda", "fedpruner"]
)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Ran:
    settings = make(tmp_path_factory.mktemp("ranks"), tiny_llama, request.param)
    return Ran(settings, federate(settings))


def added(tensors: dict[str, Tensor], module: str) -> Tensor:
    """(alpha / r) B A, dense, in fp64."""
    b, a = (tensors[f"{module}.lora_{factor}"].double() for factor in "BA")
    return ALPHA / len(a) * b @ a


def best_of_rank(matrix: Tensor, rank: int) -> Tensor:
    u, sigma, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] @ torch.diag(sigma[:rank]) @ vt[:rank]


def test_each_class_has_lora_of_its_rank(ran: Ran) -> None:
    for number, rank in enumerate(RANKS):
        spec = Bundle.open(ran.settings.run_dir / "bundle", number).manifest.lora
        assert (spec.rank, spec.alpha) == (rank, ALPHA)
        assert {item.shape[0] for item in (*spec.adapter, *spec.emulator) if item.name.endswith("lora_A")} == {rank}


def test_a_round_is_the_svd_of_the_dense_mean_at_each_classs_rank(ran: Ran) -> None:
    blobs = BlobStore(ran.settings.run_dir / "blobs")
    accepted: list[rec.UpdateAccepted] = []
    views: list[dict[str, Tensor]] = []
    closed = 0
    for record in recorded(ran.settings):
        match record:
            case rec.RunPrepared():
                views = [
                    load(blobs.get(digest)) for digest in (record.adapter_view, record.smaller[0].adapter_view or "")
                ]
            case rec.Repruned():
                views = [load(blobs.get(digest)) for digest in (record.view, record.smaller[0].view)]
            case rec.UpdateAccepted():
                assert record.size_class == (record.edge == SMALL_EDGE)
                accepted.append(record)
            case rec.RoundClosed():
                closed += 1
                master = load(blobs.get(record.master))
                trained = [
                    (
                        one.num_examples,
                        delta.advance(
                            view := views[one.size_class], blobs.get(one.digest), delta.layout_of(view), "bf16"
                        ),
                    )
                    for one in accepted
                ]
                assert record.cross_term is None
                for module in {name.rpartition(".lora_")[0] for _, tensors in trained for name in tensors}:
                    held = [(count, added(one, module)) for count, one in trained if f"{module}.lora_A" in one]
                    products = [count * product for count, product in held]
                    mean = torch.stack(products).sum(dim=0) / sum(count for count, _ in held)
                    assert mean.any()
                    best = best_of_rank(mean, RANKS[0])
                    torch.testing.assert_close(added(master, module), best, rtol=0, atol=1e-5 * float(best.norm()))
                after = [load(blobs.get(digest)) for digest in (record.view, record.smaller[0].view)]
                for view, rank in zip(after, RANKS, strict=True):
                    for module in {name.rpartition(".lora_")[0] for name in view}:
                        best = best_of_rank(added(master, module), rank)
                        off = float((added(view, module) - best).norm())
                        assert off <= 0.02 * float(best.norm()) + 1e-12  # steps are coded in bf16
                views, accepted = after, []
    assert closed == 3


def test_every_update_of_both_ranks_counts(ran: Ran) -> None:
    for events in ran.said.values():
        assert [event.round for event in events if isinstance(event, edge_events.Accepted)] == [1, 2, 3]
    outcome = read_outcome(ran.settings.run_dir)
    assert outcome.evaluation is not None
    assert all(value is not None for value in outcome.evaluation.loss.values())
    realigned = [record for record in recorded(ran.settings) if isinstance(record, rec.Realigned)]
    assert [len(record.smaller) for record in realigned] == ([1] if ran.settings.method.realign_every else [])


def test_the_plan_says_what_each_class_sends(ran: Ran, tiny_llama: Path) -> None:
    report = plan_report(str(tiny_llama), ran.settings)
    accepted = {one.size_class: one.digest for one in recorded(ran.settings) if isinstance(one, rec.UpdateAccepted)}
    blobs = BlobStore(ran.settings.run_dir / "blobs")
    foretold = [report.ours.up_bytes_per_edge_round, report.smaller[0].up_bytes_per_edge_round]
    assert foretold == [pytest.approx(len(blobs.get(accepted[number])), rel=0.01) for number in (0, 1)]


@pytest.mark.parametrize(
    ("tables", "sentence"),
    [
        ({"lora": {"ranks": [8, 4]}}, r'rule = "fedavg" .* cannot be averaged; write rule = "flexlora" and \[wire\] codec = "bf16"'),
        ({"lora": {"ranks": [8]}, "aggregation": {"rule": "flexlora"}}, r"it must be 2 numbers, one for each size class"),
        ({"lora": {"ranks": [4, 4]}, "aggregation": {"rule": "flexlora"}}, r"the first \[lora\] rank = 8 and none above"),
        ({"lora": {"ranks": [8, 16]}, "aggregation": {"rule": "flexlora"}}, r"ranks = \[8, 16\] .* none above it"),
        ({"lora": {"ranks": [8, 0]}, "aggregation": {"rule": "flexlora"}}, r"ranks = \[8, 0\] in"),
    ],
)  # fmt: skip
def test_ranks_that_cannot_be_are_refused_with_those_that_can(tables: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageProblem, match=sentence):
        settings_for_plan("m", method={"classes": [5]}, wire={"codec": "bf16"}, **tables)


def test_ranks_are_part_of_what_a_run_began_with() -> None:
    settings = settings_for_plan("m")
    assert settings.fixed()["[lora] ranks"] == []
    assert replace(settings.lora, ranks=[8, 2]).of_class(1) == 2
    assert settings.lora.of_class(1) == settings.lora.rank
