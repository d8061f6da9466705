"""A checkpoint is read tensor by tensor; what cannot be pruned is refused by name; streaming is the whole model."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedsoda_edge.data.samples import SampleTokenizer
from fedsoda_edge.errors import BlobCorrupt, UsageProblem
from fedsoda_edge.model import lora
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.nf4 import NF4Tensor
from fedsoda_edge.model.streaming import Checkpoint, stream
from tests.edge.model.test_bundle import write

SAMPLES = [torch.arange(3, 3 + length) for length in (5, 17, 1, 17, 9)]


@pytest.fixture
def model_dir(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def edit_config(directory: Path, **change: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def make_pickled(directory: Path) -> None:
    torch.save({}, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def shard(directory: Path) -> None:
    """Two files and an index, as Transformers writes large checkpoints."""
    tensors = load_file(directory / "model.safetensors")
    table: dict[str, str] = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, directory / file, {"format": "pt"})
        table |= dict.fromkeys(names, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    (directory / "model.safetensors").unlink()


def lose_a_shard(directory: Path) -> None:
    shard(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()


def test_a_sharded_checkpoint_reads_like_a_whole_one(tiny_llama: Path, model_dir: Path) -> None:
    shard(model_dir)
    one, two = Checkpoint.open(str(tiny_llama)), Checkpoint.open(str(model_dir))
    assert torch.equal(one.embedding(), two.embedding())
    assert torch.equal(one.head(), two.head())
    for number in range(one.num_layers):
        first, second = one.layer(number), two.layer(number)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (make_pickled, r"model has only \.bin weights, which are pickles.*save_pretrained"),
        (lambda d: edit_config(d, quantization_config={"quant_method": "gptq"}), r"already quantized \(gptq\)"),
        (
            lambda d: edit_config(d, model_type="mamba"),
            r"family 'mamba' is not supported; these are: gemma3_text, llama, mistral",
        ),
        (lambda d: (d / "config.json").unlink(), r"has no config\.json"),
        (lambda d: (d / "tokenizer.json").unlink(), r"has no tokenizer\.json"),
        (lambda d: (d / "model.safetensors").unlink(), r"has no model\.safetensors; found"),
        (
            lose_a_shard,
            r"incomplete: .*names model-00002-of-00002\.safetensors",
        ),
    ],
    ids=["pickles", "quantized", "family", "config", "tokenizer", "weights", "shard"],
)
def test_what_cannot_be_pruned_is_refused_by_name(
    model_dir: Path, damage: Callable[[Path], Any], sentence: str
) -> None:
    damage(model_dir)
    with pytest.raises(UsageProblem, match=sentence):
        Checkpoint.open(str(model_dir))


def test_a_model_that_is_nowhere_is_said_to_be_nowhere(tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match="is not there; name a directory or a hub id"):
        Checkpoint.open("./llama", relative_to=tmp_path)


def test_streaming_is_the_whole_model_with_peft(tiny_llama: Path) -> None:
    """Layer by layer, samples of many lengths at once, LoRA unmerged: PEFT's hidden states sample by sample."""
    source = Checkpoint.open(str(tiny_llama))
    targets = ("q_proj", "v_proj", "down_proj")
    layout = lora.specs(source.family, source.fields, range(source.num_layers), targets, 4)
    generator = torch.Generator().manual_seed(2)
    tensors = {item.name: torch.randn(item.shape, generator=generator) * 0.1 for item in layout}
    seen: dict[int, list[torch.Tensor]] = {}
    stream(
        source,
        range(source.num_layers),
        SAMPLES,
        lora=tensors,
        lora_scale=8 / 4,
        batch_tokens=40,
        visit=lambda number, hidden: seen.update({number: list(hidden)}),
    )

    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    whole = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules=list(targets))).eval()
    for name, parameter in whole.named_parameters():
        head, mark, tail = name.partition(".lora_")
        if mark:
            parameter.data = tensors[f"{head.removeprefix('base_model.model.model.')}.lora_{tail[0]}"]
    for at, ids in enumerate(SAMPLES):
        with torch.no_grad():
            expected = whole(ids[None], output_hidden_states=True).hidden_states
        for number in range(source.num_layers - 1):  # the last of them is after the final norm
            torch.testing.assert_close(seen[number][at], expected[number + 1][0], rtol=1e-4, atol=1e-5)


def test_a_config_may_list_several_ids_that_end_a_text(model_dir: Path) -> None:
    edit_config(model_dir, eos_token_id=[2, 7])
    source = Checkpoint.open(str(model_dir))
    one = SampleTokenizer(model_dir / "tokenizer.json", source.fields["eos_token_id"]).sample("a b", "c")
    two = SampleTokenizer(model_dir / "tokenizer.json", 2).sample("a b", "c")
    assert one == two


# -- on an edge: from a bundle --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Bundle:
    return write(tmp_path_factory.mktemp("b") / "bundle", tiny_llama, trained=True)


def test_layers_that_stay_as_they_are_stored_give_the_states_of_dense_ones(bundle: Bundle) -> None:
    def states(dense: bool) -> list[torch.Tensor]:
        return stream(
            bundle, bundle.plan.sub_emulator, SAMPLES, lora=bundle.emulator_lora(), lora_scale=2.0, dense=dense
        )

    for one, other in zip(states(True), states(False), strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()


def test_one_layer_is_read_ahead_while_the_one_before_computes(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the next one read after this one's work, its reading would not begin before `visit` returns."""
    layers, read = bundle.plan.sub_emulator, list[int]()
    begun = {number: threading.Event() for number in layers}
    plain = bundle.stored_layer

    def noting(number: int) -> dict[str, torch.Tensor | NF4Tensor]:
        read.append(number)
        begun[number].set()
        return plain(number)

    def visit(number: int, _: list[torch.Tensor]) -> None:
        ahead = layers[: layers.index(number) + 2]
        assert begun[ahead[-1]].wait(10)
        assert read == list(ahead)

    monkeypatch.setattr(bundle, "stored_layer", noting)
    stream(bundle, layers, SAMPLES, visit=visit)
    assert read == list(layers)
    assert len(layers) > 2


@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_layer_that_cannot_be_read_ends_the_sweep_with_its_own_error(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    layers, done = bundle.plan.sub_emulator, list[int]()
    plain = bundle.stored_layer

    def damaged(number: int) -> dict[str, torch.Tensor | NF4Tensor]:
        if number == layers[place]:
            raise BlobCorrupt(f"layer {number} is not as it was")
        return plain(number)

    monkeypatch.setattr(bundle, "stored_layer", damaged)
    with pytest.raises(BlobCorrupt, match=f"layer {layers[place]} is not as it was"):
        stream(bundle, layers, SAMPLES, visit=lambda number, _: done.append(number))
    assert done == list(layers[: layers.index(layers[place])])
