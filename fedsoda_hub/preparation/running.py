"""Decide how a run's layers are run: on which device, in which dtype, and who hears of the progress.

Which layers are run on what is the caller's matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

import torch

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.nf4 import has_instructions_for
from fedsoda_hub.federation.jobs import JobProgress, Stage
from fedsoda_hub.settings.run import RunSettings

TakeProgress = Callable[[JobProgress], None]


def to_nobody(_: JobProgress) -> None:
    """Drop the progress of a job that nobody follows."""


def pick_device(wanted: str, dtype: str) -> tuple[str, torch.dtype]:
    """Return (device, compute dtype): `dtype` on CUDA and on a CPU that has instructions for it; fp32 on other CPUs.

    Args:
        wanted: a device as torch names it, or "auto": CUDA if torch sees a device.
        dtype: the name of a torch dtype.

    Raises:
        UsageProblem: CUDA is wanted, and torch sees no device.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageProblem(f'device = "{wanted}", but torch sees no CUDA device here; write device = "cpu"')
    wanted_dtype: torch.dtype = getattr(torch, dtype)
    is_quick = device != "cpu" or has_instructions_for(wanted_dtype)
    return device, wanted_dtype if is_quick else torch.float32


class How(TypedDict):
    """The arguments that everything which runs layers takes. progress: called as progress(done, total)."""

    compute_dtype: torch.dtype
    device: str
    progress: Callable[[int, int], None]


class RunningLayers:
    """The place where the layers of a run are computed. report: takes the progress of the current job, which sets it.

    Raises:
        UsageProblem: the device is not available.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.device, self.compute_dtype = pick_device(settings.device, settings.dtype)
        self.report: TakeProgress = to_nobody

    def how(self, stage: str) -> How:
        """Return the arguments for running layers; progress is reported as `stage`."""
        return {"compute_dtype": self.compute_dtype, "device": self.device, "progress": self.progress(stage)}

    def progress(self, stage: str) -> Callable[[int, int], None]:
        """Return a function that reports (done, total) as `stage`."""
        return lambda done, total: self.report(Stage(stage=stage, done=done, total=total))
