"""Make the manifest of a bundle that no model is in: for hubs of benches and tests, whose torch is stood in for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from fedsoda_edge.protocol.manifest import BundleManifest, EdgeNeeds, File, LayerPlan, LoRASpec, TensorSpec


def small_manifest(layout: Sequence[TensorSpec], shard: bytes) -> bytes:
    """Make a manifest of two layers and one file, norm.safetensors.

    Args:
        layout: of the adapter's LoRA. shard: the file's bytes.
    """
    return msgspec.json.encode(
        BundleManifest(
            format_version=1,
            family="llama",
            config={},
            dtype="bfloat16",
            source="no-model",
            source_revision="",
            plan=LayerPlan(num_layers=2, adapter=(1,), kept=(0, 1), groups=(), mapping=(), distances=()),
            lora=LoRASpec(rank=2, alpha=4, targets=("q_proj",), adapter=tuple(layout), emulator=()),
            adapter_base="bf16",
            quantized_embedding=False,
            files=(File("norm.safetensors", hashlib.sha256(shard).hexdigest(), len(shard)),),
            needs=EdgeNeeds(disk_bytes=1, ram_bytes=1, vram_bytes=0),
            bits_per_parameter=16.0,
        )
    )
