"""A bundle is written whole or not at all, to the same bytes each time, and says itself what an edge needs for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsoda_edge.errors import DiskFull
from fedsoda_edge.model.bundle import Bundle, read_manifest
from fedsoda_edge.model.nf4 import dequantize, quantize
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.protocol.manifest import encode_manifest
from fedsoda_edge.protocol.needs import edge_needs, shape_of
from tests.edge.model.test_bundle import write


@pytest.mark.parametrize("change", [{}, {"adapter_base": "bf16", "quantize_embedding": True}], ids=["nf4", "bf16"])
def test_what_an_edge_needs_is_counted_with_the_shape_that_the_edge_finds(
    tmp_path: Path, tiny_llama: Path, change: dict[str, Any]
) -> None:
    manifest = write(tmp_path / "b", tiny_llama, **change).manifest
    layer = sum(tensor.numel() for tensor in Checkpoint.open(str(tiny_llama)).layer(0).values())
    counted = {"layer_parameters": layer, "adapter_parameters": 2 * layer, "frozen_parameters": 0}
    found = replace(shape_of(manifest), **counted)  # an edge counts parameters by the sizes of files
    assert manifest.needs == edge_needs(found, manifest.files)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, tiny_llama: Path) -> None:
    one, two = write(tmp_path / "1", tiny_llama), write(tmp_path / "2", tiny_llama)
    assert encode_manifest(one.manifest) == encode_manifest(two.manifest)
    assert read_manifest(encode_manifest(one.manifest)) == one.manifest


def test_a_failure_on_the_way_leaves_nothing_of_a_new_bundle(tmp_path: Path, tiny_llama: Path) -> None:
    class Unwritable(Checkpoint):
        def head(self) -> Tensor:
            raise DiskFull("the disk is full")

    first = write(tmp_path / "b", tiny_llama).manifest
    with pytest.raises(DiskFull):
        write(tmp_path / "b", tiny_llama, source=Unwritable.open(str(tiny_llama)))
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert Bundle.open(tmp_path / "b").manifest == first


def test_quantizing_the_embedding_makes_the_bundle_smaller(tmp_path: Path, tiny_llama: Path) -> None:
    kept, coded = write(tmp_path / "1", tiny_llama), write(tmp_path / "2", tiny_llama, quantize_embedding=True)
    assert coded.manifest.bits_per_parameter < kept.manifest.bits_per_parameter
    assert torch.equal(coded.embedding(), dequantize(quantize(kept.embedding())))
