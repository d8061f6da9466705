"""Code LoRA deltas in less than a bit a value: the codecs "klt" and "klt-fine" (docs/protocol.md (p5-klt)).

What training changes in a factor of rank R lies mostly in one or two of the R directions of its rank. So each tensor is
turned to its own principal directions (Karhunen-Loeve transform; Goyal, "Theoretical foundations of transform coding",
IEEE Signal Processing Magazine 2001) before it is rounded. One step serves all tensors of an update, the smallest that
fits, which leaves the least squared error for the bytes. Codes are integers, and so are the directions:

    value = scale * sum_j direction_j * code_j        an exact sum of integers, one fp32 multiplication

How codes become bits is `protocol/klt.py`'s, what becomes of what is lost `delta.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsoda_edge.protocol import klt
from fedsoda_edge.protocol.coded import most_bytes, safetensors_bytes
from fedsoda_edge.protocol.klt import Entry, Subset
from fedsoda_edge.protocol.manifest import TensorSpec

# From which part of a step on a code is rounded up in size: codes near 0 save more bits than they would bring. This one
# leaves the least error for the bytes on deltas of SmolLM2-135M; between 0.6 and 0.7 it hardly matters.
ROUND_UP_FROM = 0.65
UNIT = 127  # the length of a direction
OCTAVES = 8  # below the largest coefficient in which the step is looked for; smaller steps do not fit into any bytes
NOT_A_NUMBER, LARGEST = 0x7FC0, 0x7F7F  # bf16, as integers

Bits = NDArray[np.uint8]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Turned:
    """A tensor in its principal directions. directions: (R, R) int64, rows. coefficients: (R, N) fp32, in lengths of them."""

    directions: Tensor
    coefficients: Tensor

    def codes(self, scale: float) -> Tensor:
        """Round the coefficients to multiples of the scale: (R, N), int64."""
        sizes = (self.coefficients.abs() / scale + (1 - ROUND_UP_FROM)).floor_().clamp_(max=klt.MAX_CODE)
        return sizes.mul_(self.coefficients.sign()).long()


# -- coding ---------------------------------------------------------------------------------------------


def encode(tensors: Mapping[str, Tensor], codec: str) -> dict[str, Tensor]:
    """Code fp32 CPU tensors, as finely as fits into a file of `coded.most_bytes`.

    Returns:
        An entry for each tensor, uint8. Where a value is not finite, all scales are NaN.
    """
    layout = [TensorSpec(name, (tensor.shape[0], tensor.shape[1])) for name, tensor in tensors.items()]
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        return {name: torch.tensor([*_bytes_of(NOT_A_NUMBER), 0], dtype=torch.uint8) for name in tensors}
    most, turned = most_bytes(layout, codec), {name: turn(tensor) for name, tensor in tensors.items()}

    def is_too_large(entry_bytes: Mapping[str, int]) -> bool:
        return safetensors_bytes({n: ("U8", (size,)) for n, size in entry_bytes.items()}, {"codec": codec}) > most

    # Steps are the bf16 numbers between these two, as integers. At the coarser one every code is 0.
    largest = max((float(each.coefficients.abs().max()) for each in turned.values()), default=0.0)
    coarse = min(_nearest(largest) + 128, LARGEST)
    fine = max(coarse - 128 * (1 + OCTAVES), 0)
    while coarse - fine > 1:
        step = (coarse + fine) // 2
        if is_too_large({name: likely_bytes(each, _value(step)) for name, each in turned.items()}):
            fine = step
        else:
            coarse = step
    while True:
        coded = {name: _entry(coarse, each) for name, each in turned.items()}
        if coarse >= LARGEST or not is_too_large({name: entry.numel() for name, entry in coded.items()}):
            return coded
        coarse += 1


def turn(tensor: Tensor) -> Turned:
    """Turn a tensor to its principal directions, the largest first; its shorter side is that of its rank."""
    across = tensor if tensor.shape[0] <= tensor.shape[1] else tensor.T
    largest = across.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    normed = (across / largest).double()
    directions = torch.linalg.eigh(normed @ normed.T).eigenvectors.T.flip(0)
    # Either sign would do; which one comes differs between builds of LAPACK.
    directions = directions * directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).sign()
    return Turned((directions * UNIT).round().long(), (directions @ normed).float() * (largest / UNIT))


def likely_bytes(turned: Turned, scale: float) -> int:
    """Say how many bytes an entry of this scale will have, from its counts alone: as if its gaps were geometric."""
    rank = len(turned.directions)
    sizes = turned.codes(scale).abs_() + torch.arange(rank)[:, None] * (klt.MAX_CODE + 1)
    found = np.bincount(sizes.flatten().numpy(), minlength=rank * (klt.MAX_CODE + 1)).reshape(rank, -1)
    at_least = found[:, ::-1].cumsum(axis=1)[:, ::-1]
    of, size = at_least[:, :-1][at_least[:, 1:] > 0], at_least[:, 1:][at_least[:, 1:] > 0]
    num_directions = int((at_least[:, 1] > 0).sum())
    written = np.minimum(size, of - size)
    of, some = of[written > 0], written[written > 0]
    low = np.frexp(77 * (2 * of - some) // (320 * some))[1]  # the bit length, as Subset.low_bits has it
    stays = (1 - some / of) ** (1 << low)
    bits = at_least[:, 1].sum() + (some * (low + 1 / (1 - stays))).sum()
    counts = size.size + (size > 0x7F).sum() + (size > 0x3FFF).sum() + num_directions
    return int(3 + num_directions * rank + counts + bits / 8)


def _entry(step: int, turned: Turned) -> Tensor:
    """Write a tensor with the step of this bf16 number."""
    codes = turned.codes(_value(step)).numpy()
    used = codes.any(axis=1)
    counts, signs, low, gaps = bytearray(), [], [], []
    for row in codes[used]:
        members = np.abs(row)
        signs.append(row[members > 0] < 0)
        for size in range(1, int(members.max()) + 1):
            subset = Subset(int((members >= size).sum()), len(members))
            counts += klt.write_varint(subset.size)
            skipped = _gaps(members >= size, subset)
            low.append((skipped >> np.arange(subset.low_bits)[:, None]) & 1)
            gaps.append(_unary(skipped >> subset.low_bits))
            members = members[members >= size]
        counts += klt.write_varint(0) if int(np.abs(row).max()) < klt.MAX_CODE else b""
    bits = np.concatenate([np.ravel(part).astype(np.uint8) for part in (*signs, *low, *gaps, [])])
    directions = turned.directions.numpy()[used].astype(np.int8).tobytes()
    head = bytes([*_bytes_of(step), *klt.write_varint(int(used.sum())), *directions, *counts])
    return torch.frombuffer(bytearray(head + np.packbits(bits).tobytes()), dtype=torch.uint8)


def _gaps(is_member: NDArray[np.bool_], subset: Subset) -> Integers:
    """Count how many are skipped before each that is written."""
    return np.diff(np.flatnonzero(is_member != subset.is_complement), prepend=-1) - 1


def _unary(numbers: Integers) -> Bits:
    """Write each number as zeros, of which there are as many, and a one."""
    ends = (numbers + 1).cumsum()
    bits = np.zeros(int(ends[-1]) if ends.size else 0, dtype=np.uint8)
    bits[ends - 1] = 1
    return bits


# -- decoding -------------------------------------------------------------------------------------------


def decode(entry: Entry, shape: tuple[int, int]) -> Tensor:
    """Decode an entry that `klt.check` has let pass: fp32.

    The sum is exact whatever its order, so that all machines get the same bits.
    """
    rank, width = klt.sides(shape)
    bits = np.unpackbits(np.frombuffer(entry.bits, dtype=np.uint8))
    low_at, gaps_at = entry.num_signs, entry.num_signs + entry.num_low_bits
    ends = np.flatnonzero(bits[gaps_at:])
    zeros = np.diff(ends, prepend=-1) - 1
    codes = np.zeros((len(entry.subsets), width), dtype=np.float64)
    sign_at = done = 0
    for row, of_direction in zip(codes, entry.subsets, strict=True):
        members = np.arange(width)
        for subset in of_direction:
            count, low = subset.num_written, subset.low_bits
            planes = bits[low_at : low_at + count * low].reshape(low, count).astype(np.int64)
            skipped = (zeros[done : done + count] << low) + (planes << np.arange(low)[:, None]).sum(axis=0)
            is_member = np.full(subset.of, subset.is_complement)
            is_member[(skipped + 1).cumsum() - 1] = not subset.is_complement
            members = members[is_member]
            row[members] += 1
            low_at += count * low
            done += count
        num_signs = of_direction[0].size
        row[row > 0] *= 1.0 - 2.0 * bits[sign_at : sign_at + num_signs]
        sign_at += num_signs
    directions = np.frombuffer(entry.directions, dtype=np.int8).reshape(-1, rank).astype(np.float64)
    sums = torch.from_numpy((directions.T @ codes).astype(np.float32))
    scale = torch.frombuffer(bytearray(entry.scale), dtype=torch.bfloat16).float()
    values = sums * scale
    return values if shape[0] <= shape[1] else values.T.contiguous()


# -- bf16 numbers as integers ---------------------------------------------------------------------------


def _bytes_of(number: int) -> bytes:
    return number.to_bytes(2, "little")


def _value(number: int) -> float:
    return float(torch.tensor(number, dtype=torch.int16).view(torch.bfloat16))


def _nearest(value: float) -> int:
    return int(torch.tensor(value).bfloat16().view(torch.int16))
