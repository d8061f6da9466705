"""Write what happens as one line of a log: digests, counts, seconds and losses; never text, payloads or secrets.

    < RoundOffer round=3 view=sha256:9f2c… due_seconds=600    received
    > UpdateChunk digest=sha256:1b07… offset=0 payload=262144 sent
    = session greeted -> open                                 a state changed
    % Progress round=3 step=7 steps=60 loss=0.693             keepalive: sent or received
    ! HubUnreachable step=TCP                                 went wrong

A string is shown if it is a digest, shortened, or one of the few words that its type allows; every other string is left
out, whoever wrote it. Which logger gets the line, and when, is left to the caller.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal, get_args, get_origin

import msgspec

from fedsoda_edge.errors import FedSODAError
from fedsoda_edge.protocol.messages import Digest, Progress

_DIGEST = re.compile(r"[0-9a-f]{64}")
_WORD = re.compile(r"[\w .-]{1,40}")
_ODD = re.compile(r"[^\w .:=/-]")
_STEPS = ("DNS", "TCP", "TLS", "HTTP", "auth")
_SHOWN = 4  # digits of a digest: enough to see which two are the same

Mark = Literal["<", ">", "!"]


def line(mark: Mark, message: msgspec.Struct, note: str = "") -> str:
    """Write the line of a message: "<" came, ">" was sent, "!" was refused; "%" is a progress that went either way.

    Args:
        note: what the caller adds, such as "payload=262144" or whose message it is, and never text of others: unusual
            characters become "?", and it is cut after 80.
    """
    words = ["%" if isinstance(message, Progress) else mark, type(message).__name__, *_fields(message, "")]
    return " ".join([*words, _ODD.sub("?", note)[:80]] if note else words)


def changed(what: str, before: str, after: str) -> str:
    """Write the line of a state that changed. All three arguments are words of ours, not of the other side."""
    assert all(_WORD.fullmatch(word) for word in (what, before, after)), "states are words of ours"
    return f"= {what} {before} -> {after}"


def went_wrong(problem: BaseException | msgspec.Struct) -> str:
    """Write the line of an error or a refusal, without its sentence, which is for people and may hold rows of data."""
    if isinstance(problem, msgspec.Struct):
        return line("!", problem)
    fields = problem.fields() if isinstance(problem, FedSODAError) else {}
    shown = [f"{name}={_number(value)}" for name, value in fields.items() if isinstance(value, int | float)]
    if fields.get("step") in _STEPS:
        shown.append(f"step={fields['step']}")
    return " ".join(["!", type(problem).__name__, *shown])


def _fields(message: msgspec.Struct, prefix: str) -> Iterator[str]:
    """Yield name=value of what may be shown; a struct with a digest is shown by that, any other by its fields."""
    for name, kinds in _kinds(type(message)).items():
        value = getattr(message, name)
        if isinstance(value, msgspec.Struct):
            inner = dict(part.partition("=")[::2] for part in _fields(value, ""))
            if "digest" in inner:
                yield f"{prefix}{name}={inner.pop('digest')}"
            yield from (f"{prefix}{name}.{key}={shown}" for key, shown in inner.items())
        elif isinstance(value, int | float):
            yield f"{prefix}{name}={_number(value)}"
        elif isinstance(value, str):
            if Digest in kinds and _DIGEST.fullmatch(value):
                yield f"{prefix}{name}=sha256:{value[:_SHOWN]}…"
            elif value in kinds:
                yield f"{prefix}{name}={value}"
        elif isinstance(value, list | tuple | Mapping):
            yield f"{prefix}{name}={len(value)}"  # how many, not which


@cache
def _kinds(kind: type[msgspec.Struct]) -> dict[str, frozenset[Any]]:
    """Map each field to its type's parts: types of a union, words of a Literal."""
    return {field.name: frozenset(_parts(field.type)) for field in msgspec.structs.fields(kind)}


def _parts(annotation: Any) -> Iterator[Any]:
    inner = get_args(annotation)
    if get_origin(annotation) is Literal or not inner:
        yield from inner or (annotation,)
    for part in inner if get_origin(annotation) is not Literal else ():
        yield from _parts(part)


def _number(value: float) -> str:
    """Write a count as it is, a measurement with three figures, a flag as true or false."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
