"""What runs on a GPU gives what a CPU gives in fp32. `--device cuda` runs these there; otherwise the CPU stands in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.device.facts import read_device
from fedsoda_edge.device.pause_rules import parse_pause_rules
from fedsoda_edge.device.sensors import Sensors
from fedsoda_edge.edge import Edge
from fedsoda_edge.model import lora
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.nf4 import dequantize, quantize
from fedsoda_edge.model.sub_llm import build
from fedsoda_edge.protocol.needs import SampleSizes, plans, shape_of
from fedsoda_edge.testing import ScriptedHub
from fedsoda_edge.worker.batches import SweptSamples
from fedsoda_edge.worker.border_cache import CachedStates, CacheSettings
from fedsoda_edge.worker.training import fine_tune
from fedsoda_hub.evaluation.judge import RunJudge
from fedsoda_hub.preparation import self_generated
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.settings.run import RunSettings, read_settings
from tests.edge.model.test_bundle import random_lora, write
from tests.edge.worker.test_training import SETTINGS, make_samples
from tests.hub.runs import make_run, public_kl

pytestmark = pytest.mark.cuda
SAMPLES = make_samples(24)
GIB = 1 << 30


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Bundle:
    return write(tmp_path_factory.mktemp("device") / "bundle", tiny_llama, trained=True)


def swept(bundle: Bundle, device: str, dtype: torch.dtype) -> SweptSamples:
    spec = bundle.manifest.lora
    return SweptSamples.sweep(
        bundle,
        bundle.plan.swept,
        SAMPLES,
        emulator=bundle.emulator_lora(),
        lora_scale=spec.scale,
        compute_dtype=dtype,
        device=device,
    )


def states(held: SweptSamples) -> Tensor:
    return torch.cat([held.states[at].float() for at in range(len(SAMPLES))])


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def trained(bundle: Bundle, device: str, dtype: torch.dtype, *, dense: bool, recompute: bool = False) -> Tensor:
    """The delta of one round, flat."""
    spec, plan = bundle.manifest.lora, bundle.plan
    view = lora.on(plan.adapter, random_lora(spec, 5))
    tail = build(
        bundle, plan.resident, compute_dtype=dtype, device=device, dense=dense, dense_head=dense, recompute=recompute
    )
    lora.attach(tail, spec, {**lora.on(plan.resident, bundle.emulator_lora()), **view})
    made = fine_tune(tail, swept(bundle, device, dtype), view, SETTINGS, seed=0, round_number=1, edge="a")
    return torch.cat([made.delta[name].flatten() for name in sorted(made.delta)])


def run_on(device: str, directory: Path, model: Path, **tables: dict[str, object]) -> RunSettings:
    path = Path(make_run(directory, model, **tables).path)
    path.write_text(path.read_text().replace('device = "cpu"', f'device = "{device}"'))
    return read_settings(path)


def test_nf4_weights_are_the_same_on_every_device(device: str) -> None:
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(1))
    stored = quantize(weight)
    assert torch.equal(dequantize(stored, torch.float32, device).cpu(), dequantize(stored, torch.float32, "cpu"))


def test_border_states_are_those_of_fp32(bundle: Bundle, device: str) -> None:
    assert relative(states(swept(bundle, device, torch.bfloat16)), states(swept(bundle, "cpu", torch.float32))) < 0.02


@pytest.mark.parametrize(("dense", "recompute"), [(True, False), (False, False), (False, True)])
def test_a_round_moves_the_adapter_as_in_fp32(bundle: Bundle, device: str, dense: bool, recompute: bool) -> None:
    """On a GPU weights that stay in NF4 are multiplied by bitsandbytes; the oracle has them dense."""
    ours = trained(bundle, device, torch.bfloat16, dense=dense, recompute=recompute)
    theirs = trained(bundle, "cpu", torch.float32, dense=True)
    assert cosine_similarity(ours, theirs, dim=0) > 0.98
    assert 0.9 < ours.norm() / theirs.norm() < 1.1


@pytest.mark.parametrize(("kept", "most"), [("bf16", 0.02), ("int8", 0.03)])
def test_border_states_come_back_from_disk(bundle: Bundle, device: str, kept: str, most: float, tmp_path: Path) -> None:
    cached = CachedStates(
        bundle,
        [sample.ids for sample in SAMPLES],
        emulator=bundle.emulator_lora(),
        emulator_name="first",
        settings=CacheSettings(tmp_path, b"k" * 32, kept),
        compute_dtype=torch.bfloat16,
        device=device,
    )
    cached.sweep()
    assert cached.num_kept == len({sample.ids for sample in SAMPLES})
    assert relative(states(SweptSamples(SAMPLES, cached)), states(swept(bundle, "cpu", torch.float32))) < most
    cached.close()


def test_an_edge_takes_part(scripted: Path, device: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"word {i} is", "completion": "yes" if i % 2 else "no"}) + "\n" for i in range(9))
    )
    hub = ScriptedHub(rounds=2, bundle=scripted)

    with Edge(hub, home=tmp_path / "home", device=device).join(LocalData(tmp_path / "rows.jsonl")) as offers:
        for offer in offers:
            offer.submit(offer.train())
    assert [update.round for update in hub.updates] == [1, 2]


@pytest.mark.parametrize("align", [{}, {"heal": True, "steps": 0}], ids=["paper", "healed"])
def test_a_sub_llm_is_prepared_as_in_fp32(
    tiny_llama: Path, device: str, align: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_generated, "MAX_PROMPTS", 100)
    monkeypatch.setattr(self_generated, "COLUMN_IDS", 8)
    ours = public_kl(run_on(device, tmp_path / "ours", tiny_llama, align=align))
    theirs = public_kl(run_on("cpu", tmp_path / "theirs", tiny_llama, align=align))
    assert ours == pytest.approx(theirs, rel=0.1, abs=1e-3)


def test_the_models_of_a_run_are_judged_as_in_fp32(tiny_llama: Path, device: str, tmp_path: Path) -> None:
    losses = {}
    for name in (device, "cpu"):
        settings = run_on(name, tmp_path / name, tiny_llama)
        public_kl(settings)
        judge = RunJudge(settings, settings.directory / "eval.jsonl")
        bundle = Bundle.open(RunDirectory(settings.run_dir).bundle)
        models = judge.judged(
            lora.on(bundle.plan.adapter, random_lora(bundle.manifest.lora, 3)), bundle.emulator_lora()
        )
        losses[name] = [judge.evaluator.verdict(models[which]).loss for which in ("full", "plug_in", "sub_llm")]
    assert losses[device] == pytest.approx(losses["cpu"], rel=0.02)


def test_memory_stays_within_the_plan(bundle: Bundle, device: str) -> None:
    if device == "cpu":
        pytest.skip("scripts/bench_memory measures a CPU's")
    sizes = SampleSizes(SETTINGS.batch_size, max(len(sample.ids) for sample in SAMPLES), 3, len(SAMPLES))
    ways = [way for way in plans(shape_of(bundle.manifest), device, sizes) if way.micro_batch == SETTINGS.batch_size]
    for way in ways:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        trained(bundle, device, torch.bfloat16, dense=not way.packed, recompute=way.recompute)
        assert torch.cuda.max_memory_allocated() <= way.peak


def test_the_device_is_described(device: str, tmp_path: Path) -> None:
    facts = read_device(tmp_path)
    assert facts.ram_bytes > GIB
    if device != "cpu":
        assert facts.accelerator
        assert facts.vram_bytes > GIB


def test_others_on_the_gpu_are_seen(device: str) -> None:
    sensors = Sensors(parse_pause_rules("gpu-busy"))
    busy = sensors.read(12, None).others_percent
    assert (busy is None) == bool(sensors.missing())
    if device != "cpu":
        assert busy is not None
