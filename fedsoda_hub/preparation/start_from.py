"""Read the LoRA that a run begins with from an export of another run, and check that it is of the same model and layout.

Nothing of the other run is needed but the directory that `fedsoda-hub export` wrote.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.protocol.manifest import TensorSpec

MAX_NAMED = 3  # tensors in a sentence


class _About(msgspec.Struct):
    """The content of fedsoda.json, as far as it is needed."""

    run: str
    rounds: int
    model_revision: str
    merged: bool


class _Config(msgspec.Struct):
    """The content of adapter_config.json, as far as it is needed."""

    r: int
    lora_alpha: float


def read_start(directory: Path, source: Checkpoint, rank: int, alpha: float) -> dict[str, Tensor]:
    """Read an export as LoRA by the names that runs use, fp32.

    Args:
        rank, alpha: those of [lora].

    Raises:
        UsageProblem: the directory is not an export, or one of another model, rank or alpha.
    """
    label = f"[lora] start_from = {str(directory)!r}"
    try:
        about = msgspec.json.decode((directory / "fedsoda.json").read_bytes(), type=_About)
        if about.merged:
            raise UsageProblem(f"{label} is a merged checkpoint; export the round without --merge, and name that")
        config = msgspec.json.decode((directory / "adapter_config.json").read_bytes(), type=_Config)
        tensors = load_file(directory / "adapter_model.safetensors")
    except (OSError, msgspec.MsgspecError, SafetensorError, json.JSONDecodeError) as error:
        raise UsageProblem(
            f"{label} cannot be read as an export ({error}); name a directory that `fedsoda-hub export` wrote"
        ) from error
    if about.model_revision != source.revision:
        raise UsageProblem(
            f"{label} is an export of run {about.run} for another model (revision {about.model_revision!r}) than this run's "
            f"(revision {source.revision!r}); name an export for this model"
        )
    if (config.r, config.lora_alpha) != (rank, alpha):
        raise UsageProblem(
            f"{label} has rank {config.r} and alpha {config.lora_alpha:g}, this run {rank} and {alpha:g}; write those of the export"
        )
    prefix = f"base_model.model.{source.family.layers}."
    found = {
        "layers." + name.removeprefix(prefix).removesuffix(".weight"): tensor.float()
        for name, tensor in tensors.items()
    }
    broken = [name for name, tensor in found.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise UsageProblem(f"{label} holds what is not a number in {_some(broken)}; name an export of an earlier round")
    return found


def begun_with(layout: Sequence[TensorSpec], fresh: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the LoRA of an export in the place of fresh LoRA.

    Raises:
        UsageProblem: the export lacks tensors of this layout, or has others or other shapes.
    """
    lacking = [spec.name for spec in layout if spec.name not in start]
    if lacking:
        raise UsageProblem(
            f"[lora] start_from has no LoRA for {_some(lacking)}; write [method] adapter_layers and [lora] targets as in the run "
            "that it was exported from"
        )
    for spec in layout:
        if tuple(start[spec.name].shape) != tuple(spec.shape):
            raise UsageProblem(
                f"[lora] start_from has {spec.name} with shape {list(start[spec.name].shape)}, this run {list(spec.shape)}; name an "
                "export for this model and rank"
            )
    return {name: start.get(name, tensor) for name, tensor in fresh.items()}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")
