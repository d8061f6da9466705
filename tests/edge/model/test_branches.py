"""Sequences with one beginning, run as one row, have the hidden states that they have when they run apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import fedsoda_edge.model.streaming as streaming_module
from fedsoda_edge.model.branches import Branches, attention, joined
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.model.streaming import stream
from fedsoda_edge.model.sub_llm import build
from tests.tiny import FAMILY_CONFIGS, make_tiny

# No longer than the tiny models' sliding windows; one is the beginning of another, one row has a sequence only.
GROUPS = (
    [[3, 4, 5], [3, 4, 6, 7], [3, 4, 8]],
    [[9, 8, 7], [9, 8, 7, 6]],
    [[5, 6], [7, 8, 9]],
    [[11, 12, 13, 14, 15]],
)
ROWS = [joined(group) for group in GROUPS]
LAYERS = range(8)


def test_a_row_holds_the_beginning_once() -> None:
    ids, branches = joined(GROUPS[0])
    assert ids == [3, 4, 5, 6, 7, 8]
    assert branches == Branches((2, 3, 5), 6)
    assert branches.positions().tolist() == [0, 1, 2, 2, 3, 2]
    for number, sequence in enumerate(GROUPS[0]):
        assert [ids[branches.column(number, at)] for at in range(len(sequence))] == sequence


def test_a_query_sees_its_own_sequence_up_to_itself() -> None:
    """By brute force: column j is seen from column i where some sequence holds both, j not after i."""
    _, mask = attention([branches for _, branches in ROWS], "cpu")
    assert mask is not None
    for row, (group, (_, branches)) in enumerate(zip(GROUPS, ROWS, strict=True)):
        together = {
            (branches.column(number, i), branches.column(number, j))
            for number, sequence in enumerate(group)
            for i in range(len(sequence))
            for j in range(i + 1)
        }
        own = mask[row, 0, : branches.length, : branches.length]
        assert {(int(i), int(j)) for i, j in own.nonzero()} == together
    assert mask.any(dim=-1).all()  # pads too: a softmax over nothing would be NaN


def test_rows_of_one_sequence_need_no_mask() -> None:
    assert attention([joined([[1, 2, 3]])[1], joined([[4, 5]])[1]], "cpu") == (None, None)


def apart(states: list[Tensor]) -> list[Tensor]:
    """Take the states of each sequence out of its row."""
    return [
        states[row][[branches.column(number, at) for at in range(len(sequence))]]
        for row, (group, (_, branches)) in enumerate(zip(GROUPS, ROWS, strict=True))
        for number, sequence in enumerate(group)
    ]


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
def test_the_states_are_those_of_sequences_run_apart(family: str, tmp_path: Path) -> None:
    source = Checkpoint.open(str(make_tiny(tmp_path, family)))
    sequences = [torch.tensor(sequence) for group in GROUPS for sequence in group]
    rows, branches = [torch.tensor(ids) for ids, _ in ROWS], [branches for _, branches in ROWS]
    swept = stream(source, LAYERS, rows, branches=branches)
    for made, expected in zip(apart(swept), stream(source, LAYERS, sequences), strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    model = build(source, LAYERS[4:])
    below = pad_sequence(stream(source, LAYERS[:4], rows, branches=branches), batch_first=True)
    positions, mask = attention(branches, "cpu")
    with torch.no_grad():
        above = model.hidden(states=below, positions=positions, mask=mask)
        starts = stream(source, LAYERS[:4], sequences)
        for made, start in zip(apart(list(above)), starts, strict=True):
            torch.testing.assert_close(made, model.hidden(states=start[None])[0], rtol=1e-4, atol=1e-5)
        places, columns = torch.tensor([0, 0, 1, 2]), torch.tensor([2, 4, 3, 1])
        some = model.hidden_at(places, columns, states=below, positions=positions, mask=mask)
        torch.testing.assert_close(some, above[places, columns], rtol=1e-4, atol=1e-5)


def test_what_a_sweep_keeps_of_masks_is_bounded(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four batches of which no two have room beside each other are made again for each layer, to the same bits."""
    source = Checkpoint.open(str(tiny_llama))
    rows, branches = [torch.tensor(ids) for ids, _ in ROWS], [branches for _, branches in ROWS]
    expected, made = swept_alone(source, rows, branches, monkeypatch)
    assert made == 4
    monkeypatch.setattr(streaming_module, "KEPT_CALL_BYTES", 1)
    again, made = swept_alone(source, rows, branches, monkeypatch)
    assert made == 4 * len(LAYERS)
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))


def test_rows_of_one_shape_without_branches_share_what_is_kept(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, branches = joined([[3, 4, 5, 6]])
    _, made = swept_alone(Checkpoint.open(str(tiny_llama)), [torch.tensor(ids)] * 4, [branches] * 4, monkeypatch)
    assert made == 1


def swept_alone(
    source: Checkpoint, rows: list[Tensor], branches: list[Branches], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], int]:
    """Run four rows, each a batch of its own; give their states and how often masks were asked for."""
    made = []

    def counted(*args: Any) -> Any:
        made.append(args)
        return attention(*args)

    monkeypatch.setattr(streaming_module, "attention", counted)
    return stream(source, LAYERS, rows, branches=branches, batches=[[0], [1], [2], [3]]), len(made)
