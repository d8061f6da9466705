"""Drift: the gradient that edges follow beside the one that the plug-in needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedsoda_edge.model import lora
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.loss import log_likelihoods
from fedsoda_edge.model.streaming import stream
from fedsoda_edge.model.sub_llm import build
from fedsoda_hub.algorithms.alignment import drift
from fedsoda_hub.federation.jobs import Probe, ProbeResult
from fedsoda_hub.preparation.full_llm import StreamedLLM
from fedsoda_hub.preparation.realign import PreparedRun
from fedsoda_hub.settings.run import RunSettings
from tests.edge.model.test_bundle import random_lora
from tests.hub.runs import make_run, prepare, public_kl, put


def adapter_of(settings: RunSettings, seed: int) -> dict[str, Tensor]:
    spec = Bundle.open(settings.run_dir / "bundle").manifest.lora
    return {name: tensor for name, tensor in random_lora(spec, seed).items() if name in {i.name for i in spec.adapter}}


def probed(settings: RunSettings, master: dict[str, Tensor], emulator_view: dict[str, Tensor]) -> ProbeResult:
    job = Probe(master=put(settings, master), emulator_view=put(settings, emulator_view))
    return PreparedRun(StreamedLLM(settings)).probe(job)


def test_the_gradient_is_the_slope_of_the_mean_loss(prepared: RunSettings) -> None:
    made = StreamedLLM(prepared)
    bundle = Bundle.open(prepared.run_dir / "bundle")
    plan, spec, adapter = bundle.plan, bundle.manifest.lora, adapter_of(prepared, 3)
    ids = torch.stack(made.text.used[:6])
    start = torch.stack(stream(bundle, plan.sub_emulator, list(ids)))
    model = build(bundle, plan.adapter)
    lora.attach(model, spec, adapter)
    gradient = drift.adapter_gradient(model, plan.adapter, start, ids)
    names = sorted(adapter)
    way = {
        name: torch.randn(adapter[name].shape, generator=torch.Generator().manual_seed(at))
        for at, name in enumerate(names)
    }

    def loss(step: float) -> float:
        lora.load(model, {name: adapter[name] + step * way[name] for name in names})
        with torch.no_grad():
            hidden = model.hidden(states=start)[:, :-1].flatten(0, 1)
        return -float(log_likelihoods(hidden, model.head, ids[:, 1:].flatten()).double().mean())

    slope = float(gradient.double() @ torch.cat([way[name].flatten() for name in names]).double())
    assert slope == pytest.approx((loss(1e-3) - loss(-1e-3)) / 2e-3, rel=2e-2)


def test_a_sub_llm_that_is_the_full_llm_has_not_drifted_and_a_pruned_one_has(
    tmp_path: Path, tiny_llama: Path, prepared: RunSettings
) -> None:
    whole = make_run(tmp_path, tiny_llama, method={"groups": 0, "adapter_base": "bf16", "emulator_base": "bf16"})
    prepare(whole)
    probe = probed(whole, adapter_of(whole, 1), {})
    assert probe.kl == pytest.approx(0.0, abs=1e-6)
    assert probe.cosine == pytest.approx(1.0, abs=1e-5)
    spec = Bundle.open(prepared.run_dir / "bundle").manifest.lora
    disturbed = {item.name: random_lora(spec, 2)[item.name] for item in spec.emulator}
    probe = probed(prepared, adapter_of(prepared, 1), disturbed)
    assert probe.kl > 0.01
    assert probe.cosine < 0.99


def test_a_probe_starts_from_the_kl_that_the_alignment_left(prepared: RunSettings) -> None:
    """As the round machine compares them: the same blocks, the same models."""
    bundle = Bundle.open(prepared.run_dir / "bundle")
    probe = probed(prepared, bundle.adapter_lora(), bundle.emulator_lora())
    assert probe.kl == pytest.approx(public_kl(prepared)["aligned"])
