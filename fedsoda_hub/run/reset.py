"""Forget what a run did, so that it can begin again with other settings. Who may join stays as it is.

That nobody serves the run meanwhile is the lock's matter, who asks the owner first the command's.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import msgspec

from fedsoda_hub.run.database import Damaged
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import Ledger


class Begun(msgspec.Struct, frozen=True):
    """The state of a run before a reset.

    rounds_closed: None: the ledger is damaged. tokens, links: how many edges have one that is not revoked. bytes: what a reset
    frees.
    """

    rounds_closed: int | None
    tokens: int
    links: int
    bytes: int


def begun(directory: RunDirectory) -> Begun:
    """Measure what there is of a run, which is locked."""
    freed = sum(path.stat().st_size for place in _made(directory) for path in _files(place))
    try:
        with contextlib.closing(Ledger(directory.ledger)) as ledger:
            kept = [edge.kind for edge in ledger.edges.all() if not edge.revoked]
            return Begun(len(ledger.replay().losses), kept.count("token"), kept.count("link"), freed)
    except Damaged:
        return Begun(None, 0, 0, freed)


def reset(directory: RunDirectory) -> None:
    """Delete bundle, rounds and results of a run, which is locked; tokens and what the model wrote for it stay.

    A damaged ledger is deleted, and its tokens with it.

    Raises:
        UsageProblem: the directory cannot be written to.
        DiskFull: nothing was deleted.
    """
    try:
        with contextlib.closing(Ledger(directory.ledger)) as ledger:
            ledger.forget()  # first: where the rest is cut short, preparation deletes what is of other settings
    except Damaged:
        for path in directory.path.glob(f"{directory.ledger.name}*"):
            path.unlink()
    for place in _made(directory):
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)


def _made(directory: RunDirectory) -> tuple[Path, ...]:
    return (
        directory.bundle,
        directory.blobs.directory,
        directory.uploads,
        directory.preparation,
        directory.report,
        directory.model_revision,
        directory.address,
        directory.process,
    )


def _files(place: Path) -> list[Path]:
    return [path for path in (place, *place.rglob("*")) if path.is_file()]
