"""Run a model layer by layer with one layer resident: SGP, teacher targets, the edge's border sweep.

Layers are the outer loop, samples the inner one, so each weight is read once for all samples
(method.md 8b); the next layer is read, as it is stored, while this one computes. What the hidden states are for
is the caller's business.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.branches import Branches, attention
from fedsoda_edge.model.families import (
    Family,
    allowed_fields,
    branch,
    build_config,
    family_of,
    layer_on_meta,
    merge_experts,
    prune_half,
    skeleton,
)
from fedsoda_edge.model.nf4 import NF4Linear, NF4Tensor, dequantize
from fedsoda_edge.ports.disk import sha256_file
from fedsoda_edge.protocol.manifest import TOKENIZER_FILES, Half


class LayerSource(Protocol):
    """Where layers come from: a 16-bit checkpoint on the hub, an NF4 bundle on an edge."""

    family: Family
    fields: dict[str, Any]
    num_layers: int
    dtype: torch.dtype
    lacking: Mapping[int, Half]  # layers of which a half is pruned (`LayerPlan.lacking`)

    def embedding(self) -> Tensor:
        """(V, C)."""
        ...

    def embedding_rows(self, ids: Tensor) -> Tensor:
        """(M, C): those rows of it, (M,) int64; the others are not read."""
        ...

    def norm(self) -> dict[str, Tensor]:
        """The final norm's tensors by name within it."""
        ...

    def head(self) -> Tensor:
        """(V, C); the embedding where they are tied."""
        ...

    def stored_head(self) -> Tensor | NF4Tensor:
        """(V, C), as it is stored."""
        ...

    def layer(self, number: int) -> dict[str, Tensor]:
        """Dense tensors of one full-LLM layer, by name within the layer."""
        ...

    def stored_layer(self, number: int) -> dict[str, Tensor | NF4Tensor]:
        """The same as they are stored."""
        ...


class Checkpoint:
    """A safetensors checkpoint of a supported family, read tensor by tensor.

    name: the hub id or the directory's name, never a local path. revision: the hub's commit, or for a
    directory the sha256 over its config and weights.
    """

    def __init__(self, directory: Path, name: str, revision: str | None) -> None:
        config_file = directory / "config.json"
        if not config_file.exists():
            raise UsageProblem(f"{directory} has no config.json; a model directory holds config.json and *.safetensors")
        raw = json.loads(config_file.read_text(encoding="utf-8"))
        self.path = directory
        self.name = name
        self.family = family_of(str(raw.get("model_type")))
        if "quantization_config" in raw:
            method = raw["quantization_config"].get("quant_method", "unknown")
            raise UsageProblem(
                f"{name} is already quantized ({method}); SGP and ODA need the 16-bit checkpoint it was made from"
            )
        config = self.family.config_class.from_dict(raw)
        self.fields = allowed_fields(self.family, config)
        self.num_layers = int(config.num_hidden_layers)
        self._files = _tensor_table(directory, name)
        self.dtype = self._read(f"{self.family.embedding}.weight").dtype
        self.lacking: Mapping[int, Half] = {}
        self._revision = revision
        self.tokenizer_files = [directory / file for file in TOKENIZER_FILES if (directory / file).exists()]
        if not (directory / "tokenizer.json").exists():
            raise UsageProblem(f"{name} has no tokenizer.json; save its fast tokenizer beside the weights")

    @cached_property
    def revision(self) -> str:
        """Reads all weights of a directory once: a model trained on under its old name is another model."""
        if self._revision:
            return self._revision
        files = {path.name: sha256_file(path) for path in set(self._files.values())}
        return hashlib.sha256(json.dumps([files, self.fields], sort_keys=True).encode()).hexdigest()

    def without(self, lacking: Mapping[int, Half]) -> Checkpoint:
        """The same checkpoint with these halves of layers pruned: nobody reads or runs them."""
        pruned = copy.copy(self)
        pruned.lacking = lacking
        return pruned

    @property
    def bytes(self) -> int:
        """Of its weights, as stored."""
        return sum(path.stat().st_size for path in set(self._files.values()))

    @classmethod
    def open(cls, model: str, *, relative_to: Path | None = None, revision: str | None = None) -> Checkpoint:
        """A directory, or a model hub's id that `huggingface_hub` fetches (safetensors and JSON only).

        Args:
            revision: the commit of a model hub's id; None: the newest. A directory has no other than its own.
        """
        path = Path(model).expanduser()
        if relative_to is not None and not path.is_absolute():
            path = relative_to / path
        if path.is_dir():
            return cls(path, path.resolve().name, None)
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise UsageProblem(f"the model directory {path} is not there; name a directory or a hub id like org/model")
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

        try:
            local = snapshot_download(model, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.jinja"])
        except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, OSError) as error:
            raise UsageProblem(
                f"{model!r} is neither a directory here nor could it be fetched from the model hub ({error}); "
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
        pruned: tuple[str, ...] = ()
        if number in self.lacking:
            pruned = branch(layer_on_meta(self.family, self.fields, number), self.lacking[number])
        return merge_experts(self._below(f"{self.family.layers}.{number}.", pruned))

    def stored_layer(self, number: int) -> dict[str, Tensor | NF4Tensor]:
        return dict(self.layer(number))

    def _below(self, prefix: str, pruned: Sequence[str] = ()) -> dict[str, Tensor]:
        """The tensors of a module by name within it, but those of its modules `pruned`."""
        names = [name.removeprefix(prefix) for name in self._files if name.startswith(prefix)]
        if not names:
            raise UsageProblem(f"{self.name} has no tensor below {prefix!r}; the checkpoint is incomplete")
        return {name: self._read(prefix + name) for name in names if name.partition(".")[0] not in pruned}


def read_rows(table: Any, ids: Tensor) -> Tensor:
    """(M, C): the rows `ids` of a safetensors slice; the others are not read."""
    return torch.cat([table[row : row + 1] for row in ids.tolist()])


def _tensor_table(directory: Path, name: str) -> dict[str, Path]:
    """Which file holds which tensor."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        missing = sorted({file for file in table.values() if not (directory / Path(file).name).exists()})
        if missing:
            raise UsageProblem(f"{name} is incomplete: {index.name} names {missing[0]}, which is not there")
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
    raise UsageProblem(f"{name} has no model.safetensors; found {[p.name for p in directory.iterdir()][:8]}")


KEPT_CALL_BYTES = 64 << 20  # of masks and rotary tables that the layers of a sweep are called with

Enter = Callable[[int, Any], None]
Visit = Callable[[int, list[Tensor]], None]
Progress = Callable[[int, int], None]


def stream(
    source: LayerSource,
    layers: Sequence[int],
    ids: Sequence[Tensor],
    *,
    start: Sequence[Tensor] | None = None,
    compute_dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    store_dtype: torch.dtype | None = None,
    batch_tokens: int = 2048,
    batches: Sequence[Sequence[int]] | None = None,
    branches: Sequence[Branches] | None = None,
    lora: dict[str, Tensor] | None = None,
    lora_scale: float = 0.0,
    dense: bool = True,
    enter: Enter | None = None,
    visit: Visit | None = None,
    progress: Progress | None = None,
) -> list[Tensor]:
    """Hidden states of every sample after the last of `layers`, without padding.

    Args:
        ids: one (T_i,) int64 tensor per sample. Samples are bucketed by length and padded on the right:
            under causal attention no real position sees a pad, so no mask is needed.
        batches: samples that run together instead, by their places in `ids`; what a sample's states are depends in
            its last bits on who runs with it.
        branches: of each sample, where several sequences with one beginning stand in it. Then no sample may be longer
            than a sliding window of the model.
        start: hidden states (T_i, C) to begin with instead of the embeddings of `ids`.
        store_dtype: what hidden states are rounded to between layers; None: compute_dtype.
        lora: tensors by full-LLM name; applied unmerged, as PEFT does: y + scale * (x A^T) B^T.
        dense: NF4 weights are dequantized once for all samples; otherwise for each batch anew, tile by tile.
        enter: called as enter(layer, its module) before it runs; hooks that it puts there go with the module.
        visit: called as visit(layer, hidden states of all samples) after each layer.
        progress: called as progress(layers done, layers in all).

    Returns:
        One (T_i, C) CPU tensor of store_dtype per sample, in the order of `ids`.
    """
    store = store_dtype or compute_dtype
    family = source.family
    with torch.inference_mode(), ThreadPoolExecutor(1, "next layer") as reader:
        coming = reader.submit(source.stored_layer, layers[0]) if layers else None
        batches = batches or buckets([len(sample) for sample in ids], batch_tokens)
        # All layers of the full config, so that layer l gets the mask and the rotary table of layer l.
        model = skeleton(family, build_config(family, source.fields))
        if start is None:
            hidden = _embedded(model.get_submodule(family.embedding), source, ids, store)
        else:
            hidden = [state.to(store) for state in start]
        base = model.get_submodule(family.layers.rpartition(".")[0])
        calls = _Calls(base)
        if branches is not None and all(len(row.forks) == 1 for row in branches):
            branches = None  # their shape says all, so that batches of one shape share what is kept of them
        base.rotary_emb.to(device)  # the only real tensors of the skeleton
        for done, number in enumerate(layers):
            assert coming is not None
            layer = calls.take_layer(number)
            prune_half(layer, source.lacking.get(number))
            fill(layer, coming.result(), compute_dtype, device, dense=dense)
            coming = reader.submit(source.stored_layer, layers[done + 1]) if done + 1 < len(layers) else None
            if enter is not None:
                enter(number, layer)
            with _lora_hooks(layer, f"layers.{number}.", lora or {}, lora_scale, device, compute_dtype):
                for batch in batches:
                    longest = max(len(hidden[i]) for i in batch)
                    padded = torch.zeros(len(batch), longest, hidden[batch[0]].shape[1], dtype=compute_dtype)
                    for row, i in enumerate(batch):
                        padded[row, : len(hidden[i])] = hidden[i]
                    parted = tuple(branches[i] for i in batch) if branches is not None else ()
                    arguments = calls.arguments(number, padded.to(device), parted)
                    out = layer(*arguments[0], **arguments[1])
                    out = (out[0] if isinstance(out, tuple) else out).to(store).cpu()
                    for row, i in enumerate(batch):
                        hidden[i] = out[row, : len(hidden[i])].clone()
            del layer
            if visit is not None:
                visit(number, hidden)
            if progress is not None:
                progress(done + 1, len(layers))
    return [state.clone() for state in hidden]


def _embedded(module: Any, source: LayerSource, ids: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The ids' rows through the family's own embedding module, which may scale them (Gemma); other rows stay out."""
    used, places = torch.unique(torch.cat(list(ids)), return_inverse=True)
    module.weight = nn.Parameter(source.embedding_rows(used).to(dtype), requires_grad=False)
    module.padding_idx = None  # an id of the whole table; without gradients it has no meaning
    rows = module(places)
    module.to_empty(device="meta")
    return list(rows.split([len(sample) for sample in ids]))


class _Recorder(torch.nn.Module):
    """Stands in a layer's place while the family's own base model runs, and notes how it is called."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule: the base model must not see its weights
        for name, value in vars(layer).items():
            if name.startswith("_") or name in ("training",):
                continue
            self.__dict__[name] = value

    def take_layer(self) -> Any:
        """The layer, which nothing holds from now on but the caller."""
        return self.__dict__.pop("layer")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        self.__dict__["call"] = args[1:], kwargs
        return hidden


class _Calls:
    """How a family's base model calls its layers for a batch: masks, rotary tables and what else stands beside the states."""

    def __init__(self, base: Any) -> None:
        self._base = base
        self._recorders = [_Recorder(layer) for layer in base.layers]
        base.layers = torch.nn.ModuleList(self._recorders)
        base.norm = torch.nn.Identity()
        self._kept: dict[Any, list[Any]] = {}  # (shape of the states, branches) -> of each layer its other arguments
        self._kept_bytes = 0

    def take_layer(self, number: int) -> Any:
        return self._recorders[number].take_layer()

    def arguments(
        self, number: int, hidden: Tensor, branches: tuple[Branches, ...]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A layer's arguments for these hidden states, as the family's own forward would pass them."""
        key = hidden.shape, branches
        if key not in self._kept:
            positions, mask = attention(branches, hidden.device)
            # Once for all layers, which share what it makes.
            self._base(inputs_embeds=hidden, position_ids=positions, attention_mask=mask, use_cache=False)
            calls = [recorder.__dict__.pop("call") for recorder in self._recorders]
            size = sum({id(tensor): tensor.nbytes for tensor in _tensors(calls)}.values())
            if self._kept_bytes + size > KEPT_CALL_BYTES:
                self._kept, self._kept_bytes = {}, 0
            self._kept[key] = calls
            self._kept_bytes += size
        others, named = self._kept[key][number]
        return (hidden, *others), named


def _tensors(call: Any) -> Iterator[Tensor]:
    """Those in a layer's arguments, however they are nested."""
    if isinstance(call, Tensor):
        yield call
    elif isinstance(call, dict | tuple | list):
        for value in call.values() if isinstance(call, dict) else call:
            yield from _tensors(value)


def fill(
    module: Any,
    weights: dict[str, Tensor | NF4Tensor],
    dtype: torch.dtype,
    device: str | torch.device,
    *,
    dense: bool,
) -> None:
    """Replace a module's meta tensors by real ones.

    Args:
        dense: matrices in NF4 are dequantized, the same values; otherwise they become NF4Linear.
    """
    missing = {name for name, _ in module.named_parameters()} - set(weights)
    assert not missing, f"{module} lacks {sorted(missing)}"
    for name, value in weights.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path) if path else module
        if isinstance(value, NF4Tensor) and isinstance(owner, nn.Linear) and not dense:
            bias = weights.get(f"{path}.bias")
            assert not isinstance(bias, NF4Tensor)
            linear = NF4Linear(value, bias, device)
            parent, _, child = path.rpartition(".")
            setattr(module.get_submodule(parent) if parent else module, child, linear)
        elif not isinstance(owner, NF4Linear):  # whose bias it has already
            if isinstance(value, NF4Tensor):
                shape = getattr(owner, leaf).shape  # a stack of experts is one tall matrix in NF4
                value = dequantize(value, dtype, device).reshape(shape)
            setattr(owner, leaf, nn.Parameter(value.to(device=device, dtype=dtype), requires_grad=False))


@contextmanager
def _lora_hooks(
    layer: Any,
    prefix: str,
    lora: dict[str, Tensor],
    scale: float,
    device: str | torch.device,
    dtype: torch.dtype,
) -> Iterator[None]:
    """Add LoRA to the linear modules of one layer for a while, unmerged."""
    handles = []
    for name in [n for n in lora if n.startswith(prefix) and n.endswith(".lora_A")]:
        module = name.removeprefix(prefix).removesuffix(".lora_A")
        a = lora[name].to(device=device, dtype=dtype)
        b = lora[name.removesuffix("A") + "B"].to(device=device, dtype=dtype)

        def add(_: Any, inputs: Any, out: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            return out + (inputs[0] @ a.T @ b.T) * scale

        handles.append(layer.get_submodule(module).register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def buckets(lengths: Iterable[int], batch_tokens: int) -> list[list[int]]:
    """Sample indices in batches of near-equal length with at most `batch_tokens` padded positions."""
    lengths = list(lengths)
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * lengths[i] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
