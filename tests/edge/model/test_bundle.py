"""A bundle is the sub-LLM: same logits as a model pruned by hand, in plain Transformers too; nothing damaged passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedsoda_edge.errors import BlobCorrupt
from fedsoda_edge.model import lora
from fedsoda_edge.model.bundle import Bundle, BundleSettings, encode_manifest, read_manifest, write_bundle
from fedsoda_edge.model.layer_plan import choose_groups, make_plan
from fedsoda_edge.model.nf4 import dequantize, quantize
from fedsoda_edge.model.streaming import Checkpoint, stream
from fedsoda_edge.model.sub_llm import build
from fedsoda_edge.protocol.manifest import LayerPlan, LoRASpec
from tests.tiny import make_tiny_llama

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
IDS = torch.randint(3, 260, (3, 20), generator=torch.Generator().manual_seed(0))


def plan_for(source: Checkpoint, adapter: int = 2) -> LayerPlan:
    emulator = source.num_layers - adapter
    distances = [[0.1 + 0.01 * ((7 * low + m) % 5) for m in range(emulator - 1 - low)] for low in range(emulator)]
    return make_plan(source.num_layers, adapter, choose_groups(distances, source.num_layers, adapter, 1, 2), distances)


def write(directory: Path, model: Path, **change: Any) -> Bundle:
    source = Checkpoint.open(str(model))
    plan = plan_for(source)
    spec = LoRASpec(
        rank=4,
        alpha=8.0,
        targets=TARGETS,
        adapter=lora.specs(source.family, source.fields, plan.adapter, TARGETS, 4),
        emulator=lora.specs(source.family, source.fields, plan.aligned, TARGETS, 4),
    )
    settings = BundleSettings(spec, change.get("adapter_base", "nf4"), change.get("quantize_embedding", False))
    write_bundle(
        directory,
        source,
        plan,
        settings,
        name=source.name,
        revision=source.revision,
        adapter_lora=random_lora(spec, 5) if change.get("trained") else lora.initial(spec.adapter, 0),
        emulator_lora=lora.initial(spec.emulator, 0),
        tokenizer_files=source.tokenizer_files,
    )
    return Bundle.open(directory)


def random_lora(spec: LoRASpec, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {t.name: torch.randn(t.shape, generator=generator) * 0.1 for t in (*spec.adapter, *spec.emulator)}


def pruned_by_hand(model_dir: Path, plan: LayerPlan, quantized: bool) -> Any:
    """The full Transformers model with layers deleted and, if asked, weights replaced by their NF4 values."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    model.model.layers = torch.nn.ModuleList([model.model.layers[i] for i in plan.kept])
    for position, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = position
    model.config.num_hidden_layers = len(plan.kept)
    model.float()
    if quantized:
        for weight in model.model.layers.parameters():
            if weight.ndim == 2:
                weight.data = dequantize(quantize(weight.data))
    return model.eval()


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dense", [False, True], ids=["nf4", "dense"])
def test_the_sub_llm_is_the_model_pruned_by_hand(tmp_path: Path, tie: bool, dense: bool) -> None:
    model = make_tiny_llama(tmp_path / "m", tie=tie)
    bundle = write(tmp_path / "b", model)
    sub = build(bundle, bundle.plan.kept, dense=dense, embedding=True)
    with torch.no_grad():
        ours = sub.hidden(ids=IDS) @ sub.head.T
        expected = pruned_by_hand(model, bundle.plan, quantized=True)(IDS).logits
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert ("head.safetensors" in [file.name for file in bundle.manifest.files]) == (not tie)


def test_the_unquantized_sub_llm_comes_from_the_checkpoint(tiny_llama: Path) -> None:
    source = Checkpoint.open(str(tiny_llama))
    plan = plan_for(source)
    sub = build(source, plan.kept, embedding=True)
    with torch.no_grad():
        ours = sub.hidden(ids=IDS) @ sub.head.T
        expected = pruned_by_hand(tiny_llama, plan, quantized=False)(IDS).logits
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantize_embedding", [False, True])
def test_materialized_it_gives_the_same_logits_in_plain_transformers(
    tmp_path: Path, tiny_llama: Path, quantize_embedding: bool
) -> None:
    bundle = write(tmp_path / "b", tiny_llama, trained=True, quantize_embedding=quantize_embedding)
    bundle.materialize(tmp_path / "plain")
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    for parameter in plain.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    plain.train()  # bitsandbytes repacks itself in eval mode on some CPUs
    sub = build(bundle, bundle.plan.kept, embedding=True)
    with torch.no_grad():
        torch.testing.assert_close(sub.hidden(ids=IDS) @ sub.head.T, plain(IDS).logits, rtol=1e-4, atol=1e-4)
        lora.attach(sub, bundle.manifest.lora, {**bundle.emulator_lora(), **bundle.adapter_lora()})
        with_lora = PeftModel.from_pretrained(plain, str(tmp_path / "plain" / "lora"))
        torch.testing.assert_close(sub.hidden(ids=IDS) @ sub.head.T, with_lora(IDS).logits, rtol=1e-4, atol=1e-4)


def test_lora_forward_and_gradients_are_those_of_peft(tmp_path: Path, tiny_llama: Path) -> None:
    bundle = write(tmp_path / "b", tiny_llama)
    spec, plan = bundle.manifest.lora, bundle.plan
    tensors = random_lora(spec, 1)
    sub = build(bundle, plan.kept, dense=False, embedding=True)
    lora.attach(sub, spec, tensors)
    assert not any(parameter.requires_grad for parameter in sub.model.parameters())
    for name, parameter in lora.parameters(sub).items():
        parameter.requires_grad_(int(name.split(".")[1]) in plan.adapter)
    torch.nn.functional.cross_entropy((sub.hidden(ids=IDS) @ sub.head.T).flatten(0, 1), IDS.flatten()).backward()

    # The reference: LoRA by its formula in a model pruned by hand.
    model = pruned_by_hand(tiny_llama, plan, quantized=True).requires_grad_(False)
    weights = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    for name in [n for n in weights if n.endswith("lora_A")]:
        _, number, rest = name.split(".", 2)
        linear = model.model.layers[plan.kept.index(int(number))].get_submodule(rest.removesuffix(".lora_A"))
        a, b = weights[name], weights[name[:-1] + "B"]
        linear.register_forward_hook(lambda _, x, y, a=a, b=b: y + spec.scale * x[0] @ a.T @ b.T)
    torch.nn.functional.cross_entropy(model(IDS).logits.flatten(0, 1), IDS.flatten()).backward()
    adapter = {t.name for t in spec.adapter}
    for name, parameter in lora.parameters(sub).items():
        if name in adapter:
            torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-4, atol=1e-6)
        else:
            assert parameter.grad is None
    assert lora.snapshot(sub).keys() == tensors.keys()

    # The streamed sweep applies the same LoRA.
    border = stream(bundle, plan.sub_emulator, list(IDS), lora=tensors, lora_scale=spec.scale)
    tail = build(bundle, plan.adapter)
    lora.attach(tail, spec, {name: tensors[name] for name in adapter})
    with torch.no_grad():
        torch.testing.assert_close(tail.hidden(states=torch.stack(border)), sub.hidden(ids=IDS), rtol=1e-4, atol=1e-4)


def test_a_bf16_adapter_keeps_the_checkpoints_weights(tmp_path: Path, tiny_llama: Path) -> None:
    bundle = write(tmp_path / "b", tiny_llama, adapter_base="bf16")
    source = Checkpoint.open(str(tiny_llama))
    for number in bundle.plan.adapter:
        for name, tensor in source.layer(number).items():
            assert torch.equal(bundle.layer(number)[name], tensor)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, tiny_llama: Path) -> None:
    one, two = write(tmp_path / "1", tiny_llama), write(tmp_path / "2", tiny_llama)
    assert encode_manifest(one.manifest) == encode_manifest(two.manifest)
    assert read_manifest(encode_manifest(one.manifest)) == one.manifest


def test_a_flipped_bit_is_found_before_use(tmp_path: Path, tiny_llama: Path) -> None:
    write(tmp_path / "b", tiny_llama)
    shard = tmp_path / "b" / "layers.0.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(BlobCorrupt, match=r"layers.0.safetensors has digest .*, the manifest says"):
        Bundle.open(tmp_path / "b").layer(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format 2, this program reads 1"),
        ({"family": "auto"}, "'auto' is not supported"),
        ({"dtype": "object"}, "dtype that is not known"),
        ({"config": {"auto_map": {"AutoModel": "x.y"}}}, "not one of a bundle"),
    ],
)
def test_a_manifest_that_no_bundle_has_is_refused(
    tmp_path: Path, tiny_llama: Path, change: dict[str, Any], message: str
) -> None:
    raw = json.loads(encode_manifest(write(tmp_path / "b", tiny_llama).manifest)) | change
    with pytest.raises(BlobCorrupt, match=message):
        read_manifest(json.dumps(raw).encode())


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "A", "a/b", "", "layers..0"])
def test_file_names_in_a_manifest_reach_no_other_place(tmp_path: Path, tiny_llama: Path, name: str) -> None:
    raw = json.loads(encode_manifest(write(tmp_path / "b", tiny_llama).manifest))
    raw["files"][-1]["name"] = name
    with pytest.raises(BlobCorrupt):
        read_manifest(json.dumps(raw).encode())
