"""Make a checkpoint in bf16 of a GGUF, as Ollama and llama.cpp keep models, tensor by tensor.

Values are dequantized by the package gguf and put in order by Transformers' processors of each architecture; what Transformers
leaves out of a config (how rotary tables are scaled, the width of a head) is read here from the file's metadata. Writing shards
is left to `checkpoint_writer.py`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.config_file import read_config_file
from fedsoda_edge.model.families import FAMILIES, Family, build_config, skeleton
from fedsoda_edge.model.foreign_files import what_is
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.protocol.manifest import TOKENIZER_FILES
from fedsoda_hub.preparation.checkpoint_writer import CheckpointWriter, check_room, new_directory, write_config

# By the architectures of GGUF; of olmo2 and smollm3 Transformers 5 reads no GGUF.
ARCHITECTURES = {
    "gemma3": "gemma3_text",
    "llama": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
}
# How llama 3.1 and later scale their rotary tables; a GGUF holds what becomes of it.
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")

TakeStage = Callable[[str, int, int], None]  # stage, weights done, weights in all


class Imported(msgspec.Struct, frozen=True):
    """The report of `import --json`. weights: their number. tied: whether the head is the embedding."""

    model: str
    family: str
    weights: Annotated[int, Meta(gt=0)]
    tied: bool


class _Reader:
    """A GGUF that is open: its metadata by key, its tensors by name."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            from gguf import GGUFReader
        except ImportError:
            raise UsageProblem(
                "a GGUF is read with the package gguf, which is not installed: pip install 'fedsoda[gguf]'"
            ) from None
        if not file.is_file():
            raise UsageProblem(f"{file} is not there; name a file that ends in .gguf")
        with file.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise UsageProblem(f"{file} is not a GGUF: {what_is(file)}")
        try:
            reader = GGUFReader(file)
        except Exception as error:  # whatever numpy raises where the file ends too early
            raise UsageProblem(
                f"{file} is a GGUF, but not a whole one ({type(error).__name__}: {error}); fetch it again"
            ) from error
        self.fields: Mapping[str, Any] = reader.fields
        self.tensors = list(reader.tensors)

    def value(self, key: str) -> Any:
        """Return the value of a key of the metadata; None: it has no such key."""
        field = self.fields.get(key)
        return None if field is None else field.contents()

    @property
    def architecture(self) -> str:
        """The architecture, as llama.cpp names it."""
        return str(self.value("general.architecture"))

    @property
    def num_weights(self) -> int:
        """The number of weights of all tensors."""
        return sum(int(tensor.n_elements) for tensor in self.tensors)

    def of_architecture(self, key: str) -> Any:
        """Return the value of a key below the architecture's own; None: it has no such key."""
        return self.value(f"{self.architecture}.{key}")

    def tensor(self, name: str) -> Tensor | None:
        """Read a tensor, fp32; None: no tensor has that name."""
        return next((_dequantized(self.file, one) for one in self.tensors if one.name == name), None)


def import_gguf(
    file: Path, directory: Path, report: TakeStage = lambda *_: None, *, tokenizer: Path | None = None
) -> Imported:
    """Write the checkpoint of a GGUF: bf16 safetensors, config and tokenizer files.

    Args:
        directory: a new one; it is there whole at the end, or not at all.
        tokenizer: a directory whose tokenizer files are taken; None: they are made of the GGUF's vocabulary.

    Raises:
        UsageProblem: the file is not a GGUF of a whole model of a known architecture, or `directory` is in use.
        DiskFull: there is no space for it.
    """
    reader = _Reader(file)
    family = _family(reader)
    total = reader.num_weights
    check_room(directory, 2 * total + (64 << 20))
    with new_directory(directory) as temporary:
        report(f"reading {file.name}", 0, total)
        fields = _config(reader, family)
        write_config(temporary, fields)
        config = read_config_file(temporary / "config.json")
        model = skeleton(family, build_config(family, config.fields))
        writer = CheckpointWriter(temporary)
        for name, tensor, done in _tensors(reader, fields, model):
            _check_finite(file, name, tensor)
            writer.add(name, tensor.to(torch.bfloat16))
            report(f"dequantizing {file.name}", done, total)
        writer.finish()
        report("making the tokenizer", 0, total)
        _write_tokenizer(file, temporary, tokenizer)
        report("making the tokenizer", total, total)
        checkpoint = Checkpoint.open(str(temporary))
        tied = bool(checkpoint.fields.get("tie_word_embeddings"))
    return Imported(model=str(directory.resolve()), family=family.model_type, weights=total, tied=tied)


def _family(reader: _Reader) -> Family:
    """Find the family of a GGUF of a whole model."""
    name, known = reader.architecture, ", ".join(sorted(ARCHITECTURES))
    parts, kind = reader.value("split.count") or 1, reader.value("general.type") or "model"
    if int(parts) > 1:
        raise UsageProblem(
            f"{reader.file} is one of {parts} parts; join them first: llama-gguf-split --merge FIRST_PART OUT.gguf"
        )
    if kind != "model":
        raise UsageProblem(
            f"{reader.file} is a GGUF of the kind {kind!r}, but a whole model is expected; name the model's own GGUF"
        )
    if name not in ARCHITECTURES:
        raise UsageProblem(
            f"{reader.file} is of the architecture {name!r}; known are {known}: take the safetensors checkpoint of a supported model"
        )
    if name == "llama" and reader.of_architecture("expert_count"):
        raise UsageProblem(f"{reader.file} is a mixture of llama experts, which is not supported; known are {known}")
    if not reader.tensors:
        raise UsageProblem(f"{reader.file} holds a vocabulary alone; name the model's own GGUF")
    return FAMILIES[ARCHITECTURES[name]]


def _config(reader: _Reader, family: Family) -> dict[str, Any]:
    """Make the fields of config.json: Transformers' own, and what it leaves out."""
    try:
        config = AutoConfig.from_pretrained(reader.file.parent, gguf_file=reader.file.name)
        fields = config.to_dict()
    except Exception as error:  # whatever a config class raises, or a key that is not there
        raise UsageProblem(
            f"{reader.file}: Transformers makes no config of its metadata ({type(error).__name__}: {error}); take the model's "
            "safetensors checkpoint"
        ) from error
    for key in ("quantization_config", "transformers_version", "_name_or_path"):
        fields.pop(key, None)
    fields |= {"architectures": [family.model_name], "dtype": "bfloat16", "model_type": family.model_type}
    for ours, theirs in (
        ("head_dim", "attention.key_length"),
        ("moe_intermediate_size", "expert_feed_forward_length"),
        ("num_experts", "expert_count"),
        ("num_experts_per_tok", "expert_used_count"),
        ("sliding_window", "attention.sliding_window"),
    ):
        value = reader.of_architecture(theirs)
        if value is not None and ours in family.fields:
            fields[ours] = int(value)
    if reader.architecture == "gemma3":  # llama.cpp knows its largest, whose queries are scaled otherwise, by its depth
        width = int(fields["hidden_size"]) // int(fields["num_attention_heads"])
        fields["query_pre_attn_scalar"] = width if fields["num_hidden_layers"] == 62 else fields["head_dim"]
    if rope := _rope(reader):
        held = fields.get("rope_parameters") or {}
        if "full_attention" in held:  # gemma3, whose layers with a window are not scaled
            held["full_attention"] |= rope
        else:
            fields["rope_parameters"] = held | rope
    return fields


def _rope(reader: _Reader) -> dict[str, object]:
    """Say how the rotary tables are scaled, as Transformers' `rope_parameters` do; nothing where they are not."""
    if (factors := reader.tensor("rope_freqs.weight")) is not None:
        return _llama3(reader, factors)
    kind, factor = reader.of_architecture("rope.scaling.type"), reader.of_architecture("rope.scaling.factor")
    original = reader.of_architecture("rope.scaling.original_context_length")
    if any(tensor.name.startswith("rope_factors_") for tensor in reader.tensors):
        kind = "longrope"
    if kind in (None, "none") or (kind in ("linear", "yarn") and factor in (None, 0, 1)):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(factor)}
    if kind == "yarn" and original:
        return {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": int(original)}
    raise UsageProblem(
        f"{reader.file} scales its rotary tables by {kind!r}, which cannot be read back from a GGUF; take the model's safetensors "
        "checkpoint"
    )


def _llama3(reader: _Reader, factors: Tensor) -> dict[str, object]:
    """Find the scaling of which these factors (head_dim / 2,) come: a GGUF holds them alone."""
    theta = float(reader.of_architecture("rope.freq_base") or 10_000.0)
    found = _LLAMA3 | {"factor": float(factors.max()), "rope_theta": theta}
    head = 2 * len(factors)
    config = FAMILIES["llama"].config_class(
        hidden_size=head, num_attention_heads=1, head_dim=head, max_position_embeddings=131_072, rope_parameters=found
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = theta ** -(torch.arange(0, head, 2, dtype=torch.float32) / head)
    if not torch.allclose(plain / scaled, factors.float(), rtol=1e-3):
        raise UsageProblem(
            f"{reader.file} scales its rotary tables by rope_freqs.weight, and not as llama 3 does; take the model's safetensors "
            "checkpoint"
        )
    return found


def _tensors(reader: _Reader, fields: dict[str, Any], model: Any) -> Iterator[tuple[str, Tensor, int]]:
    """Read the tensors one by one, fp32, each with its name in the model and the number of weights read so far."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS.get(reader.architecture, TensorProcessor)(config=fields)
    names = get_gguf_hf_weights_map(model, processor)
    parts: dict[str, Tensor] = {}  # of stacks of experts, which come in two halves
    seen: dict[str, int] = {}
    done = 0
    for one in reader.tensors:
        done += int(one.n_elements)
        dense = _dequantized(reader.file, one)
        result = processor.process(
            weights=dense.numpy(), name=one.name, tensor_key_mapping=names, parsed_parameters={"tensors": parts}
        )
        if result.name in names:
            yield names[result.name], torch.from_numpy(result.weights.copy()), done
        for stack in [name for name in parts if any(part in one.name for part in _EXPERTS)]:
            seen[stack] = seen.get(stack, 0) + 1
            if seen[stack] == (1 if stack.endswith("down_proj") else 2):
                yield stack, parts.pop(stack), done


def _dequantized(file: Path, tensor: Any) -> Tensor:
    from gguf import dequantize

    try:
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    except (
        Exception
    ) as error:  # NotImplementedError of its type, or whatever numpy raises for a shape that does not fit
        raise UsageProblem(
            f"{file}: {tensor.name} is stored as {tensor.tensor_type.name}, which the package gguf cannot read ({error}); upgrade "
            "it (pip install -U gguf), or take a GGUF of another quantization"
        ) from error


def _check_finite(file: Path, name: str, tensor: Tensor) -> None:
    if not all(map(math.isfinite, map(float, torch.aminmax(tensor)))):
        raise UsageProblem(f"{file}: {name} holds values that are not finite; fetch the file again")


def _write_tokenizer(file: Path, directory: Path, tokenizer: Path | None) -> None:
    if tokenizer is not None:
        found = [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]
        if tokenizer / "tokenizer.json" not in found:
            raise UsageProblem(
                f"{tokenizer} has no tokenizer.json; name the original model's directory with --tokenizer"
            )
        for path in found:
            shutil.copyfile(path, directory / path.name)
        return
    try:
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)
    except Exception as error:  # whatever the converter of this vocabulary raises
        raise UsageProblem(
            f"{file}: Transformers makes no tokenizer of its vocabulary ({type(error).__name__}: {error}); fetch tokenizer.json of "
            "the original model, and name its directory with --tokenizer"
        ) from error
