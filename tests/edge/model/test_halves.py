"""A layer without its attention or its MLP is what Transformers makes of it when that half adds nothing.

The oracle is Transformers' own model, whole, with zeros in the matrix that ends the half: then it adds 0 and passes no
gradient on. What is tested holds no weight of that half.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsoda_edge.errors import BlobCorrupt, UsageProblem
from fedsoda_edge.model import lora
from fedsoda_edge.model.bundle import Bundle, read_manifest
from fedsoda_edge.model.bundle_writer import BundleSettings, half_bytes, shard_sizes, write_bundle
from fedsoda_edge.model.families import layer_on_meta
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.model.streaming import stream
from fedsoda_edge.model.sub_llm import build
from fedsoda_edge.protocol.manifest import Half, LayerPlan, LoRASpec, check_plan, encode_manifest
from fedsoda_edge.protocol.needs import SampleSizes, edge_needs, plans, shape_of
from fedsoda_edge.worker.batches import SweptSamples
from fedsoda_edge.worker.training import completion_loss
from fedsoda_hub.algorithms.pruning.layer_plan import drop_layers
from tests.edge.model.test_bundle import IDS, random_lora, relative_difference
from tests.edge.model.test_families import pruned
from tests.edge.protocol.test_needs import LEAST, MOST, kept_bytes, plan_of
from tests.edge.worker.test_training import make_samples
from tests.tiny import FAMILY_CONFIGS, make_tiny

KEPT = (0, 2, 3, 5, 6, 7)
# The first layer and the last have no attention; what has it lies where layers are of other kinds (tests/tiny.py).
WHOLE = drop_layers(8, (5, 6, 7), (0, 2, 3))
PLAN = msgspec.structs.replace(WHOLE, without_attention=(0, 3, 7), without_mlp=(2, 6))
HALVES: tuple[Half, Half] = ("attention", "mlp")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module", params=sorted(FAMILY_CONFIGS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    family: str = request.param
    return Checkpoint.open(str(make_tiny(tmp_path_factory.mktemp("halves") / family, family)))


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_halves(tmp_path_factory.mktemp("bundles") / "bundle", checkpoint)


def write_halves(directory: Path, checkpoint: Checkpoint, plan: LayerPlan = PLAN, base: str = "nf4") -> Bundle:
    """Write a bundle with LoRA that is not zero on all that is left of the adapter's layers."""
    targets = TARGETS[:4] if checkpoint.family.model_type == "qwen3_moe" else TARGETS  # experts carry no LoRA
    layout = lora.specs(checkpoint.family, checkpoint.fields, plan.adapter, targets, 4, plan.lacking)
    spec = LoRASpec(4, 8.0, targets, layout, ())
    write_bundle(
        directory,
        checkpoint,
        plan,
        BundleSettings(spec, base, False, base),
        name=checkpoint.name,
        revision=checkpoint.revision,
        adapter_lora=random_lora(spec, 5),
        emulator_lora={},
        tokenizer_files=checkpoint.tokenizer_files,
    )
    return Bundle.open(directory)


def by_hand(checkpoint: Checkpoint, *, quantized: bool) -> Any:
    model = pruned(checkpoint, KEPT, quantized=quantized)
    for number in (*PLAN.without_attention, *PLAN.without_mlp):
        layer = model.model.layers[KEPT.index(number)]
        if number in PLAN.without_attention:
            layer.self_attn.o_proj.weight.data.zero_()
        elif hasattr(layer.mlp, "experts"):
            layer.mlp.experts.down_proj.data.zero_()
        else:
            layer.mlp.down_proj.weight.data.zero_()
    return model.requires_grad_(False)


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    assert relative_difference(ours, theirs) < 1e-5


def test_the_sub_llm_is_transformers_with_halves_that_add_nothing(checkpoint: Checkpoint) -> None:
    sub = build(checkpoint.without(PLAN.lacking), KEPT, embedding=True)
    with torch.no_grad():
        assert_near(sub.hidden(ids=IDS) @ sub.head.T, by_hand(checkpoint, quantized=False)(IDS).logits)
        whole = build(checkpoint, KEPT, embedding=True)
        assert relative_difference(sub.hidden(ids=IDS), whole.hidden(ids=IDS)) > 0.1
    for number in KEPT:
        modules = {name.partition(".")[0] for name, _ in sub.layer(number).named_parameters()}
        assert ("self_attn" in modules) == (number not in PLAN.without_attention)
        assert ("mlp" in modules) == (number not in PLAN.without_mlp)
        norms = {name for name in modules if name.endswith("layernorm")}
        in_whole = {name for name, _ in whole.layer(number).named_children() if name.endswith("layernorm")}
        assert len(norms) == len(in_whole) // (2 if number in PLAN.lacking else 1)


def test_generation_with_a_cache_gives_what_it_gives_without_one(checkpoint: Checkpoint) -> None:
    sub, plain = build(checkpoint.without(PLAN.lacking), KEPT, embedding=True), by_hand(checkpoint, quantized=False)
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids, mask = IDS[:2, :9], torch.tensor([[0] * 4 + [1] * 5, [1] * 9])  # the shorter one is padded on the left
    with torch.no_grad():
        cached = sub.model.generate(ids, attention_mask=mask, use_cache=True, **settings)
        assert torch.equal(cached, sub.model.generate(ids, attention_mask=mask, use_cache=False, **settings))
        assert torch.equal(cached, plain.generate(ids, attention_mask=mask, use_cache=True, **settings))
        held = sub.model(ids, use_cache=True).past_key_values.layers
    assert sum(layer.keys is not None for layer in held) == len(KEPT) - len(PLAN.without_attention)


def test_streaming_runs_what_is_left_of_each_layer(checkpoint: Checkpoint) -> None:
    samples, seen = [IDS[0], IDS[1, :7]], dict[int, list[Tensor]]()
    source = checkpoint.without(PLAN.lacking)
    stream(source, KEPT, samples, visit=lambda number, hidden: seen.update({number: list(hidden)}))
    model, expected = by_hand(checkpoint, quantized=False), dict[int, Tensor]()
    for number, layer in zip(KEPT, model.model.layers, strict=True):
        layer.register_forward_hook(lambda _, __, out, number=number: expected.update({number: out}))
    for at, ids in enumerate(samples):
        with torch.no_grad():
            model(ids[None])
        for number in KEPT:
            assert_near(seen[number][at], expected[number][0])


@pytest.mark.parametrize("base", ["nf4", "bf16"])
def test_a_bundle_holds_the_kept_halves_alone(tmp_path: Path, checkpoint: Checkpoint, base: str) -> None:
    bundle = write_halves(tmp_path / "b", checkpoint, base=base)
    manifest = bundle.manifest
    assert read_manifest(encode_manifest(manifest)).plan == PLAN
    settings = BundleSettings(manifest.lora, base, False, base)
    predicted = shard_sizes(bundle.family, manifest.config, PLAN, settings, manifest.dtype)
    assert {f"{role}.safetensors": size for role, size in predicted.items()}.items() <= {
        file.name: file.bytes for file in manifest.files
    }.items()
    halves: dict[int, list[int]] = {}
    for number in KEPT:
        shard = load_file(tmp_path / "b" / f"layers.{number}.safetensors")
        sizes = [half_bytes(bundle.family, manifest.config, number, half, base, manifest.dtype) for half in HALVES]
        kept = [size for size, half in zip(sizes, HALVES, strict=True) if PLAN.lacking.get(number) != half]
        assert sum(tensor.nbytes for tensor in shard.values()) == sum(kept)
        halves[number] = kept
    assert {len(halves[number]) for number in PLAN.lacking} == {1}
    for dense in (False, True):
        sub = build(bundle, KEPT, dense=dense, embedding=True)
        with torch.no_grad():
            expected = by_hand(checkpoint, quantized=base == "nf4")(IDS).logits
            assert_near(sub.hidden(ids=IDS) @ sub.head.T, expected)


def test_every_tensor_of_a_layer_is_of_one_half(checkpoint: Checkpoint) -> None:
    for number in range(8):
        layers = [layer_on_meta(checkpoint.family, checkpoint.fields, number, lacks) for lacks in (None, *HALVES)]
        whole, mlp, attention = ({name for name, _ in layer.named_parameters()} for layer in layers)
        assert mlp | attention == whole == set(checkpoint.layer(number))
        assert not mlp & attention
        assert checkpoint.without({number: "attention"}).layer(number).keys() == mlp


def test_plain_transformers_loads_it_with_zeros_in_the_place_of_what_is_gone(bundle: Bundle, tmp_path: Path) -> None:
    bundle.materialize(tmp_path / "plain")
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    for parameter in plain.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    plain.train()  # bitsandbytes repacks itself in eval mode on some CPUs
    sub = build(bundle, KEPT, embedding=True)
    lora.attach(sub, bundle.manifest.lora, bundle.adapter_lora())
    with torch.no_grad():
        with_lora = PeftModel.from_pretrained(plain, str(tmp_path / "plain" / "lora")).train()  # it comes in eval mode
        assert_near(sub.hidden(ids=IDS) @ sub.head.T, with_lora(IDS).logits)


@pytest.mark.parametrize("way", [{}, {"dense": False}, {"dense": False, "recompute": True}], ids=str)
def test_loss_and_lora_gradients_are_those_of_peft(checkpoint: Checkpoint, bundle: Bundle, way: dict[str, Any]) -> None:
    samples = make_samples(5)
    view, spec = bundle.adapter_lora(), bundle.manifest.lora
    swept = SweptSamples.sweep(bundle, PLAN.swept, samples, emulator={}, lora_scale=spec.scale)
    tail = build(bundle, PLAN.resident, **way)
    lora.attach(tail, spec, view)
    named = lora.parameters(tail)
    for parameter in named.values():
        parameter.requires_grad_(True)
    loss = completion_loss(tail, swept.batch(range(5)))
    loss.backward()

    plain = by_hand(checkpoint, quantized=True)
    paths = {name: f"model.layers.{KEPT.index(int(name.split('.')[1]))}.{name.split('.', 2)[2]}" for name in view}
    modules = sorted({path.rpartition(".")[0] for path in paths.values()})
    peft: Any = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules=modules))
    for name, path in paths.items():
        module, _, leaf = path.rpartition(".")
        getattr(peft.base_model.model.get_submodule(module), leaf)["default"].weight.data = view[name].clone()
    total = torch.zeros(())
    for sample in samples:
        logs = peft(torch.tensor([sample.ids])).logits[0].log_softmax(-1)
        total = total - sum(logs[at - 1, sample.ids[at]] for at in range(sample.start, len(sample.ids)))
    expected = total / sum(sample.num_supervised for sample in samples)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert named.keys() == view.keys()
    for name, path in paths.items():
        module, _, leaf = path.rpartition(".")
        assert_near(named[name].grad, getattr(peft.base_model.model.get_submodule(module), leaf)["default"].weight.grad)


def test_lora_lies_on_what_is_left(tiny_llama: Path) -> None:
    source = Checkpoint.open(str(tiny_llama))
    lacking = PLAN.lacking
    names = [spec.name for spec in lora.specs(source.family, source.fields, (6, 7), TARGETS, 4, lacking)]
    assert {name.rpartition(".")[0] for name in names} == {
        *(f"layers.6.self_attn.{target}" for target in TARGETS[:4]),
        *(f"layers.7.mlp.{target}" for target in TARGETS[4:]),
    }
    assert lora.specs(source.family, source.fields, (7,), ("q_proj",), 4, lacking) == ()
    with pytest.raises(UsageProblem, match="'qproj', which matches no module in layer 7"):
        lora.specs(source.family, source.fields, (7,), ("qproj",), 4, lacking)


@pytest.mark.parametrize("half", HALVES)
def test_the_last_layer_computes_the_rows_that_the_loss_asks_for(checkpoint: Checkpoint, half: Half) -> None:
    model = build(checkpoint.without({7: half}), (6, 7))
    states = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1))
    rows, columns = torch.tensor([0, 0, 1]), torch.tensor([7, 14, 9])
    assert_near(model.hidden_at(rows, columns, states=states), model.hidden(states=states)[rows, columns])


@pytest.mark.parametrize("samples", [SampleSizes(4, 16, 4), SampleSizes(4, 16, 16)], ids=str)
def test_the_memory_plan_counts_what_is_there(tmp_path: Path, checkpoint: Checkpoint, samples: SampleSizes) -> None:
    plan = msgspec.structs.replace(WHOLE, without_attention=(0, 6), without_mlp=(3, 5))  # the last layer is whole
    bundle, whole = (write_halves(tmp_path / str(at), checkpoint, each) for at, each in enumerate((plan, WHOLE)))
    planned, kept = plan_of(bundle, samples, recompute=False), kept_bytes(bundle, samples)
    most = 1.02 * MOST[bundle.manifest.family]  # LoRA's rank weighs more beside half a layer; phi3 is at 1.01
    assert LEAST * planned.activations <= kept <= most * planned.activations
    layers = {n: layer_on_meta(bundle.family, bundle.fields, n, plan.lacking.get(n)) for n in plan.kept}
    sizes = {number: sum(parameter.numel() for parameter in layer.parameters()) for number, layer in layers.items()}
    shape = replace(
        shape_of(bundle.manifest),  # counts by the sizes of files
        layer_parameters=max(sizes.values()),
        adapter_parameters=sum(sizes[number] for number in plan.adapter),
    )
    assert bundle.manifest.needs == edge_needs(shape, bundle.manifest.files)
    less, more = (next(plans(shape_of(each.manifest), "cpu", samples)) for each in (bundle, whole))
    assert less.weights < more.weights
    assert less.activations < more.activations


def test_a_plan_of_whole_layers_names_no_halves() -> None:
    """Edges of releases that know none read it."""
    written = msgspec.json.encode(drop_layers(8, (6, 7), (0, 1, 2, 3)))
    assert b"without" not in written
    assert b'"distances":[]' in written
    assert msgspec.json.decode(msgspec.json.encode(PLAN), type=LayerPlan) == PLAN


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"without_mlp": (1,)}, "a kept layer lacks one half at most"),
        ({"without_mlp": (3,)}, "a kept layer lacks one half at most"),
        ({"without_mlp": (6, 2)}, "what lacks a half is ascending"),
        ({"without_attention": (0, 0, 3)}, "a kept layer lacks one half at most"),
        ({"without_attention": KEPT, "without_mlp": ()}, "some layer has attention"),
    ],
)
def test_a_plan_of_halves_from_the_network_is_checked(
    tmp_path: Path, tiny_llama: Path, change: dict[str, Any], rule: str
) -> None:
    wrong = msgspec.structs.replace(PLAN, **change)
    with pytest.raises(UsageProblem, match=rule):
        check_plan(wrong)
    manifest = write_halves(tmp_path / "b", Checkpoint.open(str(tiny_llama))).manifest
    with pytest.raises(BlobCorrupt, match="breaks the rule"):
        read_manifest(encode_manifest(msgspec.structs.replace(manifest, plan=wrong)))


def test_lora_on_a_half_that_is_gone_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    manifest = write_halves(tmp_path / "b", Checkpoint.open(str(tiny_llama))).manifest
    less = msgspec.structs.replace(PLAN, without_mlp=(2, 5, 6))
    with pytest.raises(BlobCorrupt, match="its LoRA tensors are not those of its plan"):
        read_manifest(encode_manifest(msgspec.structs.replace(manifest, plan=less)))
