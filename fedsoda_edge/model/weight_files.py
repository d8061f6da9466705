"""Find a model directory's weights as Transformers finds them, and check them whole before any is read.

`from_pretrained` of Transformers 5 prefers model.safetensors to an index beside it, reads every tensor of every file that an
index names (so it does not matter which one it says for which), adds or strips the base model's prefix, ties the head only
where the checkpoint has no other head, and fills what is missing with random numbers; that last is refused here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.config_file import ModelConfig, Shapes
from fedsoda_edge.model.foreign_files import import_advice, present, read_json, what_is
from fedsoda_edge.units import one_line

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What is read, and the narrowest dtype of ours that holds each value exactly.
_HELD_IN = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float32,  # as Transformers reads it
    "F8_E4M3": torch.bfloat16,
    "F8_E5M2": torch.bfloat16,
}
_ROWS = 1 << 14  # of two tables that are compared


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. name: the one that it has there. dtype: as safetensors names it."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint, by the names that they have in the family's CausalLM, those of each expert by its number.

    files: all files that were opened. dtype: the narrowest of ours that holds all of them exactly. is_tied: whether the head
    is the embedding.
    """

    table: Mapping[str, Stored]
    files: tuple[Path, ...]
    dtype: torch.dtype
    is_tied: bool


def find_weights(directory: Path, config: ModelConfig) -> Weights:
    """Open all files of weights, and check names, shapes and dtypes against the config.

    Raises:
        UsageProblem: files, or tensors in them, are missing, cut, of other shapes or quantized.
    """
    files = tuple(_files(directory, config))
    known = _known_names(config.shapes)
    table: dict[str, Stored] = {}
    others: list[str] = []
    for stored in _stored(files):
        name = _name_in_model(stored.name, known, config.family.layers.partition(".")[0])
        if name not in known:
            others.append(stored.name)
            continue
        if name in table and table[name].name != stored.name:
            raise UsageProblem(
                f"{stored.file} holds {stored.name}, and {table[name].file.name} holds {table[name].name}: both are {name}; "
                "leave one of them out"
            )
        table[name] = stored
    _tie(table, config)
    _check_complete(table, others, files, config)
    for name, stored in table.items():
        _check(stored, known[name], config)
    dtypes = {_HELD_IN[stored.dtype] for stored in table.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # neither of the two 16-bit ones holds the other
    return Weights(table, files, dtype, is_tied=config.is_tied and _is_one_table(table, config))


def read(stored: Stored, dtype: torch.dtype) -> Tensor:
    """Read one tensor.

    Raises:
        UsageProblem: its file is not what it was when it was opened.
    """
    with opened(stored.file) as file:
        return file.get_tensor(stored.name).to(dtype)


def opened(file: Path) -> Any:
    """Open a file of safetensors.

    Raises:
        UsageProblem: it is none, or cut; says what it is.
    """
    try:
        return safe_open(file, framework="pt")
    except OSError as error:
        raise UsageProblem(
            f"{file} cannot be read ({error.strerror or error}); make it readable for this user"
        ) from error
    except RuntimeError as error:  # torch, where memory for the file's pages or its header is not there
        raise UsageProblem(
            f"{file} cannot be opened ({one_line(str(error), 200)}); free memory, or fetch it again"
        ) from error
    except SafetensorError as error:
        raise UsageProblem(f"{file} is not whole safetensors ({error}): {what_is(file)}") from error


def _files(directory: Path, config: ModelConfig) -> Iterable[Path]:
    """List the files that Transformers would read, in its order."""
    if config.weights is not None:
        own = _inside(directory, config.weights, config.file)
        if not present(own):
            raise UsageProblem(
                f"{config.file} names {config.weights} in transformers_weights, which is not there; fetch it"
            )
        return _shards(own) if own.name.endswith(".index.json") else [own]
    if present(directory / WEIGHTS):
        return [directory / WEIGHTS]
    if present(directory / INDEX):
        return _shards(directory / INDEX)
    raise UsageProblem(_what_instead(directory))


def _inside(directory: Path, name: str, said_by: Path) -> Path:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise UsageProblem(f"{said_by} names the file {name!r}, which is not one below {directory}; fetch it again")
    return directory / path


def _shards(index: Path) -> Iterable[Path]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(file, str) for file in table.values()):
        raise UsageProblem(f"{index} has no weight_map from tensors to files; fetch it again")
    files = [_inside(index.parent, name, index) for name in sorted(set(table.values()))]
    missing = [file for file in files if not present(file)]
    if missing:
        raise UsageProblem(
            f"{index.parent.name} is incomplete: {index.name} names {missing[0].relative_to(index.parent)} "
            f"({len(missing)} of {len(files)} files are missing), which is not there; fetch it again"
        )
    return files


def _what_instead(directory: Path) -> str:
    """Say what a directory without weights of its own has instead."""
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in directory.iterdir())
    by_lower = {name.lower(): name for name in names}
    for wanted in (WEIGHTS, INDEX):
        if by_lower.get(wanted, wanted) != wanted:
            return f"{directory} has {by_lower[wanted]}, but {wanted} is expected: rename it"
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    safetensors = [name for name in names if name.endswith(".safetensors")]
    if any(name.startswith("consolidated") for name in safetensors):
        return (
            f"{directory.name} has only consolidated.safetensors, whose names are not those of Transformers; fetch {WEIGHTS}, or "
            f"{INDEX} and its shards, of the same model"
        )
    if safetensors:
        return (
            f"{directory.name} has no {WEIGHTS}, but {', '.join(safetensors[:4])}; rename the one that holds the whole model, or "
            f"fetch {INDEX}, which names its shards"
        )
    if ggufs:
        return f"{directory} has no {WEIGHTS}, but a GGUF; {import_advice(directory / ggufs[0])}"
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return (
            f"{directory.name} has only .bin weights, which are pickles and can run code; convert it to safetensors: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)"
        )
    return (
        f"{directory.name} has no {WEIGHTS}, only {', '.join(names[:8])}; name the directory that save_pretrained wrote"
    )


def _stored(files: Iterable[Path]) -> Iterator[Stored]:
    """List the tensors of these files; of two with one name the last counts."""
    found: dict[str, Stored] = {}
    for path in files:
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118  the file is not a mapping
                part = file.get_slice(name)
                found[name] = Stored(path, name, part.get_dtype(), tuple(part.get_shape()))
    return iter(found.values())


def _known_names(shapes: Shapes) -> Shapes:
    """Add, to the names of a model's parameters, those of each expert's matrices, which checkpoints hold one by one."""
    known = dict(shapes)
    for name, shape in shapes.items():
        if len(shape) != 3:
            continue
        path, _, leaf = name.rpartition(".")
        for expert in range(shape[0]):
            if leaf == "gate_up_proj":
                known |= {
                    f"{path}.{expert}.{part}.weight": (shape[1] // 2, shape[2]) for part in ("gate_proj", "up_proj")
                }
            else:
                known[f"{path}.{expert}.{leaf}.weight"] = shape[1:]
    return known


def _name_in_model(name: str, known: Shapes, base: str) -> str:
    """Translate a stored name: the base model's prefix is stripped where that gives a known name, else added."""
    stripped = name.removeprefix(f"{base}.")
    if stripped != name and stripped in known:
        return stripped
    return f"{base}.{name}" if f"{base}.{name}" in known else name


def _tie(table: dict[str, Stored], config: ModelConfig) -> None:
    """Let a tied head and embedding stand for each other where one of them is missing."""
    if not config.is_tied:
        return
    ends = [f"{path}.weight" for path in (config.family.embedding, config.family.head)]
    for missing, there in (ends, reversed(ends)):
        if missing not in table and there in table:
            table[missing] = table[there]


def _is_one_table(table: Mapping[str, Stored], config: ModelConfig) -> bool:
    """Tell whether head and embedding hold the same values: a tied checkpoint with another head of its own keeps it."""
    one, two = (table[f"{path}.weight"] for path in (config.family.embedding, config.family.head))
    if one == two:
        return True
    with opened(one.file) as first, opened(two.file) as second:
        tables = first.get_slice(one.name), second.get_slice(two.name)
        return all(
            torch.equal(*(part[row : row + _ROWS].float() for part in tables)) for row in range(0, one.shape[0], _ROWS)
        )


def _check_complete(
    table: Mapping[str, Stored], others: list[str], files: tuple[Path, ...], config: ModelConfig
) -> None:
    missing = [name for name, shape in config.shapes.items() if not _has(table, name, shape)]
    if not missing:
        return
    head = f"{config.family.head}.weight"
    where = files[0].parent / (files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more files")
    if missing == [head]:
        raise UsageProblem(
            f"{where} has no {head}, and {config.file.name} does not tie the head to the embedding; if the model's head is its "
            f'embedding, set "tie_word_embeddings": true there, else fetch the weights again'
        )
    sentence = f"{where} has no {missing[0]}"
    sentence += f" and lacks {len(missing) - 1} more tensors" if len(missing) > 1 else ""
    if prefix := _common_prefix(others, missing):
        raise UsageProblem(
            f"{sentence}: its names begin with {prefix!r}, which Transformers does not strip; load it in the program that wrote it, "
            "and save the model in it with save_pretrained"
        )
    is_adapter = any(".lora_A." in name or ".base_layer." in name for name in others)
    advice = "merge the adapter first: merge_and_unload().save_pretrained(OUT)" if is_adapter else "fetch it again"
    also = f"; it has {others[0]} instead" if others else ""
    raise UsageProblem(
        f"{sentence}{also}, but {config.file.name} (num_hidden_layers = {config.num_layers}) asks for it, so it is incomplete or of "
        f"another model; {advice}, or correct {config.file.name}"
    )


def _has(table: Mapping[str, Stored], name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a parameter is there; a stack of experts is, too, where each expert's matrices are."""
    return name in table or (len(shape) == 3 and all(one in table for one in set(_known_names({name: shape})) - {name}))


def _common_prefix(others: list[str], missing: list[str]) -> str:
    """Find what stands before the missing names in the stored ones, such as `module.`; "": nothing."""
    for name in missing[:1]:
        for other in others:
            if other.endswith(f".{name}"):
                return other.removesuffix(name)
    return ""


def _check(stored: Stored, shape: tuple[int, ...], config: ModelConfig) -> None:
    if stored.dtype not in _HELD_IN:
        raise UsageProblem(
            f"{stored.file}: {stored.name} holds {stored.dtype}, but floats are expected, so the model is already quantized; name "
            "the 16-bit checkpoint from which it was made"
        )
    if stored.shape == shape:
        return
    vocab = config.fields["vocab_size"]
    ends = (f"{config.family.embedding}.weight", f"{config.family.head}.weight")
    is_vocab = stored.shape[1:] == shape[1:] and any(stored.name.endswith(end.partition(".")[2]) for end in ends)
    if is_vocab and len(stored.shape) == 2:
        advice = f'set "vocab_size": {stored.shape[0]} there (it is {vocab}), or fetch the weights again'
    else:
        advice = "they are of two models, or the config was changed: fetch both again"
    raise UsageProblem(
        f"{stored.file}: {stored.name} has the shape {_by(stored.shape)}, but {config.file.name} makes it {_by(shape)}; {advice}"
    )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"
