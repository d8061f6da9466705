"""A manifest's bytes are its contract: its digest is what edges are told."""

from __future__ import annotations

import msgspec

from fedsoda_edge.protocol.manifest import (
    BundleManifest,
    EdgeNeeds,
    LayerPlan,
    LoRASpec,
    encode_manifest,
)

MANIFEST = BundleManifest(
    format_version=1,
    family="llama",
    config={},
    dtype="bfloat16",
    source="m",
    source_revision="",
    plan=LayerPlan(num_layers=1, adapter=(0,), kept=(0,), groups=(), mapping=(), distances=()),
    lora=LoRASpec(rank=1, alpha=1.0, targets=("q_proj",), adapter=(), emulator=()),
    adapter_base="nf4",
    quantized_embedding=False,
    files=(),
    needs=EdgeNeeds(0, 0, 0),
    bits_per_parameter=4.0,
)


def test_a_default_is_left_out_wherever_its_text_comes_from() -> None:
    """A base that was read from a file is another object than the default: msgspec would write it."""
    read = "".join(("n", "f4"))
    assert encode_manifest(msgspec.structs.replace(MANIFEST, emulator_base=read)) == encode_manifest(MANIFEST)
    assert b"emulator_base" not in encode_manifest(MANIFEST)
    assert b'"emulator_base": "bf16"' in encode_manifest(msgspec.structs.replace(MANIFEST, emulator_base="bf16"))
