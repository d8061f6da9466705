"""What one join is asked to do, as its owner said it. Which values are allowed is checked where they are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.device.fit import Limits
from fedsoda_edge.device.pause_rules import PauseRules


@dataclass(frozen=True)
class Cache:
    """How border states are kept. max_bytes: None: what is free on the disk."""

    max_bytes: int | None = None
    dtype: str = "bf16"
    keep_key: bool = False


@dataclass(frozen=True)
class AgentSettings:
    """A join's settings. device: "auto", "cpu" or "cuda[:n]". unattended: try to reach the hub until it answers, also
    at first.
    """

    device: str
    data: LocalData = field(default_factory=lambda: LocalData(Path()))
    unattended: bool = False
    cache: Cache = Cache()
    limits: Limits = field(default_factory=Limits)
    rules: PauseRules = field(default_factory=PauseRules)
