"""Less than a bit a value: as few bytes as promised, the values that the bytes say, nothing lost, nothing malformed read."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Iterator, Mapping
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from fedsoda_edge.errors import ProtocolViolation
from fedsoda_edge.model import delta, klt
from fedsoda_edge.protocol import klt as form
from fedsoda_edge.protocol.coded import check, most_bytes, of_factor
from fedsoda_edge.protocol.klt import BITS, MAX_CODE, Subset
from fedsoda_edge.protocol.manifest import TensorSpec
from fedsoda_edge.protocol.messages import Factor

LAYOUT = (TensorSpec("layers.6.a.lora_A", (4, 330)), TensorSpec("layers.6.a.lora_B", (170, 4)))
PAPER = tuple(
    TensorSpec(f"layers.{layer}.{module}.lora_{factor}", (8, wide) if factor == "A" else (high, 8))
    for layer in (29, 30, 31)
    for module, (wide, high) in {
        "mlp.down_proj": (14336, 4096),
        "mlp.up_proj": (4096, 14336),
        "self_attn.k_proj": (4096, 1024),
        "self_attn.q_proj": (4096, 4096),
        "self_attn.v_proj": (4096, 1024),
    }.items()
    for factor in "AB"
)
# Lengths of a delta in its principal directions, as SmolLM2-135M's deltas of a round have them.
LENGTHS = (0.81, 0.4, 0.28, 0.2, 0.16, 0.13, 0.11, 0.08)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(spec: TensorSpec, seed: int, scale: float = 1e-3, heavy: bool = True) -> Tensor:
    """Draw a delta that lies mostly in few directions, as training leaves it; heavy: by Student's t of 3 degrees."""
    rank, width = sorted(spec.shape)
    generator = seeded(seed)
    drawn = torch.randn(rank, width, generator=generator)
    if heavy:
        drawn /= torch.randn(rank, width, 3, generator=generator).square().mean(dim=2).sqrt()
    turned = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q @ (
        torch.tensor(LENGTHS)[:rank, None] * drawn
    )
    return scale * (turned if spec.shape[0] == rank else turned.T.contiguous())


def deltas(layout: tuple[TensorSpec, ...], seed: int, scale: float = 1e-3) -> dict[str, Tensor]:
    return {spec.name: trained(spec, 100 * seed + number, scale) for number, spec in enumerate(layout)}


def lost(made: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The part of the squared length that is lost."""
    return sum(float((made[n] - wanted[n]).square().sum()) for n in wanted) / sum(
        float(value.square().sum()) for value in wanted.values()
    )


RECORDED = """
343c025c57a95c261e1614100c080705 02003625160800ccc999599955556ab5 5aaaa2afb208562a1e542005b6860952
a52a54a14a9536f4c697adb09bfc9999 296d6b5a4f1823063eada0
"""
RECORDED_VALUES = [
    [-13.9306640625, 0.0, -0.164794921875, 0.054931640625, 1.91162109375, 3.14208984375],
    [-5.51513671875, 0.0, -5.899658203125, 1.966552734375, -2.021484375, 6.800537109375],
]


# -- what the bytes say ---------------------------------------------------------------------------------


def read_slowly(entry: bytes, shape: tuple[int, int]) -> list[list[Fraction]]:
    """Decode an entry bit by bit, as docs/protocol.md (p5-klt) says it, in exact numbers: (R, N)."""
    rank, width = min(shape), max(shape)
    scale = Fraction(struct.unpack("<f", b"\0\0" + entry[:2])[0])
    numbers = iter(entry[2:])

    def varint() -> int:
        value, place = 0, 0
        for byte in numbers:
            value += (byte % 128) << place
            place += 7
            if byte < 128:
                break
        return value

    directions = [[struct.unpack("b", bytes([next(numbers)]))[0] for _ in range(rank)] for _ in range(varint())]
    levels: list[list[int]] = []
    for _ in directions:
        levels.append([])
        while len(levels[-1]) < MAX_CODE and (count := varint()):
            levels[-1].append(count)
    bits = [byte >> 7 - place & 1 for byte in numbers for place in range(8)]
    signs, low = [], []
    written: list[tuple[int, int, int]] = []  # of each subset: members of what, gaps, low bits
    for counts in levels:
        for of, size in zip([width, *counts], counts, strict=False):
            gaps = min(size, of - size)
            long = Fraction(77, 160) * (Fraction(of, gaps) - Fraction(1, 2)) if gaps else 0
            written.append((of, gaps, int(long).bit_length()))
    at = 0
    for counts in levels:
        signs.append(bits[at : at + counts[0]])
        at += counts[0]
    for _, gaps, places in written:
        planes = [bits[at + place * gaps : at + (place + 1) * gaps] for place in range(places)]
        low.append([sum(plane[number] << place for place, plane in enumerate(planes)) for number in range(gaps)])
        at += gaps * places
    rest = iter(bits[at:])
    codes = []
    subsets = iter(zip(written, low, strict=True))
    for counts, of_direction in zip(levels, signs, strict=True):
        row, members = [0] * width, list(range(width))
        for size in counts:
            (of, gaps, places), lows = next(subsets)
            place, found = -1, set()
            for number in range(gaps):
                gap = 0
                while not next(rest):
                    gap += 1
                place += 1 + (gap << places) + lows[number]
                found.add(place)
            if 2 * size > of:
                found = set(range(of)) - found
            members = [member for number, member in enumerate(members) if number in found]
            assert len(members) == size
            for member in members:
                row[member] += 1
        negative = iter(of_direction)
        codes.append([-code if code and next(negative) else code for code in row])
    assert not any(rest)
    return [
        [scale * sum(directions[j][i] * codes[j][n] for j in range(len(directions))) for n in range(width)]
        for i in range(rank)
    ]


def entries(data: bytes) -> dict[str, bytes]:
    return {name: entry.numpy().tobytes() for name, entry in load(data).items()}


@pytest.mark.parametrize("codec", BITS)
@given(
    seed=st.integers(0, 999),
    rank=st.integers(1, 6),
    width=st.integers(6, 120),
    kind=st.sampled_from(["trained", "white", "equal", "one", "zero"]),
    is_turned=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_bytes_mean_what_the_page_says(
    codec: str, seed: int, rank: int, width: int, kind: str, is_turned: bool
) -> None:
    spec = TensorSpec("t", (rank, width) if is_turned else (width, rank))
    value = {
        "trained": trained(spec, seed),
        "white": torch.randn(spec.shape, generator=seeded(seed)),
        "equal": torch.ones(spec.shape),
        "one": torch.zeros(spec.shape).index_fill_(0, torch.tensor([seed % spec.shape[0]]), 3.0),
        "zero": torch.zeros(spec.shape),
    }[kind]
    data = delta.encode({"t": value}, codec)
    check(data, (spec,), codec)
    made = delta.decode(data, (spec,), codec)["t"]
    exact = read_slowly(entries(data)["t"], spec.shape)
    across = made if spec.shape[0] == rank else made.T
    for row, expected in zip(across.tolist(), exact, strict=True):
        assert row == [float(np.float32(float(number))) for number in expected]


def test_recorded_bytes_are_read_and_written_as_they_were() -> None:
    spec, at = TensorSpec("t", (2, 64)), torch.arange(64.0)
    long, short = (at * 37 % 64 - 31.5) ** 3 / 3000, (at * 29 % 64 - 31.5) / 8
    wanted = torch.stack([long + short, long - short]).round()
    data = delta.encode({"t": wanted}, "klt")
    assert entries(data)["t"].hex(" ", -16).split() == RECORDED.split()
    made = delta.decode(data, (spec,), "klt")["t"]
    assert wanted[:, :6].tolist() == [[-14, 0, 0, 0, 2, 4], [-6, 0, -7, 2, -3, 7]]
    assert made[:, :6].tolist() == RECORDED_VALUES


@pytest.mark.parametrize("of", [2, 7, 100, 4096])
def test_low_bits_are_the_best_for_geometric_gaps(of: int) -> None:
    for size in range(1, of // 2 + 1, max(1, of // 50)):
        stays = 1 - size / of

        def bits(low: int, stays: float = stays) -> float:
            ends = stays ** (2**low)
            return low + 1 / (1 - ends)

        assert bits(Subset(size, of).low_bits) <= 1.005 * min(map(bits, range(16)))
        assert Subset(of - size, of).low_bits == Subset(size, of).low_bits


# -- how many bytes, and what they bring ----------------------------------------------------------------


@pytest.mark.parametrize(("codec", "promised", "error"), [("klt", 64_000, 0.31), ("klt-fine", 150_000, 0.13)])
def test_the_papers_adapter_with_heavy_tails_fits_into_what_is_promised(
    codec: str, promised: int, error: float
) -> None:
    assert sum(math.prod(spec.shape) for spec in PAPER) == 1_327_104
    wanted = deltas(PAPER, 0)
    data = delta.encode(wanted, codec)
    assert 0.97 * most_bytes(PAPER, codec) <= len(data) <= most_bytes(PAPER, codec) <= promised
    assert lost(delta.decode(data, PAPER, codec), wanted) < error


@pytest.mark.parametrize("codec", BITS)
@given(
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.0, 1e-42, 1e-20, 1e-4, 1.0, 1e28]),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 70)),
    tail=st.sampled_from([0.0, 1e4]),
)
@settings(max_examples=25, deadline=None)
def test_no_delta_takes_more_and_none_comes_out_longer(
    codec: str, seed: int, scale: float, shape: tuple[int, int], tail: float
) -> None:
    layout = (TensorSpec("t", shape),)
    value = torch.randn(shape, generator=seeded(seed)) * scale
    value[0, 0] += tail * scale
    data = delta.encode({"t": value}, codec)
    check(data, layout, codec)
    assert len(data) <= most_bytes(layout, codec)
    made = delta.decode(data, layout, codec)["t"]
    assert float((made - value).double().norm()) <= 1.02 * float(value.double().norm()) + 1e-38


def test_directions_bring_more_than_half_as_many_bytes_again() -> None:
    """Beside what the largest values lose, with exact sizes for nothing and ideal bits for places and signs."""
    wanted = {spec.name: trained(spec, number, heavy=False) for number, spec in enumerate(PAPER[:10])}
    data = delta.encode(wanted, "klt")
    made = lost(delta.decode(data, PAPER[:10], "klt"), wanted)
    flat = torch.cat([value.flatten() for value in wanted.values()]).abs()

    def top(bits: float) -> float:
        share = next(p / 1000 for p in range(1, 500) if _entropy(p / 1000) + p / 1000 > bits)
        return float(1 - flat.topk(int(share * len(flat))).values.square().sum() / flat.square().sum())

    assert made < top(1.5 * 8 * len(data) / len(flat))


def _entropy(p: float) -> float:
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


# -- error feedback -------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", BITS)
@pytest.mark.parametrize("factor", ["both", "B"])
def test_what_was_sent_and_what_is_left_is_what_was_trained(codec: str, factor: Factor) -> None:
    layout = of_factor(LAYOUT, factor)
    residual: dict[str, Tensor] | None = None
    sent, true = ({spec.name: torch.zeros(spec.shape, dtype=torch.float64) for spec in layout} for _ in range(2))
    left, lengths = [], []
    for step in range(30):
        update = deltas(layout, step)
        coded, residual = delta.encode_with_feedback(update, residual, {}, layout, codec)
        for name, value in delta.decode(coded, layout, codec).items():
            sent[name] += value
            true[name] += update[name]
        for name in true:
            torch.testing.assert_close(sent[name] + residual[name], true[name], rtol=1e-5, atol=1e-8)
        left.append(math.sqrt(sum(float(value.square().sum()) for value in residual.values())))
        lengths.append(math.sqrt(sum(float(value.square().sum()) for value in update.values())))
    assert max(left[10:]) < {"klt": 4, "klt-fine": 1.5}[codec] * sum(lengths) / 30  # it delays, and does not pile up


@pytest.mark.parametrize("codec", BITS)
def test_a_view_follows_the_master_and_a_latecomers_is_the_same(codec: str) -> None:
    master, view = deltas(LAYOUT, 0, 0.1), deltas(LAYOUT, 0, 0.1)
    follower = dict(view)
    for step in range(8):
        master = {name: value + deltas(LAYOUT, step + 1)[name] for name, value in master.items()}
        coded, view = delta.step_down(master, view, LAYOUT, codec)
        follower = delta.advance(follower, coded, LAYOUT, codec)
    behind = [lag(master, view)]
    for _ in range(12):  # nothing new comes: what was left over comes along
        coded, view = delta.step_down(master, view, LAYOUT, codec)
        follower = delta.advance(follower, coded, LAYOUT, codec)
        behind.append(lag(master, view))
    assert delta.digest(follower) == delta.digest(view)
    assert behind == sorted(behind, reverse=True)
    assert behind[-1] < 0.3 * behind[0]


def lag(master: Mapping[str, Tensor], view: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float((master[name] - view[name]).square().sum()) for name in view))


# -- what is malformed ----------------------------------------------------------------------------------


def written(changed: Mapping[str, bytes], codec: str) -> bytes:
    tensors = {name: torch.tensor(list(entry), dtype=torch.uint8) for name, entry in changed.items()}
    return save(tensors, {"codec": codec})


def mutations(entry: bytes, chance: random.Random) -> Iterator[bytes]:
    for size in range(1, len(entry)):
        yield entry[:size]
    for at in range(len(entry)):
        yield entry[:at] + bytes([entry[at] ^ 1 << chance.randrange(8)]) + entry[at + 1 :]
        yield entry[:at] + chance.randbytes(chance.randrange(1, 9)) + entry[at + chance.randrange(9) :]
    for _ in range(200):
        yield chance.randbytes(chance.randrange(1, 40))


@pytest.mark.parametrize("codec", BITS)
def test_a_changed_entry_is_refused_in_a_sentence_or_read_as_a_tensor_of_its_shape(codec: str) -> None:
    spec = LAYOUT[0]
    [good] = entries(delta.encode({spec.name: trained(spec, 5)}, codec)).values()
    refused: list[str] = []
    for bad in mutations(good, random.Random(0)):
        data = written({spec.name: bad}, codec)
        try:
            check(data, (spec,), codec)
        except ProtocolViolation as error:
            refused.append(str(error))
        else:
            made = delta.decode(data, (spec,), codec)[spec.name]
            assert made.shape == spec.shape
            assert bool(made.isfinite().all())
    assert len(refused) > 1.5 * len(good)
    assert max(map(len, refused)) < 500
    for size in range(len(good)):  # one that ends too early is refused in every case
        with pytest.raises(ProtocolViolation):
            check(written({spec.name: good[:size]}, codec), (spec,), codec)


SCALE, ROW = b"\x00\x3c", bytes(4)  # 2^-7; a direction of LAYOUT[0]
EVERY = b"\xca\x02"  # 330


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        (b"", "in the midst of its counts"),
        (b"\x80\x7f\x00", r"values that are not finite; lower \[local\] learning_rate"),
        (b"\xc0\x7f\x00", "values that are not finite"),
        (b"\xff\x7e\x01" + ROW + b"\x01\x00\x00\x40", "values that are not finite"),
        (SCALE + b"\x05" + ROW * 5, "a count of 5 where at most 4 is possible"),
        (SCALE + b"\xff" * 9, "a count of 34359738367 where at most 4 is possible"),
        (SCALE + b"\x02" + ROW, "in the midst of its counts"),
        (SCALE + b"\x01" + ROW + b"\x00", "a direction without codes"),
        (SCALE + b"\x01" + ROW + b"\xcb\x02\x00", "a count of 331 where at most 330"),
        (SCALE + b"\x01" + ROW + b"\x02\x03\x00", "a count of 3 where at most 2"),
        (SCALE + b"\x00\x00", "8 bits with 0 gaps, its counts say 0 and 0 gaps"),
        (SCALE + b"\x01" + ROW + b"\x01\x00", "0 bits with 0 gaps, its counts say 9 and 1 gaps"),
        (SCALE + b"\x01" + ROW + b"\x01\x00\x00\x40\x80", "24 bits with 2 gaps, its counts say 9 and 1 gaps"),
        (SCALE + b"\x01" + ROW + b"\x01\x00\x00\x08", "a code at place"),
    ],
)
def test_what_is_wrong_with_an_entry_is_said(entry: bytes, sentence: str) -> None:
    with pytest.raises(ProtocolViolation, match=sentence):
        check(written({"layers.6.a.lora_A": entry}, "klt"), LAYOUT[:1], "klt")


def test_the_most_that_few_bytes_can_ask_for_is_bounded_by_the_layout() -> None:
    """Every code of every direction as large as can be: two bytes a size, and no bits but the signs."""
    entry = SCALE + b"\x04" + b"\x7f" * 16 + EVERY * MAX_CODE * 4 + bytes(4 * 42)
    data = written({LAYOUT[0].name: entry}, "klt-fine")
    with pytest.raises(ProtocolViolation, match=r"the update has \d+ bytes, and at most \d+ are allowed"):
        check(data, LAYOUT[:1], "klt-fine")
    of_one = SCALE + b"\x01" + b"\x7f" * 4 + EVERY * MAX_CODE + bytes(42)
    made = klt.decode(form.check("t", of_one, LAYOUT[0].shape), LAYOUT[0].shape)
    assert made.unique().tolist() == [127 * 127 / 128]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_values_that_are_not_finite_are_refused_as_those_of_the_other_codecs(bad: float) -> None:
    value = deltas(LAYOUT, 0)
    value[LAYOUT[0].name][1, 7] = bad
    with pytest.raises(ProtocolViolation, match=r"has values that are not finite; lower \[local\] learning_rate"):
        check(delta.encode(value, "klt"), LAYOUT, "klt")
