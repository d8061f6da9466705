"""Hidden states at the border between sub-emulator and adapter: swept once per alignment, then reused.

The sub-emulator is frozen between alignments, so its output for a sample is a constant (method.md 8a).
States are kept in RAM, without pads, in the dtype training computes in. Training is `training.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsoda_edge.data import Sample
from fedsoda_edge.model.streaming import LayerSource, stream


@dataclass(frozen=True)
class Batch:
    """states: (B, T, C), zero where padded on the right. rows, columns, labels: (M,), which positions predict
    which completion ids."""

    states: Tensor
    rows: Tensor
    columns: Tensor
    labels: Tensor
    num_samples: int
    num_tokens: int


class Border:
    """Samples with their hidden states at the border."""

    def __init__(self, samples: Sequence[Sample], states: Sequence[Tensor]) -> None:
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
        """Run all samples through the layers below the adapter, one layer resident."""
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
        return cls(samples, states)

    def batch(self, indices: Sequence[int], device: str | torch.device = "cpu") -> Batch:
        """The samples of these indices, padded to the longest of them."""
        longest = max(len(self.samples[i].ids) for i in indices)
        first = self.states[indices[0]]
        states = torch.zeros(len(indices), longest, first.shape[1], dtype=first.dtype)
        rows: list[int] = []
        columns: list[int] = []
        labels: list[int] = []
        tokens = 0
        for row, i in enumerate(indices):
            sample = self.samples[i]
            states[row, : len(sample.ids)] = self.states[i]
            tokens += len(sample.ids)
            start = max(sample.start, 1)  # nothing comes before the first id, so nothing predicts it
            rows += [row] * (len(sample.ids) - start)
            columns += range(start - 1, len(sample.ids) - 1)
            labels += sample.ids[start:]
        return Batch(
            states.to(device),
            torch.tensor(rows, device=device),
            torch.tensor(columns, device=device),
            torch.tensor(labels, device=device),
            len(indices),
            tokens,
        )
