"""Every method through the same machine: its layers are its paper's, its costs are the paper's arithmetic, its edges'
gradients are those of Transformers and PEFT on the whole model, and a run of it ends with what the hub says."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.data.samples import SampleTokenizer, read_samples
from fedsoda_edge.errors import BlobCorrupt, UsageProblem
from fedsoda_edge.model import delta, lora
from fedsoda_edge.model.bundle import DTYPES, Bundle, read_manifest
from fedsoda_edge.model.bundle_writer import BundleSettings, write_bundle
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.model.sub_llm import SubLLM, build
from fedsoda_edge.ports.disk import BlobStore
from fedsoda_edge.protocol import commands as cmd
from fedsoda_edge.protocol.manifest import LoRASpec, encode_manifest
from fedsoda_edge.protocol.messages import Digest
from fedsoda_edge.protocol.needs import Dtype, SampleSizes, plans, shape_of
from fedsoda_edge.protocol.template import TextTemplate
from fedsoda_edge.worker.batches import SweptSamples
from fedsoda_edge.worker.border_cache import CachedStates, CacheSettings
from fedsoda_edge.worker.training import completion_loss, fine_tune
from fedsoda_edge.worker.worker import Worker
from fedsoda_hub.algorithms.methods.by_name import method_of
from fedsoda_hub.algorithms.pruning.representatives import contiguous, measure_layers, select_layers, spectral
from fedsoda_hub.evaluation.export import export
from fedsoda_hub.evaluation.judge import judged_models
from fedsoda_hub.federation.records import Realigned, RoundClosed
from fedsoda_hub.plan import likely_plan, plan_report
from fedsoda_hub.preparation.prepare import RunPreparation
from fedsoda_hub.run.ledger import Ledger
from fedsoda_hub.run.outcome import read_outcome
from fedsoda_hub.settings.methods import METHODS, readers_of
from fedsoda_hub.settings.run import RunSettings, read_settings, settings_for_plan
from fedsoda_hub.settings.tables import LayerChoice, Method
from tests.edge.model.test_bundle import pruned_by_hand, random_lora
from tests.edge.protocol.test_needs import kept_bytes, plan_of
from tests.edge.worker.test_training import SETTINGS, make_samples
from tests.hub.algorithms.alignment.test_oda import with_peft
from tests.hub.algorithms.methods.test_exact import mean_nll
from tests.hub.evaluation.test_evaluator import QUESTIONS, evaluator, score_by_hand
from tests.hub.runs import make_run, public_kl
from tests.hub.test_plan import MODELS
from tests.test_federation import Federation, write_run

# Of an 8-layer model; None leaves out what test runs of FedSODA write.
SMALL: dict[str, dict[str, Any]] = {
    "exact": {"adapter_layers": 2},
    "fedbiot": {"adapter_layers": 2, "drop_layers": 2},
    "fedot": {"adapter_layers": 2, "bottom_layers": 1, "drop_layers": 2},
    "fedpetuning": {"adapter_layers": None},
    "fedpruner": {"adapter_layers": None, "drop_layers": 3},
    "fedpruner+": {"adapter_layers": None, "drop_layers": 3, "layer_choice": "spectral"},
}


def layers_of(name: str, num_layers: int, **keys: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(adapter, kept emulator layers) of the method as RUN.toml would have it."""
    settings = settings_for_plan("m", method={"name": name, **keys}).method
    plan = likely_plan(num_layers, settings)
    return plan.adapter, plan.sub_emulator


# --- which layers ------------------------------------------------------------------------------------------


def by_fedbiots_code(emulator: int, kept: int) -> list[int]:
    """HarliWu/FedBiOT, federatedscope/llm/offsite_tuning, with floats that are not taken for less than they are."""
    stride = (emulator - 1) / (kept - 1)
    return [int(i * stride + 1e-9) for i in range(kept)]


def by_offsite_tunings_code(emulator: int, kept: int) -> list[int]:
    """mit-han-lab/offsite-tuning, uniform_choose_layers; the same about floats."""
    stride = (emulator - 1) / (kept - 1)
    return [round(round(i * stride, 9)) for i in range(kept)]


def test_layers_are_dropped_by_the_formulas_of_both_codes() -> None:
    for emulator in (2, 3, 5, 16, 26, 28, 29, 30, 33):
        for kept in range(2, emulator + 1):
            adapter, left = layers_of("fedbiot", emulator + 3, adapter_layers=3, drop_layers=emulator - kept)
            assert (adapter, list(left)) == (
                (emulator, emulator + 1, emulator + 2),
                by_fedbiots_code(emulator, kept),
            )
            adapter, left = layers_of("fedot", emulator + 3, drop_layers=emulator - kept)
            assert adapter == (0, emulator + 1, emulator + 2)
            assert [layer - 1 for layer in left] == by_offsite_tunings_code(emulator, kept)


def test_the_last_layer_of_an_emulator_is_not_lost_to_a_float() -> None:
    """FedBiOT's own int(i * stride) keeps layer 14 of 0..15 where 12 of 16 are left: 11 * (15 / 11) is below 15."""
    assert int(11 * (15 / 11)) == 14
    assert layers_of("fedbiot", 17, adapter_layers=1, drop_layers=4)[1][-1] == 15


def test_layers_of_the_papers_llama() -> None:
    every = tuple(range(32))
    assert layers_of("fedbiot", 32) == ((29, 30, 31), (0, 1, 3, 5, 7, 8, 10, 12, 14, 15, 17, 19, 21, 22, 24, 26, 28))
    assert layers_of("fedot", 32)[0] == (0, 30, 31)
    assert len(layers_of("fedot", 32)[1]) == 17
    assert layers_of("fedpetuning", 32) == (every, ())
    assert layers_of("exact", 32) == ((29, 30, 31), every[:29])
    assert (len(layers_of("fedpruner", 32)[0]), layers_of("fedpruner", 32)[1]) == (20, ())
    assert layers_of("fedpruner+", 32) == layers_of("fedpruner", 32)  # as many bytes, before anything is measured
    assert likely_plan(32, Method(emulator="full")) == likely_plan(32, Method(name="exact"))


@pytest.mark.parametrize(
    ("name", "keys", "sentence"),
    [
        ("exact", {"adapter_layers": 8}, "adapter_layers = 8, but the model has 8 layers .*; write at most 7"),
        ("fedbiot", {"adapter_layers": 9}, "adapter_layers = 9, but the model has 8 layers .*; write at most 7"),
        ("fedbiot", {"adapter_layers": 7}, 'leaves 1 layers .*; lower adapter_layers, or write name = "exact"'),
        ("fedbiot", {}, "drop_layers = 12, but the emulator has 5 layers .*; write at most 3"),
        ("fedot", {"drop_layers": 4}, "drop_layers = 4, but the emulator has 5 layers .*; write at most 3"),
        ("fedot", {"bottom_layers": 5}, "bottom_layers = 5 and adapter_layers = 2, but the model has 8 layers; .* lower the larger"),
        ("fedpruner", {"drop_layers": 7}, "drop_layers = 7, but the model has 8 layers and .*; write at most 6"),
        ("fedpruner+", {"drop_layers": 7}, "drop_layers = 7, but the model has 8 layers and .*; write at most 6"),
        ("fedot", {"bottom_layers": 0}, "bottom_layers = 0 and .* at both ends .* write bottom_layers = 1"),
    ],
)  # fmt: skip
def test_too_few_layers_are_refused_before_any_work(name: str, keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageProblem, match=sentence):
        layers_of(name, 8, **keys)


def test_fedpruner_keeps_what_its_functions_choose_of_the_public_text(tmp_path: Path, tiny_llama: Path) -> None:
    chosen = set()
    for choice, partition in (("contiguous", contiguous), ("spectral", partial(spectral, seed=0))):
        keys = {"layer_choice": choice, "drop_layers": 1}
        made = RunPreparation(run_of(tmp_path / choice, tiny_llama, "fedpruner", keys))
        measured = measure_layers(made.llm.source, made.llm.text.used, seed=0)
        made.run()
        plan = Bundle.open(made.directory.bundle).plan
        assert plan.kept == plan.adapter == select_layers(measured, 7, partition, keep_ends=True)
        assert plan.kept[-1] == 7 != select_layers(measured, 7, contiguous)[-1]  # no group of its own without ends
        chosen.add(plan.kept)
    assert len(chosen) == 2


def test_what_fedpruner_is_compared_with_keeps_as_many_layers() -> None:
    every = set(range(24))
    kept = {
        choice: layers_of("fedpruner", 24, layer_choice=choice, drop_layers=8)[0] for choice in get_args(LayerChoice)
    }
    assert {len(layers) for layers in kept.values()} == {16}
    assert kept["top"] == tuple(range(16))
    assert list(kept["uniform"]) == by_offsite_tunings_code(24, 16)
    drawn = [
        likely_plan(24, Method(name="fedpruner", layer_choice="random", drop_layers=8), seed).kept for seed in range(40)
    ]
    assert drawn[0] == kept["random"]
    assert all(layers[0] == 0 and layers[-1] == 23 and len(layers) == 16 for layers in drawn)
    assert every == {layer for layers in drawn for layer in layers}
    assert len(set(drawn)) == 40


# --- settings ----------------------------------------------------------------------------------------------


def test_a_method_has_its_own_defaults(tmp_path: Path) -> None:
    (tmp_path / "public.txt").write_text("text")
    head = 'name = "x"\nmodel = "m"\n[public]\ntext = "public.txt"\n[method]\nname = '

    def read(text: str) -> RunSettings:
        (tmp_path / "run.toml").write_text(head + text)
        return read_settings(tmp_path / "run.toml")

    biot, ot, pet = read('"fedbiot"\n'), read('"fedot"\n'), read('"fedpetuning"\n')
    assert (biot.method.realign_every, biot.align.steps, biot.align.realign_steps) == (1, 500, 10)
    assert (ot.method.adapter_layers, ot.method.bottom_layers, ot.method.realign_every) == (2, 1, 0)
    assert (ot.align.steps, ot.align.realign_steps, ot.align.kl_weight) == (500, 0, 0.0)
    assert {each.method.adapter_base for each in (biot, ot, pet)} == {"bf16"}
    assert (biot.method.drop_layers, biot.method.groups, biot.method.layers_per_group) == (12, 0, 0)
    assert read('"fedbiot"\nrealign_every = 3\nadapter_base = "nf4"\n').method.realign_every == 3
    assert read('"fedsoda"\n') == read('"fedsoda"\n[align]\n')
    assert method_of(read('"exact"\n').method) is method_of(read('"fedsoda"\nemulator = "full"\n').method)


@pytest.mark.parametrize(
    ("name", "table", "way"),
    [
        ("fedsoda", {"method": {"drop_layers": 3}}, 'name = "fedbiot" or "fedot" or "fedpruner" or "fedpruner+"'),
        ("fedot", {"method": {"layer_choice": "spectral"}}, 'name = "fedpruner" or "fedpruner+"'),
        ("fedpruner", {"method": {"realign_every": 2}}, 'name = "fedsoda" or "fedbiot"'),
        ("fedbiot", {"method": {"groups": 2}}, 'name = "fedsoda"'),
        ("fedbiot", {"method": {"emulator": "full"}}, 'name = "fedsoda"'),
        ("fedot", {"method": {"realign_every": 2}}, 'name = "fedsoda" or "fedbiot"'),
        ("fedpetuning", {"method": {"adapter_layers": 3}}, 'name = "fedsoda" or "exact" or "fedbiot" or "fedot"'),
        ("fedpetuning", {"align": {"steps": 5}}, 'name = "fedsoda" or "fedbiot" or "fedot"'),
        ("exact", {"method": {"emulator": "sub"}}, 'name = "fedsoda"'),
    ],
)
def test_what_a_method_cannot_use_is_refused_with_the_methods_that_can(
    name: str, table: dict[str, dict[str, Any]], way: str
) -> None:
    [(section, values)] = table.items()
    [(key, value)] = values.items()
    with pytest.raises(UsageProblem) as caught:
        settings_for_plan("m", **(table | {"method": {"name": name, **table.get("method", {})}}))
    assert str(caught.value) == (
        f'[{section}] {key} = {value!r} beside [method] name = "{name}" in the options: {name} does not read it; '
        f"delete [{section}] {key}, or write {way}"
    )


# --- costs by the paper's arithmetic -----------------------------------------------------------------------

LLAMA, QWEN = 442_368, 483_328  # LoRA of one layer: docs/methods.md (m13-counts)


@pytest.mark.parametrize(
    ("name", "model", "trainable", "per_round"),
    [
        ("fedpetuning", "LLaMA3-8B", 32 * LLAMA, 64 * LLAMA),  # 14.16 M; the paper prints 15.2 M
        ("fedpetuning", "Qwen2-7B", 28 * QWEN, 56 * QWEN),  # the paper counts 32 layers
        ("fedot", "LLaMA3-8B", 3 * LLAMA, 6 * LLAMA),
        ("fedot", "Qwen2-7B", 3 * QWEN, 6 * QWEN),
        ("fedbiot", "LLaMA3-8B", 3 * LLAMA, (6 + 17) * LLAMA),  # 10.17 M
        ("fedbiot", "Qwen2-7B", 3 * QWEN, (6 + 13) * QWEN),  # the paper counts 17
        ("fedpruner", "LLaMA3-8B", 20 * LLAMA, 40 * LLAMA),
        ("fedpruner+", "LLaMA3-8B", 20 * LLAMA, 40 * LLAMA),
        ("exact", "LLaMA3-8B", 3 * LLAMA, 6 * LLAMA),
    ],
)
def test_the_papers_table_2_of_other_methods(
    tmp_path: Path, name: str, model: str, trainable: int, per_round: int
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(MODELS[model]))
    report = plan_report(str(file), settings_for_plan(str(file), method={"name": name}))
    assert report.paper.trainable_parameters == trainable
    assert report.paper.parameters_per_round == per_round
    layers = int(str(MODELS[model]["num_hidden_layers"]))
    assert report.kept_layers == (layers if name in ("exact", "fedpetuning") else layers - 12)
    assert report.ours.bits_per_parameter == pytest.approx(5.68 if name == "exact" else 16.0, abs=0.01)
    assert report.emulators is None


def test_a_bottom_adapter_sends_gradients_through_every_layer(tmp_path: Path) -> None:
    """LLaMA3-8B by hand: FedOT holds 20 layers where FedBiOT holds 3, and sweeps none."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(MODELS["LLaMA3-8B"]))
    layer, head = 218_112_000, 128256 * 4096
    found = {name: plan_report(str(file), settings_for_plan(str(file), method={"name": name})).ours for name in METHODS}
    flop = {name: ours.gflop_per_token for name, ours in found.items()}
    assert (flop["fedot"].sweep, flop["fedpetuning"].sweep) == (0, 0)
    assert flop["fedbiot"].sweep == pytest.approx(2 * 17 * (layer + LLAMA) / 1e9)
    assert flop["fedot"].cached == pytest.approx((4 * (20 * layer + 17 * LLAMA + head) + 18 * LLAMA) / 1e9)
    assert flop["fedpetuning"].cached == flop["fedpetuning"].full_lora == flop["exact"].full_lora
    assert flop["fedbiot"].cached == flop["exact"].cached == flop["fedsoda"].cached
    # On a CPU 16-bit layers are widened to fp32.
    assert found["fedpetuning"].edge_memory_bytes > 4 * 32 * layer
    assert 4 * 20 * layer < found["fedot"].edge_memory_bytes < 4 * 21 * layer + 4 * 2**30
    assert found["fedbiot"].edge_memory_bytes < 4 * 5 * layer + 2 * 2**30


# --- an edge's gradients -----------------------------------------------------------------------------------


def bundle_of(directory: Path, model: Path, name: str, base: str) -> Bundle:
    """A bundle of the method whose LoRA is not zero, as it might be in the middle of a run."""
    source = Checkpoint.open(str(model))
    keys = {key: value for key, value in SMALL[name].items() if value is not None}
    settings = settings_for_plan("m", method={"name": name, "adapter_base": base, **keys}).method
    plan, targets = likely_plan(source.num_layers, settings), ("q_proj", "v_proj", "up_proj", "down_proj")
    layouts = [
        lora.specs(source.family, source.fields, on, targets, 4)
        for on in (plan.adapter, method_of(settings).aligned(plan))
    ]  # fmt: skip
    spec = LoRASpec(4, 8.0, targets, *layouts)
    tensors = random_lora(spec, 5)
    write_bundle(
        directory,
        source,
        plan,
        BundleSettings(spec, base, False, base),
        name=source.name,
        revision=source.revision,
        adapter_lora={item.name: tensors[item.name] for item in spec.adapter},
        emulator_lora={item.name: tensors[item.name] for item in spec.emulator},
        tokenizer_files=source.tokenizer_files,
    )
    return Bundle.open(directory)


def on_an_edge(
    bundle: Bundle, directory: Path, *, dense: bool = True, recompute: bool = False
) -> tuple[SubLLM, SweptSamples]:
    """What the worker makes of a bundle: the cache's states and the layers above the border, with LoRA."""
    directory.mkdir()
    samples, emulator = make_samples(5), bundle.emulator_lora()
    states = CachedStates(
        bundle,
        [sample.ids for sample in samples],
        emulator=emulator,
        emulator_name="e",
        settings=CacheSettings(directory, bytes(32)),
        compute_dtype=torch.float32,
        device="cpu",
    )
    states.sweep()
    assert states.num_kept == len(samples)
    model = build(bundle, bundle.plan.resident, dense=dense, dense_head=dense, recompute=recompute)
    lora.attach(model, bundle.manifest.lora, {**lora.on(bundle.plan.resident, emulator), **bundle.adapter_lora()})
    return model, SweptSamples(samples, states)


@pytest.mark.parametrize("name", ["fedot", "fedpetuning", "fedpruner"])
@pytest.mark.parametrize("base", ["bf16", "nf4"])
def test_gradients_are_those_of_peft_on_the_materialized_model(
    tmp_path: Path, tiny_llama: Path, name: str, base: str
) -> None:
    bundle = bundle_of(tmp_path / "bundle", tiny_llama, name, base)
    bundle.materialize(tmp_path / "plain")
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    for parameter in plain.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    plain.train()  # bitsandbytes repacks itself in eval mode on some CPUs
    whole: Any = PeftModel.from_pretrained(plain, str(tmp_path / "plain" / "lora"), is_trainable=True)
    samples = make_samples(5)
    total: Tensor = torch.zeros(())
    for sample in samples:
        logs = whole(torch.tensor([sample.ids])).logits[0].log_softmax(-1)
        total = total - sum(logs[at - 1, sample.ids[at]] for at in range(sample.start, len(sample.ids)))
    expected = total / sum(sample.num_supervised for sample in samples)
    expected.backward()

    for place, way in enumerate(({}, {"dense": False}, {"dense": False, "recompute": True})):
        model, border = on_an_edge(bundle, tmp_path / f"cache{place}", **way)
        named = {key: value for key, value in lora.parameters(model).items() if key in bundle.adapter_lora()}
        assert {int(key.split(".")[1]) for key in named} == set(bundle.plan.adapter)
        for parameter in named.values():
            parameter.requires_grad_(True)
        loss = completion_loss(model, border.batch(range(5)))
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for key, parameter in named.items():
            _, number, rest = key.split(".", 2)
            module, _, leaf = rest.rpartition(".")
            path = f"model.layers.{bundle.plan.kept.index(int(number))}.{module}"
            reference = getattr(whole.base_model.model.get_submodule(path), leaf)["default"].weight.grad
            assert parameter.grad is not None
            assert float((parameter.grad - reference).norm() / reference.norm()) <= 1e-5, key


def test_training_moves_both_ends_and_not_what_lies_between(tmp_path: Path, tiny_llama: Path) -> None:
    bundle = bundle_of(tmp_path / "bundle", tiny_llama, "fedot", "bf16")
    model, border = on_an_edge(bundle, tmp_path / "cache")
    view, before = bundle.adapter_lora(), lora.snapshot(model)
    settings = msgspec.structs.replace(SETTINGS, max_steps=2)
    moved = fine_tune(model, border, view, settings, seed=0, round_number=1, edge="a").delta
    assert moved.keys() == view.keys()
    assert all(step.any() for step in moved.values())
    after = lora.snapshot(model)
    for key in bundle.emulator_lora():
        assert torch.equal(after[key], before[key])
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_worker_trains_through_the_emulator_lora_of_the_last_alignment(
    tmp_path: Path, tiny_llama: Path, dtype: Dtype
) -> None:
    bundle = bundle_of(tmp_path / "bundle", tiny_llama, "fedot", "bf16")
    spec, store = bundle.manifest.lora, BlobStore(tmp_path / "store")
    digests = {path.name: store.put(path.read_bytes()) for path in (tmp_path / "bundle").iterdir()}
    rows = [{"prompt": f"Say {word}:", "completion": word[::-1]} for word in ("cat", "rain", "inn", "mat")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    worker = Worker()
    worker.answer(
        cmd.Open(
            store=str(tmp_path / "store"),
            manifest=Digest(digests["manifest.json"]),
            rows=cmd.Rows(path=str(tmp_path / "rows.jsonl"), columns={}, prompt="{prompt}", completion="{completion}"),
            max_length=64,
        ),
        lambda _: None,
    )
    tokenizer = SampleTokenizer(tmp_path / "bundle" / "tokenizer.json", bundle.manifest.config.get("eos_token_id"))
    read = read_samples(
        LocalData(tmp_path / "rows.jsonl"), TextTemplate("{prompt}"), TextTemplate("{completion}"), tokenizer, 64
    )
    samples, view = read.samples, bundle.adapter_lora()
    settings = msgspec.structs.replace(SETTINGS, max_steps=3)

    def by_worker(emulator: Path | None) -> dict[str, Tensor]:
        memory = next(plans(shape_of(bundle.manifest), "cpu", SampleSizes(4, 64, 64)))
        memory = msgspec.structs.replace(memory, dtype=dtype)  # as on a GPU
        cache = cmd.BorderCache(directory=str(tmp_path / "border"), key="00" * 32, dtype="bf16", max_bytes=None)
        path = None if emulator is None else str(emulator)
        worker.answer(cmd.Sweep(emulator=path, cache=cache, memory=memory, room=2**50), lambda _: None)
        task = cmd.Train(
            view=None,
            settings=settings,
            seed=0,
            round=1,
            edge="a",
            codec="bf16",
            trains="both",
            residual=None,
            update=str(tmp_path / "update"),
            new_residual=str(tmp_path / "new_residual"),
            checkpoint=str(tmp_path / "checkpoint"),
        )
        worker.answer(task, lambda _: None)
        return delta.decode((tmp_path / "update").read_bytes(), spec.adapter, "bf16")

    def by_hand(emulator: dict[str, Tensor]) -> dict[str, Tensor]:
        border = SweptSamples.sweep(bundle, (), samples, emulator={}, lora_scale=spec.scale)
        model = build(bundle, bundle.plan.resident, compute_dtype=DTYPES[dtype])
        lora.attach(model, spec, {**emulator, **view})
        return fine_tune(model, border, view, settings, seed=0, round_number=1, edge="a").delta

    def are_near(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
        return all(float((ours[key] - theirs[key]).norm()) < 0.01 * float(theirs[key].norm()) for key in theirs)

    first, second = bundle.emulator_lora(), lora.on(bundle.plan.emulator, random_lora(spec, 9))
    (tmp_path / "aligned").write_bytes(delta.to_bytes(second))
    assert are_near(by_worker(None), by_hand(first))
    assert are_near(by_worker(tmp_path / "aligned"), by_hand(second))
    assert not are_near(by_hand(first), by_hand(second))


@pytest.mark.parametrize("name", ["fedot", "fedpetuning", "fedpruner"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_memory_plan_has_room_for_all_layers_that_gradients_go_through(
    tmp_path: Path, tiny_llama: Path, name: str, recompute: bool
) -> None:
    bundle, samples = bundle_of(tmp_path / "bundle", tiny_llama, name, "nf4"), SampleSizes(4, 16, 16)
    planned, kept = plan_of(bundle, samples, recompute=recompute), kept_bytes(bundle, samples, recompute=recompute)
    assert 0.3 * planned.activations < kept <= planned.activations
    top_only = bundle_of(tmp_path / "exact", tiny_llama, "exact", "nf4")
    assert planned.activations > plan_of(top_only, samples, recompute=recompute).activations
    of_two = plan_of(top_only, samples, recompute=recompute).weights
    assert planned.weights == pytest.approx(of_two * len(bundle.plan.resident) / 2, rel=1e-3)
    assert planned.sweep == planned.slice_bytes  # nothing is swept: states are read, that is all


# --- preparation -------------------------------------------------------------------------------------------


def run_of(
    directory: Path,
    model: Path,
    name: str,
    keys: dict[str, Any] | None = None,
    dtype: str = "float32",
    **align: Any,
) -> RunSettings:
    method = {
        "name": name,
        "layers_per_group": None,
        "groups": None,
        "realign_every": None,
        **SMALL[name],
        **(keys or {}),
    }
    steps: dict[str, Any] = {"steps": 8, "realign_steps": 4} | align
    used = {key: value if name in readers_of(f"[align] {key}") else None for key, value in steps.items()}
    return make_run(directory, model, dtype, method=method, align={**align, **used})


@pytest.mark.parametrize("name", ["fedbiot", "fedot", "fedpetuning", "fedpruner", "fedpruner+"])
def test_a_preparation_stores_what_the_method_asks_for(tmp_path: Path, tiny_llama: Path, name: str) -> None:
    settings = run_of(
        tmp_path / name, tiny_llama, name, learning_rate=None
    )  # the default: 1e-2 is too fast for LoRA on all layers
    kl = public_kl(settings)
    bundle = Bundle.open(settings.run_dir / "bundle")
    plan, manifest = bundle.plan, bundle.manifest
    assert manifest.adapter_base == "bf16"
    assert manifest.emulator_base == ("bf16" if method_of(settings.method).aligned(plan) else "nf4")
    for number in plan.kept:  # the checkpoint's own bits, also below the adapter
        theirs = Checkpoint.open(str(tiny_llama)).layer(number)
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in bundle.stored_layer(number).items())
    assert manifest.lora.aligned == plan.sub_emulator
    ids = torch.stack(RunPreparation(settings).llm.text.held_out)
    full: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        teacher = full(ids).logits.double().log_softmax(-1)
        whole = with_peft(
            pruned_by_hand(tiny_llama, plan, quantized=False),
            {number: position for position, number in enumerate(plan.kept)},
            {**bundle.emulator_lora(), **bundle.adapter_lora()},
            manifest.lora.rank,
            manifest.lora.alpha,
        )
        logs = {"aligned": whole(ids).logits, "pruned": pruned_by_hand(tiny_llama, plan, quantized=False)(ids).logits}
    for key, found in logs.items():
        student = found.double().log_softmax(-1)
        expected = (teacher.exp() * (teacher - student)).sum(-1).mean().item()
        assert kl[key] == pytest.approx(expected, rel=1e-4, abs=1e-9), key
    assert kl["quantized"] == pytest.approx(kl["pruned"], rel=1e-6)  # 16 bits lose nothing
    if not method_of(settings.method).aligned(plan):
        assert bundle.emulator_lora() == {}
        assert kl["aligned"] == kl["quantized"]
    else:
        assert kl["aligned"] < kl["quantized"]
        moved = {
            int(key.split(".")[1]) for key, value in bundle.emulator_lora().items() if key.endswith("B") and value.any()
        }
        assert moved == set(plan.sub_emulator)


def test_only_another_base_is_named_in_a_manifest(prepared: RunSettings, tmp_path: Path, tiny_llama: Path) -> None:
    """Edges that know no dense emulator read FedSODA's manifests as ever."""
    assert b"emulator_base" not in (prepared.run_dir / "bundle" / "manifest.json").read_bytes()
    manifest = bundle_of(tmp_path / "b", tiny_llama, "fedbiot", "bf16").manifest
    assert read_manifest(encode_manifest(manifest)) == manifest
    for change, problem in (
        ({"emulator_base": "int3"}, "a base that is not known"),
        ({"lora": msgspec.structs.replace(manifest.lora, emulator=manifest.lora.adapter)}, "its emulator LoRA lies on"),
    ):
        with pytest.raises(BlobCorrupt, match=problem):
            read_manifest(encode_manifest(msgspec.structs.replace(manifest, **change)))


# --- evaluation --------------------------------------------------------------------------------------------


def test_the_hub_judges_a_bottom_adapter_with_the_emulator_lora_above_it(tmp_path: Path, tiny_llama: Path) -> None:
    bundle = bundle_of(tmp_path / "b", tiny_llama, "fedot", "bf16")
    spec, tensors = bundle.manifest.lora, {**bundle.adapter_lora(), **bundle.emulator_lora()}
    models = judged_models(bundle, Checkpoint.open(str(tiny_llama)), bundle.adapter_lora(), bundle.emulator_lora())
    full: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    places = {number: position for position, number in enumerate(bundle.plan.kept)}
    pruned = pruned_by_hand(tiny_llama, bundle.plan, quantized=False)
    by_hand = {
        "sub_llm": with_peft(pruned, places, tensors, spec.rank, spec.alpha),
        "plug_in": with_peft(full, {n: n for n in bundle.plan.adapter}, tensors, spec.rank, spec.alpha),
    }
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_llama)
    for name, whole in by_hand.items():
        own = [score_by_hand(whole, tokenizer, q.prompt, q.completion) for q in QUESTIONS]
        expected = -sum(score for score, _ in own) / sum(count for _, count in own)
        assert evaluator(tiny_llama).answers(models[name]).nll == pytest.approx(expected, rel=1e-5), name


# --- a whole run -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedot", "fedbiot", "fedpetuning", "fedpruner", "fedpruner+"])
def test_two_rounds_of_real_processes(tmp_path: Path, tiny_llama: Path, name: str) -> None:
    """An edge as it is joins and trains; what the hub then says of both models, Transformers and PEFT say too."""
    run_file = write_run(tmp_path / "run", tiny_llama, rounds=2, edges="a")
    text = re.sub(
        r"(?m)^(layers_per_group|groups|adapter_layers|realign_every|steps|realign_steps) = \d+\n",
        "",
        run_file.read_text(),
    )
    keys = {"name": name, **{key: value for key, value in SMALL[name].items() if value is not None}}
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
    steps = "".join(f"{key} = 4\n" for key in ("steps", "realign_steps") if name in readers_of(f"[align] {key}"))
    text = text.replace("[method]\n", f"[method]\n{lines}").replace("[align]\n", f"[align]\n{steps}")
    run_file.write_text(text.replace("min_edges = 2", "min_edges = 1").replace("_steps = 40", "_steps = 15"))
    federation = Federation(run_file, "a")
    try:
        federation.finish(federation.hub(), federation.edge("a"))
    finally:
        federation.stop()
    settings = read_settings(run_file)
    ledger = Ledger(settings.run_dir / "ledger.sqlite")
    records = list(ledger.records())
    ledger.close()
    assert [record.round for record in records if isinstance(record, RoundClosed)] == [1, 2]
    realigned = [record.round for record in records if isinstance(record, Realigned)]
    assert realigned == ([1, 2] if name == "fedbiot" else [])

    outcome, bundle = read_outcome(settings.run_dir), Bundle.open(settings.run_dir / "bundle")
    spec, plan, blobs = bundle.manifest.lora, bundle.plan, BlobStore(settings.run_dir / "blobs")
    master = delta.from_bytes(blobs.get(outcome.master), spec.adapter)
    emulator = delta.from_bytes(blobs.get(outcome.emulator_view), spec.emulator)
    whole = with_peft(
        pruned_by_hand(tiny_llama, plan, quantized=False),
        {number: position for position, number in enumerate(plan.kept)},
        {**master, **emulator},
        spec.rank,
        spec.alpha,
    )
    export(settings, tmp_path / "adapter")
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {int(re.findall(r"layers\.(\d+)\.", key)[0]) for key in exported} == set(plan.adapter)
    full: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    plugged: Any = PeftModel.from_pretrained(full, str(tmp_path / "adapter")).eval()
    assert outcome.evaluation is not None
    reported = {name: loss for name, loss in outcome.evaluation.loss.items() if loss is not None}
    assert reported["sub_llm"] == pytest.approx(mean_nll(whole, settings, tiny_llama), rel=1e-4)
    assert reported["plug_in"] == pytest.approx(mean_nll(plugged, settings, tiny_llama), rel=1e-4)
    assert reported["sub_llm"] < reported["full"]
    if name == "fedpetuning":
        assert reported["sub_llm"] == reported["plug_in"]
