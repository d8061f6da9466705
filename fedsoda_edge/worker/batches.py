"""Make batches of samples with their border states, which are swept once per alignment and then used again.

The layers below the border are frozen between alignments, so their output for a sample is a constant,
docs/methods.md (m6-cache): the sub-emulator's where the adapter is on top of it, the embedding's where the lowest layer
trains. States come from memory or, on an edge, from disk (`border_cache.py`). Training is left to `training.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedsoda_edge.data.samples import Sample
from fedsoda_edge.model.border import border_states
from fedsoda_edge.model.source import LayerSource
from fedsoda_edge.model.streaming import LayersDone


@dataclass(frozen=True)
class Batch:
    """The samples of a micro-batch, several to a row (R rows).

    states: (R, T, C), zero where padded on the right. positions: (R, T); they begin at 0 with each sample, and
    attention stays within a sample. rows, columns, labels: (M,), which positions predict which completion ids.
    num_tokens: ids of all samples.
    """

    states: Tensor
    positions: Tensor
    rows: Tensor
    columns: Tensor
    labels: Tensor
    num_samples: int
    num_tokens: int


class States(Protocol):
    """Border states that are not all in memory (`border_cache.CachedStates`)."""

    def __getitem__(self, index: int, /) -> Tensor:
        """Return a sample's border states: (T, C) on the CPU."""
        ...

    def expect(self, order: Sequence[int], /) -> None:
        """Note the samples that will be read, in order."""
        ...


class SweptSamples:
    """The samples of an edge with their border states (T, C)."""

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
        emulator: Mapping[str, Tensor],
        lora_scale: float,
        compute_dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        progress: LayersDone | None = None,
    ) -> SweptSamples:
        """Run all samples through `layers`, with one layer resident, and hold their border states.

        Args:
            layers: full-LLM numbers of the layers below the border, in order.
            emulator: the emulator's view: its LoRA, and its border map if it has one.
            progress: called as progress(layers done, layers in all).
        """
        states = border_states(
            source,
            layers,
            [torch.tensor(sample.ids) for sample in samples],
            emulator=emulator,
            lora_scale=lora_scale,
            compute_dtype=compute_dtype,
            device=device,
            progress=progress,
        )
        return cls(samples, states)

    def expect(self, order: Sequence[int]) -> None:
        """Note the samples that batches will need, in order, so that states that are not kept are computed together."""
        if not isinstance(self.states, list):
            self.states.expect(order)

    def num_labels(self, index: int) -> int:
        """Count the completion ids of a sample that are predicted. A sample's first id is not: nothing comes before it."""
        sample = self.samples[index]
        return len(sample.ids) - max(sample.start, 1)

    def batch(self, indices: Sequence[int], device: str | torch.device = "cpu") -> Batch:
        """Pack these samples into rows, on the device: padding each to the longest would waste half of the work."""
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
    """Pack lengths into rows that are no longer than the longest one: first fit, longest first.

    Returns:
        Rows as lists of places in `lengths`.
    """
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
