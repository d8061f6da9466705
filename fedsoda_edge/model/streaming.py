"""Run a model layer by layer with one layer resident: SGP, teacher targets, the edge's border sweep.

Layers are the outer loop, samples the inner one, so each weight is read once for all samples:
docs/methods.md (m6-streaming). The next layer is read, as it is stored, while this one computes. What the hidden states
are used for is left to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedsoda_edge.model.branches import Branches, attention
from fedsoda_edge.model.families import build_config, prune_half, skeleton
from fedsoda_edge.model.nf4 import NF4Linear, NF4Tensor, dequantize
from fedsoda_edge.model.source import LayerSource

KEPT_CALL_BYTES = 64 << 20  # of masks and rotary tables, with which the layers of a sweep are called

Enter = Callable[[int, Any], None]
Visit = Callable[[int, list[Tensor]], None]
LayersDone = Callable[[int, int], None]  # layers that are done, layers in all


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
    lora: Mapping[str, Tensor] | None = None,
    lora_scale: float = 0.0,
    dense: bool = True,
    enter: Enter | None = None,
    visit: Visit | None = None,
    progress: LayersDone | None = None,
) -> list[Tensor]:
    """Run samples through `layers` and return the hidden states of each after the last one, without padding.

    This knows no border map: states at the border come from `border.border_states`.

    Args:
        source: the layers, whole or with a half pruned (`LayerSource.lacking`).
        layers: full-LLM numbers, in the order in which they run; none: the embeddings alone.
        ids: one (T_i,) int64 tensor per sample. Samples are bucketed by length and padded on the right:
            under causal attention no real position sees a pad, so no mask is needed.
        start: hidden states (T_i, C) to begin with instead of the embeddings of `ids`.
        compute_dtype: the dtype of weights and hidden states while a layer runs.
        store_dtype: the dtype to which hidden states are rounded between layers; None: compute_dtype.
        batch_tokens: padded positions of a batch, at most; a longer sample is a batch of its own.
        batches: which samples run together, by their places in `ids`; None: by batch_tokens. The last bits of a
            sample's states depend on which samples run with it.
        branches: one per sample, for samples that hold several sequences with one beginning. Then no sample may be
            longer than a sliding window of the model.
        lora: tensors by full-LLM name; applied unmerged, as PEFT does: y + scale * (x A^T) B^T.
        dense: whether NF4 weights are dequantized once for all samples; otherwise for each batch again, tile by tile.
        enter: called as enter(layer, its module) before the layer runs; hooks that it adds end with the module.
        visit: called as visit(layer, hidden states of all samples) after each layer.
        progress: called as progress(layers done, layers in all).

    Returns:
        One (T_i, C) CPU tensor of store_dtype per sample, in the order of `ids`.

    Raises:
        BlobCorrupt: a shard of a bundle is not what its manifest says.
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
            branches = None  # the batch's shape says all, so that batches of one shape share masks and tables
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
    """Run the ids through the family's own embedding module, which may scale (Gemma); only the rows in use are read."""
    used, places = torch.unique(torch.cat(list(ids)), return_inverse=True)
    module.weight = nn.Parameter(source.embedding_rows(used).to(dtype), requires_grad=False)
    module.padding_idx = None  # an id of the whole table; without gradients it has no meaning
    rows = module(places)
    module.to_empty(device="meta")
    return list(rows.split([len(sample) for sample in ids]))


class _Recorder(torch.nn.Module):
    """A module in a layer's place, which notes how the family's own base model calls it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule: the base model must not see its weights
        for name, value in vars(layer).items():
            if name.startswith("_") or name in ("training",):
                continue
            self.__dict__[name] = value

    def take_layer(self) -> Any:
        """Hand the layer over; from now on only the caller holds it."""
        return self.__dict__.pop("layer")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Note the arguments, and return the hidden states as they are."""
        hidden = args[0] if args else kwargs.pop("hidden_states")
        self.__dict__["call"] = args[1:], kwargs
        return hidden


class _Calls:
    """The arguments with which a family's base model calls its layers for a batch: masks, rotary tables and others."""

    def __init__(self, base: Any) -> None:
        self._base = base
        self._recorders = [_Recorder(layer) for layer in base.layers]
        base.layers = torch.nn.ModuleList(self._recorders)
        base.norm = torch.nn.Identity()
        self._kept: dict[Any, list[Any]] = {}  # (shape of the states, branches) -> each layer's other arguments
        self._kept_bytes = 0

    def take_layer(self, number: int) -> Any:
        """Hand one layer's module over; from now on only the caller holds it."""
        return self._recorders[number].take_layer()

    def arguments(
        self, number: int, hidden: Tensor, branches: tuple[Branches, ...]
    ) -> tuple[tuple[Any, ...], dict[str, object]]:
        """Return a layer's arguments for these hidden states, as the family's own forward would pass them."""
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
    """Yield the tensors in a layer's arguments, however they are nested."""
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
        weights: tensors by name within the module.
        dense: whether NF4 matrices are dequantized, to the same values; otherwise they become NF4Linear.
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
        elif not isinstance(owner, NF4Linear):  # which has its bias already
            if isinstance(value, NF4Tensor):
                shape = getattr(owner, leaf).shape  # a stack of experts is one tall matrix in NF4
                value = dequantize(value, dtype, device).reshape(shape)
            setattr(owner, leaf, nn.Parameter(value.to(device=device, dtype=dtype), requires_grad=False))


@contextmanager
def _lora_hooks(
    layer: Any,
    prefix: str,
    lora: Mapping[str, Tensor],
    scale: float,
    device: str | torch.device,
    dtype: torch.dtype,
) -> Iterator[None]:
    """Add LoRA to the linear modules of one layer within the block, unmerged."""
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
    """Group sample indices into batches of near-equal length with at most `batch_tokens` padded positions."""
    lengths = list(lengths)
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * lengths[i] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
