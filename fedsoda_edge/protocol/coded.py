"""Check a coded update before anyone decodes it: names, sizes, finite scales. Standard library only.

The listener runs this in a process without torch; coding and decoding values is left to `model/delta.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from fedsoda_edge.errors import ProtocolViolation
from fedsoda_edge.protocol import klt
from fedsoda_edge.protocol.manifest import TensorSpec
from fedsoda_edge.protocol.messages import Factor

# Deltas with error feedback; nf4-weight codes whole weights without it, as the paper writes, for comparison.
Codec = Literal["nf4", "int8", "bf16", "klt", "klt-fine", "nf4-weight"]
CODECS: tuple[str, ...] = get_args(Codec)
BLOCK = 64
MAX_HEADER_BYTES = 1 << 20  # safetensors itself would accept 100 MB
_WITHOUT_SIGN = bytes(byte & 0x7F for byte in range(256))
_TOO_LARGE = (111 + 127) >> 1  # upper seven bits of the exponent of 2^111: no value of a LoRA is that large


def is_of(factor: Factor, name: str) -> bool:
    """Tell whether this LoRA tensor trains where only this factor does."""
    return factor == "both" or name.endswith(f".lora_{factor}")


def of_factor(layout: Sequence[TensorSpec], factor: Factor) -> tuple[TensorSpec, ...]:
    """Select the tensors that travel where only this factor trains."""
    return tuple(spec for spec in layout if is_of(factor, spec.name))


def of_alignment(codec: str) -> str:
    """Return the codec of alignments in a run with this codec.

    What an alignment loses in coding is not sent later, and the numbers of a border map are of other sizes than those of
    LoRA: "klt", which needs both, is not for them.
    """
    return "nf4" if codec in klt.BITS else codec


def coded_bytes(shape: tuple[int, int], codec: str) -> int:
    """Count the bytes of one tensor's codes and scales; the codecs of `klt.BITS` have no fixed number."""
    size = shape[0] * shape[1]
    scales = 2 * math.ceil(size / BLOCK)
    if codec == "bf16":
        return 2 * size
    return scales + (size if codec == "int8" else (size + 1) // 2)


_DTYPE_BYTES = {"F32": 4, "I32": 4, "BF16": 2, "F16": 2, "U8": 1}  # in the order safetensors writes tensors


def tensor_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Count the bytes of tensors of these dtypes ("BF16", ...) and shapes."""
    return sum(_DTYPE_BYTES[dtype] * math.prod(shape) for dtype, shape in tensors.values())


def safetensors_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> int:
    """Count the bytes of the file that safetensors writes for tensors of these dtypes ("BF16", ...) and shapes."""
    order = list(_DTYPE_BYTES)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (order.index(item[1][0]), item[0])):
        size = _DTYPE_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + math.ceil(length / 8) * 8 + end


def most_bytes(layout: Sequence[TensorSpec], codec: str) -> int:
    """Count the bytes that a coded update of this layout has at most; only those of `klt.BITS` may have fewer."""
    if codec in klt.BITS:
        return klt.most_bytes({json.dumps(spec.name, ensure_ascii=False): spec.shape for spec in layout}, codec)
    sizes = {spec.name: ("U8", (coded_bytes(spec.shape, codec),)) for spec in layout}
    return safetensors_bytes(sizes, {"codec": codec})


def check(data: bytes | memoryview, layout: Sequence[TensorSpec], codec: str) -> None:
    """Check that `data` is exactly a coded update of this layout with finite values.

    Raises:
        ProtocolViolation: `data` is anything else; says shortly what differs, with both values.
    """
    view = memoryview(data)
    if codec not in CODECS:
        raise ProtocolViolation(f"the codec {codec!r} is not known; these are: {', '.join(CODECS)}")
    length = int.from_bytes(view[:8], "little")
    if len(view) < 8 or length > min(MAX_HEADER_BYTES, len(view) - 8):
        raise ProtocolViolation(
            f"an update of {len(view)} bytes announces a header of {length} bytes, so it is damaged; send it again"
        )
    try:
        header = json.loads(bytes(view[8 : 8 + length]))
        metadata = header.pop("__metadata__")
        entries = {name: (entry["dtype"], entry["shape"], entry["data_offsets"]) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ProtocolViolation(
            f"the update's header is not one that safetensors writes ({error!s:.200}); send it again"
        ) from error
    if metadata != {"codec": codec}:
        raise ProtocolViolation(f"the update says {metadata!r:.80}, the run's codec is {codec!r}; join again")
    wanted = {spec.name for spec in layout}
    if set(entries) != wanted:
        odd = sorted(set(entries) ^ wanted)
        raise ProtocolViolation(
            f"the update has {len(entries)} tensors, the run has {len(wanted)}; the first that differs is {odd[0]!r:.200}"
        )
    body = view[8 + length :]
    ordered = sorted(layout, key=lambda spec: spec.name)
    if codec in klt.BITS:
        sizes = [_announced(entries[spec.name][1]) for spec in ordered]
        most = most_bytes(layout, codec)
        if len(view) > most:
            raise ProtocolViolation(f"the update has {len(view)} bytes, and at most {most} are allowed; send it again")
    else:
        sizes = [coded_bytes(spec.shape, codec) for spec in ordered]
    if sum(sizes) != len(body):
        raise ProtocolViolation(f"the update has {len(body)} bytes of tensors, the run needs {sum(sizes)}")
    end = 0
    for spec, size in zip(ordered, sizes, strict=True):
        if entries[spec.name] != ("U8", [size], [end, end + size]):
            raise ProtocolViolation(
                f"{spec.name} is {entries[spec.name]!r:.200} in the update, the run needs {size} bytes at {end}"
            )
        if codec in klt.BITS:
            klt.check(spec.name, body[end : end + size], spec.shape)
        else:
            numbers = 2 * math.ceil(spec.shape[0] * spec.shape[1] / BLOCK) if codec != "bf16" else size
            _check_finite(spec.name, body[end + size - numbers : end + size])
        end += size
    # json.loads also reads UTF-16, 5.0 for 5 and repeated keys, on which safetensors' own parser fails later.
    if bytes(view[8 : 8 + length]).rstrip(b" ") != _canonical_header([spec.name for spec in ordered], sizes, codec):
        raise ProtocolViolation(
            "the update's header is not written exactly as safetensors writes it; upgrade: pip install -U fedsoda"
        )


def _announced(shape: object) -> int:
    """Read the size of an entry that may have any; what is not a size gives -1, which fits nothing."""
    size = shape[0] if isinstance(shape, list) and len(shape) == 1 else None
    return size if isinstance(size, int) and size >= 0 else -1


def _canonical_header(names: Sequence[str], sizes: Sequence[int], codec: str) -> bytes:
    """Write the one header that `delta.encode` gives for entries of these sizes, without its padding."""
    header: dict[str, object] = {"__metadata__": {"codec": codec}}
    end = 0
    for name, size in zip(names, sizes, strict=True):
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


def _check_finite(name: str, bf16: memoryview) -> None:
    """Refuse NaN, infinity and values of 2^111 or more: 127 times a large int8 scale is infinite, and a sum may be too."""
    high = bytes(bf16)[1::2].translate(_WITHOUT_SIGN)  # sign and seven of eight exponent bits; no loop in Python
    if high and max(high) >= _TOO_LARGE:
        raise ProtocolViolation(
            f"{name} has values that are not finite; lower [local] learning_rate, or check the data"
        )
