"""Our NF4 is bitsandbytes' NF4, and a layer in it always passes its gradient on."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load, save
from torch.utils._python_dispatch import TorchDispatchMode

from fedsoda_edge.model import nf4
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


def gradient(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
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


@pytest.fixture(params=[False, True], ids=["widened", "native"])
def bf16_is_native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways to multiply bf16, whatever this CPU has instructions for."""
    native: bool = request.param
    monkeypatch.setattr(
        nf4, "has_instructions_for", lambda dtype: dtype.itemsize > 2 or (native and dtype == torch.bfloat16)
    )
    return native


# (rows, cols): several tiles with rests, one tile, a short last block, odd columns, long rows, one weight.
PRODUCTS = [(600, 1088), (64, 64), (96, 44), (333, 77), (3, 5), (2, 20000), (1, 1)]
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-12}


@pytest.mark.usefixtures("bf16_is_native")
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", PRODUCTS)
def test_a_product_in_tiles_is_the_product_with_the_dense_matrix(
    shape: tuple[int, int], dtype: torch.dtype, has_bias: bool
) -> None:
    rows, cols = shape
    generator = torch.Generator().manual_seed(4)
    bias = torch.randn(rows, generator=generator) if has_bias else None
    layer = NF4Linear(quantize(torch.randn(shape, generator=generator) * 0.05), bias, "cpu")
    x = torch.randn(2, 3, cols, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(2, 3, rows, generator=generator).to(dtype)
    y = layer(x)
    y.backward(grad)
    dense = layer.dense(dtype).double()
    wanted = x.detach().double() @ dense.T + (0 if bias is None else bias.to(dtype).double())
    assert x.grad is not None
    for got, exact in ((y.detach(), wanted), (x.grad, grad.double() @ dense)):
        assert got.dtype == dtype
        assert float((got.double() - exact).abs().max() / exact.abs().max()) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(600, 1088), (333, 77)])
def test_a_tile_holds_the_dense_values_to_the_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    layer = NF4Linear(quantize(torch.randn(shape, generator=torch.Generator().manual_seed(5))), None, "cpu")
    top, left, width = (256, 512, 512) if shape[1] % 64 == 0 else (64, 0, 77)
    wanted = layer.dense(dtype)[top : top + 256, left : left + width]
    for wide in {dtype, max(dtype, torch.float32, key=lambda it: it.itemsize)}:
        assert torch.equal(layer.tile(top, left, 256, width, dtype, wide), wanted.to(wide))


def test_long_inputs_and_slices_and_no_rows_at_all() -> None:
    layer = NF4Linear(quantize(torch.randn(192, 128, generator=torch.Generator().manual_seed(6))), None, "cpu")
    dense = layer.dense(torch.float32)
    x = torch.randn(128, 2100, generator=torch.Generator().manual_seed(7)).T
    torch.testing.assert_close(layer(x), x @ dense.T)
    rounded = layer.dense(torch.bfloat16).float()
    torch.testing.assert_close(layer(x.bfloat16()).float(), x.bfloat16().float() @ rounded.T, rtol=1e-2, atol=0.2)
    torch.testing.assert_close(gradient(layer, x), gradient(lambda x: x @ dense.T, x))
    assert layer(torch.empty(0, 128)).shape == (0, 192)
    assert layer(torch.ones(128)).shape == (192,)


def test_inference_mode_leaves_nothing_that_training_trips_over() -> None:
    nf4._scratch.kept.clear()
    layer = NF4Linear(quantize(torch.randn(64, 128)), None, "cpu")
    with torch.inference_mode():
        layer(torch.randn(3, 128))
        layer(torch.randn(3, 128).bfloat16())
    gradient(layer, torch.randn(3, 128))
    gradient(layer, torch.randn(3, 128).bfloat16())


class Made(TorchDispatchMode):
    """Bytes of every tensor an operation gives back, by storage."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            storage = out.untyped_storage()  # kept, so that no address is used twice
            self.storages[storage.data_ptr()] = storage
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("num_rows", [8, 700])
def test_no_dense_matrix_is_made_on_the_way(bf16_is_native: bool, num_rows: int, dtype: torch.dtype) -> None:
    """All tensors of forward and backward, beside input, output, gradients and the layer itself: 4 MB in sum."""
    bytes_of = functools.partial(torch.randint, 256, dtype=torch.uint8, generator=torch.Generator().manual_seed(8))
    codes, absmax = bytes_of(size=(4096 * 2048,)), bytes_of(size=(4096 * 64,))  # quantizing a matrix takes longer
    tensor = NF4Tensor(codes, absmax, torch.ones(1024), torch.tensor(1.0), (4096, 4096))
    layer = NF4Linear(tensor, None, "cpu")
    if bf16_is_native and dtype == torch.bfloat16:
        num_rows = 8  # more would take half a minute where there are no instructions for it
    x = torch.randn(num_rows, 4096).to(dtype).requires_grad_()
    grad = torch.randn(num_rows, 4096).to(dtype)
    nf4._pair_table("cpu")
    nf4._scratch.kept.clear()
    with Made() as made:
        y = layer(x)
        y.backward(grad)
    assert x.grad is not None
    known = {it.untyped_storage().data_ptr() for it in (x, y, x.grad, grad, layer.weight, layer.absmax)}
    assert sum(it.nbytes() for address, it in made.storages.items() if address not in known) <= 4e6


def test_no_compiled_code_is_fetched_nor_its_absence_told(tmp_path: Path) -> None:
    """bitsandbytes does both at its import on CPUs with AVX512-BF16, Transformers where a kernel is asked for.

    `fedsoda_edge.model` sees to it for all its modules. What takes seconds and asks for nothing is left out here: PEFT,
    and torch's compiler, which bitsandbytes loads where there is one.
    """
    (tmp_path / "kernels.py").write_text(f"open({str(tmp_path / 'fetched')!r}, 'w')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    script = (
        "import fedsoda_edge.model, torch; torch.compile = None; import bitsandbytes, importlib.util; "
        "assert not importlib.util.find_spec('kernels')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "kernel" not in ended.stderr
    assert not (tmp_path / "fetched").exists()
