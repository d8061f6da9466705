"""What `fedsoda-hub plan` assumes of an edge. Nothing of it is measured, and RUN.toml has none of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """What an edge is taken to reach and to hold: its line, its sustained arithmetic, its samples and their ids."""

    mbit_per_second: float = 100.0
    tflop_per_second: float = 1.0
    samples: int = 1000
    ids_per_sample: int = 512
