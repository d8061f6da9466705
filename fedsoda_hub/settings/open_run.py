"""Open a run in the process that owns torch: the first call, with all settings."""

from __future__ import annotations

import msgspec

from fedsoda_edge.protocol.calls import Call, NoProgress
from fedsoda_hub.settings.run import RunSettings


class RunOpened(msgspec.Struct, frozen=True):
    """threads: that torch computes with."""

    threads: int


class OpenRun(Call[RunOpened, NoProgress], frozen=True, tag="open_run"):
    """Take these settings from now on, and check that the evaluation data can be judged."""

    settings: RunSettings
