"""`emulator = "full"`: edges sweep every layer in NF4. Nothing is measured, removed, aligned or realigned, and what an
edge trains on is what Transformers computes with the bundle's weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedsoda_edge.data.samples import SampleTokenizer
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.worker.border_cache import CachedStates, CacheSettings
from fedsoda_hub.evaluation.export import export
from fedsoda_hub.evaluation.questions import read_questions
from fedsoda_hub.federation.jobs import JobProgress
from fedsoda_hub.federation.records import Realigned, RoundClosed
from fedsoda_hub.preparation.prepare import RunPreparation
from fedsoda_hub.report.page import write_report
from fedsoda_hub.run.ledger import Ledger
from fedsoda_hub.run.outcome import read_outcome
from fedsoda_hub.settings.run import RunSettings, read_settings
from tests.hub.runs import FULL, killed_after, make_run, prepare, public_kl
from tests.schema import EDGE, HUB
from tests.test_federation import Federation, write_run


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> RunSettings:
    """A prepared run of the tiny model: adapter 2, all 8 layers kept."""
    settings = make_run(tmp_path_factory.mktemp("full"), tiny_llama, **FULL)
    prepare(settings)
    return settings


def in_nf4(model: Path, bundle: Bundle) -> Any:
    """Transformers' own model of the whole checkpoint, each layer's weights those that the bundle stands for."""
    full: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for number, layer in enumerate(full.model.layers):
        layer.load_state_dict({name: tensor.float() for name, tensor in bundle.layer(number).items()})
    return full.eval()


def test_every_layer_is_kept_and_none_carries_emulator_lora(full_run: RunSettings) -> None:
    bundle = Bundle.open(full_run.run_dir / "bundle")
    assert bundle.plan.kept == tuple(range(8))
    assert (bundle.plan.groups, bundle.plan.mapping, bundle.plan.distances) == ((), (), ())
    assert bundle.manifest.lora.emulator == ()
    assert bundle.emulator_lora() == {}
    assert set(bundle.adapter_lora()) == {spec.name for spec in bundle.manifest.lora.adapter}


def test_an_edge_needs_more_disk_and_no_more_memory(full_run: RunSettings, prepared: RunSettings) -> None:
    full, sub = (Bundle.open(run.run_dir / "bundle").manifest.needs for run in (full_run, prepared))
    assert (full.ram_bytes, full.vram_bytes) == (sub.ram_bytes, sub.vram_bytes)
    assert full.disk_bytes > sub.disk_bytes


def test_public_kl_is_what_nf4_loses(full_run: RunSettings, tiny_llama: Path) -> None:
    found = public_kl(full_run)
    ids = torch.stack(RunPreparation(full_run).llm.text.held_out)
    untouched: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        teacher = untouched(ids).logits.double().log_softmax(-1)
        student = in_nf4(tiny_llama, Bundle.open(full_run.run_dir / "bundle"))(ids).logits.double().log_softmax(-1)
    expected = (teacher.exp() * (teacher - student)).sum(-1).mean().item()
    assert found == {
        "pruned": 0.0,
        "quantized": pytest.approx(expected, rel=1e-4),
        "aligned": pytest.approx(expected, rel=1e-4),
    }


def test_nothing_is_measured_aligned_or_cached(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fedsoda_hub.algorithms.pruning.sgp.measure", lambda *_, **__: pytest.fail("similarity is measured")
    )
    monkeypatch.setattr("fedsoda_hub.algorithms.alignment.oda.align", lambda *_, **__: pytest.fail("it aligns"))
    said: list[JobProgress] = []
    settings = make_run(tmp_path, tiny_llama, **FULL)
    RunPreparation(settings).run(said.append)
    assert {progress.stage for progress in said} == {
        *("quantizing", "running the full LLM on public text", "running the sub-LLM on public text")
    }
    assert not list((settings.run_dir / "prepare").glob("*.safetensors"))


@pytest.mark.parametrize("writes", [1, 2, 9, 15, 16, 17])
def test_prepare_killed_after_any_write_ends_with_the_same_bytes(
    tmp_path: Path, tiny_llama: Path, full_run: RunSettings, writes: int
) -> None:
    settings = make_run(tmp_path, tiny_llama, **FULL)
    with killed_after(writes):
        prepare(settings)
    assert prepare(settings) == prepare(full_run)


def test_the_border_is_the_hidden_state_of_the_whole_model_in_nf4(
    tmp_path: Path, full_run: RunSettings, tiny_llama: Path
) -> None:
    """The edge's own cache on disk against Transformers' `output_hidden_states` below the adapter."""
    bundle = Bundle.open(full_run.run_dir / "bundle")
    assert full_run.eval_data is not None
    tokenizer = SampleTokenizer(tiny_llama / "tokenizer.json", 2)
    questions = read_questions(full_run.eval_data, full_run.prompt, full_run.completion)
    samples = [tokenizer.sample(question.prompt, question.completion) for question in questions]
    ids = [list(sample.ids) for sample in samples if sample is not None]
    states = CachedStates(
        bundle,
        ids,
        emulator=bundle.emulator_lora(),
        emulator_name="none",
        settings=CacheSettings(tmp_path, bytes(32)),
        compute_dtype=torch.float32,
        device="cpu",
    )
    states.sweep()
    assert states.num_kept == len(ids)
    assert [path.name.split("-")[0] for path in tmp_path.iterdir()] == ["border"]  # no LoRA: no states below it
    whole, pruned = in_nf4(tiny_llama, bundle), 0.0
    for place, row in enumerate(ids):
        with torch.no_grad():
            hidden = whole(torch.tensor([row]), output_hidden_states=True).hidden_states
        wanted = hidden[bundle.plan.adapter[0]][0]
        # Records are bf16: half a unit in its last of 8 bits.
        torch.testing.assert_close(states[place].float(), wanted, rtol=2**-8, atol=1e-6)
        pruned += float((hidden[bundle.plan.adapter[0] - 1][0] - wanted).norm() / wanted.norm())
    assert pruned / len(ids) > 0.1  # one layer less would be seen
    states.close()


@pytest.mark.slow
def test_two_rounds_of_real_processes(tmp_path: Path, tiny_llama: Path) -> None:
    """An edge as it is joins, sweeps and trains; the sub-LLM is the plug-in but for NF4, and nothing is realigned."""
    run_file = write_run(tmp_path / "run", tiny_llama, rounds=2, edges="a")
    of_pruning = r"(?m)^(layers_per_group|groups|realign_every|steps|realign_steps) = \d+\n"
    text = re.sub(of_pruning, "", run_file.read_text()).replace("min_edges = 2", "min_edges = 1")
    run_file.write_text(text.replace("[method]\n", '[method]\nemulator = "full"\n'))
    federation = Federation(run_file, "a")
    try:
        federation.finish(federation.hub(), federation.edge("a"))
    finally:
        federation.stop()
    for log, outputs in (("hub.log", HUB), ("a.log", EDGE)):
        for event in federation.events(log):
            outputs.check_event(event)
    settings = read_settings(run_file)
    ledger = Ledger(settings.run_dir / "ledger.sqlite")
    records = list(ledger.records())
    ledger.close()
    assert [record.round for record in records if isinstance(record, RoundClosed)] == [1, 2]
    assert not [record for record in records if isinstance(record, Realigned)]
    assert {event["alignment"] for event in federation.events("hub.log") if event["event"] == "round_opened"} == {0}

    outcome = read_outcome(settings.run_dir)
    bundle = Bundle.open(settings.run_dir / "bundle")
    assert outcome.evaluation is not None
    reported = {name: loss for name, loss in outcome.evaluation.loss.items() if loss is not None}
    export(settings, tmp_path / "adapter")
    whole = {
        "sub_llm": in_nf4(tiny_llama, bundle),
        "plug_in": AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval(),
    }
    for name, model in whole.items():
        plugged: Any = PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
        assert reported[name] == pytest.approx(mean_nll(plugged, settings, tiny_llama), rel=1e-4), name
    learned = reported["full"] - reported["plug_in"]
    assert learned > 0
    assert abs(reported["sub_llm"] - reported["plug_in"]) < learned / 2
    shown = Path(write_report(settings, tmp_path / "report").report).read_text(encoding="utf-8")
    assert "8 of 8 kept" in shown


def mean_nll(model: Any, settings: RunSettings, tiny_llama: Path) -> float:
    """Per completion id of the run's evaluation data, by Transformers and PEFT alone."""
    assert settings.eval_data is not None
    tokenizer = SampleTokenizer(tiny_llama / "tokenizer.json", 2)
    total, count = 0.0, 0
    for question in read_questions(settings.eval_data, settings.prompt, settings.completion):
        sample = tokenizer.sample(question.prompt, question.completion)
        assert sample is not None
        with torch.no_grad():
            logs = model(torch.tensor([sample.ids])).logits[0].double().log_softmax(-1)
        for at in range(sample.start, len(sample.ids)):
            total, count = total - float(logs[at - 1, sample.ids[at]]), count + 1
    return total / count
