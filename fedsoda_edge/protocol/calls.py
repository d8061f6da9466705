"""Define what a call to a process that owns torch is: a struct that names the types of its result and its progress.

The types stand in its base: `class Train(Call[Trained, TrainingStep], ...)`. Which calls there are is left to
`commands.py` (an edge's worker) and the hub's `federation/jobs.py`, how they travel to `ports/child.py`.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar, cast, get_args

import msgspec

ResultT = TypeVar("ResultT", bound=msgspec.Struct)
ProgressT = TypeVar("ProgressT")


class Call(msgspec.Struct, Generic[ResultT, ProgressT], frozen=True, kw_only=True, tag_field="do"):
    """The root of all calls. Paths in a call are text; tensors travel as files."""


class NoProgress(msgspec.Struct, frozen=True):
    """The progress of a call that reports none."""


def result_type(call: Call[ResultT, Any]) -> type[ResultT]:
    """Return the type of what the call answers."""
    return cast("type[ResultT]", _arguments(type(call))[0])


def progress_type(call: Call[Any, ProgressT]) -> type[ProgressT]:
    """Return the type (or union of types) of what the call reports while it runs."""
    return cast("type[ProgressT]", _arguments(type(call))[1])


def _arguments(kind: type[Call[Any, Any]]) -> tuple[Any, ...]:
    [base] = kind.__orig_bases__  # type: ignore[attr-defined]
    return get_args(base)
