"""How a run's layers are run: on which device, in which dtype, and who hears how far the work is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

import torch

from fedsoda_edge.errors import UsageProblem
from fedsoda_hub.federation.jobs import JobProgress, Stage
from fedsoda_hub.settings.run import RunSettings

ReportProgress = Callable[[JobProgress], None]


def to_nobody(_: JobProgress) -> None:
    """Take a progress that nobody asked for."""


def pick_device(wanted: str, dtype: str) -> tuple[str, torch.dtype]:
    """Return (device, compute dtype): `dtype` on CUDA; fp32 on a CPU, where 16-bit products are several times slower.

    Args:
        wanted: a device as torch names it, or "auto": CUDA where torch sees one.

    Raises:
        UsageProblem: CUDA is wanted, and torch sees none.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageProblem(f"device = {wanted!r}, but torch sees no CUDA device here; use device = 'cpu'")
    return device, torch.float32 if device == "cpu" else getattr(torch, dtype)


class How(TypedDict):
    """What everything that runs layers takes beside its input. progress: called as progress(done, total)."""

    compute_dtype: torch.dtype
    device: str
    progress: Callable[[int, int], None]


class RunningLayers:
    """Where the layers of a run are computed. report: who hears of the job in hand; each job sets its own."""

    def __init__(self, settings: RunSettings) -> None:
        self.device, self.compute_dtype = pick_device(settings.device, settings.dtype)
        self.report: ReportProgress = to_nobody

    def how(self, stage: str) -> How:
        """Give the arguments of whatever runs layers; its progress is reported as `stage`."""
        return {"compute_dtype": self.compute_dtype, "device": self.device, "progress": self.progress(stage)}

    def progress(self, stage: str) -> Callable[[int, int], None]:
        """Make a listener that reports (done, total) as `stage`."""
        return lambda done, total: self.report(Stage(stage=stage, done=done, total=total))
