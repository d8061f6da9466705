"""A bundle is the sub-LLM: same logits as a model pruned by hand, in plain Transformers too; nothing damaged passes."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load, load_file, save
from transformers import AutoModelForCausalLM

from fedsoda_edge.errors import BlobCorrupt
from fedsoda_edge.model import delta, lora
from fedsoda_edge.model.bundle import Bundle, read_manifest
from fedsoda_edge.model.bundle_writer import BundleSettings, write_bundle
from fedsoda_edge.model.loss import cross_entropy
from fedsoda_edge.model.nf4 import NF4Linear, dequantize, quantize
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.model.streaming import stream
from fedsoda_edge.model.sub_llm import SubLLM, build
from fedsoda_edge.protocol.manifest import File, LayerPlan, LoRASpec
from fedsoda_hub.algorithms.pruning.layer_plan import make_plan
from fedsoda_hub.algorithms.pruning.sgp import choose_groups
from tests.tiny import make_tiny_llama

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
IDS = torch.randint(3, 260, (3, 20), generator=torch.Generator().manual_seed(0))


def plan_for(source: Checkpoint, adapter: int = 2) -> LayerPlan:
    emulator = source.num_layers - adapter
    distances = [[0.1 + 0.01 * ((7 * low + m) % 5) for m in range(emulator - 1 - low)] for low in range(emulator)]
    return make_plan(source.num_layers, adapter, choose_groups(distances, source.num_layers, adapter, 1, 2), distances)


def write(directory: Path, model: Path, **change: Any) -> Bundle:
    source = change.get("source") or Checkpoint.open(str(model))
    plan, targets = change.get("plan") or plan_for(source), change.get("targets", TARGETS)
    spec = LoRASpec(
        rank=4,
        alpha=8.0,
        targets=targets,
        adapter=lora.specs(source.family, source.fields, plan.adapter, targets, 4),
        emulator=lora.specs(source.family, source.fields, plan.retained, targets, 4),
    )
    settings = BundleSettings(spec, change.get("adapter_base", "nf4"), change.get("quantize_embedding", False))
    tensors = (
        random_lora(spec, 5)
        if change.get("trained")
        else {**lora.initial(spec.adapter, 0), **lora.initial(spec.emulator, 0)}
    )
    write_bundle(
        directory,
        source,
        plan,
        settings,
        name=source.name,
        revision=source.revision,
        adapter_lora={t.name: tensors[t.name] for t in spec.adapter},
        emulator_lora={t.name: tensors[t.name] for t in spec.emulator},
        tokenizer_files=source.tokenizer_files,
    )
    return Bundle.open(directory)


def random_lora(spec: LoRASpec, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {t.name: torch.randn(t.shape, generator=generator) * 0.1 for t in (*spec.adapter, *spec.emulator)}


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def pruned_by_hand(model_dir: Path, plan: LayerPlan, quantized: bool) -> Any:
    """Load the full Transformers model, delete layers and, if asked, replace weights by their NF4 values.

    A half that is pruned ends in zeros, so it adds nothing.
    """
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
    for number, half in plan.lacking.items():
        layer = model.model.layers[plan.kept.index(number)]
        end = layer.self_attn.o_proj if half == "attention" else layer.mlp.down_proj
        end.weight.data.zero_()
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
    assert plain.config.quantization_config.bnb_4bit_compute_dtype == torch.float32
    sub = build(bundle, bundle.plan.kept, embedding=True)
    with torch.no_grad():
        assert relative_difference(sub.hidden(ids=IDS) @ sub.head.T, plain(IDS).logits) < 1e-5
        lora.attach(sub, bundle.manifest.lora, {**bundle.emulator_lora(), **bundle.adapter_lora()})
        with_lora = PeftModel.from_pretrained(plain, str(tmp_path / "plain" / "lora")).train()  # it comes in eval mode
        assert relative_difference(sub.hidden(ids=IDS) @ sub.head.T, with_lora(IDS).logits) < 1e-5


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


def test_a_flipped_bit_is_found_before_use(tmp_path: Path, tiny_llama: Path) -> None:
    write(tmp_path / "b", tiny_llama)
    shard = tmp_path / "b" / "layers.0.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(BlobCorrupt, match=r"layers.0.safetensors has digest .*, the manifest says"):
        Bundle.open(tmp_path / "b").layer(0)


def test_lora_is_fp32_and_trains_beside_bf16_weights(tmp_path: Path, tiny_llama: Path) -> None:
    bundle = write(tmp_path / "b", tiny_llama)
    for dense in (True, False):
        sub = build(bundle, bundle.plan.adapter, compute_dtype=torch.bfloat16, dense=dense)
        lora.attach(sub, bundle.manifest.lora, bundle.adapter_lora())
        for parameter in lora.parameters(sub).values():
            assert parameter.dtype == torch.float32
            parameter.requires_grad_(True)
        sub.hidden(states=torch.randn(2, 5, 64).bfloat16()).float().square().sum().backward()
        assert all(parameter.grad is not None for parameter in lora.parameters(sub).values())


def lora_gradients(sub: SubLLM, states: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = lora.parameters(sub)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
        parameter.grad = None
    sub.hidden(states=states).square().sum().backward()
    found = {}
    for name, parameter in parameters.items():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = parameter.grad
        parameter.requires_grad_(False)
    return found


@pytest.mark.parametrize("longest", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_no_order_of_modes_and_files_loses_a_gradient(tmp_path: Path, tiny_llama: Path, longest: int) -> None:
    """All orders up to this length, on an adapter in NF4 with LoRA, against the same adapter dequantized.

    bitsandbytes' Linear4bit repacks itself on some CPUs after one evaluation and then trains without gradient.
    """
    bundle = write(tmp_path / "b", tiny_llama)
    tensors = random_lora(bundle.manifest.lora, 3)
    adapter = {item.name: tensors[item.name] for item in bundle.manifest.lora.adapter}
    states = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(5))

    def made(dense: bool) -> SubLLM:
        sub = build(bundle, bundle.plan.adapter, dense=dense)
        lora.attach(sub, bundle.manifest.lora, adapter)
        return sub

    expected = lora_gradients(made(dense=True), states)
    assert all(float(value.norm()) > 0 for value in expected.values())
    sub, actions = made(dense=False), ("eval", "train", "no_grad", "save", "load")

    def written() -> tuple[bytes, bytes]:
        held = {name: value for name, value in sub.model.state_dict().items() if not value.is_meta}
        return delta.to_bytes(lora.snapshot(sub)), save(held)

    saved = written()
    for length in range(1, longest + 1):
        for order in itertools.product(actions, repeat=length):
            for action in order:
                if action == "no_grad":
                    with torch.no_grad():
                        sub.hidden(states=states)
                elif action == "save":
                    saved = written()
                elif action == "load":
                    sub.model.load_state_dict(load(saved[1]), strict=False)
                    lora.load(sub, delta.from_bytes(saved[0], bundle.manifest.lora.adapter))
                else:
                    sub.model.train(action == "train")
            for name, value in lora_gradients(sub, states).items():
                torch.testing.assert_close(value, expected[name], msg=lambda text, o=order: f"after {o}: {text}")


# --- manifests that no prepare writes ------------------------------------------------------------------------

DELETE = object()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format_version"], 2, "format 2, this program reads 1"),
        (["family"], "auto", "'auto' is not supported"),
        (["dtype"], "object", "the dtype 'object'"),
        (["auto_map"], {}, "unknown field"),
        (["adapter_base"], "fp4", "a base that is not known"),
        (["needs", "ram_bytes"], -1, "needs below 0"),
        (["config", "auto_map"], {"AutoModel": "x.y"}, "'auto_map' is not allowed"),
        (["config", "hidden_act"], "os.system", "os.system"),
        (["config", "hidden_size"], 1 << 50, "a config number out of bounds"),
        (["config", "vocab_size"], 1 << 30, "vocab_size is 1073741824"),
        (["config", "intermediate_size"], DELETE, "intermediate_size is None"),
        (["config", "num_key_value_heads"], "4", "num_key_value_heads is 4"),
        (["config", "head_dim"], 1 << 30, "head_dim is 1073741824"),
        (["config", "num_attention_heads"], 0, "num_attention_heads is 0"),
        (["config", "rope_parameters"], {"rope_type": "nope"}, "nope"),
        (["config", "rope_parameters"], {"x": [1e300] * 5}, "a config number out of bounds"),
        (["config", "num_hidden_layers"], 9, "another number of layers than its plan"),
        (["plan", "num_layers"], 1 << 40, "a number of layers that no model has"),
        (["plan", "kept"], [0, 1], "a file that no bundle has"),
        (["plan", "adapter"], [], "a number of layers that no model has"),
        (["plan", "mapping"], [], "mapping gives"),
        (["plan", "groups", 0, "removed"], [7], "right above its start"),
        (["lora", "rank"], 1 << 40, "a LoRA that is not possible"),
        (["lora", "alpha"], -1.0, "a LoRA that is not possible"),
        (["lora", "targets"], ["__init__"], "'__init__'"),
        (["lora", "adapter", 0, "shape"], [4, 4096], "not those of its plan"),
        (["lora", "emulator", 0, "shape"], [4, 4096], "not those of its plan"),
        (["lora", "emulator", 0, "name"], "layers.7.mlp.up_proj.lora_A", "its emulator LoRA lies on"),
        (["files", 0, "sha256"], "../../../etc/passwd", "a digest that is not one"),
        (["files", 0, "bytes"], 1 << 50, "a size that is not possible"),
        (["files", 0, "bytes"], 0, "a size that is not possible"),
        (["files", 0], DELETE, "no shard"),
        (["files", 1, "name"], "layers.0.safetensors", "a file twice"),
        (["files", -1, "name"], "../x", "a file that no bundle has"),
        (["files", -1, "name"], "/etc/passwd", "a file that no bundle has"),
        (["files", -1, "name"], "manifest.json", "a file that no bundle has"),
        (["files", -1, "name"], "model.py", "a file that no bundle has"),
        (["files", -1, "name"], "", "a file that no bundle has"),
    ],
)
def test_a_manifest_that_no_bundle_has_is_refused_before_anything_is_made(
    manifest: dict[str, Any], path: list[Any], value: Any, message: str
) -> None:
    place = manifest
    for step in path[:-1]:
        place = place[step]
    if value is DELETE:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    with pytest.raises(BlobCorrupt, match=message):
        read_manifest(json.dumps(manifest).encode())


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"\xff", b"{}", b"[" * 200_000, b'{"format_version":1}', b" " * (17 << 20)]
)
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(BlobCorrupt):
        read_manifest(data)


@pytest.fixture
def manifest(tmp_path: Path, written: Path) -> dict[str, Any]:
    return json.loads((written / "manifest.json").read_bytes())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    directory = tmp_path_factory.mktemp("bundles") / "b"
    write(directory, tiny_llama)
    return directory


# --- shards that have their digest and are none --------------------------------------------------------------


def break_shard(bundle: Bundle, name: str, data: bytes) -> Bundle:
    """Make the bundle of a hub that wrote these bytes on purpose: digest and size are right."""
    bundle.path(name).write_bytes(data)
    files = tuple(
        File(name, hashlib.sha256(data).hexdigest(), len(data)) if file.name == name else file
        for file in bundle.manifest.files
    )
    directory = bundle.path("tokenizer.json").parent
    return Bundle(msgspec.structs.replace(bundle.manifest, files=files), lambda file: directory / file.name)


@pytest.mark.parametrize("attack", ["noise", "header", "missing", "more", "shape", "dtype", "parts"])
def test_a_shard_that_does_not_fit_the_model_is_refused(tmp_path: Path, written: Path, attack: str) -> None:
    shutil.copytree(written, tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    tensors = load_file(bundle.path("layers.0.safetensors"))
    matrix = "mlp.up_proj.weight"
    if attack == "missing":
        del tensors["input_layernorm.weight"]
    elif attack == "more":
        tensors["more.weight"] = torch.zeros(3)
    elif attack == "shape":
        tensors |= quantize(torch.zeros(64, 64)).tensors(matrix)
    elif attack == "dtype":
        tensors[f"{matrix}.absmax"] = tensors[f"{matrix}.absmax"].float()
    elif attack == "parts":
        tensors[f"{matrix}.shape"] = torch.tensor([1 << 30, 1 << 30], dtype=torch.int32)
    data = {"noise": b"\0" * 100, "header": (1 << 60).to_bytes(8, "little")}.get(attack) or save(tensors)
    broken = break_shard(bundle, "layers.0.safetensors", data)
    with pytest.raises(BlobCorrupt, match="has its digest, but is not a shard of this bundle"):
        broken.layer(0)


def test_lora_of_another_shape_is_refused(tmp_path: Path, written: Path) -> None:
    shutil.copytree(written, tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    wrong = {name: tensor[:, :1].clone() for name, tensor in bundle.adapter_lora().items()}
    with pytest.raises(BlobCorrupt, match="not a shard of this bundle"):
        break_shard(bundle, "adapter_lora.safetensors", save(wrong)).adapter_lora()


@pytest.mark.parametrize("quantized", [False, True])
def test_rows_of_the_embedding_are_the_tables_without_reading_it(
    tmp_path: Path, tiny_llama: Path, quantized: bool
) -> None:
    bundle = write(tmp_path / "bundle", tiny_llama, quantize_embedding=quantized)
    ids = torch.tensor([0, 7, 3, len(bundle.embedding()) - 1])
    assert torch.equal(bundle.embedding_rows(ids), bundle.embedding()[ids])


def test_a_head_in_nf4_gives_the_loss_and_the_gradient_of_the_dense_one(tmp_path: Path, tiny_llama: Path) -> None:
    bundle = write(tmp_path / "bundle", tiny_llama, quantize_embedding=True)
    packed = build(bundle, bundle.plan.adapter, dense_head=False)
    dense = build(bundle, bundle.plan.adapter)
    assert isinstance(packed.head, NF4Linear)
    assert isinstance(dense.head, torch.Tensor)
    hidden = torch.randn(5, dense.head.shape[1], generator=torch.Generator().manual_seed(0))
    labels = torch.arange(5)
    found = []
    for head in (packed.head, dense.head):
        states = hidden.clone().requires_grad_()
        value = cross_entropy(states, head, labels)
        value.backward()
        found.append((value.detach(), states.grad))
    torch.testing.assert_close(found[0], found[1])
