"""Define where layers come from (`LayerSource`), and read them from the hub's 16-bit checkpoint.

Reading them from a bundle, as edges do, is left to `bundle.py`, running them to `streaming.py`.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.families import Family, allowed_fields, branch, family_of, layer_on_meta, merge_experts
from fedsoda_edge.model.nf4 import NF4Tensor, dequantize
from fedsoda_edge.model.own_tokenizer import own_eos, own_tokenizer
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
        config_file = directory / "config.json"
        if not config_file.exists():
            raise UsageProblem(
                f"{directory} has no config.json; name a model's directory, with config.json and *.safetensors"
            )
        raw = json.loads(config_file.read_text(encoding="utf-8"))
        self.path = directory
        self.name = name
        self.family = family_of(str(raw.get("model_type")))
        if "quantization_config" in raw:
            method = raw["quantization_config"].get("quant_method", "unknown")
            raise UsageProblem(
                f"{name} is already quantized ({method}); name the 16-bit checkpoint from which it was made, which SGP and "
                "ODA need"
            )
        config = self.family.config_class.from_dict(raw)
        self.fields = allowed_fields(self.family, config)
        self.num_layers = int(config.num_hidden_layers)
        self._files = _tensor_table(directory, name)
        self.dtype = self._read(f"{self.family.embedding}.weight").dtype
        self.lacking: Mapping[int, Half] = {}
        self._replaced: Mapping[int, Mapping[str, Tensor | NF4Tensor]] = {}
        self._revision = revision
        self.tokenizer_files = [directory / file for file in TOKENIZER_FILES if (directory / file).exists()]
        if not (directory / "tokenizer.json").exists():
            raise UsageProblem(f"{name} has no tokenizer.json; save its fast tokenizer beside the weights")
        if raw.get("eos_token_id") is None and (own := own_eos(directory)) is not None:
            self.fields["eos_token_id"] = own  # a config class has a default, which is another token of this model

    @cached_property
    def own_tokenizer(self) -> Mapping[str, bytes]:
        """The content of the tokenizer's files by name, in which Transformers' reading of them is written down.

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
        files = {path.name: sha256_file(path) for path in set(self._files.values())}
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
        return sum(path.stat().st_size for path in set(self._files.values()))

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
        path = Path(model).expanduser()
        if relative_to is not None and not path.is_absolute():
            path = relative_to / path
        if path.is_dir():
            return cls(path, path.resolve().name, None)
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise UsageProblem(
                f"the model's directory {path} does not exist; name a directory, or a model hub's id such as org/model"
            )
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

        try:
            local = snapshot_download(model, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.jinja"])
        except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, OSError) as error:
            raise UsageProblem(
                f"{model!r} is not a directory here and could not be fetched from the model hub ({error}); "
                "check the name, HF_TOKEN for gated models, and the network"
            ) from error
        return cls(Path(local), model, Path(local).name)

    def _read(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def embedding(self) -> Tensor:
        return self._read(f"{self.family.embedding}.weight")

    def embedding_rows(self, ids: Tensor) -> Tensor:
        name = f"{self.family.embedding}.weight"
        with safe_open(self._files[name], framework="pt") as file:
            return read_rows(file.get_slice(name), ids)

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
        names = [name.removeprefix(prefix) for name in self._files if name.startswith(prefix)]
        if not names:
            raise UsageProblem(f"{self.name} has no tensors below {prefix!r}, so it is incomplete; fetch it again")
        return {name: self._read(prefix + name) for name in names if name.partition(".")[0] not in pruned}


def dense(layer: Mapping[str, Tensor | NF4Tensor]) -> dict[str, Tensor]:
    """Make the tensors of a stored layer dense; those of a stack of experts stay one tall matrix."""
    return {name: dequantize(value) if isinstance(value, NF4Tensor) else value for name, value in layer.items()}


def read_rows(table: Any, ids: Tensor) -> Tensor:
    """Read the rows `ids` of a safetensors slice: (M, C). The other rows are not read."""
    return torch.cat([table[row : row + 1] for row in ids.tolist()])


def _tensor_table(directory: Path, name: str) -> dict[str, Path]:
    """Map each tensor's name to its file."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        missing = sorted({file for file in table.values() if not (directory / Path(file).name).exists()})
        if missing:
            raise UsageProblem(
                f"{name} is incomplete: {index.name} names {missing[0]}, which is not there; fetch it again"
            )
        return {tensor: directory / Path(file).name for tensor, file in table.items()}
    single = directory / "model.safetensors"
    if single.exists():
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    if list(directory.glob("*.bin")):
        raise UsageProblem(
            f"{name} has only .bin weights, which are pickles and can run code; convert it to safetensors: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)"
        )
    raise UsageProblem(
        f"{name} has no model.safetensors, only {', '.join([p.name for p in directory.iterdir()][:8])}; "
        "name the directory that save_pretrained wrote"
    )
