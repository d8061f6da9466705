"""Smaller sub-LLMs beside the largest: some of its shards, and an alignment of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedsoda_edge.model import delta, lora
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.bundle_writer import BundleSettings, write_bundle
from fedsoda_hub.federation.jobs import Realign
from fedsoda_hub.preparation.prepare import RunPreparation
from fedsoda_hub.preparation.realign import PreparedRun
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.settings.run import RunSettings
from tests.edge.model.test_bundle import pruned_by_hand
from tests.hub.algorithms.alignment.test_oda import with_peft
from tests.hub.runs import make_run, prepare

METHOD = {"groups": 1, "classes": [2]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> RunSettings:
    settings = make_run(tmp_path_factory.mktemp("classes"), tiny_llama, method=METHOD)
    prepare(settings)
    return settings


def bundles(settings: RunSettings) -> list[Bundle]:
    return [Bundle.open(settings.run_dir / "bundle", number) for number in (0, 1)]


def test_classes_beside_it_change_nothing_of_the_largest(tmp_path: Path, tiny_llama: Path, run: RunSettings) -> None:
    alone = prepare(make_run(tmp_path, tiny_llama, method={"groups": 1}))
    beside = prepare(run)
    assert beside.sub_llms[:1] == alone.sub_llms
    assert len(beside.sub_llms) == 2


def test_a_smaller_class_is_the_bundle_of_its_plan_made_of_the_same_shards(tmp_path: Path, run: RunSettings) -> None:
    large, small = bundles(run)
    assert set(small.plan.kept) < set(large.plan.kept)
    assert small.plan.adapter == large.plan.adapter
    assert set(large.plan.groups) < set(small.plan.groups)
    made = RunPreparation(run)
    whole = write_bundle(
        tmp_path / "whole",
        made.llm.source,
        small.plan,
        BundleSettings(small.manifest.lora, "nf4", False),
        name=made.llm.source.name,
        revision=made.llm.source.revision,
        adapter_lora=small.adapter_lora(),
        emulator_lora=small.emulator_lora(),
        tokenizer_files=made.llm.source.tokenizer_files,
    )
    for field in ("files", "lora", "config"):
        assert getattr(small.manifest, field) == getattr(whole, field)
    assert small.manifest.bits_per_parameter == pytest.approx(whole.bits_per_parameter)
    assert msgspec.structs.astuple(small.manifest.needs) == pytest.approx(
        msgspec.structs.astuple(whole.needs), rel=0.01
    )
    shards = {path.name for path in (run.run_dir / "bundle").iterdir()}
    assert {name for name in shards if ".1." in name and not name.startswith("layers.")} == {
        "manifest.1.json",
        "emulator_lora.1.safetensors",
    }


def test_each_class_is_aligned_by_itself(tiny_llama: Path, run: RunSettings) -> None:
    _, smaller = prepare(run).sub_llms
    small = bundles(run)[1]
    kl, spec = smaller.public_kl, small.manifest.lora
    assert spec.aligned == small.plan.retained
    assert kl["aligned"] < kl["quantized"]
    ids = torch.stack(RunPreparation(run).llm.text.held_out)
    full: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    whole = with_peft(
        pruned_by_hand(tiny_llama, small.plan, quantized=True),
        {number: position for position, number in enumerate(small.plan.kept)},
        {**small.emulator_lora(), **small.adapter_lora()},
        spec.rank,
        spec.alpha,
    )
    with torch.no_grad():
        teacher, student = (model(ids).logits.double().log_softmax(-1) for model in (full, whole))
    assert kl["aligned"] == pytest.approx((teacher.exp() * (teacher - student)).sum(-1).mean().item(), rel=1e-4)


def test_a_realignment_gives_each_class_its_step(run: RunSettings) -> None:
    preparation, blobs = RunPreparation(run), RunDirectory(run.run_dir).blobs
    started = preparation.run()
    views = tuple(sub_llm.emulator_view for sub_llm in started.sub_llms)
    result = PreparedRun(preparation.llm).realign(Realign(version=1, master=started.master, emulator_views=views))
    (_, made), spec = result.sub_llms, bundles(run)[1].manifest.lora
    view, step = delta.from_bytes(blobs.get(made.view), spec.emulator), blobs.get(made.delta)
    before = delta.from_bytes(blobs.get(views[1]), spec.emulator)
    for name, tensor in delta.decode(step, spec.emulator, run.wire.codec).items():
        assert torch.equal(view[name], before[name] + tensor)
    assert any(not torch.equal(view[name], before[name]) for name in view)
    assert made.kl_before == pytest.approx(started.sub_llms[1].public_kl["aligned"], rel=1e-6)
    assert lora.on(bundles(run)[0].plan.retained, view).keys() < view.keys()
