"""Model directories as people have them: what Transformers loads gives its logits here, anything else one sentence.

Transformers itself is the oracle: every directory of `LOADED` is loaded by `AutoModelForCausalLM.from_pretrained` too.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.config_file import read_config_file
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.model.sub_llm import build
from tests.tiny import make_tiny, make_tiny_llama

Damage = Callable[[Path], object]
Tensors = dict[str, Tensor]
IDS = torch.tensor([[1, 5, 9, 30, 77, 300, 4, 4, 61]])
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("small") / "small", layers=3, hidden=32, intermediate=64)


@pytest.fixture
def model_dir(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "model"))


def config(without: tuple[str, ...] = (), **change: Any) -> Damage:
    """Change the config."""

    def damage(directory: Path) -> None:
        file = directory / "config.json"
        values = json.loads(file.read_text()) | change
        file.write_text(json.dumps({key: value for key, value in values.items() if key not in without}))

    return damage


def tensors(change: Callable[[Tensors], Tensors]) -> Damage:
    """Change the weights."""

    def damage(directory: Path) -> None:
        file = directory / "model.safetensors"
        changed = change({name: tensor.clone() for name, tensor in load_file(file).items()})
        file.unlink()
        save_file(changed, file, {"format": "pt"})

    return damage


def both(*damages: Damage) -> Damage:
    """Do one after the other."""

    def damage(directory: Path) -> None:
        for one in damages:
            one(directory)

    return damage


def renamed(change: Callable[[str], str]) -> Damage:
    return tensors(lambda held: {change(name): tensor for name, tensor in held.items()})


def cast(part: str, dtype: torch.dtype) -> Damage:
    return tensors(lambda held: {name: t.to(dtype) if part in name else t for name, t in held.items()})


def without(part: str) -> Damage:
    return tensors(lambda held: {name: tensor for name, tensor in held.items() if part not in name})


def poisoned(part: str, value: float) -> Damage:
    def change(held: Tensors) -> Tensors:
        [name] = [name for name in held if part in name]
        held[name].view(-1)[31] = value
        return held

    return tensors(change)


def sharded(directory: Path) -> dict[str, str]:
    """Split the weights into two files; return which tensor is where."""
    held = load_file(directory / "model.safetensors")
    table: dict[str, str] = {}
    for number, names in enumerate((sorted(held)[::2], sorted(held)[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: held[name] for name in names}, directory / file, {"format": "pt"})
        table |= dict.fromkeys(names, file)
    (directory / "model.safetensors").unlink()
    return table


def index(directory: Path, table: object) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": table}))


def wrong_shards(directory: Path) -> None:
    table = sharded(directory)
    one, two = sorted(set(table.values()))
    index(directory, {name: two if file == one else one for name, file in table.items()})


def stale_index(directory: Path) -> None:
    index(directory, {"model.norm.weight": "model-00001-of-00009.safetensors"})


def in_a_folder(directory: Path) -> None:
    table = sharded(directory)
    (directory / "weights").mkdir()
    for file in set(table.values()):
        (directory / file).rename(directory / "weights" / file)
    index(directory, {name: f"weights/{file}" for name, file in table.items()})


def twice(directory: Path) -> None:
    """One tensor in both shards, with two values."""
    table = sharded(directory)
    one, two = sorted(set(table.values()))
    held = {name: tensor.clone() for name, tensor in load_file(directory / two).items()}
    (directory / two).unlink()
    save_file({**held, "model.norm.weight": torch.full((32,), 3.0)}, directory / two, {"format": "pt"})
    first = {name: tensor.clone() for name, tensor in load_file(directory / one).items()}
    (directory / one).unlink()
    save_file({**first, "model.norm.weight": torch.full((32,), 2.0)}, directory / one, {"format": "pt"})
    index(directory, table)


def half_an_index(directory: Path) -> None:
    table = sharded(directory)
    index(directory, dict(list(table.items())[::3]))


def as_snapshot(directory: Path) -> None:
    """Links to blobs, as a model hub's cache has them."""
    blobs = directory.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(directory.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))


def read_only(directory: Path) -> None:
    for file in directory.iterdir():
        file.chmod(0o444)
    directory.chmod(0o555)


def own_name(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "weights.safetensors")
    config(transformers_weights="weights.safetensors")(directory)


def tied_with(change: Callable[[Tensors], Tensors]) -> Damage:
    return both(config(tie_word_embeddings=True), tensors(change))


def rope(**value: Any) -> Damage:
    return config(("rope_parameters",), rope_scaling=value, rope_theta=500.0)


LOADED: dict[str, Damage] = {
    "as it was": lambda _: None,
    "tied flag, own head": config(tie_word_embeddings=True),
    "tied flag, the same head": tied_with(
        lambda held: held | {"lm_head.weight": held["model.embed_tokens.weight"] * 1}
    ),
    "tied flag, head alone": tied_with(lambda h: {n: t for n, t in h.items() if "embed_tokens" not in n}),
    "tied flag, no head": tied_with(lambda held: {n: t for n, t in held.items() if "lm_head" not in n}),
    "stale index beside a whole file": stale_index,
    "index that names the wrong shards": wrong_shards,
    "index that names a part": half_an_index,
    "shards in a folder": in_a_folder,
    "a tensor in two shards": twice,
    "weights of another name": own_name,
    "names without model.": renamed(lambda name: name.removeprefix("model.")),
    "some names without model.": renamed(lambda n: n.removeprefix("model.") if "layers.1." in n else n),
    "names with model. twice": renamed(lambda name: f"model.{name}"),
    "more tensors than are used": tensors(
        lambda held: held | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    ),
    "fewer layers than weights": config(num_hidden_layers=2),
    "fp16": cast("", torch.float16),
    "fp32": cast("", torch.float32),
    "fp64": cast("", torch.float64),
    "norms in fp32": cast("norm", torch.float32),
    "fp16 and bf16": cast("mlp", torch.float16),
    "fp8 e4m3": cast("proj", torch.float8_e4m3fn),
    "fp8 e5m2": cast("", torch.float8_e5m2),
    "torch_dtype auto": config(("dtype",), torch_dtype="auto"),
    "dtype auto": config(dtype="auto"),
    "dtype of another name": config(dtype="bf16"),
    "dtype that is not the weights'": config(dtype="float16"),
    "no dtype": config(("dtype",)),
    "no metadata in the file": lambda d: (
        save_file(load_file(d / "model.safetensors"), d / "model.safetensors.new")
        or (d / "model.safetensors.new").replace(d / "model.safetensors")
    ),
    "quantization_config null": config(quantization_config=None),
    "rope linear": rope(type="linear", factor=2.0),
    "rope yarn": rope(rope_type="yarn", factor=2.0, original_max_position_embeddings=128),
    "rope llama3": rope(
        rope_type="llama3",
        factor=2.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=128,
    ),
    "rope dynamic": rope(type="dynamic", factor=2.0),
    "rope null": config(("rope_parameters",), rope_scaling=None, rope_theta=10_000.0),
    "keys of another family": config(final_logit_softcapping=30.0, foo={"bar": [1]}),
    "a pad id below 0": config(pad_token_id=-1),
    "links into a cache": as_snapshot,
    "read-only": read_only,
    "names of a sequence classifier beside it": tensors(lambda held: held | {"score.weight": torch.ones(2, 32)}),
}


def logits(source: Checkpoint) -> Tensor:
    with torch.no_grad():
        whole = build(source, range(source.num_layers), embedding=True)
        return whole.hidden(ids=IDS) @ source.head().float().T


@pytest.mark.parametrize("damage", LOADED.values(), ids=LOADED.keys())
def test_what_transformers_loads_gives_the_same_logits(model_dir: Path, damage: Damage) -> None:
    damage(model_dir)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)(IDS).logits
    source = Checkpoint.open(str(model_dir))
    assert torch.allclose(logits(source), theirs, atol=1e-5, rtol=1e-5)
    assert source.dtype in (torch.bfloat16, torch.float16, torch.float32)
    model_dir.chmod(0o755)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_a_config_is_read_in_any_encoding(model_dir: Path, encoding: str, small: Path) -> None:
    file = model_dir / "config.json"
    file.write_bytes(file.read_text().encode(encoding))
    assert Checkpoint.open(str(model_dir)).fields == Checkpoint.open(str(small)).fields


def test_experts_are_read_one_by_one_and_stacked(tmp_path: Path) -> None:
    directory = make_tiny(tmp_path / "moe", "qwen3_moe", layers=3)
    apart = Checkpoint.open(str(directory))
    stacked: Tensors = {}
    for number in range(3):
        stacked |= {f"model.layers.{number}.{name}": t.contiguous() for name, t in apart.layer(number).items()}
    stacked |= {n: t for n, t in load_file(directory / "model.safetensors").items() if ".layers." not in n}
    before = logits(apart)
    (directory / "model.safetensors").unlink()
    save_file(stacked, directory / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(Checkpoint.open(str(directory))), before)
    tensors(lambda held: {n: t for n, t in held.items() if not n.endswith("layers.2.mlp.experts.down_proj")})(directory)
    with pytest.raises(UsageProblem, match=r"has no model\.layers\.2\.mlp\.experts\.down_proj, but"):
        Checkpoint.open(str(directory))


def test_layers_with_a_window_need_its_width(tmp_path: Path) -> None:
    directory = make_tiny(tmp_path / "qwen", "qwen2")  # some of its layers have one
    config(use_sliding_window=False)(directory)
    with pytest.raises(UsageProblem, match=r"names layers with sliding_attention, but sliding_window is None there"):
        Checkpoint.open(str(directory))


def write(name: str, data: bytes) -> Damage:
    return lambda directory: (directory / name).write_bytes(data)


def cut(name: str, kept: int) -> Damage:
    return lambda directory: os.truncate(directory / name, kept)


def rename(old: str, new: str) -> Damage:
    return lambda directory: (directory / old).rename(directory / new)


def lose_a_shard(directory: Path) -> None:
    index(directory, sharded(directory))
    (directory / "model-00002-of-00002.safetensors").unlink()


def dangling(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to("../../blobs/abc")


def gguf_alone(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()
    (directory / "tiny.Q4_K_M.gguf").write_bytes(b"GGUF" + bytes(60))


def adapter(directory: Path) -> None:
    write("adapter_config.json", b'{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')(directory)


def escaping(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    index(directory, {"lm_head.weight": "../secret.safetensors"})


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 123\n"
REFUSED: dict[str, tuple[Damage, str]] = {
    "LFS pointer": (write("model.safetensors", LFS), r"model\.safetensors is not whole .* Git LFS pointer.*`git lfs pull`"),
    "LFS pointer as config": (write("config.json", LFS), r"config\.json is not JSON: it is a Git LFS pointer"),
    "LFS pointer as a shard": (
        both(lambda d: index(d, sharded(d)), write("model-00001-of-00002.safetensors", LFS)),
        r"00001-of-00002\.safetensors is not whole .* LFS",
    ),
    "empty": (write("model.safetensors", b""), r"it is empty: the disk was full"),
    "cut in a tensor": (cut("model.safetensors", 40_000), r"model\.safetensors is not whole .* 40000 bytes and was cut"),
    "cut in the header": (cut("model.safetensors", 300), r"300 bytes and was cut or changed; fetch it again"),
    "zeros": (write("model.safetensors", bytes(5000)), r"begins with zeros: its download did not end"),
    "a web page": (write("model.safetensors", b"<!DOCTYPE html><html>sign in</html>"), r"is a web page; download"),
    "a GGUF by another name": (write("model.safetensors", b"GGUF" + bytes(90)), r"it is a GGUF; `fedsoda-hub import"),
    "a pickle by another name": (write("model.safetensors", b"\x80\x02}q\x00."), r"pickle of PyTorch.*save_pretrained"),
    "a GGUF alone": (gguf_alone, r"no config\.json; but a GGUF; `fedsoda-hub import \S+tiny\.Q4_K_M\.gguf --to DIRECTORY`"),
    "lost shard": (lose_a_shard, r"names model-00002-of-00002\.safetensors \(1 of 2 files are missing\)"),
    "index that leaves the directory": (escaping, r"names the file '\.\./secret\.safetensors', which is not one below"),
    "index without a table": (both(sharded, write(INDEX, b"{}")), r"has no weight_map"),
    "index that is no JSON": (both(sharded, write(INDEX, b"{")), r"index\.json is not JSON \("),
    "a missing tensor": (without("layers.1.mlp.up_proj"), r"has no model\.layers\.1\.mlp\.up_proj\.weight, but .* fetch it"),
    "missing layers": (config(num_hidden_layers=5), r"has no model\.layers\.3\.\S+ and lacks 17 more.*num_hidden_layers = 5"),
    "untied without a head": (without("lm_head"), r'has no lm_head\.weight, .* set "tie_word_embeddings": true'),
    "no embedding": (without("embed_tokens"), r"has no model\.embed_tokens\.weight"),
    "missing biases": (config(attention_bias=True), r"has no model\.layers\.0\.self_attn\.\w+\.bias"),
    "names of DDP": (renamed(lambda name: f"module.{name}"), r"its names begin with 'module\.'.*save_pretrained"),
    "names of torch.compile": (renamed(lambda name: f"_orig_mod.{name}"), r"its names begin with '_orig_mod\.'"),
    "one tensor by two names": (
        tensors(lambda held: held | {"norm.weight": held["model.norm.weight"] * 2}),
        r"both are model\.norm\.weight; leave one",
    ),
    "a transposed matrix": (
        tensors(lambda h: h | {"model.layers.0.mlp.up_proj.weight": h["model.layers.0.mlp.up_proj.weight"].T.contiguous()}),
        r"up_proj\.weight has the shape 32 x 64, but config\.json makes it 64 x 32; they are of two models",
    ),
    "vocab_size too small": (config(vocab_size=300), r'has the shape 320 x 32, .* makes it 300 x 32; set "vocab_size": 320'),
    "vocab_size too large": (config(vocab_size=400), r'set "vocab_size": 320 there \(it is 400\)'),
    "no vocab_size": (config(("vocab_size",)), r'makes it 32000 x 32; set "vocab_size": 320'),
    "other heads": (config(num_key_value_heads=4, head_dim=8), r"k_proj\.weight has the shape 16 x 32, .* 32 x 32"),
    "8-bit weights": (cast("up_proj", torch.int8), r"up_proj\.weight holds I8, but floats are expected, .* 16-bit"),
    "gptq": (config(quantization_config={"quant_method": "gptq", "bits": 4}), r"already quantized \(gptq\)"),
    "awq": (config(quantization_config={"quant_method": "awq"}), r"already quantized \(awq\)"),
    "bitsandbytes": (config(quantization_config={"load_in_4bit": True}), r"already quantized \(unknown\)"),
    "quantization of a word": (config(quantization_config="fp8"), r"already quantized \(fp8\)"),
    "adapter beside a model": (adapter, r"is a PEFT adapter \(adapter_config\.json\), not a model; name org/base"),
    "adapter's config": (write("config.json", b'{"peft_type": "LORA"}'), r"is the config of a PEFT adapter"),
    "a rope type of tomorrow": (rope(rope_type="spiral"), r"rope type 'spiral', .* knows .*yarn.*pip install -U transf"),
    "rope without its keys": (rope(rope_type="llama3", factor=2.0), r"makes no model of it .*high_freq_factor"),
    "rope as a word": (config(("rope_parameters",), rope_scaling="linear"), r"makes no model of it"),
    "a rope base in quotes": (config(("rope_parameters",), rope_theta="10000"), r"makes no model of it .*str"),
    "a string for a number": (config(hidden_size="32"), r"Field 'hidden_size' expected int, got str \(value: '32'\)"),
    "a string for a flag": (config(tie_word_embeddings="true"), r"expected bool, got str"),
    "a fraction for a size": (config(hidden_size=32.0), r"expected int, got float"),
    "null for a size": (config(hidden_size=None), r"expected int, got NoneType"),
    "no layers": (config(num_hidden_layers=0), r"num_hidden_layers = 0, but it is a whole number from 1 to 1024"),
    "a million layers": (config(num_hidden_layers=1_000_000), r"num_hidden_layers = 1000000, but"),
    "a size below 0": (config(hidden_size=-32), r"hidden_size = -32, but|makes no model"),
    "a size beyond memory": (config(vocab_size=10**12), r"vocab_size = 1000000000000, but it is a whole number from 1 to"),
    "heads that do not divide": (config(num_attention_heads=5, head_dim=None), r"makes no model of it .*multiple"),
    "a pad id beyond the vocabulary": (config(pad_token_id=999), r"makes no model of it .*[Pp]adding_idx"),
    "an eos in quotes": (config(eos_token_id="2"), r"eos_token_id"),
    "not a number": (config(rms_norm_eps=float("nan")), r"rms_norm_eps = nan is not finite"),
    "an activation of tomorrow": (config(hidden_act="foo"), r"hidden_act = 'foo' is not an activation of transformers"),
    "no model_type": (config(("model_type",)), r"has no model_type, so it is not the config of a model"),
    "a family in capitals": (config(model_type="Llama"), r"family 'Llama' is not supported; choose a model of"),
    "a list as config": (write("config.json", b"[]"), r"config\.json holds a list, but an object"),
    "a cut config": (cut("config.json", 100), r"config\.json is not JSON \("),
    "deep nesting": (write("config.json", b"[" * 200_000), r"config\.json is not JSON"),
    "config in capitals": (rename("config.json", "CONFIG.JSON"), r"has no config\.json; rename CONFIG\.JSON"),
    "weights in capitals": (rename("model.safetensors", "Model.SafeTensors"), r"has Model\.SafeTensors, .* rename it"),
    "weights of another name": (rename("model.safetensors", "x.safetensors"), r"no model\.safetensors, but x\.safetensors; rename"),
    "weights of Mistral": (rename("model.safetensors", "consolidated.safetensors"), r"only consolidated\.safetensors"),
    "a pickle": (rename("model.safetensors", "pytorch_model.bin"), r"only \.bin weights, which are pickles.*save_pretrained"),
    "a GGUF for weights": (
        both(rename("model.safetensors", "m.gguf")),
        r"has no model\.safetensors, but a GGUF; `fedsoda-hub import \S+m\.gguf --to",
    ),
    "a link to nothing": (dangling, r"is a link to \.\./\.\./blobs/abc, which is not there; .*cp -rL"),
    "LFS pointer as tokenizer": (write("tokenizer.json", LFS), r"tokenizer\.json is not a tokenizer .* Git LFS pointer"),
    "a cut tokenizer": (cut("tokenizer.json", 3000), r"tokenizer\.json is not a tokenizer that tokenizers \S+ reads: "),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), r"no tokenizer\.json; save its fast tokenizer"),
    "a directory for a file": (both(lambda d: (d / "model.safetensors").unlink(), lambda d: (d / "model.safetensors").mkdir()), r"has no model\.safetensors, only"),
    "weights named outside": (config(transformers_weights="../x.safetensors"), r"names the file '\.\./x\.safetensors'"),
    "weights named that are not there": (config(transformers_weights="x.safetensors"), r"x\.safetensors in transformers_weights"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_opened_is_refused_in_a_sentence(model_dir: Path, damage: Damage, sentence: str) -> None:
    damage(model_dir)
    began = time.monotonic()
    with pytest.raises(UsageProblem, match=sentence) as no:
        Checkpoint.open(str(model_dir))
    assert time.monotonic() - began < 2
    assert "\n" not in str(no.value)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("layers.1.mlp.down_proj", float("nan")),
        ("layers.2.input_layernorm", float("inf")),
        ("lm_head", float("-inf")),
        ("model.norm", float("nan")),
        ("embed_tokens", float("nan")),
    ],
)
def test_a_weight_that_is_not_finite_is_named_when_it_is_first_read(model_dir: Path, part: str, value: float) -> None:
    poisoned(part, value)(model_dir)
    source = Checkpoint.open(str(model_dir))
    with pytest.raises(UsageProblem, match=rf"{part}\S* holds {str(value).lstrip('-')}|{part}\S* holds -?\w+ at \[\d+"):
        logits(source)


def test_rows_of_the_embedding_that_are_read_alone_are_looked_through_too(model_dir: Path) -> None:
    poisoned("embed_tokens", float("nan"))(model_dir)
    source = Checkpoint.open(str(model_dir))
    assert source.embedding_rows(torch.tensor([1, 5])).shape == (2, 32)
    with pytest.raises(UsageProblem, match=r"embed_tokens\.weight holds nan at \[0, 31\]"):
        source.embedding_rows(torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("tiny.gguf", r"tiny\.gguf is a file, but a model is a directory; `fedsoda-hub import \S+tiny\.gguf --to DIR"),
        ("config.json", r"config\.json is a file, .* name the model's directory, "),
        ("gone.gguf", r"gone\.gguf does not exist"),
        ("~nobody-here/model", r"is not a path"),
        ("a" * 300, r"is not a path"),
        ("with\0nul", r"could not be fetched|is not a path"),
        ("two words", r"could not be fetched"),
        ("org/not-there", r"could not be fetched"),
    ],
)
def test_what_is_no_directory_is_answered_with_what_it_is(model_dir: Path, name: str, sentence: str) -> None:
    (model_dir / "tiny.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(UsageProblem, match=sentence):
        Checkpoint.open(name, relative_to=model_dir)


def test_a_snapshot_is_named_after_its_model(small: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--tiny-1B" / "snapshots" / ("0" * 40)
    shutil.copytree(small, snapshot)
    assert Checkpoint.open(str(snapshot)).name == "tiny-1B"


def test_a_tied_flag_that_is_wrong_leaves_the_manifest(model_dir: Path) -> None:
    config(tie_word_embeddings=True)(model_dir)
    source = Checkpoint.open(str(model_dir))
    assert source.fields["tie_word_embeddings"] is False
    assert read_config_file(model_dir / "config.json").is_tied
