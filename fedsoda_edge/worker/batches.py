"""Hidden states at the border below the first layer that trains: swept once per alignment, then reused.

What lies below is frozen between alignments, so its output for a sample is a constant (method.md 8a): the
sub-emulator's where the adapter is on top of it, the embedding's where the lowest layer trains.
Here states become batches; they come from memory, or on an edge from disk (`border_cache.py`). Training is `training.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedsoda_edge.data.samples import Sample
from fedsoda_edge.model.border import mapped
from fedsoda_edge.model.streaming import LayerSource, stream


@dataclass(frozen=True)
class Batch:
    """states: (R, T, C), several samples to a row, zero where padded on the right. positions: (R, T), which start
    at 0 with each sample; attention stays within it. rows, columns, labels: (M,), which positions predict which
    completion ids."""

    states: Tensor
    positions: Tensor
    rows: Tensor
    columns: Tensor
    labels: Tensor
    num_samples: int
    num_tokens: int


class States(Protocol):
    """States that are not all in memory (`border_cache.CachedStates`)."""

    def __getitem__(self, index: int, /) -> Tensor: ...

    def expect(self, order: Sequence[int], /) -> None: ...


class Border:
    """Samples with their hidden states (T, C) at the border."""

    def __init__(self, samples: Sequence[Sample], states: list[Tensor] | States) -> None:
        self.samples = samples
        self.states = states

    @classmethod
    def sweep(
        cls,
        source: LayerSource,
        layers: Sequence[int],
        samples: Sequence[Sample],
        *,
        lora: dict[str, Tensor],
        lora_scale: float,
        compute_dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> Border:
        """Run all samples through the layers below the border, one layer resident, and the border map in `lora`."""
        ids = [torch.tensor(sample.ids) for sample in samples]
        states = stream(
            source,
            layers,
            ids,
            lora=lora,
            lora_scale=lora_scale,
            compute_dtype=compute_dtype,
            device=device,
            progress=progress,
        )
        return cls(samples, [mapped(state, lora) for state in states])

    def expect(self, order: Sequence[int]) -> None:
        """The samples that batches will ask for, in order; states that are not kept are computed with that in mind."""
        if not isinstance(self.states, list):
            self.states.expect(order)

    def num_labels(self, index: int) -> int:
        """Completion ids of a sample that are predicted: nothing comes before its first id, so nothing predicts that."""
        sample = self.samples[index]
        return len(sample.ids) - max(sample.start, 1)

    def batch(self, indices: Sequence[int], device: str | torch.device = "cpu") -> Batch:
        """The samples of these indices, packed: padding each to the longest would waste half of the work."""
        lengths = [len(self.samples[i].ids) for i in indices]
        packed = pack(lengths)
        width = max(sum(lengths[at] for at in row) for row in packed)
        found = [self.states[index] for index in indices]
        states = torch.zeros(len(packed), width, found[0].shape[1], dtype=found[0].dtype)
        positions = torch.zeros(len(packed), width, dtype=torch.int64)
        rows: list[int] = []
        columns: list[int] = []
        labels: list[int] = []
        for row, members in enumerate(packed):
            begin = 0
            for at in members:
                sample, end = self.samples[indices[at]], begin + lengths[at]
                states[row, begin:end] = found[at]
                positions[row, begin:end] = torch.arange(lengths[at])
                start = lengths[at] - self.num_labels(indices[at])
                rows += [row] * (lengths[at] - start)
                columns += range(begin + start - 1, end - 1)
                labels += sample.ids[start:]
                begin = end
        return Batch(
            states.to(device),
            positions.to(device),
            torch.tensor(rows, device=device),
            torch.tensor(columns, device=device),
            torch.tensor(labels, device=device),
            len(indices),
            sum(lengths),
        )


def pack(lengths: Sequence[int]) -> list[list[int]]:
    """Rows no longer than the longest sample, each a list of places in `lengths`: first fit, longest first."""
    rows: list[list[int]] = []
    left: list[int] = []
    for at in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        row = next((row for row, free in enumerate(left) if free >= lengths[at]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            left.append(max(lengths))
        rows[row].append(at)
        left[row] -= lengths[at]
    return rows
