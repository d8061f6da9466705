"""Count, from sizes alone, what an edge needs: the ways to train a sub-LLM, and what a worker's memory holds in each.

Everything is bytes. A memory plan is one way to train; `plans` lists them, the quickest first:

    dense                 weights in the dtype of products: bf16 on a GPU, fp32 on a CPU
    packed                weights as they are stored, a tile dense at a time (nf4.py, loss.py)
    packed, recomputed    a layer's activations are made again in the backward pass as well

each with all samples of a step at once, then half of them, and so on. Only the first way lets malloc keep memory that
was used, which is more than the activations (KEPT_HEAP); all others return it at once, which costs page faults.

    sweep = a layer + the next one as it is stored + hidden states of a slice + activations of one group
    train = resident layers + head + LoRA x 16 (weight, gradient, two moments in fp32; in bf16 its copy too)
            + activations + logits
    peak  = process + max(sweep, train)

Activations are what autograd keeps for a decoder layer with LoRA, in the last layer's MLP only at supervised positions
(sub_llm.py). One formula serves nine families; llama keeps a tenth to a fifth less, gemma3 as much more:
docs/methods.md (m8-memory). What the process takes and what malloc adds are measured; border states are on disk, on top
of the bundle. What a device has free, and which plan it takes, is left to the room `device`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fedsoda_edge.protocol.manifest import BundleManifest, EdgeNeeds, File, LayerPlan, LoRASpec, TensorSpec

PROCESS_BYTES = 440 << 20  # measured: worker with torch 2.13 (CPU), transformers 5.23, peft 0.21 imported
KERNEL_BYTES = 48 << 20  # measured: what libraries of kernels load and hold once a first step has run
CUDA_CONTEXT_BYTES = 450 << 20  # reported by others for torch on consumer cards; not measured here
KEPT_HEAP = 1.7  # measured (scripts/bench_memory): bytes that malloc holds for a byte of activations

NORMS_HEADS = ("qwen3", "gemma3_text")  # families whose norms of queries and keys count; others keep less elsewhere

NF4_STORED = 0.5 + 1 / 64 + 4 / 64 / 256  # bytes of a weight: codes, absmax, nested absmax
NF4_HELD = 0.5 + 4 / 64  # bytes of a weight in memory, where absmax is fp32, which every use needs
LOGITS = 1 << 23  # logits of one chunk of rows: 32 MiB in fp32
GROUP_POSITIONS = 512  # padded positions that a sweep runs together: enough for a product
MIN_SLICE_BYTES, MAX_SLICE_BYTES = 64 << 20, 1 << 30  # of samples that one pass over the layers takes along


def chunk_rows(vocab: int) -> int:
    """Count the rows whose logits exist at once (loss.py)."""
    return max(1, LOGITS // vocab)


@dataclass(frozen=True)
class Shape:
    """The sizes of a sub-LLM that an edge trains.

    hidden, mlp, queries, keys, vocab: features. num_layers: layers from the border on, through which gradients go.
    num_attention, num_mlp: how many of these have that half; the last layer counts as whole and is left out.
    layer_parameters: parameters of the largest kept layer. frozen_parameters, frozen_lora_parameters: parameters in
    layers from the border on that do not train. width: bytes of a weight that is not stored in NF4. is_swept: whether
    there are layers below the border. norms_heads: whether norms of queries and keys keep what goes into them.
    """

    hidden: int
    mlp: int
    queries: int
    keys: int
    vocab: int
    num_layers: int
    num_attention: int
    num_mlp: int
    layer_parameters: int
    adapter_parameters: int
    frozen_parameters: int
    lora_parameters: int
    adapter_in_nf4: bool
    emulator_in_nf4: bool
    head_in_nf4: bool
    width: int
    frozen_lora_parameters: int = 0
    is_swept: bool = True
    norms_heads: bool = False


def shape_of(manifest: BundleManifest) -> Shape:
    """Take the sizes from a manifest: no other file of the bundle needs to be here."""
    plan, dtype = manifest.plan, manifest.dtype
    stored, of_emulator = (stored_bytes(base, dtype) for base in (manifest.adapter_base, manifest.emulator_base))
    parameters = {
        number: round(
            manifest.file(f"layers.{number}.safetensors").bytes / (stored if number in plan.adapter else of_emulator)
        )
        for number in plan.kept
    }
    return make_shape(
        manifest.family,
        manifest.config,
        plan,
        parameters,
        manifest.lora,
        adapter_base=manifest.adapter_base,
        emulator_base=manifest.emulator_base,
        quantized_embedding=manifest.quantized_embedding,
        dtype=dtype,
    )


def stored_bytes(base: str, dtype: str) -> float:
    """Count the bytes of a weight in a bundle, whose base is "nf4" or "bf16": the checkpoint's own dtype."""
    return NF4_STORED if base == "nf4" else _width(dtype)


def _width(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def make_shape(
    family: str,
    fields: dict[str, Any],
    plan: LayerPlan,
    parameters: Mapping[int, int],
    lora: LoRASpec,
    *,
    adapter_base: str,
    emulator_base: str,
    quantized_embedding: bool,
    dtype: str,
) -> Shape:
    """Take the sizes from a model's config, before there is a bundle.

    Args:
        parameters: how many each kept layer has.
        adapter_base, emulator_base, quantized_embedding, dtype: as the manifest will name them.
    """
    hidden, heads = int(fields["hidden_size"]), int(fields["num_attention_heads"])
    head = int(fields.get("head_dim") or hidden // heads)
    experts = int(fields.get("moe_intermediate_size") or 0) * int(fields.get("num_experts_per_tok") or 0)
    return Shape(
        hidden,
        max(int(fields["intermediate_size"]), experts),
        heads * head,
        int(fields.get("num_key_value_heads") or heads) * head,
        int(fields["vocab_size"]),
        len(plan.resident),
        len({*plan.resident[:-1]} - {*plan.without_attention}),
        len({*plan.resident[:-1]} - {*plan.without_mlp}),
        max(parameters[number] for number in plan.kept),
        sum(parameters[number] for number in plan.adapter),
        sum(parameters[number] for number in plan.resident if number not in plan.adapter),
        _count(lora.adapter),
        adapter_base == "nf4",
        emulator_base == "nf4",
        quantized_embedding,
        _width(dtype),
        _count(spec for spec in lora.emulator if spec.layer in plan.resident),
        bool(plan.swept),
        family in NORMS_HEADS,
    )


def _count(specs: Iterable[TensorSpec]) -> int:
    return sum(spec.shape[0] * spec.shape[1] for spec in specs)


Dtype = Literal["bfloat16", "float32"]  # of products


@dataclass(frozen=True)
class SampleSizes:
    """The sizes of an edge's samples.

    batch_size: samples of a step. ids, labels: ids and completion ids of the longest sample. count: samples that the
    edge has; None: not known yet.
    """

    batch_size: int
    ids: int
    labels: int
    count: int | None = None


SHORTEST = SampleSizes(1, 2, 1)  # no sample is shorter, so an edge needs at least what this takes


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the memory that training takes, in words and bytes."""

    part: Annotated[str, Meta(min_length=1)]
    bytes: Annotated[int, Meta(ge=0)]


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One way to train and what its memory holds, in bytes.

    device: "cpu", "cuda" or "cuda:N". dtype: the one of products and activations. packed: whether adapter and head stay as
    they are stored. recompute: whether a layer's activations are computed again in the backward pass. frugal: whether malloc returns memory at once
    (`ports.system.return_memory_at_once`). micro_batch: samples that go through at once, of the batch_size samples of a
    step. slice_bytes: hidden states that one pass of the sweep takes along. process, ..., sweep: what each part takes.
    """

    device: str
    dtype: Dtype
    packed: bool
    recompute: bool
    frugal: bool
    micro_batch: int
    batch_size: int
    slice_bytes: int
    process: int
    weights: int
    head: int
    lora: int
    activations: int
    logits: int
    sweep: int

    @property
    def peak(self) -> int:
        """Bytes of the device that trains, at the most."""
        return self.process + max(self.sweep, self.weights + self.head + self.lora + self.activations + self.logits)


def dtype_on(device: str) -> Dtype:
    """Return the dtype of products on "cpu" or "cuda[:n]": docs/decisions.md (d18-fp32)."""
    return "bfloat16" if device.startswith("cuda") else "float32"


def plans(shape: Shape, device: str, samples: SampleSizes, process_bytes: int = PROCESS_BYTES) -> Iterator[MemoryPlan]:
    """List the ways to train on "cpu" or "cuda[:n]", the quickest first.

    Args:
        process_bytes: RAM of a worker before it has read anything.
    """
    forms = [(False, False), (True, False), (True, True)]
    for packed, recompute in forms:
        micro = samples.batch_size
        while True:
            yield _plan(shape, device, samples, process_bytes, packed, recompute, micro)
            if micro == 1:
                break
            micro = math.ceil(micro / 2)


def _plan(
    shape: Shape, device: str, samples: SampleSizes, process_bytes: int, packed: bool, recompute: bool, micro: int
) -> MemoryPlan:
    on_cpu = not device.startswith("cuda")
    dtype = dtype_on(device)
    size = 4 if dtype == "float32" else 2
    frugal = packed or micro < samples.batch_size
    heap = KEPT_HEAP if on_cpu and not frugal else 1.0
    d, f, q, k = shape.hidden, shape.mlp, shape.queries, shape.keys
    positions, labels = micro * samples.ids, micro * samples.labels
    in_nf4 = packed and shape.adapter_in_nf4
    layer_size, emulator_size = (
        NF4_HELD if packed and is_nf4 else size for is_nf4 in (shape.adapter_in_nf4, shape.emulator_in_nf4)
    )
    head_size = (NF4_HELD if shape.head_in_nf4 else shape.width) if packed else size
    # Gradients go through frozen layers too, which keep less than this: their LoRA does not train.
    others = shape.num_layers - 1
    normed = q + k if shape.norms_heads else 0  # what goes into the norms of queries and keys
    wide = 4 // size - 1  # what goes into a norm is kept in fp32
    attention = (3 * (d + q + k) + normed + wide * (d + normed)) * positions
    mlp = (3 * d + 4 * f + wide * d) * positions
    last = (d + 3 * q + 3 * k + normed + wide * (d + normed)) * positions + (7 * d + q + 4 * f + wide * 2 * d) * labels
    if recompute and others:
        kept = others * d * positions + max(attention + mlp + (d + f) * positions, last)
    else:  # the gradients on their way through a layer come when the last layer's activations are gone
        kept = shape.num_attention * attention + shape.num_mlp * mlp
        kept += max(last, (2 * d + 3 * f) * positions if others else 0)
    rows = min(labels, chunk_rows(shape.vocab))
    transient = size * d * f if in_nf4 and not on_cpu else 0  # bitsandbytes makes a matrix dense for each product
    weights = round(shape.adapter_parameters * layer_size + shape.frozen_parameters * emulator_size) + transient
    head = round(shape.vocab * d * head_size)
    copy = size % 4  # LoRA multiplies in the dtype of its input, and trains in fp32
    lora = (16 + copy) * shape.lora_parameters + (4 + copy) * shape.frozen_lora_parameters
    activations = round(kept * size * heap)
    logits = round(rows * shape.vocab * 4)
    sweep = 0.0
    if shape.is_swept:
        sweep = shape.layer_parameters * (emulator_size + (NF4_STORED if shape.emulator_in_nf4 else shape.width))
        sweep += (4 * d + 2 * q + 2 * k + 3 * f) * max(GROUP_POSITIONS, samples.ids) * size * heap
    # Hidden states of a slice lie in RAM; on a CPU they may take the memory that training will take anyway.
    slice_bytes = MAX_SLICE_BYTES // 2
    if on_cpu:
        spare = weights + head + lora + activations + logits - sweep
        slice_bytes = round(max(MIN_SLICE_BYTES, min(MAX_SLICE_BYTES, spare)))
    if samples.count is not None:
        slice_bytes = min(slice_bytes, 2 * samples.count * samples.ids * d * size)
    return MemoryPlan(
        device=device,
        dtype=dtype,
        packed=packed,
        recompute=recompute,
        frugal=frugal,
        micro_batch=micro,
        batch_size=samples.batch_size,
        slice_bytes=slice_bytes,
        process=process_bytes + KERNEL_BYTES if on_cpu else CUDA_CONTEXT_BYTES,
        weights=weights,
        head=head,
        lora=lora,
        activations=activations,
        logits=logits,
        sweep=round(sweep) + (slice_bytes if on_cpu else 0),
    )


def edge_needs(shape: Shape, files: Sequence[File]) -> EdgeNeeds:
    """Count the least free disk, RAM (training on a CPU) and VRAM (training on a GPU) for a bundle of this shape."""
    samples = SampleSizes(1, GROUP_POSITIONS, GROUP_POSITIONS)
    least = {device: min(way.peak for way in plans(shape, device, samples)) for device in ("cpu", "cuda")}
    return EdgeNeeds(
        disk_bytes=sum(file.bytes for file in files) + 64 * shape.lora_parameters,
        ram_bytes=least["cpu"],
        vram_bytes=least["cuda"],
    )
