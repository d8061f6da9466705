"""Define where layers come from (`LayerSource`), and read them from the hub's 16-bit checkpoint.

Reading them from a bundle, as edges do, is left to `bundle.py`, running them to `streaming.py`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.config_file import read_config_file
from fedsoda_edge.model.families import Family, branch, layer_on_meta, merge_experts
from fedsoda_edge.model.foreign_files import check_tokenizer, import_advice, present, read_json
from fedsoda_edge.model.nf4 import NF4Tensor, dequantize
from fedsoda_edge.model.own_tokenizer import own_eos, own_tokenizer
from fedsoda_edge.model.weight_files import find_weights, opened, read
from fedsoda_edge.ports.disk import sha256_file
from fedsoda_edge.protocol.manifest import TOKENIZER_FILES, Half


class LayerSource(Protocol):
    """A source of layers: a 16-bit checkpoint on the hub, an NF4 bundle on an edge."""

    family: Family
    fields: dict[str, Any]
    num_layers: int
    dtype: torch.dtype
    lacking: Mapping[int, Half]  # layers of which one half is pruned (`LayerPlan.lacking`)

    def embedding(self) -> Tensor:
        """Read the embedding, dense: (V, C)."""
        ...

    def embedding_rows(self, ids: Tensor) -> Tensor:
        """Read the rows `ids` (M,) int64 of the embedding: (M, C). The other rows are not read."""
        ...

    def norm(self) -> dict[str, Tensor]:
        """Read the final norm's tensors, by name within the norm."""
        ...

    def head(self) -> Tensor:
        """Read the head, dense: (V, C). A tied head is the embedding."""
        ...

    def stored_head(self) -> Tensor | NF4Tensor:
        """Read the head (V, C) in the form in which it is stored."""
        ...

    def layer(self, number: int) -> dict[str, Tensor]:
        """Read one full-LLM layer's tensors, dense, by name within the layer."""
        ...

    def stored_layer(self, number: int) -> dict[str, Tensor | NF4Tensor]:
        """Read one full-LLM layer's tensors in the form in which they are stored, by name within the layer."""
        ...


class Checkpoint:
    """A safetensors checkpoint of a supported family, read tensor by tensor: a `LayerSource`.

    Args:
        name: the model hub's id or the directory's name, never a local path.
        revision: the model hub's commit; None: a directory, which only its weights identify.

    Raises:
        UsageProblem: on construction, when the directory does not hold a model that can be pruned.
    """

    def __init__(self, directory: Path, name: str, revision: str | None) -> None:
        check_directory(directory)
        config = read_config_file(directory / "config.json")
        weights = find_weights(directory, config)
        check_tokenizer(directory)
        self.path = directory
        self.name = name
        self.family = config.family
        self.fields = config.fields
        if config.is_tied and not weights.is_tied:
            self.fields = config.fields | {"tie_word_embeddings": False}
        self.num_layers = config.num_layers
        self.dtype = weights.dtype
        self.lacking: Mapping[int, Half] = {}
        self._weights = weights
        self._finite: set[str] = set()  # the tensors that were read before, of which each is looked through once
        self._replaced: Mapping[int, Mapping[str, Tensor | NF4Tensor]] = {}
        self._revision = revision
        self.tokenizer_files = [directory / file for file in TOKENIZER_FILES if present(directory / file)]
        if config.raw.get("eos_token_id") is None and (own := own_eos(directory)) is not None:
            # a config class has a default, which is another token of this model
            self.fields = self.fields | {"eos_token_id": own}

    @cached_property
    def own_tokenizer(self) -> Mapping[str, bytes]:
        """The content of the tokenizer files by name, in which Transformers' reading of them is written down.

        Raises:
            UsageProblem: Transformers cannot load it.
        """
        files = {path.name: path.read_bytes() for path in self.tokenizer_files} | own_tokenizer(self.path)
        return {name: files[name] for name in TOKENIZER_FILES if name in files}

    @cached_property
    def revision(self) -> str:
        """The model hub's commit; for a directory the sha256 over its config and weights, all read at the first use.

        A model that was trained further under its old name is another model.
        """
        if self._revision:
            return self._revision
        files = {path.name: sha256_file(path) for path in self._weights.files}
        return hashlib.sha256(json.dumps([files, self.fields], sort_keys=True).encode()).hexdigest()

    def without(self, lacking: Mapping[int, Half]) -> Checkpoint:
        """Return the same checkpoint with these halves of layers pruned: they are not read and not run."""
        pruned = copy.copy(self)
        pruned.lacking = lacking
        return pruned

    def with_layers(self, layers: Mapping[int, Mapping[str, Tensor | NF4Tensor]]) -> Checkpoint:
        """Return the same checkpoint with other tensors in these layers, whole ones, by name within the layer."""
        other = copy.copy(self)
        other._replaced = layers
        return other

    @property
    def bytes(self) -> int:
        """The bytes of the weights on disk."""
        return sum(path.stat().st_size for path in self._weights.files)

    @classmethod
    def open(cls, model: str, *, relative_to: Path | None = None, revision: str | None = None) -> Checkpoint:
        """Open a directory, or a model hub's id that `huggingface_hub` fetches (safetensors and JSON only).

        Args:
            model: the directory or the id.
            relative_to: where a relative directory begins; None: the working directory.
            revision: the commit of a model hub's id; None: the newest. A directory has only its own.

        Raises:
            UsageProblem: there is no such model, or it cannot be pruned.
        """
        if (local := _local(model, relative_to)) is not None:
            return cls(local, _name_of(local), None)
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )

        try:
            fetched = Path(
                snapshot_download(model, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.jinja"])
            )
        except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
            raise UsageProblem(
                f"{model!r} is not a directory here and could not be fetched from the model hub ({error}); "
                "check the name, HF_TOKEN for gated models, and the network"
            ) from error
        return cls(fetched, model, fetched.name)

    def _read(self, name: str) -> Tensor:
        return self._looked_through(name, read(self._weights.table[name], self.dtype))

    def _looked_through(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor that has just been read, finite throughout.

        Raises:
            UsageProblem: it holds NaN or infinity, of which everything that is computed would become NaN.
        """
        if name not in self._finite:
            if tensor.numel() and not all(map(math.isfinite, map(float, torch.aminmax(tensor)))):
                where = (~torch.isfinite(tensor)).nonzero()[0].tolist()
                stored = self._weights.table[name]
                raise UsageProblem(
                    f"{stored.file}: {stored.name} holds {float(tensor[tuple(where)])} at {where}, but weights are finite "
                    "numbers; fetch the file again, or take a checkpoint from before the training that broke it"
                )
            self._finite.add(name)
        return tensor

    def embedding(self) -> Tensor:
        return self._read(f"{self.family.embedding}.weight")

    def embedding_rows(self, ids: Tensor) -> Tensor:
        stored = self._weights.table[f"{self.family.embedding}.weight"]
        with opened(stored.file) as file:
            rows = read_rows(file.get_slice(stored.name), ids).to(self.dtype)
        if not torch.isfinite(rows).all():
            self.embedding()  # says where
        return rows

    def norm(self) -> dict[str, Tensor]:
        return self._below(f"{self.family.norm}.")

    def head(self) -> Tensor:
        if self.fields.get("tie_word_embeddings"):
            return self.embedding()
        return self._read(f"{self.family.head}.weight")

    def stored_head(self) -> Tensor | NF4Tensor:
        return self.head()

    def layer(self, number: int) -> dict[str, Tensor]:
        if number in self._replaced:
            return dense(self._replaced[number])
        pruned: tuple[str, ...] = ()
        if number in self.lacking:
            pruned = branch(layer_on_meta(self.family, self.fields, number), self.lacking[number])
        return merge_experts(self._below(f"{self.family.layers}.{number}.", pruned))

    def stored_layer(self, number: int) -> dict[str, Tensor | NF4Tensor]:
        return dict(self._replaced[number] if number in self._replaced else self.layer(number))

    def _below(self, prefix: str, pruned: Sequence[str] = ()) -> dict[str, Tensor]:
        """Read the tensors of a module, by name within it, except those of its modules `pruned`."""
        names = [name.removeprefix(prefix) for name in self._weights.table if name.startswith(prefix)]
        return {name: self._read(prefix + name) for name in names if name.partition(".")[0] not in pruned}


def dense(layer: Mapping[str, Tensor | NF4Tensor]) -> dict[str, Tensor]:
    """Make the tensors of a stored layer dense; those of a stack of experts stay one tall matrix."""
    return {name: dequantize(value) if isinstance(value, NF4Tensor) else value for name, value in layer.items()}


def read_rows(table: Any, ids: Tensor) -> Tensor:
    """Read the rows `ids` of a safetensors slice: (M, C). The other rows are not read."""
    return torch.cat([table[row : row + 1] for row in ids.tolist()])


def check_directory(directory: Path, *, with_tokenizer: bool = True) -> None:
    """Refuse a directory that lacks a model's config or tokenizer, or holds an adapter.

    Args:
        with_tokenizer: whether it needs a tokenizer.

    Raises:
        UsageProblem: as above; says what the directory is instead.
    """
    if present(directory / "adapter_config.json"):
        base = (
            read_json(directory / "adapter_config.json").get("base_model_name_or_path")
            or "the model that it was trained on"
        )
        raise UsageProblem(
            f"{directory} is a PEFT adapter (adapter_config.json), not a model; name {base}, or merge it first: "
            "PeftModel.from_pretrained(MODEL, DIR).merge_and_unload().save_pretrained(OUT). If a whole model lies beside it, "
            "move adapter_config.json away"
        )
    for wanted, advice in (
        ("config.json", "name a model's directory, with config.json and *.safetensors"),
        (
            "tokenizer.json",
            "save its fast tokenizer beside the weights: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        ),
    ):
        if present(directory / wanted) or (wanted == "tokenizer.json" and not with_tokenizer):
            continue
        names = sorted(path.name for path in directory.iterdir())
        other = next((name for name in names if name.lower() == wanted), None)
        gguf = next((name for name in names if name.lower().endswith(".gguf")), None)
        if other is not None:
            advice = f"rename {other}"
        elif gguf is not None:
            advice = f"but a GGUF; {import_advice(directory / gguf)}"
        raise UsageProblem(f"{directory} has no {wanted}; {advice}")


def _local(model: str, relative_to: Path | None) -> Path | None:
    """Find the directory that `model` names; None: it may be a model hub's id.

    Raises:
        UsageProblem: it is a file, or a path where there is nothing.
    """
    try:
        path = Path(model).expanduser()
        if relative_to is not None and not path.is_absolute():
            path = relative_to / path
        if path.is_dir():
            return path
        is_file = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long; with a NUL; ~ of nobody
        raise UsageProblem(
            f"the model {model[:80]!r} is not a path ({error}); name a directory, or a model hub's id such as org/model"
        ) from error
    if is_file:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        advice = import_advice(path) if is_gguf else f"name the model's directory, {path.parent}"
        raise UsageProblem(f"{path} is a file, but a model is a directory; {advice}")
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or path.suffix.lower() == ".gguf":
        raise UsageProblem(
            f"the model's directory {path} does not exist; name a directory, or a model hub's id such as org/model"
        )
    return None


def _name_of(directory: Path) -> str:
    """Name a model after its directory; a snapshot in a model hub's cache after its model, not its commit."""
    path = directory.resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.rpartition("--")[2]
    return path.name
