"""Layers are dropped by the formulas of both reference codes, and an emulator keeps its ends."""

from __future__ import annotations

import pytest

from fedsoda_edge.errors import UsageProblem
from fedsoda_hub.algorithms.pruning.uniform import evenly, evenly_rounded_down, num_kept


def by_offsite_tunings_code(layers: int, kept: int) -> list[int]:
    """mit-han-lab/offsite-tuning, uniform_choose_layers, with floats that are not taken for less than they are."""
    stride = (layers - 1) / (kept - 1)
    return [round(round(i * stride, 9)) for i in range(kept)]


def by_fedbiots_code(layers: int, kept: int) -> list[int]:
    """HarliWu/FedBiOT, federatedscope/llm/offsite_tuning; the same about floats."""
    stride = (layers - 1) / (kept - 1)
    return [int(i * stride + 1e-9) for i in range(kept)]


def test_places_are_those_of_both_codes() -> None:
    for layers in range(2, 34):
        for kept in range(2, layers + 1):
            assert evenly(layers, kept) == by_offsite_tunings_code(layers, kept)
            assert evenly_rounded_down(layers, kept) == by_fedbiots_code(layers, kept)


def test_both_ends_stay() -> None:
    """FedBiOT's own int(i * stride) keeps layer 14 of 0..15 where 12 of 16 are left: 11 * (15 / 11) is below 15."""
    assert int(11 * (15 / 11)) == 14
    for places in (evenly(16, 12), evenly_rounded_down(16, 12)):
        assert (places[0], places[-1], len(set(places))) == (0, 15, 12)


def test_an_emulator_keeps_two_layers_at_least() -> None:
    assert num_kept(5, 3) == 2
    with pytest.raises(UsageProblem, match=r"drop_layers = 4, but the emulator has 5 layers .*; write at most 3$"):
        num_kept(5, 4)
    with pytest.raises(UsageProblem, match=r'leaves 1 layers .*; lower adapter_layers, or write name = "exact"$'):
        num_kept(1, 0)
