"""Refuse a tokenizer.json with which the library that reads it would end the process, or fill its memory.

The library is in Rust: where it asks for memory that is not there, no exception comes, and the process is gone. All other
mistakes in a tokenizer.json are its own business.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator
from typing import Any

from fedsoda_edge.errors import UsageProblem

MOST_GROWTH = 10_000  # times that a text may grow by what is put in the place of something shorter
_SMALL = 2.0  # growth that is not counted: a letter with an accent may become two, in a long list of them
_ADVICE = "ask the hub's owner to correct it"


def check_tokenizer_json(text: str) -> None:
    """Check what would end the process. What is not JSON is left to the library, which says so.

    Raises:
        UsageProblem: as above.
    """
    if not any(f'"{kind}"' in text for kind in ("Precompiled", "Replace", "Prepend")):
        return
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return
    growth = 1.0
    for one in _objects(whole):
        match one.get("type"):
            case "Precompiled":
                _check_charsmap(one.get("precompiled_charsmap"))
            case "Replace":
                pattern = one.get("pattern")
                found = pattern.get("String") if isinstance(pattern, dict) else None
                growth *= _growth(one.get("content"), len(found) if isinstance(found, str) else 1)
            case "Prepend":
                growth *= _growth(one.get("prepend"), 1)
    if growth > MOST_GROWTH:
        raise UsageProblem(
            f"the model's tokenizer.json makes a text up to {growth:.0e} times as long, and at most {MOST_GROWTH} times is "
            f"allowed; {_ADVICE}"
        )


def _growth(content: object, length: int) -> float:
    grown = len(content) / max(1, length) if isinstance(content, str) else 1.0
    return grown if grown > _SMALL else 1.0


def _check_charsmap(text: object) -> None:
    """Compare the size of the trie that a table of characters announces with its bytes."""
    try:
        table = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError):
        return
    announced = int.from_bytes(table[:4], "little")
    if announced > len(table) - 4:
        raise UsageProblem(
            f"the model's tokenizer.json announces a table of {announced} bytes where {max(0, len(table) - 4)} are; {_ADVICE}"
        )


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Yield all objects of JSON, at any depth; the vocabulary's own values are no objects, and are passed over."""
    rest = [value]
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            yield one
            rest += [part for part in one.values() if isinstance(part, dict | list)]
        elif isinstance(one, list):
            rest += [part for part in one if isinstance(part, dict | list)]
