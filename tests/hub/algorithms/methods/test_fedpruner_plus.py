"""FedPruner+: attention and MLP blocks by importance in the bytes of whole layers, and a federation on what is left."""

from __future__ import annotations

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model import delta
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.ports.disk import BlobStore
from fedsoda_hub.algorithms.pruning.representatives import contiguous, measure_components, select_components, spectral
from fedsoda_hub.evaluation.export import export
from fedsoda_hub.evaluation.judge import RunJudge
from fedsoda_hub.federation.records import RoundClosed, UpdateAccepted
from fedsoda_hub.plan import plan_report, predict
from fedsoda_hub.preparation.prepare import RunPreparation
from fedsoda_hub.report.page import write_report
from fedsoda_hub.run.ledger import Ledger
from fedsoda_hub.run.outcome import read_outcome
from fedsoda_hub.settings.run import RunSettings, settings_for_plan
from fedsoda_hub.settings.toml import write_toml
from tests.edge.model.test_bundle import pruned_by_hand
from tests.hub.algorithms.alignment.test_oda import with_peft
from tests.hub.algorithms.methods.test_exact import mean_nll
from tests.hub.local.test_in_process import in_one_process
from tests.hub.runs import WORDS, make_run, prepare, public_kl
from tests.tiny import make_tiny

METHOD: dict[str, Any] = {
    "name": "fedpruner+",
    **dict.fromkeys(("adapter_layers", "layers_per_group", "groups", "realign_every")),
    "drop_layers": 3,
    "layer_choice": "spectral",  # of tiny_llama it leaves a layer without attention and one without MLP
}
NO_ALIGNMENT = {"steps": None, "realign_steps": None}
ATTENTION, MLP, NORM = 2 * 64 * 64 + 2 * 64 * 32, 3 * 64 * 128, 64  # weights of tiny_llama's layer


def run_of(directory: Path, model: Path, **method: Any) -> RunSettings:
    return make_run(directory, model, method=METHOD | method, align=NO_ALIGNMENT, wire={"codec": "int8"})


@pytest.fixture(scope="module", params=["bf16", "nf4"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> RunSettings:
    settings = run_of(tmp_path_factory.mktemp("plus"), tiny_llama, adapter_base=request.param)
    prepare(settings)
    return settings


def test_it_keeps_what_its_functions_choose_of_the_public_text(tmp_path: Path, tiny_llama: Path) -> None:
    """By hand: 5 layers of 16-bit weights; each kind with its norm."""
    sizes = [2 * (ATTENTION + NORM)] * 8, [2 * (MLP + NORM)] * 8
    budget = 5 * (sizes[0][0] + sizes[1][0])
    chosen = set()
    for choice, partition in (("contiguous", contiguous), ("spectral", partial(spectral, seed=0))):
        made = RunPreparation(run_of(tmp_path / choice, tiny_llama, layer_choice=choice))
        attention, mlp = measure_components(made.llm.source, made.llm.text.used, seed=0)
        kept = select_components(attention, mlp, *sizes, budget, partition)
        made.run()
        plan = Bundle.open(made.directory.bundle).plan
        assert plan.kept == plan.adapter == tuple(sorted({*kept.attention, *kept.mlp}))
        assert tuple(layer for layer in plan.kept if layer not in plan.without_attention) == kept.attention
        assert tuple(layer for layer in plan.kept if layer not in plan.without_mlp) == kept.mlp
        chosen.add(plan)
    assert len(chosen) == 2
    assert plan.without_attention  # or nothing here would test halves
    assert plan.without_mlp


def test_it_takes_no_more_memory_than_the_layers_that_fedpruner_keeps(
    tmp_path: Path, tiny_llama: Path, run: RunSettings
) -> None:
    base = run.method.adapter_base
    other = make_run(
        tmp_path,
        tiny_llama,
        method=METHOD | {"name": "fedpruner", "adapter_base": base, "reprune_every": 0},
        align=NO_ALIGNMENT,
    )
    prepare(other)

    def tensors(settings: RunSettings) -> int:
        shards = (settings.run_dir / "bundle").glob("layers.*.safetensors")
        return sum(tensor.nbytes for shard in shards for tensor in load_file(shard).values())

    assert 0.9 * tensors(other) < tensors(run) <= tensors(other)


def test_its_plan_has_the_bytes_that_its_preparation_wrote(run: RunSettings) -> None:
    bundle = Bundle.open(run.run_dir / "bundle")
    manifest = bundle.manifest
    ours = predict(bundle.family, bundle.fields, manifest.dtype, bundle.plan, run).ours
    names = ("tokenizer.json", "tokenizer_config.json")
    assert ours.bundle_bytes == sum(file.bytes for file in manifest.files if file.name not in names)
    assert ours.bits_per_parameter == pytest.approx(manifest.bits_per_parameter, rel=1e-12)
    needs = (ours.edge_memory_bytes, ours.edge_vram_bytes)
    assert needs == (manifest.needs.ram_bytes, manifest.needs.vram_bytes)
    assert ours.up_bytes_per_edge_round == len(delta.encode(bundle.adapter_lora(), run.wire.codec))


def test_before_anything_is_measured_its_plan_is_that_of_as_many_whole_layers(ref24: Path) -> None:
    plus, plain = (
        plan_report(str(ref24), settings_for_plan(str(ref24), method={"name": name}))
        for name in ("fedpruner+", "fedpruner")
    )
    assert replace(plus, settings=plain.settings) == plain


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match=r"layer_choice = 'top' .* contiguous or spectral where name = .fedpruner\+"):
        settings_for_plan("m", method={"name": "fedpruner+", "layer_choice": "top"})
    model = make_tiny(tmp_path / "m", "qwen3_moe")  # its layers 1 and 6 are small: the ends are more than a fourth
    settings = run_of(tmp_path / "run", model, drop_layers=6)
    with pytest.raises(
        UsageProblem, match=r"the first and the last layer, which are always kept, take .* \[method\] drop_layers"
    ):
        prepare(replace(settings, lora=replace(settings.lora, targets=["q_proj"])))


def test_two_rounds_and_what_they_leave(tmp_path: Path, tiny_llama: Path) -> None:
    """Daemon, agents and workers in this process; the hub's words of both models are those of Transformers and PEFT."""
    settings = run_of(tmp_path, tiny_llama)
    rounds = replace(settings.rounds, count=2, min_edges=2, quorum=1.0)
    local = replace(settings.local, max_steps=6, batch_size=4, learning_rate=1e-2)
    settings = replace(settings, rounds=rounds, local=local, listen=replace(settings.listen, port=0))
    Path(settings.path).write_text(write_toml(settings))
    data = {}
    for number, name in enumerate(("a", "b")):
        data[name] = tmp_path / f"{name}.jsonl"
        rows = [{"word": word, "answer": "yes" if i % (2 + number) else "no"} for i, word in enumerate(WORDS)]
        data[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    in_one_process(settings, data, lambda _: None, lambda _: lambda _: None)
    with contextlib.closing(Ledger(settings.run_dir / "ledger.sqlite")) as ledger:
        records = list(ledger.records())
    assert len([record for record in records if isinstance(record, RoundClosed)]) == 2
    assert len([record for record in records if isinstance(record, UpdateAccepted)]) == 4

    outcome, bundle = read_outcome(settings.run_dir), Bundle.open(settings.run_dir / "bundle")
    spec, plan = bundle.manifest.lora, bundle.plan
    blobs = BlobStore(settings.run_dir / "blobs")
    master = delta.from_bytes(blobs.get(outcome.master), spec.adapter)
    assert all(tensor.any() for name, tensor in master.items() if name.endswith("B"))  # all that is left has trained
    export(settings, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    of_halves = {
        *(f"model.layers.{n}.self_attn.{t}_proj" for n in plan.kept if n not in plan.without_attention for t in "qkv"),
        *(f"model.layers.{n}.mlp.{t}_proj" for n in plan.kept if n not in plan.without_mlp for t in ("up", "down")),
    }
    assert set(config["target_modules"]) == of_halves
    full: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    plugged: Any = PeftModel.from_pretrained(full, str(tmp_path / "adapter")).eval()
    held = {name for name, _ in plugged.named_parameters() if ".lora_" in name}
    assert len(held) == len(master)
    places = {number: position for position, number in enumerate(plan.kept)}
    sub = with_peft(pruned_by_hand(tiny_llama, plan, quantized=False), places, master, spec.rank, spec.alpha).eval()
    assert outcome.evaluation is not None
    reported = {name: loss for name, loss in outcome.evaluation.loss.items() if loss is not None}
    assert reported["plug_in"] == pytest.approx(mean_nll(plugged, settings, tiny_llama), rel=1e-4)
    assert reported["sub_llm"] == pytest.approx(mean_nll(sub, settings, tiny_llama), rel=1e-4)
    assert reported["sub_llm"] < reported["full"]
    about = json.loads((tmp_path / "adapter" / "fedsoda.json").read_text())
    assert tuple(about["plan"]["without_attention"]) == plan.without_attention
    page = Path(write_report(settings, tmp_path / "report").report).read_text()
    assert "6 of 8 kept (1 without attention, 1 without MLP), LoRA rank 4 in 6" in page

    # Without choices the hub generates, through a cache of keys and values that layers without attention have no part in.
    open_ended = replace(settings, task=replace(settings.task, choices="none"))
    judge = RunJudge(open_ended, Path(settings.directory / "eval.jsonl"))
    answers = judge.evaluator.answers(judge.models(outcome.master, outcome.emulator_view, outcome.manifest)["sub_llm"])
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_llama)
    for question, made in list(zip(judge.evaluator.questions, answers.chosen, strict=True))[:4]:
        ids = tokenizer(question.prompt, return_tensors="pt").input_ids
        out = sub.generate(input_ids=ids, do_sample=False, max_new_tokens=64, eos_token_id=2, pad_token_id=0)
        assert made == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_moe"])
def test_norms_behind_and_experts_go_with_their_half(tmp_path: Path, family: str) -> None:
    settings = run_of(tmp_path / "run", make_tiny(tmp_path / family, family))
    kl = public_kl(replace(settings, lora=replace(settings.lora, targets=["q_proj", "o_proj"])))
    bundle = Bundle.open(settings.run_dir / "bundle")
    plan = bundle.plan
    assert plan.without_mlp
    for number in plan.without_mlp:
        held = {name.partition(".")[0] for name in bundle.layer(number)}
        assert "self_attn" in held
        assert not any("mlp" in name or "feedforward" in name for name in held)
    assert {item.layer for item in bundle.manifest.lora.adapter} == {*plan.kept} - {*plan.without_attention}
    assert kl["quantized"] == pytest.approx(kl["pruned"], rel=1e-6)  # 16 bits
