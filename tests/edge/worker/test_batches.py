"""Samples become batches: packed into rows, each with its own positions, and only what something precedes is predicted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from fedsoda_edge.data.samples import Sample
from fedsoda_edge.worker.batches import SweptSamples, pack


@pytest.mark.parametrize("lengths", [(7,), (9, 4, 5, 3, 9, 2), (1,) * 8 + (3,), tuple(range(1, 40))])
def test_packing_keeps_every_sample_once_in_rows_no_longer_than_the_longest(lengths: tuple[int, ...]) -> None:
    rows = pack(lengths)
    assert sorted(at for row in rows for at in row) == list(range(len(lengths)))
    filled = [sum(lengths[at] for at in row) for row in rows]
    assert max(filled) == max(lengths)
    # First fit leaves no two rows that would fit in one.
    assert all(a + b > max(lengths) for i, a in enumerate(filled) for b in filled[:i])


def swept(*samples: Sample) -> SweptSamples:
    """Border states of width 1 that name sample and position: 10.0, 11.0, ... of the first, 20.0, ... of the second."""
    states = [10.0 * (at + 1) + torch.arange(float(len(sample.ids)))[:, None] for at, sample in enumerate(samples)]
    return SweptSamples(samples, states)


def test_a_batch_holds_several_samples_in_a_row_with_positions_and_labels_of_each() -> None:
    one, two, three = Sample((5, 6, 7), 1), Sample((8, 9, 1, 2, 3), 3), Sample((4, 2), 1)
    batch = swept(one, two, three).batch((0, 1, 2))
    assert batch.states.squeeze(-1).tolist() == [[20.0, 21.0, 22.0, 23.0, 24.0], [10.0, 11.0, 12.0, 30.0, 31.0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
    predicted = list(zip(batch.rows.tolist(), batch.columns.tolist(), batch.labels.tolist(), strict=True))
    assert predicted == [(0, 2, 2), (0, 3, 3), (1, 0, 6), (1, 1, 7), (1, 3, 2)]
    assert (batch.num_samples, batch.num_tokens) == (3, 10)


def test_nothing_predicts_the_first_id_of_a_sample_that_is_all_completion() -> None:
    samples = swept(Sample((5, 6, 7), 0))
    assert samples.num_labels(0) == 2
    assert samples.batch((0,)).labels.tolist() == [6, 7]


def test_states_that_are_not_in_memory_are_told_what_comes() -> None:
    class OnDisk:
        def __init__(self) -> None:
            self.order: list[int] = []

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.zeros(3, 1)

        def expect(self, order: Sequence[int]) -> None:
            self.order = list(order)

    states = OnDisk()
    SweptSamples([Sample((5, 6, 7), 1)] * 2, states).expect([1, 0, 1])
    assert states.order == [1, 0, 1]
