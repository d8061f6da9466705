"""Let a local round survive kill -9: LoRA, optimiser and counts as files, in two generations.

A round is a pure function of its offer and data on one thread count, so a file serves only the very same round; any
other round begins at its beginning. What to save is left to `training.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SHARE_AT_RISK = 0.02  # the part of a round's steps that may be lost, at least one step

WriteFile = Callable[[dict[str, Tensor], Path, dict[str, str]], None]  # tensors, where, metadata


@dataclass(frozen=True)
class Saved:
    """A saved state of a round.

    step: the last one that is done. tokens: ids trained on so far. micro_batch: samples that went through at once.
    tensors: all on which the next step depends.
    """

    step: int
    tokens: int
    micro_batch: int
    tensors: dict[str, Tensor]


class RoundCheckpoint:
    """The saved states of one local round in `directory`.

    Args:
        identity: everything on which the round's result depends.
        write_file: writes a file; if it fails, training continues without the file.
    """

    def __init__(self, directory: Path, identity: Mapping[str, object], write_file: WriteFile = save_file) -> None:
        self._directory = directory
        self._identity = json.dumps(dict(identity), sort_keys=True)
        self._write_file = write_file
        self._writer: threading.Thread | None = None
        self._generation = 0
        directory.mkdir(parents=True, exist_ok=True)

    def load(self) -> Saved | None:
        """Read the latest whole saved state of this round; None where there is none."""
        found = [one for generation in (0, 1) if (one := self._read(generation)) is not None]
        if not found:
            return None
        saved, generation = max(found, key=lambda one: one[0].step)
        self._generation = 1 - generation
        return saved

    def _path(self, generation: int) -> Path:
        return self._directory / f"round.{generation}.safetensors"

    def _read(self, generation: int) -> tuple[Saved, int] | None:
        try:
            with safe_open(self._path(generation), framework="pt") as file:
                about = file.metadata() or {}
                if about.get("identity") != self._identity:
                    return None
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
        if about.get("digest") != _digest(tensors):
            return None  # a power cut may leave a file's length without its bytes
        return Saved(int(about["step"]), int(about["tokens"]), int(about["micro_batch"]), tensors), generation

    def is_due(self, step: int, steps: int) -> bool:
        """Tell whether to save after this step: so often that 2 % of the round is lost at most, one save at a time."""
        every = max(1, int(steps * SHARE_AT_RISK))
        return step % every == 0 and step < steps and (self._writer is None or not self._writer.is_alive())

    def save(self, step: int, tokens: int, micro_batch: int, tensors: dict[str, Tensor]) -> None:
        """Copy the tensors now, and write them while training continues.

        Without fsync: the page cache outlives the process, and a power cut that destroys both generations costs only the
        round's work.
        """
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        path, self._generation = self._path(self._generation), 1 - self._generation
        about = {"step": str(step), "tokens": str(tokens), "micro_batch": str(micro_batch)}
        self._writer = threading.Thread(target=self._write, args=(path, about, copies), daemon=True)
        self._writer.start()

    def _write(self, path: Path, about: dict[str, str], copies: dict[str, Tensor]) -> None:
        part = path.with_suffix(".part")
        try:
            self._write_file(copies, part, {"identity": self._identity, "digest": _digest(copies), **about})
            os.replace(part, path)
        except (OSError, SafetensorError):
            part.unlink(missing_ok=True)  # the disk is full: training continues without

    def wait(self) -> None:
        """Wait until the last state is written."""
        if self._writer is not None:
            self._writer.join()

    def forget(self) -> None:
        """Remove the saved states, once the round is trained and its update is on disk."""
        self.wait()
        for path in self._directory.glob("round.*"):  # with what a kill left half-written
            path.unlink(missing_ok=True)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
