"""Lay out a tensor of the codecs "klt" and "klt-fine", and check its bytes without decoding them. Standard library only.

An entry, of a tensor whose shorter side is R and whose longer side is N (docs/protocol.md (p5-klt)):

    scale       2 bytes      bf16
    K           varint       directions, at most R
    directions  K x R bytes  int8
    counts      varints      for each direction, how many of its N codes are at least 1, 2, ... in size, up to a 0
    bits        the rest     signs; then low bits, then gaps, of every subset in the order of the counts

The codes that are at least v + 1 are a subset of those that are at least v. Of a subset or its complement, whichever is
smaller, the gaps before each member are written as Golomb-Rice codes, whose parameter follows from the counts. So sums of
gaps are sums of single bits, which Python counts in C: whether an entry can be decoded is known without decoding it. What
its values are is left to `model/klt.py`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fedsoda_edge.errors import ProtocolViolation

# Bits a value, without what each tensor takes beside: the paper's adapter (LLaMA3-8B) is at most 64 kB and 150 kB.
BITS = {"klt": 0.35, "klt-fine": 0.87}
MAX_CODE = 127
TOO_LARGE = 2.0**111  # as `coded.check` has it: no value of a LoRA is that large
_FILE = 64  # bytes of a file beside its tensors: the header's length, its metadata, its padding
_ENTRY = 96  # bytes a tensor: the rest of its line in the header, scale, counts and the first codes
_MAX_VARINT_BYTES = 5


class Subset(NamedTuple):
    """Some members of a list: `size` of `of`. What is written is the smaller of the subset and its complement."""

    size: int
    of: int

    @property
    def is_complement(self) -> bool:
        """Whether the members that it lacks are written."""
        return 2 * self.size > self.of

    @property
    def num_written(self) -> int:
        """The number of gaps that are written."""
        return min(self.size, self.of - self.size)

    @property
    def low_bits(self) -> int:
        """The Rice parameter: the best one for gaps of a geometric distribution with this mean, in integers.

        Kiely, IPN Progress Report 42-159 (2004): 1 + floor(log2(log(0.618) / log(mean / (mean + 1)))), where the quotient
        is about 0.48125 (mean + 1/2).
        """
        written = self.num_written
        return (77 * (2 * self.of - written) // (320 * written)).bit_length() if written else 0


@dataclass(frozen=True)
class Entry:
    """A coded tensor, read as far as its bits.

    scale: bf16. directions: K x R int8. subsets: of each direction, ascending in the size of the codes.
    """

    scale: bytes
    directions: bytes
    subsets: tuple[tuple[Subset, ...], ...]
    bits: bytes

    @property
    def num_signs(self) -> int:
        """The number of codes that are not 0."""
        return sum(of_direction[0].size for of_direction in self.subsets)

    @property
    def num_low_bits(self) -> int:
        """The number of low bits of all gaps."""
        return sum(subset.num_written * subset.low_bits for subset in self.all_subsets)

    @property
    def all_subsets(self) -> Iterator[Subset]:
        """The subsets in the order in which their gaps are written."""
        return (subset for of_direction in self.subsets for subset in of_direction)


def sides(shape: tuple[int, int]) -> tuple[int, int]:
    """Return (R, N), the shorter and the longer side."""
    return min(shape), max(shape)


def most_bytes(shapes: Mapping[str, tuple[int, int]], codec: str) -> int:
    """Count the bytes that a file of tensors of these shapes may have, whatever their values are.

    Args:
        shapes: by the name of the tensor, as it is written in JSON.
    """
    beside = _FILE + sum(len(name.encode()) + _ENTRY + min(shape) for name, shape in shapes.items())
    return beside + math.ceil(BITS[codec] / 8 * sum(map(math.prod, shapes.values())))


def write_varint(value: int) -> bytes:
    """Write a number of at least 0, seven bits a byte, the lowest first (LEB128)."""
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)


def read(name: str, data: bytes | memoryview, shape: tuple[int, int]) -> Entry:
    """Read an entry as far as its bits.

    Raises:
        ProtocolViolation: it holds other numbers than a tensor of this shape can have.
    """
    rank, width = sides(shape)
    view, at = bytes(data), 2

    def number(most: int) -> int:
        nonlocal at
        value = 0
        for place in range(_MAX_VARINT_BYTES):
            if at >= len(view):
                raise ProtocolViolation(
                    f"{name} ends after {len(view)} bytes in the midst of its counts; send it again"
                )
            byte = view[at]
            at += 1
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                break
        if value > most:
            raise ProtocolViolation(
                f"{name} announces a count of {value} where at most {most} is possible; send it again"
            )
        return value

    num_directions = number(rank)
    directions = view[at : at + num_directions * rank]
    at += num_directions * rank
    subsets = []
    for _ in range(num_directions):
        of_direction: list[Subset] = []
        left = width
        while len(of_direction) < MAX_CODE and (size := number(left)):
            of_direction.append(Subset(size, left))
            left = size
        if not of_direction:
            raise ProtocolViolation(f"{name} has a direction without codes; upgrade: pip install -U fedsoda")
        subsets.append(tuple(of_direction))
    return Entry(view[:2], directions, tuple(subsets), view[at:])


def check(name: str, data: bytes | memoryview, shape: tuple[int, int]) -> Entry:
    """Check that an entry can be decoded to a tensor of this shape, and read it as far as its bits.

    Raises:
        ProtocolViolation: it cannot; says shortly what is wrong.
    """
    entry = read(name, data, shape)
    [scale] = struct.unpack("<f", b"\0\0" + entry.scale)
    if not abs(scale) * 128 * max(1, sum(map(len, entry.subsets))) < TOO_LARGE:
        raise ProtocolViolation(
            f"{name} has values that are not finite; lower [local] learning_rate, or check the data"
        )
    bits = bin(int.from_bytes(b"\1" + entry.bits, "big"))[3:]
    at, begin = entry.num_signs, entry.num_signs + entry.num_low_bits
    gaps = bits[begin:].split("1")  # the zeros before each one; behind the last one what fills up the last byte
    written = sum(subset.num_written for subset in entry.all_subsets)
    if begin > len(bits) or len(gaps) - 1 != written or len(gaps[-1]) >= 8:
        raise ProtocolViolation(
            f"{name} has {len(bits)} bits with {len(gaps) - 1} gaps, its counts say {begin} and {written} gaps; send it again"
        )
    done = 0
    for subset in entry.all_subsets:
        count, low = subset.num_written, subset.low_bits
        high = sum(map(len, gaps[done : done + count]))
        reach = count + (high << low) + _sum_of_planes(bits[at : at + count * low], count)
        if reach > subset.of:
            raise ProtocolViolation(f"{name} has a code at place {reach} of {subset.of}; send it again")
        done += count
        at += count * low
    return entry


def _sum_of_planes(planes: str, count: int) -> int:
    """Add up numbers that are written in planes of `count` bits, the lowest bits of all first."""
    return sum(planes.count("1", at, at + count) << place for place, at in enumerate(range(0, len(planes), count or 1)))
