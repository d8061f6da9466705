"""Deltas on the wire: nothing is lost for good, both sides get the same bits, and nothing malformed passes."""

from __future__ import annotations

import json
import random
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsoda_edge.errors import ProtocolViolation
from fedsoda_edge.model import delta
from fedsoda_edge.protocol.coded import CODECS, check, coded_bytes, of_factor
from fedsoda_edge.protocol.manifest import TensorSpec
from fedsoda_hub.algorithms.aggregation.weighted_mean import CodedUpdate, weighted_mean

LAYOUT = (TensorSpec("layers.6.a.lora_A", (4, 33)), TensorSpec("layers.6.a.lora_B", (17, 4)))
FEEDBACK = ("nf4", "int8", "bf16")
STEP = {
    "bf16": 2**-8,
    "int8": 1.02 / 127,
    "nf4": 0.17,
    "nf4-weight": 0.17,
}  # largest error of a block, in units of its absmax


def tensors(seed: int, scale: float = 1e-3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {spec.name: torch.randn(spec.shape, generator=generator) * scale for spec in LAYOUT}


@pytest.mark.parametrize("codec", STEP)  # of "klt": test_klt.py
@given(
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.0, 1e-42, 1e-20, 1e-4, 1.0, 1e30]),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 70)),
)
@settings(max_examples=40, deadline=None)
def test_a_round_trip_is_within_one_step(codec: str, seed: int, scale: float, shape: tuple[int, int]) -> None:
    layout = (TensorSpec("t", shape),)
    value = {"t": torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale}
    coded = delta.encode(value, codec)
    check(coded, layout, codec)
    again = delta.decode(coded, layout, codec)["t"]
    bound = STEP[codec] * float(value["t"].abs().max()) + 1e-40
    assert float((again - value["t"]).abs().max()) <= bound
    assert torch.equal(delta.decode(delta.encode(value, codec), layout, codec)["t"], again)


@pytest.mark.parametrize("codec", FEEDBACK)
def test_error_feedback_delays_but_loses_nothing(codec: str) -> None:
    residual: dict[str, torch.Tensor] | None = None
    view = tensors(99)
    true = {spec.name: torch.zeros(spec.shape) for spec in LAYOUT}
    sent = {spec.name: torch.zeros(spec.shape) for spec in LAYOUT}
    for step in range(50):
        update = tensors(step)
        coded, residual = delta.encode_with_feedback(update, residual, view, LAYOUT, codec)
        for name, value in delta.decode(coded, LAYOUT, codec).items():
            sent[name] += value
            true[name] += update[name]
    for name in true:
        assert float((true[name] - sent[name]).abs().max()) <= 2 * STEP[codec] * 5e-3 + 1e-6


@pytest.mark.parametrize("codec", CODECS)
def test_an_edge_that_joins_late_by_snapshot_has_the_same_bits(codec: str) -> None:
    master, view = tensors(0, 0.1), tensors(1, 0.1)
    follower = dict(view)
    for step in range(6):
        master = {name: value + tensors(step + 2)[name] for name, value in master.items()}
        coded, view = delta.step_down(master, view, LAYOUT, codec)
        follower = delta.advance(follower, coded, LAYOUT, codec)
    late = delta.from_bytes(delta.to_bytes(view), LAYOUT)
    assert delta.digest(follower) == delta.digest(view) == delta.digest(late)
    for name in view:
        bound = STEP[codec] * float(master[name].abs().max()) if codec == "nf4-weight" else 0.05
        assert float((master[name] - view[name]).abs().max()) <= bound


@pytest.mark.parametrize("codec", CODECS)
def test_a_step_of_one_factor_leaves_the_bits_of_the_other_and_is_no_step_of_both(codec: str) -> None:
    master, view = tensors(0, 0.1), tensors(1, 0.1)
    half = of_factor(LAYOUT, "B")
    coded, after = delta.step_down(master, view, half, codec)
    assert [spec.name for spec in half] == ["layers.6.a.lora_B"]
    assert list(delta.decode(coded, half, codec)) == ["layers.6.a.lora_B"]
    assert torch.equal(after["layers.6.a.lora_A"], view["layers.6.a.lora_A"])
    assert not torch.equal(after["layers.6.a.lora_B"], view["layers.6.a.lora_B"])
    for layout in (LAYOUT, of_factor(LAYOUT, "A")):
        with pytest.raises(ProtocolViolation, match="the first that differs"):
            check(coded, layout, codec)


@pytest.mark.parametrize(
    "header",
    [
        {"__metadata__": {"codec": "x" * 100_000}},
        {"__metadata__": {"codec": "int8"}, "x" * 100_000: {"dtype": "U8", "shape": [], "data_offsets": []}},
        {
            "__metadata__": {"codec": "int8"},
            **{spec.name: {"dtype": "U8", "shape": [1] * 100_000, "data_offsets": []} for spec in LAYOUT},
        },
    ],
    ids=["codec", "name", "shape"],
)
def test_what_is_wrong_with_an_update_is_said_shortly_however_long_it_is(header: dict[str, Any]) -> None:
    """The sentence goes to the edge as a message, and messages are small."""
    text = json.dumps(header).encode()
    body = bytes(sum(coded_bytes(spec.shape, "int8") for spec in LAYOUT))
    with pytest.raises(ProtocolViolation) as refused:
        check(len(text).to_bytes(8, "little") + text + body, LAYOUT, "int8")
    assert len(str(refused.value)) < 500


def test_whole_weights_in_nf4_lose_a_step_that_deltas_in_nf4_deliver() -> None:
    """Why the paper's literal coding is an option and not the default."""
    view = delta.decode(delta.encode(tensors(0, 1.0), "nf4"), LAYOUT, "nf4")  # what an edge holds: coded already
    step = {name: value.clamp(-2e-3, 2e-3) for name, value in tensors(1).items()}
    arrived = {}
    for codec in ("nf4", "nf4-weight"):
        coded, _ = delta.encode_with_feedback(step, None, view, LAYOUT, codec)
        updates = [CodedUpdate("a", 1, partial(bytes, coded), view, LAYOUT)]
        after = delta.moved(view, weighted_mean(updates, codec, max_weight=3.0), codec)
        arrived[codec] = sum(float(((after[n] - view[n]) * step[n]).sum()) for n in view)
    norm = sum(float(value.square().sum()) for value in step.values())
    assert arrived["nf4"] == pytest.approx(norm, rel=0.05)
    assert abs(arrived["nf4-weight"]) < 0.3 * norm


def test_feedback_stays_with_the_layers_that_stay() -> None:
    held = tensors(3)
    data = delta.to_bytes({**held, "layers.9.a.lora_A": torch.ones(2, 2)})
    wider = TensorSpec(LAYOUT[0].name, (LAYOUT[0].shape[0] + 1, LAYOUT[0].shape[1]))
    layout = (*LAYOUT[1:], wider, TensorSpec("layers.8.a.lora_A", (2, 3)))
    kept = delta.feedback_of(data, layout)
    assert delta.layout_of(kept) == tuple(sorted(layout, key=lambda spec: spec.name))
    assert all(torch.equal(kept[spec.name], held[spec.name]) for spec in LAYOUT[1:])
    assert not kept[wider.name].any()  # the same tensor at another rank is another one
    assert not kept["layers.8.a.lora_A"].any()


@pytest.mark.parametrize("codec", CODECS)
def test_nothing_malformed_passes(codec: str) -> None:
    good = delta.encode(tensors(0), codec)
    check(good, LAYOUT, codec)
    chance = random.Random(0)
    header = int.from_bytes(good[:8], "little") + 8
    for _ in range(200):
        bad = bytearray(good)
        kind = chance.randrange(4)
        if kind == 0:  # cut
            bad = bad[: chance.randrange(len(bad))]
        elif kind == 1:  # header bytes; a byte that keeps the JSON's meaning (white space) may pass
            at = chance.randrange(header)
            if bad[at] == 0x20:
                continue
            bad[at] ^= 1 << chance.randrange(7)
        elif kind == 2:  # longer
            bad += b"\0"
        else:  # a NaN among the last tensor's scales
            bad[-2:] = b"\xc0\x7f"
        with pytest.raises(ProtocolViolation):
            check(bytes(bad), LAYOUT, codec)
    for other in CODECS:
        if other != codec:
            with pytest.raises(ProtocolViolation, match="the run's codec"):
                check(good, LAYOUT, other)


def fedavg(updates: list[tuple[dict[str, torch.Tensor], int]]) -> dict[str, torch.Tensor]:
    """FedAvg, McMahan et al. 2017, Algorithm 1: w <- sum_k n_k / n * w_k."""
    n = sum(n_k for _, n_k in updates)
    return {name: sum(n_k / n * w_k[name] for w_k, n_k in updates) for name in updates[0][0]}


def test_the_average_is_fedavg_and_does_not_depend_on_arrival() -> None:
    coded = [(f"edge-{i}", n, delta.encode(tensors(i), "int8")) for i, n in enumerate((10, 30, 20))]
    updates = [CodedUpdate(edge, n, partial(bytes, data), {}, LAYOUT) for edge, n, data in coded]
    mean = weighted_mean(updates, "int8", max_weight=3.0)
    expected = fedavg([(delta.decode(data, LAYOUT, "int8"), n) for _, n, data in coded])
    for name in mean:
        torch.testing.assert_close(mean[name], expected[name], rtol=1e-6, atol=1e-9)
    reordered = weighted_mean(updates[::-1], "int8", max_weight=3.0)
    assert all(torch.equal(mean[name], reordered[name]) for name in mean)


def test_a_boastful_edge_counts_at_most_three_medians() -> None:
    updates = [
        CodedUpdate(edge, n, partial(delta.encode, tensors(i), "bf16"), {}, LAYOUT)
        for i, (edge, n) in enumerate([("a", 10), ("b", 10), ("c", 10**9)])
    ]
    mean = weighted_mean(updates, "bf16", max_weight=3.0)
    expected = fedavg([(delta.decode(u.read(), LAYOUT, "bf16"), n) for u, n in zip(updates, (10, 10, 30), strict=True)])
    for name in mean:
        torch.testing.assert_close(mean[name], expected[name], rtol=1e-6, atol=1e-9)
