"""Write a checkpoint as Transformers writes one: shards of bounded size, one in memory at a time, and their index.

Nothing is written over a file that another process may have mapped: a shard gets its bytes under a name of its own, is read
back, and only then its last name. The directory is new, and takes its place whole or not at all (`new_directory`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedsoda_edge.errors import AlreadyThere, DiskFull, UsageProblem
from fedsoda_edge.ports.disk import write_durably_json
from fedsoda_edge.ports.system import sync_directory
from fedsoda_edge.units import human_bytes

SHARD_BYTES = 2_000_000_000  # what 32-bit file systems and readers take


class CheckpointWriter:
    """The weights of one checkpoint while they are written.

    Args:
        directory: an empty one.
        shard_bytes: how many bytes of tensors a file holds at most; a larger tensor is a file of its own.
    """

    def __init__(self, directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._directory = directory
        self._shard_bytes = shard_bytes
        self._held: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; it is written with the others of its shard."""
        held = sum(other.nbytes for other in self._held.values())
        if self._held and held + tensor.nbytes > self._shard_bytes:
            self._write()
        self._held[name] = tensor.contiguous()
        self._bytes += tensor.nbytes

    def finish(self) -> None:
        """Write the rest, and give all shards their names.

        Raises:
            DiskFull: a shard did not fit.
        """
        self._write()
        count = len(self._shards)
        table: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = "model.safetensors" if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"
            os.replace(self._part(number), self._directory / file)
            table |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self._bytes}, "weight_map": table}
            write_durably_json(self._directory / "model.safetensors.index.json", index)
        sync_directory(self._directory)

    def _part(self, number: int) -> Path:
        return self._directory / f"shard-{number}.part"

    def _write(self) -> None:
        part = self._part(len(self._shards))
        try:
            save_file(self._held, part, metadata={"format": "pt"})
            part.chmod(0o644)  # safetensors writes for the owner alone
            with part.open("rb+") as file:
                os.fsync(file.fileno())
        except Exception as error:  # SafetensorError, of an I/O error in Rust
            size = sum(tensor.nbytes for tensor in self._held.values())
            free = shutil.disk_usage(self._directory).free
            if free > size:
                raise
            raise DiskFull(
                f"the disk is full: {human_bytes(size)} for {self._directory} did not fit, {human_bytes(free)} are free; free "
                "space there, then try again"
            ) from error
        with safe_open(part, framework="pt") as file:
            for name, tensor in self._held.items():
                if not torch.equal(file.get_tensor(name), tensor):
                    raise OSError(f"{part} does not hold the bytes of {name} that were written")
        self._shards.append(list(self._held))
        self._held = {}


@contextlib.contextmanager
def new_directory(directory: Path, *, replaces: bool = False) -> Iterator[Path]:
    """Make a directory beside `directory`, which takes its name at the end; nothing of it stays where something fails.

    Args:
        replaces: whether what is there is replaced; the caller has made sure that it may be.

    Raises:
        AlreadyThere: something is there that is not replaced.
        UsageProblem: the directory cannot be made.
    """
    temporary = directory.with_name(f"{directory.name}.{os.getpid()}.part")
    old = directory.with_name(f"{directory.name}.{os.getpid()}.old")
    try:
        is_in_the_way = directory.is_symlink() or (directory.exists() and not directory.is_dir())
        if is_in_the_way or (not replaces and directory.exists() and any(directory.iterdir())):
            raise AlreadyThere(f"{directory} is there already; name a new directory with --to")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UsageProblem(
            f"{directory} cannot be made ({error.strerror or error}); name a directory where you may write with --to"
        ) from error
    try:
        yield temporary
        # A file of the old directory may be mapped, which Windows lets nobody delete: it leaves its name first.
        if directory.exists():
            os.replace(directory, old)
        try:
            os.replace(temporary, directory)
        except OSError:
            if old.exists():
                os.replace(old, directory)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    sync_directory(directory.parent)


def check_room(directory: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        DiskFull: it has less than `needed` bytes free.
    """
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise DiskFull(
            f"{directory} needs {human_bytes(needed)}, but its disk has {human_bytes(free)} free; free some space, or name a "
            "directory on another disk with --to"
        )


def write_config(directory: Path, fields: dict[str, object]) -> None:
    """Write config.json, as Transformers lays it out."""
    (directory / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
