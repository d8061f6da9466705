"""A checkpoint is read tensor by tensor; what cannot be pruned is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedsoda_edge.data.samples import SampleTokenizer
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.source import Checkpoint


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
            r"family 'mamba' is not supported; choose a model of gemma3_text, llama, mistral",
        ),
        (lambda d: (d / "config.json").unlink(), r"has no config\.json"),
        (lambda d: (d / "tokenizer.json").unlink(), r"has no tokenizer\.json"),
        (lambda d: (d / "model.safetensors").unlink(), r"has no model\.safetensors, only"),
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
    with pytest.raises(UsageProblem, match="does not exist; name a directory, or a model hub's id"):
        Checkpoint.open("./llama", relative_to=tmp_path)


def test_a_config_may_list_several_ids_that_end_a_text(model_dir: Path) -> None:
    edit_config(model_dir, eos_token_id=[2, 7])
    source = Checkpoint.open(str(model_dir))
    one = SampleTokenizer(model_dir / "tokenizer.json", source.fields["eos_token_id"]).sample("a b", "c")
    two = SampleTokenizer(model_dir / "tokenizer.json", 2).sample("a b", "c")
    assert one == two
