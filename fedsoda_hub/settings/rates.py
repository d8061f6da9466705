"""Declare what `fedsoda-hub plan` assumes of an edge. None of it is measured or in RUN.toml; costs are `plan.py`'s."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """An assumed edge: its line, its sustained arithmetic, its samples and their ids."""

    mbit_per_second: float = 100.0
    tflop_per_second: float = 1.0
    samples: int = 1000
    ids_per_sample: int = 512
