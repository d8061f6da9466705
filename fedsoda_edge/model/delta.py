"""Code LoRA deltas for the wire, with error feedback, and move views by them: docs/protocol.md (p4-views).

    down  c = Q(w - v), v += decode(c)          w - v is the whole downlink error feedback
    up    u = Q(delta + e), e' = delta + e - decode(u)

decode is one fp32 multiplication per value on the CPU, so both sides get the same bits. A layout may hold one factor
only, where the other one stays (FFA-LoRA, RoLoRA).

The codec "nf4-weight" is the paper's literal one, for comparison: whole weights in NF4 in both directions, without
feedback. A round's step is mostly smaller than half a code of the weight to which it belongs, and is lost. When each
step happens is left to the rounds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedsoda_edge.errors import ProtocolViolation
from fedsoda_edge.model import klt
from fedsoda_edge.model.nf4 import codebook
from fedsoda_edge.protocol.coded import BLOCK, check
from fedsoda_edge.protocol.klt import BITS, read
from fedsoda_edge.protocol.manifest import TensorSpec
from fedsoda_edge.units import one_line

LoRATensors = dict[str, Tensor]


def encode(tensors: Mapping[str, Tensor], codec: str) -> bytes:
    """Code fp32 tensors one by one: safetensors with one uint8 entry each, codes first, then block scales.

    Blocks of 64 run over the flattened tensor. int8: value = q * scale, scale = absmax / 127 rounded up to
    bf16, so no code clips and the product is exact in fp32. nf4: value = codebook[q] * absmax in bf16, two
    codes a byte. bf16: the values themselves. klt: `klt.py`.
    """
    flat = {name: tensor.detach().float().cpu() for name, tensor in sorted(tensors.items())}
    if codec in BITS:
        return save(klt.encode(flat, codec), {"codec": codec})
    return save({name: _encode_tensor(tensor.flatten(), codec) for name, tensor in flat.items()}, {"codec": codec})


def decode(data: bytes, layout: Sequence[TensorSpec], codec: str, only: Collection[str] | None = None) -> LoRATensors:
    """Decode what `encode` wrote to fp32 tensors, by name.

    Args:
        only: names of the tensors to decode; None: all of the layout.

    Raises:
        ProtocolViolation: names, sizes or scales are not those of the layout (protocol/coded.py).
    """
    check(data, layout, codec)
    coded = load(data)
    wanted = [spec for spec in layout if only is None or spec.name in only]
    if codec in BITS:
        entries = {spec: read(spec.name, coded[spec.name].numpy().tobytes(), spec.shape) for spec in wanted}
        return {spec.name: klt.decode(entry, spec.shape) for spec, entry in entries.items()}
    return {spec.name: _decode_tensor(coded[spec.name], spec.shape, codec) for spec in wanted}


def _bytes_of_bf16(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8).flatten()


def _round_up_to_bf16(values: Tensor) -> Tensor:
    """Round each non-negative fp32 value up to the next bf16: a scale rounded down would clip its block's extremes."""
    near = values.bfloat16()
    bits = near.view(torch.int16) + (near.float() < values).to(torch.int16)
    return bits.view(torch.bfloat16)


def _encode_tensor(flat: Tensor, codec: str) -> Tensor:
    if codec == "bf16":
        return _bytes_of_bf16(flat.bfloat16())
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).reshape(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scale = _round_up_to_bf16(absmax / 127 if codec == "int8" else absmax)
    divisor = scale.float().clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    if codec == "int8":
        codes = (blocks / divisor).round().clamp(-127, 127).to(torch.int8).view(torch.uint8)
        packed = codes.flatten()[: flat.numel()]
    else:
        table = codebook()
        index = torch.bucketize(blocks / divisor, (table[1:] + table[:-1]) / 2).to(torch.uint8).flatten()
        index = torch.nn.functional.pad(index[: flat.numel()], (0, flat.numel() % 2)).reshape(-1, 2)
        packed = (index[:, 0] << 4) | index[:, 1]
    return torch.cat([packed, _bytes_of_bf16(scale)])


def _decode_tensor(coded: Tensor, shape: tuple[int, int], codec: str) -> Tensor:
    size = shape[0] * shape[1]
    if codec == "bf16":
        return coded.clone().view(torch.bfloat16).float().reshape(shape)
    num_codes = size if codec == "int8" else (size + 1) // 2
    scale = coded[num_codes:].clone().view(torch.bfloat16).float()
    if codec == "int8":
        values = coded[:num_codes].clone().view(torch.int8).float()
    else:
        pairs = coded[:num_codes].long()
        values = codebook()[torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()[:size]]
    return (values * scale.repeat_interleave(BLOCK)[:size]).reshape(shape)


def encode_with_feedback(
    delta: Mapping[str, Tensor],
    residual: Mapping[str, Tensor] | None,
    view: Mapping[str, Tensor],
    layout: Sequence[TensorSpec],
    codec: str,
) -> tuple[bytes, LoRATensors]:
    """Code delta + residual, with EF21-style error feedback (arXiv 2106.05203).

    Args:
        delta: trained adapter LoRA minus the view, fp32.
        residual: e, what coding left over before; None: zero.
        view: the weights from which the delta starts; only the codec "nf4-weight" reads it.

    Returns:
        (u, e'): the coded update, and what coding left over now. The caller keeps e' once the update has its receipt,
        and e otherwise.
    """
    if codec == "nf4-weight":
        coded = encode({name: view[name] + value for name, value in delta.items()}, codec)
        return coded, {name: torch.zeros_like(value) for name, value in delta.items()}
    wanted = {name: value + residual[name] if residual else value.clone() for name, value in delta.items()}
    coded = encode(wanted, codec)
    sent = decode(coded, layout, codec)
    return coded, {name: wanted[name] - sent[name] for name in wanted}


def step_down(
    master: Mapping[str, Tensor], view: Mapping[str, Tensor], layout: Sequence[TensorSpec], codec: str
) -> tuple[bytes, LoRATensors]:
    """Code the step from the view towards the master: (c, the view after the step)."""
    names = [spec.name for spec in layout]
    lacking = {name: master[name] if codec == "nf4-weight" else master[name] - view[name] for name in names}
    coded = encode(lacking, codec)
    return coded, advance(view, coded, layout, codec)


def advance(view: Mapping[str, Tensor], coded: bytes, layout: Sequence[TensorSpec], codec: str) -> LoRATensors:
    """Move a view by a coded step, v + decode(c), to the same bits on both sides.

    Raises:
        ProtocolViolation: names, sizes or scales are not those of the layout.
    """
    return moved(view, decode(coded, layout, codec), codec)


def moved(weights: Mapping[str, Tensor], decoded: Mapping[str, Tensor], codec: str) -> LoRATensors:
    """Move weights by a decoded step, w + d; with the codec "nf4-weight" the step holds the new weights themselves.

    Weights that the step does not hold stay.
    """
    stepped = decoded if codec == "nf4-weight" else {name: weights[name] + value for name, value in decoded.items()}
    return {**weights, **stepped}


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Write canonical fp32 safetensors: equal tensors give equal bytes, and so equal digests."""
    return save({name: tensor.float().contiguous() for name, tensor in sorted(tensors.items())})


def from_bytes(data: bytes, layout: Sequence[TensorSpec]) -> LoRATensors:
    """Read what `to_bytes` wrote.

    Raises:
        ProtocolViolation: names, shapes or dtype are not those of the layout, or it is not safetensors.
    """
    try:
        tensors = load(data)
    except (
        SafetensorError,
        KeyError,
        ValueError,
        RuntimeError,
    ) as error:  # it has its digest, so the hub made it like this
        raise ProtocolViolation(
            f"a LoRA snapshot is not safetensors ({one_line(str(error), 200)}); ask the hub's owner"
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != {spec.name: spec.shape for spec in layout} or any(t.dtype != torch.float32 for t in tensors.values()):
        raise ProtocolViolation("a LoRA snapshot has other tensors than the manifest says; ask the hub's owner")
    return tensors


def layout_of(tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    """List names and shapes of these LoRA tensors, ascending by name."""
    return tuple(TensorSpec(name, (tensor.shape[0], tensor.shape[1])) for name, tensor in sorted(tensors.items()))


def feedback_of(data: bytes, layout: Sequence[TensorSpec]) -> LoRATensors:
    """Read error feedback that `to_bytes` wrote, for the tensors of this layout.

    It may come from a sub-LLM with other layers: tensors outside the layout are dropped, missing ones are zero.
    """
    held = load(data)
    return {
        spec.name: held[spec.name]
        if spec.name in held and held[spec.name].shape == spec.shape
        else torch.zeros(spec.shape)
        for spec in layout
    }


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Compute a view's identity: the sha256 of its canonical bytes."""
    return hashlib.sha256(to_bytes(tensors)).hexdigest()
