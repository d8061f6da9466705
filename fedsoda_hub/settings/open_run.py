"""Define the first call to the process that owns torch: open a run, with all its settings. Answering is `compute.py`'s."""

from __future__ import annotations

import msgspec

from fedsoda_edge.protocol.calls import Call, NoProgress
from fedsoda_hub.settings.run import RunSettings


class RunOpened(msgspec.Struct, frozen=True):
    """The answer that a run is open. threads: how many torch computes with."""

    threads: int


class OpenRun(Call[RunOpened, NoProgress], frozen=True, tag="open_run"):
    """The call to take these settings from now on, and to check that the evaluation data can be judged."""

    settings: RunSettings
