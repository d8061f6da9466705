"""What a plan needs on an edge, from sizes alone. Whether a device has it is `device.py`'s business.

Sizes are bytes. The process itself (Python, torch, transformers, peft) is measured, the rest is counted:

    sweep = one dense layer in compute dtype + hidden states of one batch
    train = adapter layers + head in compute dtype + LoRA x 16 (weight, gradient, two moments in fp32)
            + activations of the adapter layers for one batch + one chunk of logits
    peak  = process + max(sweep, train)

Border states of the edge's own samples are on disk, on top of the bundle: their number is known only there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedsoda_edge.protocol.manifest import EdgeNeeds, File, LoRASpec

PROCESS_BYTES = 620 << 20  # measured: worker with torch 2.13 (CPU), transformers 5.23, peft 0.21 imported
CUDA_CONTEXT_BYTES = 450 << 20  # measured elsewhere for torch on consumer cards; not on a GPU of ours
LOGIT_ROWS = 256  # rows of logits that exist at once (loss.py)
ACTIVATION_FACTOR = 16  # hidden-size-wide tensors an adapter layer keeps for backward, per position
BATCH_POSITIONS = 2048  # positions of one batch we plan for


def edge_needs(
    fields: dict[str, Any],
    num_adapter_layers: int,
    layer_parameters: int,
    lora: LoRASpec,
    files: Sequence[File],
) -> EdgeNeeds:
    """Least free disk, RAM (training on CPU) and VRAM (training on a GPU) for a bundle of this shape."""
    hidden, vocab = int(fields["hidden_size"]), int(fields["vocab_size"])
    width = max(hidden, int(fields["intermediate_size"]))
    lora_parameters = sum(spec.shape[0] * spec.shape[1] for spec in lora.adapter)

    def peak(size: int) -> int:
        sweep = layer_parameters * size + 3 * BATCH_POSITIONS * width * size
        activations = num_adapter_layers * ACTIVATION_FACTOR * BATCH_POSITIONS * hidden * size
        weights = (num_adapter_layers * layer_parameters + vocab * hidden) * size
        train = weights + 16 * lora_parameters + activations + 3 * LOGIT_ROWS * vocab * 4
        return max(sweep, train)

    return EdgeNeeds(
        disk_bytes=sum(file.bytes for file in files) + 64 * lora_parameters,
        ram_bytes=PROCESS_BYTES + peak(4),
        vram_bytes=CUDA_CONTEXT_BYTES + peak(2),
    )
