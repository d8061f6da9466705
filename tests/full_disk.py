"""A disk that is full for one file: what is written under its name fails as an operating system says it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock


@contextlib.contextmanager
def full_disk_for(name: str) -> Iterator[None]:
    """Let no file get this name (`ports/disk.py` gives it once the bytes are written). All others have room."""
    replace = os.replace

    def full(source: str | Path, target: str | Path) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    with mock.patch.object(os, "replace", full):
        yield
