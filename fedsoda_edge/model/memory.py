"""How training fits a device: what a worker's memory holds, from sizes alone, and the quickest way that has room.

Everything is bytes. A plan is one way to train (`MemoryPlan`); `plans` lists them, the quickest first:

    dense                 weights in compute dtype
    packed                weights as they are stored, a tile dense at a time (nf4.py, loss.py)
    packed, recomputed    a layer's activations are made again in the backward pass as well

each with all samples of a step at once, then half of them, and so on. All but the first give memory back at once,
which costs page faults, and holds what is used: malloc keeps 1.2 to 2.9 x the activations otherwise.

    sweep = a layer + the next one as it is stored + hidden states of a slice + activations of one group
    train = resident layers + head + LoRA x 16 (weight, gradient, two moments in fp32) + activations + logits
    peak  = process + max(sweep, train)

Activations are what autograd keeps for a decoder layer with LoRA, the last layer's MLP at supervised positions only
(sub_llm.py): one formula for nine families, of which llama keeps a tenth to a fifth less and gemma3 as much more. What
the process itself takes is measured, so is what malloc adds. What a device has is `device.py`'s business; border states
are on disk, on top of the bundle.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from fedsoda_edge.protocol.manifest import BundleManifest, EdgeNeeds, File, LayerPlan, LoRASpec, TensorSpec

PROCESS_BYTES = 440 << 20  # measured: worker with torch 2.13 (CPU), transformers 5.23, peft 0.21 imported
KERNEL_BYTES = 48 << 20  # measured: what libraries of kernels load and hold once a first step has run
CUDA_CONTEXT_BYTES = 450 << 20  # measured elsewhere for torch on consumer cards; not on a GPU of ours
KEPT_HEAP = 1.7  # measured (scripts/bench_memory): what malloc holds for a byte of activations that comes and goes

NF4_STORED = 0.5 + 1 / 64 + 4 / 64 / 256  # bytes a weight: codes, absmax, nested absmax
NF4_HELD = 0.5 + 4 / 64  # with absmax as fp32, which every use needs
LOGITS = 1 << 23  # of one chunk of rows (loss.py)
GROUP_POSITIONS = 512  # that a sweep runs together: enough for a product
MIN_SLICE_BYTES, MAX_SLICE_BYTES = 64 << 20, 1 << 30  # of samples that one pass over the layers takes along


@dataclass(frozen=True)
class Shape:
    """Sizes of what an edge trains. layer_parameters: of the largest kept layer.

    stored_layer, stored_head, stored_emulator: bytes a weight as stored; NF4_STORED, or those of a dtype.
    num_frozen_layers: of the emulator above the border, which gradients go through; frozen_lora_parameters: theirs.
    is_swept: whether there are layers below the border.
    """

    hidden: int
    mlp: int
    queries: int
    keys: int
    vocab: int
    num_adapter_layers: int
    layer_parameters: int
    lora_parameters: int
    stored_layer: float = NF4_STORED
    stored_head: float = 2.0
    stored_emulator: float = NF4_STORED
    num_frozen_layers: int = 0
    frozen_lora_parameters: int = 0
    is_swept: bool = True


def shape_of(manifest: BundleManifest) -> Shape:
    """From the manifest alone: no file of the bundle needs to be here."""
    plan, dtype = manifest.plan, manifest.dtype
    stored, of_emulator = stored_bytes(manifest.adapter_base, dtype), stored_bytes(manifest.emulator_base, dtype)
    parameters = {
        number: manifest.file(f"layers.{number}.safetensors").bytes
        / (stored if number in plan.adapter else of_emulator)
        for number in plan.kept
    }
    head = stored_bytes("nf4" if manifest.quantized_embedding else "bf16", dtype)
    return _shape(manifest.config, plan, round(max(parameters.values())), manifest.lora, stored, of_emulator, head)


def stored_bytes(base: str, dtype: str) -> float:
    """Of a weight in a bundle, whose base is "nf4" or "bf16": the checkpoint's own dtype."""
    return NF4_STORED if base == "nf4" else 4 if dtype == "float32" else 2


def _shape(
    fields: dict[str, Any],
    plan: LayerPlan,
    layer_parameters: int,
    lora: LoRASpec,
    stored_layer: float,
    stored_emulator: float,
    stored_head: float,
) -> Shape:
    hidden, heads = int(fields["hidden_size"]), int(fields["num_attention_heads"])
    head = int(fields.get("head_dim") or hidden // heads)
    experts = int(fields.get("moe_intermediate_size") or 0) * int(fields.get("num_experts_per_tok") or 0)
    return Shape(
        hidden,
        max(int(fields["intermediate_size"]), experts),
        heads * head,
        int(fields.get("num_key_value_heads") or heads) * head,
        int(fields["vocab_size"]),
        len(plan.adapter),
        layer_parameters,
        _count(lora.adapter),
        stored_layer,
        stored_head,
        stored_emulator,
        len(plan.resident) - len(plan.adapter),
        _count(spec for spec in lora.emulator if int(spec.name.split(".")[1]) in plan.resident),
        bool(plan.swept),
    )


def _count(specs: Iterable[TensorSpec]) -> int:
    return sum(spec.shape[0] * spec.shape[1] for spec in specs)


@dataclass(frozen=True)
class Samples:
    """What a step trains on: how many, and the ids and completion ids of the longest. count: of all; None: not known."""

    batch_size: int
    ids: int
    labels: int
    count: int | None = None


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One way to train and what its memory holds, in bytes; `peak` is of the device that trains.

    packed: adapter and head stay as they are stored. micro_batch: samples at once, of batch_size. frugal: malloc is
    to return memory at once (`ports.system.return_memory_at_once`).
    """

    device: str
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
        return self.process + max(self.sweep, self.weights + self.head + self.lora + self.activations + self.logits)

    @property
    def accumulation(self) -> int:
        """Micro-batches whose gradients make one step."""
        return math.ceil(self.batch_size / self.micro_batch)


def plans(shape: Shape, device: str, samples: Samples, process_bytes: int = PROCESS_BYTES) -> Iterator[MemoryPlan]:
    """Ways to train on "cpu" or "cuda[:n]", the quickest first.

    Args:
        process_bytes: of a worker's RAM before it has read anything.
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
    shape: Shape, device: str, samples: Samples, process_bytes: int, packed: bool, recompute: bool, micro: int
) -> MemoryPlan:
    on_cpu = not device.startswith("cuda")
    size = 4 if on_cpu else 2
    frugal = packed or micro < samples.batch_size
    heap = KEPT_HEAP if on_cpu and not frugal else 1.0
    d, f, q, k = shape.hidden, shape.mlp, shape.queries, shape.keys
    positions, labels = micro * samples.ids, micro * samples.labels
    head_nf4 = shape.stored_head == NF4_STORED
    layer_size, emulator_size = (
        NF4_HELD if packed and stored == NF4_STORED else size for stored in (shape.stored_layer, shape.stored_emulator)
    )
    head_size = (NF4_HELD if head_nf4 else shape.stored_head) if packed else size
    # Gradients go through frozen layers too, which keep less than this: there is no LoRA of theirs to train.
    others = shape.num_adapter_layers + shape.num_frozen_layers - 1
    whole = (6 * d + 3 * q + 3 * k + 4 * f) * positions
    last = (d + 3 * q + 3 * k) * positions + (7 * d + q + 4 * f) * labels
    if recompute and others:
        kept = others * d * positions + max(whole + (d + f) * positions, last)
    else:  # the gradients on their way through a layer come when the last layer's activations are gone
        kept = others * whole + max(last, (2 * d + 3 * f) * positions if others else 0)
    rows = min(labels, max(1, LOGITS // shape.vocab))
    transient = 0 if on_cpu or not packed else size * d * f  # bitsandbytes makes a matrix dense for each product
    held = shape.num_adapter_layers * layer_size + shape.num_frozen_layers * emulator_size
    weights = round(shape.layer_parameters * held) + transient
    head = round(shape.vocab * d * head_size)
    lora = 16 * shape.lora_parameters + 4 * shape.frozen_lora_parameters
    activations = round(kept * size * heap)
    logits = round(rows * shape.vocab * 4)
    sweep = 0.0
    if shape.is_swept:
        sweep = shape.layer_parameters * (emulator_size + shape.stored_emulator)
        sweep += (4 * d + 2 * q + 2 * k + 3 * f) * max(GROUP_POSITIONS, samples.ids) * size * heap
    # Hidden states of a slice lie in RAM; on a CPU they may take what training will take anyway.
    slice_bytes = MAX_SLICE_BYTES // 2
    if on_cpu:
        spare = weights + head + lora + activations + logits - sweep
        slice_bytes = round(max(MIN_SLICE_BYTES, min(MAX_SLICE_BYTES, spare)))
    if samples.count is not None:
        slice_bytes = min(slice_bytes, 2 * samples.count * samples.ids * d * size)
    return MemoryPlan(
        device=device,
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


def edge_needs(
    fields: dict[str, Any],
    plan: LayerPlan,
    layer_parameters: int,
    lora: LoRASpec,
    files: Sequence[File],
    stored_layer: float = NF4_STORED,
    stored_emulator: float = NF4_STORED,
) -> EdgeNeeds:
    """Least free disk, RAM (training on CPU) and VRAM (training on a GPU) for a bundle of this shape."""
    shape = _shape(fields, plan, layer_parameters, lora, stored_layer, stored_emulator, 2.0)
    samples = Samples(1, GROUP_POSITIONS, GROUP_POSITIONS)
    least = {device: min(way.peak for way in plans(shape, device, samples)) for device in ("cpu", "cuda")}
    return EdgeNeeds(
        disk_bytes=sum(file.bytes for file in files) + 64 * shape.lora_parameters,
        ram_bytes=least["cpu"],
        vram_bytes=least["cuda"],
    )
