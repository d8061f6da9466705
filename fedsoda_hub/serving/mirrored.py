"""Write the files of a run's bundles for mirrors, each named by its digest, as edges ask for them.

Which files these are is `shelf.py`'s; whoever serves them is not trusted by anybody, so nothing else goes there.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec

from fedsoda_edge.errors import BlobCorrupt, UsageProblem
from fedsoda_edge.ports.disk import sha256_file
from fedsoda_edge.protocol.messages import Digest
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import not_started, opened_to_read
from fedsoda_hub.serving.shelf import Shelf
from fedsoda_hub.settings.run import RunSettings


class MirroredBundle(msgspec.Struct, frozen=True):
    """The files in a directory for mirrors. copied: how many were not there before."""

    directory: str
    files: int
    bytes: int
    copied: int


def write_files(settings: RunSettings, to: Path) -> MirroredBundle:
    """Write what edges may fetch of this run, whether a hub serves it or not; a file that is whole already stays.

    Raises:
        UsageProblem: the run is not prepared, or the directory cannot be written to.
        BlobCorrupt: a file of the bundle does not have its digest.
    """
    directory = RunDirectory(settings.run_dir)
    if not directory.ledger.exists():
        raise not_started(settings.path)
    with opened_to_read(directory) as ledger:
        shelf = Shelf(directory, ledger.replay())
        shelf.follow(ledger.records())
    if not shelf.files:
        raise UsageProblem(f"{settings.name} is not prepared yet; run `fedsoda-hub serve {settings.path}` first")
    copied = 0
    try:
        to.mkdir(parents=True, exist_ok=True)
        for digest, path in shelf.files.items():
            copied += _copy(path, Digest(digest), to)
    except FileNotFoundError as error:
        raise BlobCorrupt(
            f"{error.filename} is missing: the disk or another program deleted it; put it back from a copy, or begin again "
            "with `fedsoda-hub reset`"
        ) from error
    except OSError as error:
        raise UsageProblem(f"{to} cannot be written to ({error.strerror}); name another directory with --to") from error
    size = sum((to / digest).stat().st_size for digest in shelf.files)
    return MirroredBundle(str(to), len(shelf.files), size, copied)


def _copy(path: Path, digest: Digest, to: Path) -> bool:
    """Copy a file under its digest, which appears only with all its bytes; tell whether that was needed."""
    target = to / digest
    if target.exists() and sha256_file(target) == digest:
        return False
    part = target.with_suffix(".part")
    shutil.copyfile(path, part)
    if (found := sha256_file(part)) != digest:
        part.unlink()
        raise BlobCorrupt(
            f"{path} has digest {found[:12]}, the manifest says {digest[:12]}: the disk or another program changed it; put it "
            "back from a copy, or begin again with `fedsoda-hub reset`"
        )
    os.replace(part, target)
    return True
