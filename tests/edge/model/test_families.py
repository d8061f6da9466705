"""Every family, pruned, streamed, quantized and reloaded, is what plain Transformers makes of the same layers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model import lora
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.families import FAMILIES, build_config
from fedsoda_edge.model.nf4 import dequantize, quantize
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.model.streaming import stream
from fedsoda_edge.model.sub_llm import build
from tests.edge.model.test_bundle import IDS, TARGETS, relative_difference, write
from tests.tiny import FAMILY_CONFIGS, make_tiny

KEPT = (0, 2, 3, 5, 6, 7)  # what the plan of these tests keeps of 8 layers


@pytest.fixture(scope="module", params=sorted(FAMILY_CONFIGS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    family: str = request.param
    return Checkpoint.open(str(make_tiny(tmp_path_factory.mktemp("families") / family, family)))


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    targets = TARGETS if checkpoint.family.model_type != "qwen3_moe" else ("q_proj", "k_proj", "v_proj")
    return write(tmp_path_factory.mktemp("bundles") / "bundle", checkpoint.path, targets=targets)


def plain(checkpoint: Checkpoint) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()


def pruned(checkpoint: Checkpoint, kept: tuple[int, ...], *, quantized: bool) -> Any:
    """Transformers' own model with its layers moved, never rebuilt: what they were built as stays with them."""
    model = plain(checkpoint)
    config, layers = model.config, model.model.layers
    if quantized:
        for layer in layers:
            for name, weight in layer.named_parameters():
                if weight.ndim == 3 or (weight.ndim == 2 and not re.search(r"mlp\.gate\.weight$", name)):
                    weight.data = dequantize(quantize(weight.data.flatten(0, -2))).reshape(weight.shape)
    model.model.layers = torch.nn.ModuleList([layers[number] for number in kept])
    for position, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = position
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[number] for number in kept]
    return model


def test_there_is_a_tiny_model_for_every_family() -> None:
    assert set(FAMILY_CONFIGS) == set(FAMILIES)


def test_the_pruned_model_is_the_one_made_by_hand(checkpoint: Checkpoint) -> None:
    sub = build(checkpoint, KEPT, embedding=True)
    with torch.no_grad():
        expected = pruned(checkpoint, KEPT, quantized=False)(IDS).logits
        torch.testing.assert_close(sub.hidden(ids=IDS) @ sub.head.T, expected, rtol=1e-4, atol=1e-4)


def test_generation_with_a_cache_gives_what_it_gives_without_one(checkpoint: Checkpoint) -> None:
    sub = build(checkpoint, KEPT, embedding=True)
    by_hand = pruned(checkpoint, KEPT, quantized=False)
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = IDS[:1, :9]
    with torch.no_grad():
        cached = sub.model.generate(ids, use_cache=True, **settings)
        assert torch.equal(cached, sub.model.generate(ids, use_cache=False, **settings))
        assert torch.equal(cached, by_hand.generate(ids, use_cache=True, **settings))


def test_streaming_gives_every_layer_its_own_mask_and_rotary_table(checkpoint: Checkpoint) -> None:
    seen: dict[int, torch.Tensor] = {}
    samples = [IDS[0], IDS[1, :7], IDS[2, :13]]
    stream(
        checkpoint,
        range(checkpoint.num_layers),
        samples,
        visit=lambda number, hidden: seen.update({number: list(hidden)}),
    )
    model = plain(checkpoint)
    for at, ids in enumerate(samples):
        with torch.no_grad():
            expected = model(ids[None], output_hidden_states=True).hidden_states
        for number in range(checkpoint.num_layers - 1):  # the last of them is after the final norm
            torch.testing.assert_close(seen[number][at], expected[number + 1][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dense", [False, True], ids=["nf4", "dense"])
def test_the_bundle_is_the_pruned_model_in_nf4(checkpoint: Checkpoint, bundle: Bundle, dense: bool) -> None:
    assert bundle.plan.kept == KEPT
    sub = build(bundle, KEPT, dense=dense, embedding=True)
    with torch.no_grad():
        expected = pruned(checkpoint, KEPT, quantized=True)(IDS).logits
        torch.testing.assert_close(sub.hidden(ids=IDS) @ sub.head.T, expected, rtol=1e-4, atol=1e-4)


def test_it_is_saved_and_loaded_again_by_plain_transformers(bundle: Bundle, tmp_path: Path) -> None:
    bundle.materialize(tmp_path / "plain")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    for parameter in again.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    again.train()  # bitsandbytes repacks itself in eval mode on some CPUs
    assert again.config.num_hidden_layers == len(KEPT)
    sub = build(bundle, KEPT, embedding=True)
    with torch.no_grad():
        assert relative_difference(sub.hidden(ids=IDS) @ sub.head.T, again(IDS).logits) < 1e-5


def test_the_adapter_trains_above_the_border(bundle: Bundle) -> None:
    border = stream(bundle, bundle.plan.sub_emulator, list(IDS))
    tail = build(bundle, bundle.plan.adapter, dense=False)
    lora.attach(tail, bundle.manifest.lora, bundle.adapter_lora())
    for parameter in lora.parameters(tail).values():
        parameter.requires_grad_(True)
    whole = build(bundle, KEPT, embedding=True)
    hidden = tail.hidden(states=torch.stack(border))
    torch.testing.assert_close(hidden, whole.hidden(ids=IDS), rtol=1e-4, atol=1e-4)
    hidden.square().mean().backward()
    moved = {name for name, p in lora.parameters(tail).items() if p.grad is not None and float(p.grad.norm()) > 0}
    assert moved == {item.name for item in bundle.manifest.lora.adapter if item.name.endswith("lora_B")}


def test_what_a_config_says_of_single_layers_follows_them() -> None:
    def config(family: str, **fields: Any) -> Any:
        return build_config(FAMILIES[family], {"num_hidden_layers": 6, **fields}, (0, 3, 5))

    kinds = ["full_attention", "sliding_attention"] * 3
    assert config("qwen2", layer_types=kinds).layer_types == [kinds[0], kinds[3], kinds[5]]
    assert config("smollm3", no_rope_layers=[1, 1, 1, 0, 1, 0]).no_rope_layers == [1, 0, 0]
    # Every second layer has experts, but for layer 3: so of 0, 3, 5 only the last one.
    assert config("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[3]).mlp_only_layers == [0, 1]
    assert config("llama", eos_token_id=[1, 2, 3, 4, 5, 6]).eos_token_id == [1, 2, 3, 4, 5, 6]  # no list of layers


def test_no_window_stays_no_window(tmp_path: Path) -> None:
    """Mistral's config class has a window of its own for whom it is not told."""
    directory = make_tiny(tmp_path / "m", "mistral")
    file = directory / "config.json"
    file.write_text(file.read_text().replace('"sliding_window": 6', '"sliding_window": null'))
    source = Checkpoint.open(str(directory))
    assert build_config(source.family, source.fields, (0, 1)).sliding_window is None


def test_lora_names_known_from_llama_reach_fused_modules(tmp_path: Path) -> None:
    source = Checkpoint.open(str(make_tiny(tmp_path / "m", "phi3")))
    names = [spec.name for spec in lora.specs(source.family, source.fields, [7], TARGETS, 4)]
    assert names == [
        f"layers.7.{module}.lora_{part}"
        for module in ("mlp.down_proj", "mlp.gate_up_proj", "self_attn.qkv_proj")
        for part in "AB"
    ]


def test_a_target_that_matches_nothing_in_a_layer_names_what_there_is(tmp_path: Path) -> None:
    source = Checkpoint.open(str(make_tiny(tmp_path / "m", "qwen3_moe")))
    assert lora.specs(source.family, source.fields, [6], ["up_proj"], 4)  # a dense layer
    with pytest.raises(UsageProblem, match=r"'up_proj', which matches no module in layer 7 .* q_proj, k_proj, v_proj"):
        lora.specs(source.family, source.fields, [6, 7], ["up_proj"], 4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attn_logit_softcapping", "50.0"),
        ("final_logit_softcapping", "30.0"),
        ("use_bidirectional_attention", "true"),
    ],
)
def test_what_is_not_computed_here_is_refused(tmp_path: Path, field: str, value: str) -> None:
    directory = make_tiny(tmp_path / "m", "gemma3_text")
    file = directory / "config.json"
    text = re.sub(rf'"{field}": [a-z]+', f'"{field}": {value}', file.read_text())
    assert f'"{field}": {value}' in text
    file.write_text(text)
    with pytest.raises(UsageProblem, match=f"sets {field} = {value.title()}, which is not supported"):
        Checkpoint.open(str(directory))
