"""Hold what the owner asks of one join. Which values are allowed is checked where they are read, in `edge.py` and `cli`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.device.fit import Limits
from fedsoda_edge.device.pause_rules import PauseRules


@dataclass(frozen=True)
class Cache:
    """The way in which border states are kept.

    max_bytes: the most that they may take on disk; None: what is free. dtype: "bf16" or "int8". keep_key: whether a
    later join can read them.
    """

    max_bytes: int | None = None
    dtype: str = "bf16"
    keep_key: bool = False


@dataclass(frozen=True)
class AgentSettings:
    """The settings of one join.

    device: "auto", "cpu", "cuda" or "cuda:N". unattended: whether to try until the hub answers, also at the start.
    rules: what pauses the join without a request. hub_key: the hub's public key, as a join link names it; None: the first
    that the run's hub shows.
    """

    device: str
    data: LocalData = field(default_factory=lambda: LocalData(Path()))
    unattended: bool = False
    cache: Cache = Cache()
    limits: Limits = field(default_factory=Limits)
    rules: PauseRules = field(default_factory=PauseRules)
    hub_key: bytes | None = None
