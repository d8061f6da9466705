"""Describe a defect without the words of its exception, which may quote private text: its type, and where it happened."""

from __future__ import annotations

import os
import re
import traceback
from pathlib import Path

# Words of drivers and allocators, which never see a text.
_OF_DRIVERS = re.compile(r"(CUDA|HIP|cuDNN|cuBLAS|cublas|MIOpen|\[enforce fail at |DefaultCPUAllocator)")
_MOST_WORDS = 300  # characters
_OURS = Path(__file__).parents[1]


def sentence_of(error: BaseException) -> str:
    """Write "ValueError in fedsoda_edge/data/samples.py, line 88", with the words where they speak of the machine."""
    words, frames = machine_words(error), list(traceback.extract_tb(error.__traceback__))
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_OURS)]
    where = "".join(f" in {_short(frame.filename)}, line {frame.lineno}" for frame in (ours or frames)[-1:])
    return f"{type(error).__name__}{where}: " + (words or "its words are left out, since they may quote private text")


def machine_words(error: BaseException) -> str:
    """Return what an exception says where that can be of this machine alone; "" where it may quote a text."""
    if isinstance(error, OSError) and error.errno:
        path = error.filename
        return os.strerror(error.errno) + (f": {str(path)!r}" if isinstance(path, str | bytes | os.PathLike) else "")
    if isinstance(error, ImportError) and error.name:
        return f"the module {error.name} cannot be imported"
    said = str(error)
    return said.partition("\n")[0][:_MOST_WORDS] if isinstance(error, RuntimeError) and _OF_DRIVERS.match(said) else ""


def trace_of(error: BaseException) -> str:
    """Write a traceback with the types of all exceptions in it, and without their words."""
    parts: list[str] = []
    one: BaseException | None = error
    while one is not None and len(parts) < 10:
        frames = "".join(traceback.format_tb(one.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{frames}{type(one).__name__}")
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return "\n\nwhich came of\n\n".join(parts)


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(_OURS.parent)) if path.is_relative_to(_OURS) else path.name
