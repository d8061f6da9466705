"""Our NF4 is bitsandbytes' NF4, and a layer in it always passes its gradient on."""

from __future__ import annotations

import itertools
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load, save

from fedsoda_edge.model.nf4 import (
    NF4Linear,
    NF4Tensor,
    _values_bitsandbytes,
    dequantize,
    dynamic_map,
    quantize,
)

# 96 x 44 ends in a short block, 10 x 14 and 3 x 5 are not even multiples of anything.
SHAPES = [(64, 64), (96, 192), (512, 192), (96, 44), (10, 14), (3, 5), (1, 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantizing_gives_bitsandbytes_own_bytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)
    ours = quantize(weight)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert torch.equal(ours.codes, codes.flatten())
    assert torch.equal(ours.offset, state.offset)
    assert torch.equal(ours.nested_absmax, state.state2.absmax)
    # For fp64 bitsandbytes takes the nearest of the 256 values, as its CUDA kernel does; its fp32 CPU kernel
    # looks them up in a coarse table and is off by a step now and then.
    if state.absmax.numel() == 1:
        return  # one absmax less its mean is 0: its code stands for nothing
    _, single = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    centred = (single.absmax - single.absmax.mean()).double()
    nearest, _ = torch.ops.bitsandbytes.quantize_blockwise.default(centred, bnb.create_dynamic_map(), 256)
    assert torch.equal(ours.absmax, nearest)
    assert int((ours.absmax.int() - state.absmax.int()).abs().max()) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", [*SHAPES[:-2], (1000, 640)])
def test_dequantizing_gives_bitsandbytes_own_values(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05).to(dtype)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    theirs = NF4Tensor(codes.flatten(), state.absmax, state.state2.absmax, state.offset, shape)
    assert torch.equal(dequantize(theirs).to(dtype), bnb.dequantize_4bit(codes, state))
    by_kernel = _values_bitsandbytes(theirs.codes, theirs.absmax_values(), shape, torch.float32)
    assert torch.equal(by_kernel, dequantize(theirs))


def test_an_odd_number_of_weights_dequantizes_to_the_same_values() -> None:
    weight = torch.randn(15, generator=torch.Generator().manual_seed(2))
    odd = quantize(weight.reshape(3, 5))
    even = quantize(torch.cat([weight, torch.zeros(1)]).reshape(4, 4))
    assert torch.equal(dequantize(odd).flatten(), dequantize(even).flatten()[:15])


def test_the_dynamic_map_is_bitsandbytes_own() -> None:
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map().float())


def test_zero_matrices_stay_zero() -> None:
    assert torch.equal(dequantize(quantize(torch.zeros(8, 64))), torch.zeros(8, 64))


def test_tensors_go_through_safetensors() -> None:
    tensor = quantize(torch.randn(24, 40))
    again = NF4Tensor.from_tensors("w", load(save(tensor.tensors("w"))))
    assert torch.equal(dequantize(again), dequantize(tensor))
    broken = tensor.tensors("w") | {"w.shape": torch.tensor([4000, 4000], dtype=torch.int32)}
    with pytest.raises(ValueError, match="parts of sizes"):
        NF4Tensor.from_tensors("w", broken)


def gradient(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    layer(x).pow(2).sum().backward()
    assert x.grad is not None
    return x.grad


ACTIONS = ("eval", "train", "no_grad", "save", "load")


@pytest.mark.parametrize("first", ACTIONS)
def test_no_order_of_modes_loses_the_gradient(first: str, tmp_path: Path) -> None:
    """bitsandbytes' Linear4bit repacks itself on some CPUs after eval and then has no gradient."""
    generator = torch.Generator().manual_seed(3)
    tensor = quantize(torch.randn(48, 64, generator=generator))
    x = torch.randn(5, 64, generator=generator)
    reference = torch.nn.Linear(64, 48, bias=False)
    reference.weight.data = dequantize(tensor)
    expected = gradient(reference, x)
    for length in range(5):
        for rest in itertools.product(ACTIONS, repeat=length):
            layer = NF4Linear(tensor, None, "cpu")
            saved = {key: value.clone() for key, value in layer.state_dict().items()}
            for action in (first, *rest):
                if action == "no_grad":
                    with torch.no_grad():
                        layer(x)
                elif action == "save":
                    saved = load(save({key: value.clone() for key, value in layer.state_dict().items()}))
                elif action == "load":
                    layer.load_state_dict(saved)
                else:
                    layer.train(action == "train")
            torch.testing.assert_close(gradient(layer, x), expected)
