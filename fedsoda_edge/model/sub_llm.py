"""Build the model that holds some full-LLM layers; no other file knows local layer positions.

The whole sub-LLM, its adapter alone (fed with border states) and the part that an alignment trains are all the
same thing: a Transformers CausalLM of the family with the chosen layers. Putting LoRA on it is left to `lora.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fedsoda_edge.model.border import BorderMap
from fedsoda_edge.model.families import Family, build_config, prune_half, skeleton
from fedsoda_edge.model.nf4 import NF4Linear, NF4Tensor
from fedsoda_edge.model.source import LayerSource
from fedsoda_edge.model.streaming import fill


@dataclass
class SubLLM:
    """A model of some full-LLM layers.

    model: a CausalLM with the layers `numbers` (full-LLM) in local positions 0, 1, ... dtype: the one in which it
    computes. recompute: whether a backward pass computes the activations of all layers but the last again. border_map:
    the one that `lora.attach` put before the adapter's first layer; None: the view has none.
    """

    model: Any
    family: Family
    numbers: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    recompute: bool = False
    border_map: BorderMap | None = None

    @property
    def head(self) -> Any:
        """The head (V, C): a tensor, of `dtype` unless it was built as it is stored, or an NF4Linear (`loss.Head`)."""
        head = self.model.get_submodule(self.family.head)
        return head if isinstance(head, NF4Linear) else head.weight

    def hidden(
        self,
        *,
        ids: Tensor | None = None,
        states: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Any = None,
        cache: Any = None,
    ) -> Tensor:
        """Run the model up to the final norm: (B, T, C).

        Pads are on the right: causal attention keeps real positions from seeing them, so there is no mask.

        Args:
            ids: (B, T), where the model has its embedding.
            states: (B, T, C) below layer numbers[0], instead of ids, in any dtype.
            positions: (B, T). A row may hold several samples where positions begin at 0 with each: Transformers keeps
                attention within them.
            mask: (B, 1, T, T), bool (`branches.attention`): it alone says what a query sees. Where layers of the family
                differ in that, also a dict of masks, by the kinds in its config's layer_types.
            cache: gets keys and values of each layer, as Transformers' caches do; None: nothing is kept.
        """
        base = self.model.get_submodule(self.family.layers.rpartition(".")[0])
        with _made_again(base.layers[:-1]) if self.recompute else nullcontext():
            return base(
                input_ids=ids,
                inputs_embeds=None if states is None else states.to(self.dtype),
                position_ids=positions,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state

    def hidden_at(
        self,
        rows: Tensor,
        columns: Tensor,
        *,
        states: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Run the model as `hidden` does, and return only the positions (rows, columns), (M,) each: (M, C).

        Nothing else of the last layer is needed: its queries, its output projection, its MLP and the final norm run
        on these M rows alone; keys and values on all. Only the order of sums differs.
        """
        with _last_layer_at(self.layer(self.numbers[-1]), rows, columns):
            return self.hidden(states=states, positions=positions, mask=mask)[0]

    def layer(self, number: int) -> Any:
        """Find the module of a full-LLM layer."""
        return self.model.get_submodule(self.family.layers)[self.numbers.index(number)]

    def local_name(self, name: str) -> str:
        """Translate `layers.29.mlp.up_proj` to the module's dotted path in this model."""
        return local_name(self.family, self.numbers, name)

    def full_name(self, path: str) -> str:
        """Translate a module's dotted path in this model to its full-LLM name."""
        match = re.fullmatch(re.escape(self.family.layers) + r"\.(\d+)\.(.+)", path)
        assert match, f"{path} lies in no decoder layer"
        return f"layers.{self.numbers[int(match[1])]}.{match[2]}"


@contextmanager
def _made_again(layers: Any) -> Iterator[None]:
    """Let these layers keep only their input and run again in the backward pass (arXiv 1604.06174)."""
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


@contextmanager
def _last_layer_at(layer: Any, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Let a decoder layer compute only these positions, whatever its family does around attention and MLP.

    The layer gets (1, M, C), so residuals, norms and MLP are its own code on M rows. Only attention needs the rest:
    it gets all states, after the layer's input norm where there is one (olmo2 has none).
    """
    attention, norm = layer.self_attn, getattr(layer, "input_layernorm", None)
    everything: list[Tensor] = []

    def enter_layer(_: Any, args: Any, kwargs: Any) -> Any:
        everything.append(args[0] if args else kwargs["hidden_states"])
        some = everything[0][rows, columns][None]
        return ((some, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": some})

    def enter_attention(_: Any, args: Any, kwargs: Any) -> Any:
        states = everything[0] if norm is None else norm(everything[0])
        return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

    def leave_attention(_: Any, __: Any, out: Any) -> Any:
        return (out[0][None], *out[1:])

    def select(_: Any, args: Any) -> Any:
        return (args[0][rows, columns],)

    def spread(_: Any, __: Any, out: Tensor) -> Tensor:
        shape = (*everything[0].shape[:2], out.shape[-1])
        return out.new_zeros(shape).index_put((rows, columns), out)  # other positions ask nothing

    hooks = [layer.register_forward_pre_hook(enter_layer, with_kwargs=True)]
    if hasattr(attention, "o_proj"):  # otherwise it is pruned, and no position depends on another
        hooks += [
            attention.register_forward_pre_hook(enter_attention, with_kwargs=True),
            attention.register_forward_hook(leave_attention),
            attention.o_proj.register_forward_pre_hook(select),
        ]
    if hasattr(attention, "q_proj"):  # phi3 computes queries, keys and values in one product
        hooks += [
            attention.q_proj.register_forward_pre_hook(select),
            attention.q_proj.register_forward_hook(spread),
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _number_attention(model: Any, source: LayerSource, numbers: Sequence[int]) -> None:
    """Give a place in the cache of keys and values only to the layers that have attention.

    Transformers takes the length of a cache's content from its first layer, and the kind of cache of each layer from
    the config of the CausalLM; the base model below it goes through all layers by its own config.
    """
    attending = [position for position, number in enumerate(numbers) if source.lacking.get(number) != "attention"]
    if len(attending) < len(numbers):
        for place, position in enumerate(attending):
            model.get_submodule(f"{source.family.layers}.{position}").self_attn.layer_idx = place
        model.config = build_config(source.family, source.fields, [numbers[position] for position in attending])


def local_name(family: Family, numbers: Sequence[int], name: str) -> str:
    """Translate `layers.29.mlp.up_proj` to its dotted path in a CausalLM that holds the full-LLM layers `numbers`."""
    _, number, rest = name.split(".", 2)
    return f"{family.layers}.{numbers.index(int(number))}.{rest}"


def build(
    source: LayerSource,
    layers: Sequence[int],
    *,
    compute_dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    dense: bool = True,
    dense_head: bool = True,
    recompute: bool = False,
    embedding: bool = False,
) -> SubLLM:
    """Build a frozen model of the given full-LLM layers, with final norm and head.

    Args:
        layers: full-LLM numbers, ascending; none: final norm and head alone.
        dense: whether NF4 weights are dequantized once (the same values, quicker, more memory); otherwise they stay NF4
            and are dequantized in every forward and backward pass.
        dense_head: whether the head is held in compute_dtype; otherwise as it is stored, and widened tile by tile.
        recompute: whether layers compute their activations again in the backward pass, except the last, which keeps few.
        embedding: whether the model is fed with ids; without it the embedding is not loaded.

    Raises:
        BlobCorrupt: a shard of a bundle is not what its manifest says.
    """
    family = source.family
    numbers = tuple(layers)
    model = skeleton(family, build_config(family, source.fields, numbers))
    model.get_submodule(family.layers.rpartition(".")[0]).rotary_emb.to(device)
    for position, number in enumerate(numbers):
        module = model.get_submodule(f"{family.layers}.{position}")
        prune_half(module, source.lacking.get(number))
        fill(module, source.stored_layer(number), compute_dtype, device, dense=dense)
    _number_attention(model, source, numbers)
    fill(model.get_submodule(family.norm), dict(source.norm()), compute_dtype, device, dense=True)
    stored_head = source.stored_head()
    if isinstance(stored_head, NF4Tensor) and not dense_head:
        model.set_submodule(family.head, NF4Linear(stored_head, None, device))
    else:
        head_dtype = compute_dtype if dense_head or isinstance(stored_head, NF4Tensor) else stored_head.dtype
        fill(model.get_submodule(family.head), {"weight": stored_head}, head_dtype, device, dense=True)
    if embedding:
        if source.fields.get("tie_word_embeddings"):
            model.get_submodule(family.embedding).weight = model.get_submodule(family.head).weight
        else:
            embedding_module = model.get_submodule(family.embedding)
            fill(embedding_module, {"weight": source.embedding()}, compute_dtype, device, dense=True)
        for buffer in model.get_submodule(family.embedding).buffers():
            buffer.data = buffer.data.to(device)  # a scale (Gemma)
    model.requires_grad_(False)
    return SubLLM(model.eval(), family, numbers, compute_dtype, torch.device(device), recompute)
