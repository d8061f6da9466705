"""A GGUF becomes a checkpoint with the logits of the model that it was made of; what cannot become one says why."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fedsoda_edge.errors import DiskFull, UsageProblem
from fedsoda_hub.preparation.gguf import ARCHITECTURES, import_gguf
from tests import tiny
from tests.gguf_files import write_gguf

IDS = torch.tensor([[1, 5, 9, 30, 77, 300, 4, 4, 61]])
# What a GGUF can say of each family; a window, or layers without experts, only some.
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6, "tie_word_embeddings": True},
    "llama": {},
    "phi3": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "qwen3moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
}


def logits(directory: Path) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(IDS).logits


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_tiny_llama(
        tmp_path_factory.mktemp("small") / "small", layers=2, hidden=32, intermediate=64, tie=True
    )


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_its_logits_are_those_of_the_model_that_it_was_made_of(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = ARCHITECTURES[architecture]
    monkeypatch.setitem(tiny.FAMILY_CONFIGS, family, CONFIGS[architecture])
    model = tiny.make_tiny(tmp_path / "model", family, layers=6)
    extra = {"gemma3.attention.sliding_window": 6} if architecture == "gemma3" else {}
    file = write_gguf(model, tmp_path / "tiny.gguf", architecture, extra=extra)
    # The vocabulary of these tests is none of Gemma's, of which Transformers makes its tokenizer.
    made = import_gguf(file, tmp_path / "made", tokenizer=model if architecture == "gemma3" else None)
    assert (made.family, made.tied) == (family, architecture == "gemma3")
    assert torch.equal(logits(tmp_path / "made"), logits(model))
    assert {tensor.dtype for tensor in load_file(tmp_path / "made" / "model.safetensors").values()} == {torch.bfloat16}
    text = "the answer is\non <pad> it"
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (model, tmp_path / "made")]
    assert len({tuple(tokenizer(text).input_ids) for tokenizer in tokenizers}) == 1


def test_quantized_matrices_become_their_values(small: Path, tmp_path: Path) -> None:
    file = write_gguf(small, tmp_path / "q8.gguf", quantization=gguf.GGMLQuantizationType.Q8_0)
    import_gguf(file, tmp_path / "made")
    held, before = (load_file(path / "model.safetensors") for path in (tmp_path / "made", small))
    assert set(held) == set(before)
    assert "lm_head.weight" not in held
    for name, tensor in before.items():
        wanted = tensor.float().numpy()
        if tensor.ndim == 2 and "q_proj" not in name and "k_proj" not in name:  # those are quantized in another order
            kind = gguf.GGMLQuantizationType.Q8_0
            wanted = gguf.dequantize(gguf.quantize(wanted, kind), kind)
            assert torch.equal(held[name], torch.from_numpy(wanted).bfloat16()), name
        assert torch.allclose(held[name].float(), tensor.float(), atol=0.01), name
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rotary_scaling_of_llama_3_is_read_back(small: Path, tmp_path: Path, factor: float) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = Path(shutil.copytree(small, tmp_path / "model"))
    fields = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(fields | {"rope_parameters": rope, "max_position_embeddings": 131_072})
    )
    config = LlamaConfig.from_pretrained(model)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500_000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float32) / 8)
    factors = (plain / scaled).numpy()
    import_gguf(write_gguf(model, tmp_path / "l3.gguf", tensors={"rope_freqs.weight": factors}), tmp_path / "made")
    assert json.loads((tmp_path / "made" / "config.json").read_text())["rope_parameters"] == rope
    assert torch.equal(logits(tmp_path / "made"), logits(model))
    other = write_gguf(model, tmp_path / "other.gguf", tensors={"rope_freqs.weight": np.sqrt(factors)})
    with pytest.raises(UsageProblem, match=r"rope_freqs\.weight, and not as llama 3 does"):
        import_gguf(other, tmp_path / "other")


def test_linear_and_yarn_scaling_are_read_back(small: Path, tmp_path: Path) -> None:
    extra: dict[str, Any] = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    import_gguf(write_gguf(small, tmp_path / "l.gguf", extra=extra), tmp_path / "l")
    extra |= {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.original_context_length": 128}
    import_gguf(write_gguf(small, tmp_path / "y.gguf", extra=extra), tmp_path / "y")
    linear, yarn = (json.loads((tmp_path / name / "config.json").read_text())["rope_parameters"] for name in "ly")
    assert (linear["rope_type"], linear["factor"]) == ("linear", 2.0)
    assert (yarn["rope_type"], yarn["factor"], yarn["original_max_position_embeddings"]) == ("yarn", 2.0, 128)
    extra["llama.rope.scaling.type"] = "longrope"
    with pytest.raises(UsageProblem, match="scales its rotary tables by 'longrope'"):
        import_gguf(write_gguf(small, tmp_path / "r.gguf", extra=extra), tmp_path / "r")


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ({"split.count": 3}, r"is one of 3 parts; join them first: llama-gguf-split --merge"),
        ({"general.type": "adapter"}, r"of the kind 'adapter', but a whole model"),
        ({"general.type": "mmproj"}, r"of the kind 'mmproj', but a whole model"),
        ({"llama.expert_count": 8}, r"mixture of llama experts"),
        ({"llama.block_count": 5}, r"has no model\.layers\.2\."),
        ({"llama.vocab_size": 400}, r"has the shape 320 x 32, .*400 x 32"),
    ],
)
def test_what_is_not_one_whole_model_is_refused(
    small: Path, tmp_path: Path, extra: dict[str, Any], sentence: str
) -> None:
    file = write_gguf(small, tmp_path / "odd.gguf", extra=extra)
    with pytest.raises(UsageProblem, match=sentence):
        import_gguf(file, tmp_path / "made")
    assert not list(tmp_path.glob("made*"))


@pytest.mark.parametrize("kept", [0, 3, 20, 200, 6_000, 30_000])
def test_a_cut_file_is_refused(small: Path, tmp_path: Path, kept: int) -> None:
    file = write_gguf(small, tmp_path / "cut.gguf")
    os.truncate(file, kept)
    with pytest.raises(UsageProblem, match=r"cut\.gguf is (not a GGUF|a GGUF, but not a whole one).*fetch it again"):
        import_gguf(file, tmp_path / "made")
    assert not list(tmp_path.glob("made*"))


def test_other_architectures_and_other_files_are_answered_in_a_sentence(small: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match=r"is not there; name a file that ends in \.gguf"):
        import_gguf(tmp_path / "gone.gguf", tmp_path / "made")
    with pytest.raises(UsageProblem, match=r"model\.safetensors is not a GGUF"):
        import_gguf(small / "model.safetensors", tmp_path / "made")
    writer = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UsageProblem, match=r"architecture 'mamba'; known are gemma3, llama, phi3"):
        import_gguf(tmp_path / "mamba.gguf", tmp_path / "made")


def test_nothing_is_overwritten_and_room_is_checked_first(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(small, tmp_path / "tiny.gguf")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(UsageProblem, match=r"photos is there already; name a new directory with --to"):
        import_gguf(file, tmp_path / "photos")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskFull, match=r"made needs .* MiB, but its disk has 1000 B free"):
        import_gguf(file, tmp_path / "made")
    assert not list(tmp_path.glob("made*"))


def test_ctrl_c_leaves_nothing_behind(small: Path, tmp_path: Path) -> None:
    file = write_gguf(small, tmp_path / "tiny.gguf")
    slow = (
        "import signal, time, fedsoda_hub.preparation.gguf as g, fedsoda_hub.cli.commands as c\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background begins with it ignored
        "def add(*_):\n"
        "    print('adding', flush=True)\n"
        "    for _ in range(1200):\n"  # a signal that comes just before a sleep is heard after it
        "        time.sleep(0.05)\n"
        "g.CheckpointWriter.add = add\n"
        "c.main()"
    )
    command = [sys.executable, "-c", slow, "import", str(file), "--to", str(tmp_path / "made")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "adding\n"
        assert list(tmp_path.glob("made.*.part"))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert not list(tmp_path.glob("made*"))


def test_the_command_tells_what_it_does_and_what_it_made(small: Path, tmp_path: Path) -> None:
    file = write_gguf(small, tmp_path / "tiny.gguf")
    began = time.monotonic()
    command = [sys.executable, "-m", "fedsoda_hub", "import", str(file), "--to", str(tmp_path / "made"), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        first = process.stderr.readline()
        told = time.monotonic() - began
        rest = process.stderr.read()
        value = json.loads(process.stdout.read())
    assert process.returncode == 0, rest
    assert first.startswith(f"reading {file}; its model goes to ")
    assert told < 5
    assert value == {
        "schema": 1,
        "status": "ok",
        "model": str(tmp_path / "made"),
        "family": "llama",
        "weights": value["weights"],
        "tied": True,
    }
    assert f'model = "{tmp_path / "made"}"' in rest
