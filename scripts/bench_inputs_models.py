"""Part C of the cases: model directories as they lie on people's disks, through `plan`, `prepare` and `import`.

What Transformers loads has to be prepared, and the bundle's tensors have to be those that Transformers loaded; anything else has
to be refused with the file, what was found and what to do.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from bench_inputs_case import Case, Ended, command
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

Damage = Callable[[Path], object]
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
RUN = """\
name = "case"
model = "model"
device = "cpu"
[public]
text = "public.txt"
sequences = 4
length = 16
[method]
emulator = "full"
emulator_base = "bf16"
adapter_base = "bf16"
quantize_embedding = false
adapter_layers = 1
[lora]
rank = 2
[local]
max_length = 32
[task]
prompt = "Report: {text}\\nDepartment:"
completion = " {department}"
"""
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 269060552\n"


def make_model(directory: Path) -> Path:
    """Write a random llama of three layers with a byte-level tokenizer."""
    vocabulary = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    tokenizer = Tokenizer(
        models.BPE(vocab={token: number for number, token in enumerate(vocabulary)}, merges=[("t", "h")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(named))
    return directory


def config(*dropped: str, **change: object) -> Damage:
    """Change keys of config.json."""

    def damage(model: Path) -> None:
        values = json.loads((model / "config.json").read_text()) | change
        (model / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k not in dropped}))

    return damage


def weights(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Damage:
    """Change the tensors."""

    def damage(model: Path) -> None:
        held = change({name: tensor.clone() for name, tensor in load_file(model / "model.safetensors").items()})
        (model / "model.safetensors").unlink()
        save_file(held, model / "model.safetensors", {"format": "pt"})

    return damage


def shards(model: Path) -> dict[str, str]:
    """Split the weights into two files; return which tensor is where."""
    held = load_file(model / "model.safetensors")
    table: dict[str, str] = {}
    for number, names in enumerate((sorted(held)[::2], sorted(held)[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: held[name] for name in names}, model / file, {"format": "pt"})
        table |= dict.fromkeys(names, file)
    (model / "model.safetensors").unlink()
    return table


def write_index(model: Path, table: dict[str, str]) -> None:
    """Write an index."""
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def wrong_shards(model: Path) -> None:
    """Let the index name, for each tensor, the file that does not hold it."""
    table = shards(model)
    one, two = sorted(set(table.values()))
    write_index(model, {name: two if file == one else one for name, file in table.items()})


def lost_shard(model: Path) -> None:
    """Delete one of two shards."""
    write_index(model, shards(model))
    (model / "model-00002-of-00002.safetensors").unlink()


def poisoned(value: float) -> Damage:
    """Put one value into a weight."""

    def change(held: dict[str, Tensor]) -> dict[str, Tensor]:
        held["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        return held

    return weights(change)


def write(name: str, data: bytes) -> Damage:
    """Write a file of the directory."""
    return lambda model: (model / name).write_bytes(data)


def link_to_nothing(model: Path) -> None:
    """Leave what a copied snapshot of a cache leaves."""
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("../../blobs/0123")


def pickled(model: Path) -> None:
    """Leave old-style weights alone."""
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


LOADED: dict[str, Damage] = {
    "tied flag beside an own lm_head": config(tie_word_embeddings=True),
    "stale index beside a whole file": lambda d: write_index(
        d, {"model.norm.weight": "model-00001-of-00009.safetensors"}
    ),
    "index that names the wrong shards": wrong_shards,
    "names without model.": weights(
        lambda held: {name.removeprefix("model."): tensor for name, tensor in held.items()}
    ),
    "torch_dtype auto": config("dtype", torch_dtype="auto"),
    "norms in fp32": weights(lambda held: {n: t.float() if "norm" in n else t for n, t in held.items()}),
    "BOM in config.json": lambda d: (d / "config.json").write_bytes(b"\xef\xbb\xbf" + (d / "config.json").read_bytes()),
}
REFUSED: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "Git LFS pointer as weights": (write("model.safetensors", LFS), ("model.safetensors", "LFS", "git lfs pull")),
    "cut safetensors": (
        lambda d: os.truncate(d / "model.safetensors", 50_000),
        ("50000 bytes", "cut", "fetch it again"),
    ),
    "index that names a file that is not there": (lost_shard, ("model-00002-of-00002.safetensors", "fetch it again")),
    "missing tensor": (
        weights(lambda held: {n: t for n, t in held.items() if "layers.1.mlp.up_proj" not in n}),
        ("model.layers.1.mlp.up_proj.weight", "fetch it again"),
    ),
    "lm_head missing while untied": (
        weights(lambda held: {n: t for n, t in held.items() if "lm_head" not in n}),
        ("lm_head.weight", "tie_word_embeddings"),
    ),
    "unknown rope type": (
        config("rope_parameters", rope_scaling={"rope_type": "spiral", "factor": 2.0}),
        ("'spiral'", "yarn", "upgrade"),
    ),
    "a string for a number": (config(hidden_size="64"), ("hidden_size", "'64'", "config.json")),
    "wrong vocab_size": (config(vocab_size=250), ("260 x 64", "250 x 64", '"vocab_size": 260')),
    "a PEFT adapter instead of a model": (
        write("adapter_config.json", b'{"peft_type": "LORA", "base_model_name_or_path": "org/base"}'),
        ("PEFT adapter", "org/base", "merge_and_unload"),
    ),
    "AWQ": (config(quantization_config={"quant_method": "awq", "bits": 4}), ("already quantized (awq)", "16-bit")),
    "8-bit weights": (
        weights(lambda held: {n: t.to(torch.int8) if "up_proj" in n else t for n, t in held.items()}),
        ("I8", "already quantized", "16-bit"),
    ),
    "pytorch_model.bin alone": (pickled, ("pickles", "save_pretrained")),
    "a link into a cache that is gone": (link_to_nothing, ("link", "blobs/0123", "cp -rL")),
    "names in capitals": (lambda d: (d / "config.json").rename(d / "Config.json"), ("Config.json", "rename")),
    "a GGUF among its files": (
        lambda d: (d / "model.safetensors").rename(d / "m.gguf"),
        ("m.gguf", "fedsoda-hub import"),
    ),
}


def prepared(work: Path, damage: Damage) -> Ended:
    """Prepare a run of a damaged model."""
    damage(make_model(work / "model"))
    (work / "RUN.toml").write_text(RUN)
    (work / "public.txt").write_text("the patient was seen by the doctor and sent home again. " * 20)
    return command("fedsoda_hub", "prepare", str(work / "RUN.toml"), "--json", home=work, environment=OFFLINE)


def is_loaded(damage: Damage) -> Callable[[Path], str]:
    """Compare a prepared bundle of all layers with what Transformers loads."""

    def wrong(work: Path) -> str:
        ended = prepared(work, damage)
        if found := ended.lacks(0):
            return found
        file = work / "model" / "config.json"
        file.write_text(
            file.read_text(encoding="utf-8-sig"), encoding="utf-8"
        )  # which Transformers does not read with a BOM
        theirs = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32).state_dict()
        for name, tensor in theirs.items():
            role, leaf = _shard_of(name)
            file = work / "case.run" / "bundle" / f"{role}.safetensors"
            if not file.exists():
                return f"the bundle has no {file.name}"
            if not torch.equal(load_file(file)[leaf].float(), tensor):
                return f"{name} is not what Transformers loads"
        return ""

    return wrong


def _shard_of(name: str) -> tuple[str, str]:
    """Say in which shard of a bundle a parameter is, by which name."""
    if name.startswith("model.layers."):
        number, _, leaf = name.removeprefix("model.layers.").partition(".")
        return f"layers.{number}", leaf
    return {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head", "model.norm.weight": "norm"}[
        name
    ], "weight"


def is_refused(damage: Damage, words: tuple[str, ...]) -> Callable[[Path], str]:
    """Ask what a run of a damaged model costs."""

    def wrong(work: Path) -> str:
        damage(make_model(work / "model"))
        return command("fedsoda_hub", "plan", str(work / "model"), home=work, environment=OFFLINE).lacks(2, *words)

    return wrong


def is_not_finite(value: float, word: str) -> Callable[[Path], str]:
    """Prepare a run of a model with such a weight."""
    return lambda work: prepared(work, poisoned(value)).lacks(2, "layers.1.mlp.up_proj.weight", word, "[3, 5]")


def gguf_as_model(work: Path) -> str:
    """Name a GGUF where a directory is expected."""
    (work / "tiny.gguf").write_bytes(b"GGUF" + bytes(100))
    ended = command("fedsoda_hub", "plan", str(work / "tiny.gguf"), home=work, environment=OFFLINE)
    return ended.lacks(2, f"fedsoda-hub import {work / 'tiny.gguf'} --to")


def imported(work: Path) -> str:
    """Import a GGUF of a tied model, and let Transformers load both."""
    import gguf

    model = make_model(work / "model")
    weights(lambda held: {name: tensor for name, tensor in held.items() if "lm_head" not in name})(model)
    config(tie_word_embeddings=True)(model)
    writer = gguf.GGUFWriter(work / "tiny.gguf", "llama")
    writer.add_context_length(128)
    writer.add_block_count(3)
    writer.add_feed_forward_length(128)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(16)
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(sorted(vocabulary, key=lambda token: int(vocabulary[token])))
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    for name, tensor in load_file(model / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if stem.endswith(("q_proj", "k_proj")):  # llama.cpp keeps the halves of rotary pairs beside each other
            heads = 4 if stem.endswith("q_proj") else 2
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{names.get_name(stem)}.weight", tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = work / "made"
    ended = command("fedsoda_hub", "import", str(work / "tiny.gguf"), "--to", str(made), home=work, environment=OFFLINE)
    if found := ended.lacks(0, f'model = "{made}"'):
        return found
    ids = torch.tensor([[1, 5, 9, 30, 77]])
    with torch.no_grad():
        one, two = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits for path in (model, made)
        )
    if not torch.equal(one, two):
        return f"the logits differ by {float((one - two).abs().max())}"
    again = command("fedsoda_hub", "import", str(work / "tiny.gguf"), "--to", str(made), home=work, environment=OFFLINE)
    shutil.rmtree(made)
    return again.lacks(2, "is there already", "--to")


def cases(shared: Path) -> list[Case]:
    """List the cases of model directories; their inputs are made here, not in `shared`."""
    loaded = [Case("C", "what Transformers loads", name, is_loaded(damage)) for name, damage in LOADED.items()]
    refused = [
        Case("C", "what Transformers does not load", name, is_refused(damage, words))
        for name, (damage, words) in REFUSED.items()
    ]
    finite = [
        Case("C", "a weight that is not finite", word, is_not_finite(value, word))
        for value, word in ((float("nan"), "nan"), (float("inf"), "inf"))
    ]
    files = [
        Case("C", "GGUF", "named as a model", gguf_as_model),
        Case("C", "GGUF", "imported", imported),
    ]
    return [*loaded, *refused, *finite, *files]
