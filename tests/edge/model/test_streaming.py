"""Streaming is the whole model, layer by layer; the next layer is read while one computes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fedsoda_edge.errors import BlobCorrupt
from fedsoda_edge.model import lora
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.nf4 import NF4Tensor
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.model.streaming import stream
from fedsoda_edge.protocol.manifest import BundleManifest, File
from tests.edge.model.test_bundle import write

SAMPLES = [torch.arange(3, 3 + length) for length in (5, 17, 1, 17, 9)]


def test_streaming_is_the_whole_model_with_peft(tiny_llama: Path) -> None:
    """Layer by layer, samples of many lengths at once, LoRA unmerged: PEFT's hidden states sample by sample."""
    source = Checkpoint.open(str(tiny_llama))
    targets = ("q_proj", "v_proj", "down_proj")
    layout = lora.specs(source.family, source.fields, range(source.num_layers), targets, 4)
    generator = torch.Generator().manual_seed(2)
    tensors = {item.name: torch.randn(item.shape, generator=generator) * 0.1 for item in layout}
    seen: dict[int, list[torch.Tensor]] = {}
    stream(
        source,
        range(source.num_layers),
        SAMPLES,
        lora=tensors,
        lora_scale=8 / 4,
        batch_tokens=40,
        visit=lambda number, hidden: seen.update({number: list(hidden)}),
    )

    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    whole = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules=list(targets))).eval()
    for name, parameter in whole.named_parameters():
        head, mark, tail = name.partition(".lora_")
        if mark:
            parameter.data = tensors[f"{head.removeprefix('base_model.model.model.')}.lora_{tail[0]}"]
    for at, ids in enumerate(SAMPLES):
        with torch.no_grad():
            expected = whole(ids[None], output_hidden_states=True).hidden_states
        for number in range(source.num_layers - 1):  # the last of them is after the final norm
            torch.testing.assert_close(seen[number][at], expected[number + 1][0], rtol=1e-4, atol=1e-5)


# -- on an edge: from a bundle --------------------------------------------------------------------------


def same_files(bundle: Bundle) -> tuple[BundleManifest, Callable[[File], Path]]:
    """What a `Bundle` is made of, for one that does more."""
    return bundle.manifest, lambda file: bundle.path(file.name)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Bundle:
    return write(tmp_path_factory.mktemp("b") / "bundle", tiny_llama, trained=True)


def test_layers_that_stay_as_they_are_stored_give_the_states_of_dense_ones(bundle: Bundle) -> None:
    def states(dense: bool) -> list[torch.Tensor]:
        return stream(
            bundle, bundle.plan.sub_emulator, SAMPLES, lora=bundle.emulator_lora(), lora_scale=2.0, dense=dense
        )

    for one, other in zip(states(True), states(False), strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()


def test_one_layer_is_read_ahead_while_the_one_before_computes(bundle: Bundle) -> None:
    """Were the next one read after this one's work, its reading would not begin before `visit` returns."""
    layers, read = bundle.plan.sub_emulator, list[int]()
    begun = {number: threading.Event() for number in layers}

    class Noting(Bundle):
        def stored_layer(self, number: int) -> dict[str, torch.Tensor | NF4Tensor]:
            read.append(number)
            begun[number].set()
            return super().stored_layer(number)

    def visit(number: int, _: list[torch.Tensor]) -> None:
        ahead = layers[: layers.index(number) + 2]
        assert begun[ahead[-1]].wait(10)
        assert read == list(ahead)

    stream(Noting(*same_files(bundle)), layers, SAMPLES, visit=visit)
    assert read == list(layers)
    assert len(layers) > 2


@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_layer_that_cannot_be_read_ends_the_sweep_with_its_own_error(bundle: Bundle, place: int) -> None:
    layers, done = bundle.plan.sub_emulator, list[int]()

    class Damaged(Bundle):
        def stored_layer(self, number: int) -> dict[str, torch.Tensor | NF4Tensor]:
            if number == layers[place]:
                raise BlobCorrupt(f"layer {number} is not as it was")
            return super().stored_layer(number)

    with pytest.raises(BlobCorrupt, match=f"layer {layers[place]} is not as it was"):
        stream(Damaged(*same_files(bundle)), layers, SAMPLES, visit=lambda number, _: done.append(number))
    assert done == list(layers[: layers.index(layers[place])])
