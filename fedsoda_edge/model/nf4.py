"""Hold matrices in NF4 with double quantization, on disk and in RAM, and train through them in a linear layer.

The numbers are those of bitsandbytes (QLoRA, arXiv 2305.14314), so that CUDA kernels and plain Transformers read
our files. A weight's value is codebook[q] * absmax in fp32; a device rounds it to the dtype in which it computes.
Which layers are quantized is left to `bundle_writer.py`.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 64  # weights to an absmax
NESTED_BLOCK = 256  # absmax values to a second-level absmax
PIECE = 4096  # blocks dequantized at once: 1 MiB of fp32
TILE = 512  # the matrix is multiplied on the CPU in tiles of 512 x 512: 1 MiB of fp32

# Quantiles of the standard normal, normalised to [-1, 1] (QLoRA, appendix E).
CODEBOOK = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@functools.cache
def codebook() -> Tensor:
    """Make the 16 values of NF4 as an fp32 tensor, ascending."""
    return torch.tensor(CODEBOOK, dtype=torch.float32)


@functools.cache
def dynamic_map() -> Tensor:
    """Make the 256 values of the signed 8-bit dynamic data type (Dettmers, arXiv 1511.04561), ascending."""
    values: list[float] = [0.0, 1.0]
    for exponent in range(7):
        steps = 2**exponent + 1
        boundaries = torch.linspace(0.1, 1, steps)
        means = (boundaries[:-1] + boundaries[1:]) / 2.0
        for mean in ((10 ** (-6 + exponent)) * means).tolist():
            values += [mean, -mean]
    return torch.tensor(sorted(values), dtype=torch.float32)


@dataclass(frozen=True)
class NF4Tensor:
    """A matrix in NF4.

    codes: uint8, ceil(rows * cols / 2), two codes a byte, the earlier in the high half.
    absmax: uint8 index into `dynamic_map`, one for each 64 weights of the flattened matrix.
    nested_absmax: fp32, one for each 256 absmax. offset: fp32 scalar, the mean of the absmax.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor
    shape: tuple[int, int]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the parts for safetensors, each named `name` with a suffix."""
        return {
            f"{name}.codes": self.codes,
            f"{name}.absmax": self.absmax,
            f"{name}.nested_absmax": self.nested_absmax,
            f"{name}.offset": self.offset.reshape(1),
            f"{name}.shape": torch.tensor(self.shape, dtype=torch.int32),
        }

    @staticmethod
    def from_tensors(name: str, tensors: Mapping[str, Tensor]) -> NF4Tensor:
        """Put together what `tensors` gave.

        Raises:
            KeyError: a part is missing.
            ValueError: the parts do not fit each other.
        """
        rows, cols = (int(size) for size in tensors[f"{name}.shape"])
        made = NF4Tensor(
            tensors[f"{name}.codes"],
            tensors[f"{name}.absmax"],
            tensors[f"{name}.nested_absmax"],
            tensors[f"{name}.offset"].reshape(()),
            (rows, cols),
        )
        blocks = math.ceil(rows * cols / BLOCK)
        sizes = (made.codes.numel(), made.absmax.numel(), made.nested_absmax.numel())
        wanted = (math.ceil(rows * cols / 2), blocks, math.ceil(blocks / NESTED_BLOCK))
        dtypes = (made.codes.dtype, made.absmax.dtype, made.nested_absmax.dtype, made.offset.dtype)
        if dtypes != (torch.uint8, torch.uint8, torch.float32, torch.float32):
            raise ValueError(f"{name} has parts of dtypes {dtypes}")
        if min(rows, cols) < 1 or sizes != wanted:
            raise ValueError(f"{name} of shape {rows} x {cols} has parts of sizes {sizes}, not {wanted}")
        return made

    def absmax_values(self) -> Tensor:
        """Compute the absmax of each block of 64 weights, fp32."""
        scale = self.nested_absmax.repeat_interleave(NESTED_BLOCK)[: self.absmax.numel()]
        return dynamic_map().to(self.codes.device)[self.absmax.long()] * scale + self.offset


PARTS = ("codes", "absmax", "nested_absmax", "offset", "shape")  # of `NF4Tensor.tensors`


def unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor | NF4Tensor]:
    """Put together what a shard holds: its NF4 matrices, and its other tensors as they are.

    Raises:
        KeyError: a part of a matrix is missing.
        ValueError: the parts of a matrix do not fit each other.
    """
    names = [name.removesuffix(".codes") for name in tensors if name.endswith(".codes")]
    matrices = {name: NF4Tensor.from_tensors(name, tensors) for name in names}
    return matrices | {name: value for name, value in tensors.items() if name.rpartition(".")[2] not in PARTS}


def nf4_entries(size: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """List the parts that `NF4Tensor.tensors` returns for `size` weights: safetensors dtype and shape of each."""
    blocks = math.ceil(size / BLOCK)
    return {
        "codes": ("U8", (math.ceil(size / 2),)),
        "absmax": ("U8", (blocks,)),
        "nested_absmax": ("F32", (math.ceil(blocks / NESTED_BLOCK),)),
        "offset": ("F32", (1,)),
        "shape": ("I32", (2,)),
    }


def quantize(weight: Tensor) -> NF4Tensor:
    """Quantize a matrix (rows, cols); blocks run over the flattened matrix, as in bitsandbytes."""
    flat = weight.detach().float().flatten()
    index, absmax = _coded(flat, BLOCK, codebook())
    # An odd last weight shares its byte with the code of 0.0, as in bitsandbytes: blocks are filled up with zeros.
    pairs = index[: math.ceil(flat.numel() / 2) * 2].reshape(-1, 2)
    offset = absmax.mean()
    coded, nested = _coded(absmax - offset, NESTED_BLOCK, dynamic_map())
    rows, cols = weight.shape
    return NF4Tensor((pairs[:, 0] << 4) | pairs[:, 1], coded[: absmax.numel()].clone(), nested, offset, (rows, cols))


def _coded(flat: Tensor, size: int, table: Tensor) -> tuple[Tensor, Tensor]:
    """Code numbers by blocks of `size`, the last one filled up with zeros: (index of the nearest table value, absmax).

    x * (1 / absmax), not x / absmax: bitsandbytes rounds in this order.
    """
    blocks = nn.functional.pad(flat, (0, -flat.numel() % size)).reshape(-1, size)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1.0, 1.0)
    return torch.bucketize(scaled, (table[1:] + table[:-1]) / 2).to(torch.uint8).flatten(), absmax


def _values(codes: Tensor, absmax: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Compute the matrix (rows, cols) of `dtype` from packed codes and fp32 absmax, in plain torch.

    Runs over pieces that stay in the cache: whole intermediates would take three times the dense matrix,
    and fresh pages for them cost more than the arithmetic, docs/decisions.md (d17-tiles).
    """
    size = shape[0] * shape[1]
    table = _pair_table(str(codes.device))
    out = torch.empty(absmax.numel() * BLOCK, dtype=dtype, device=codes.device)
    step = PIECE * BLOCK // 2
    for start in range(0, codes.numel(), step):
        index = codes[start : start + step].int()
        if rest := -index.numel() % (BLOCK // 2):
            index = nn.functional.pad(index, (0, rest))  # the last block may be short; `size` cuts it off
        rows = table.index_select(0, index).view(torch.float32).view(-1, BLOCK)
        block = start // (BLOCK // 2)
        target = out[block * BLOCK : block * BLOCK + rows.numel()].view(-1, BLOCK)
        target.copy_(rows.mul_(absmax[block : block + len(rows), None]))
    return out[:size].reshape(shape)


@functools.cache
def _pair_table(device: str) -> Tensor:
    """Make a table (256,) of the two fp32 values that a byte of codes stands for, as the 8 bytes of one int64."""
    byte = torch.arange(256)
    return torch.stack([codebook()[byte >> 4], codebook()[byte & 15]], dim=1).view(torch.int64).flatten().to(device)


def _values_bitsandbytes(codes: Tensor, absmax: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Compute the matrix (rows, cols) of `dtype` from packed codes and fp32 absmax with bitsandbytes' kernels."""
    import bitsandbytes.functional as bnb

    state = bnb.QuantState(
        absmax=absmax,
        shape=torch.Size(shape),
        dtype=dtype,
        blocksize=BLOCK,
        quant_type="nf4",
        code=codebook().to(codes.device),
    )
    return bnb.dequantize_4bit(codes.reshape(-1, 1), state)


def dequantize(tensor: NF4Tensor, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensor:
    """Make the dense matrix (rows, cols) on the device; values are fp32 products, rounded to `dtype`."""
    codes, absmax = tensor.codes.to(device), tensor.absmax_values().to(device)
    values = _values_bitsandbytes if codes.is_cuda else _values
    return values(codes, absmax, tensor.shape, dtype)


def dequantize_rows(codes: Tensor, absmax: Tensor, rows: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """Dequantize some rows of a matrix whose rows are whole blocks: (M, C), fp32.

    Args:
        codes: (M, C / 2), absmax: (M, C / 64), only of these rows. rows: (M,), their places in the matrix.
        nested_absmax, offset: those of the whole matrix.
    """
    per_row = absmax.shape[1]
    blocks = rows[:, None] * per_row + torch.arange(per_row)
    values = dynamic_map()[absmax.long()] * nested_absmax[blocks // NESTED_BLOCK] + offset
    return _values(codes.flatten(), values.flatten(), (len(rows), per_row * BLOCK), torch.float32)


class _Scratch(threading.local):
    """The flat tensors that a thread fills repeatedly: fresh pages would cost more than the arithmetic."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, use: str, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return `size` numbers of scratch memory for this use; its values are arbitrary."""
        kept = self.kept.get((use, dtype))
        if kept is None or kept.numel() < size:
            with torch.inference_mode(False):  # a tensor made in inference mode could not be written to after it
                kept = self.kept[use, dtype] = torch.empty(size, dtype=dtype)
        return kept[:size]


_scratch = _Scratch()


@functools.cache
def has_instructions_for(dtype: torch.dtype) -> bool:
    """Tell whether this CPU has instructions for products of this dtype; without them fp32 is 10 to 80 times quicker."""
    if dtype in (torch.float32, torch.float64):
        return True
    return dtype == torch.bfloat16 and bool(torch.cpu._is_avx512_bf16_supported())


def _multiply(x: Tensor, layer: NF4Linear, is_forward: bool) -> Tensor:
    """Compute x W^T, or x W for the gradient, on the CPU; W is dequantized in tiles that stay in the cache.

    A dtype without instructions is multiplied and summed in fp32 from the same rounded weights, and rounded once.
    """
    rows, cols = layer.shape
    is_tiled = cols % BLOCK == 0
    wide = x.dtype if has_instructions_for(x.dtype) and (is_tiled or x.dtype.itemsize > 2) else torch.float32
    is_widened = wide != x.dtype
    if not is_tiled:  # blocks run on from row to row: a tile is rows that end where a block does
        unit = BLOCK // math.gcd(cols, BLOCK)
        height, width = max(unit, TILE * TILE // cols // unit * unit), cols
    elif wide.itemsize == 2:  # a partial sum would be rounded: a tile has all that is summed
        height = max(1, TILE * TILE // cols) if is_forward else rows
        width = cols if is_forward else max(1, TILE * TILE // rows // BLOCK) * BLOCK
    else:
        height, width = TILE, TILE
    out_size, out_step = (rows, height) if is_forward else (cols, width)
    sum_size, sum_step = (cols, width) if is_forward else (rows, height)
    flat = x.reshape(-1, sum_size)
    out = torch.empty(*x.shape[:-1], out_size, dtype=x.dtype)
    flat_out = out.view(-1, out_size)
    step = max(1, min(TILE * TILE // max(out_step, sum_step), len(flat))) if is_widened else max(1, len(flat))
    for start in range(0, len(flat), step):
        part, result = flat[start : start + step], flat_out[start : start + step]
        for at in range(0, out_size, out_step):
            target = result[:, at : at + out_step]
            total = _scratch.take("sum", target.numel()).view(target.shape) if is_widened else target
            for begin in range(0, sum_size, sum_step):
                piece = part[:, begin : begin + sum_step]
                if is_widened:
                    piece = _scratch.take("piece", piece.numel()).view(piece.shape).copy_(piece)
                matrix = (
                    layer.tile(at, begin, height, width, x.dtype, wide).t()
                    if is_forward
                    else layer.tile(begin, at, height, width, x.dtype, wide)
                )
                if begin == 0:
                    torch.mm(piece, matrix, out=total)
                else:
                    total.addmm_(piece, matrix)
            if is_widened:
                target.copy_(total)
    return out


class _NF4Matmul(torch.autograd.Function):
    """The product y = x W^T, with W dequantized in forward and in backward; W is frozen and has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        if x.device.type == "cpu":
            return _multiply(x, layer, True)
        return nn.functional.linear(x, layer.dense(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if grad.device.type == "cpu":
            return _multiply(grad, ctx.layer, False), None
        return grad @ ctx.layer.dense(grad.dtype), None


class NF4Linear(nn.Linear):
    """A frozen linear layer in NF4 that gives its input a gradient in every mode.

    It is not bitsandbytes' Linear4bit, which on some CPUs repacks itself on the first evaluation and then trains without
    gradient and without an error, docs/decisions.md (d5-nf4-layer). PEFT treats it as the nn.Linear that it is.
    """

    def __init__(self, tensor: NF4Tensor, bias: Tensor | None, device: str | torch.device) -> None:
        rows, cols = tensor.shape
        super().__init__(cols, rows, bias=False, device="meta")
        self.weight = nn.Parameter(tensor.codes.to(device), requires_grad=False)
        self.register_buffer("absmax", tensor.absmax_values().to(device))
        self.shape = tensor.shape
        if bias is not None:
            self.bias = nn.Parameter(bias.to(device), requires_grad=False)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Make the dense matrix (rows, cols) in `dtype`."""
        values = _values_bitsandbytes if self.weight.is_cuda else _values
        return values(self.weight, self.absmax, self.shape, dtype)

    def rows(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Make the rows `begin` to `end` of the matrix in `dtype`: (end - begin, cols). On a CPU the next tile overwrites them.

        Args:
            begin: a multiple of 64.
        """
        cols = self.shape[1]
        if not self.weight.is_cuda:
            return self.tile(begin, 0, end - begin, cols, dtype, dtype)
        codes = self.weight[begin * cols // 2 : math.ceil(end * cols / 2)]
        absmax = self.absmax[begin * cols // BLOCK : math.ceil(end * cols / BLOCK)]
        return _values_bitsandbytes(codes, absmax, (end - begin, cols), dtype)

    def tile(self, top: int, left: int, height: int, width: int, dtype: torch.dtype, wide: torch.dtype) -> Tensor:
        """Make the part of the matrix at (top, left), with the values of `dense(dtype)`, held in `wide`; CPU only.

        It lies in scratch memory that the thread's next tile overwrites. A tile's edges are edges of blocks.
        """
        rows, cols = self.shape
        height, width = min(height, rows - top), min(width, cols - left)
        if cols % BLOCK == 0:
            codes = self.weight.view(rows, cols // 2)[top : top + height, left // 2 : (left + width) // 2]
            blocks, perrow = self.absmax.view(rows, -1), width // BLOCK
            absmax = blocks[top : top + height, left // BLOCK : left // BLOCK + perrow]
        else:
            first, last = top * cols, (top + height) * cols
            codes = self.weight[first // 2 : math.ceil(last / 2)]
            absmax = self.absmax[first // BLOCK : math.ceil(last / BLOCK)]
        index = _scratch.take("index", absmax.numel() * BLOCK // 2, torch.int32)
        index[codes.numel() :].zero_()  # the last block of a matrix may be short
        index[: codes.numel()].view(codes.shape).copy_(codes)
        pairs = _scratch.take("pairs", index.numel(), torch.int64)
        torch.index_select(_pair_table("cpu"), 0, index, out=pairs)
        values = pairs.view(torch.float32)
        values.view(*absmax.shape, BLOCK).mul_(absmax[..., None])
        values = values[: height * width]
        if dtype != torch.float32:
            if dtype.itemsize == 2:  # the indices are used up, and take as many bytes
                rounded = index.view(dtype)[: values.numel()].copy_(values)
            else:
                rounded = _scratch.take("rounded", values.numel(), dtype).copy_(values)
            values = rounded if wide == dtype else values.copy_(rounded)
        return values.view(height, width)

    def forward(self, input: Tensor) -> Tensor:
        """Compute input W^T + bias."""
        out: Tensor = _NF4Matmul.apply(input, self)
        return out if self.bias is None else out.add_(self.bias.to(out.dtype))
