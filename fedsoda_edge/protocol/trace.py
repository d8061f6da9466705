"""A message as one line of a log: its name, numbers and digests. Never text, payloads or secrets. Pure.

`<` came, `>` went, `=` a state changed, `%` keeps a connection alive, `!` went wrong.
"""

from __future__ import annotations

import re

import msgspec

_DIGEST = re.compile(r"[0-9a-f]{64}")


def line(mark: str, message: msgspec.Struct, note: str = "") -> str:
    """Return `< RoundOffer round=3 view.digest=sha256:9f2c…`; `note` is added as it is."""
    words = [mark, type(message).__name__, *_fields(message, ""), *([note] if note else [])]
    return " ".join(words)


def _fields(message: msgspec.Struct, path: str) -> list[str]:
    found: list[str] = []
    for name in message.__struct_fields__:
        value = getattr(message, name)
        match value:
            case bool() | int() | float():
                found.append(f"{path}{name}={value:.4g}" if isinstance(value, float) else f"{path}{name}={value}")
            case str() if _DIGEST.fullmatch(value):
                found.append(f"{path}{name}=sha256:{value[:4]}…")
            case msgspec.Struct():
                found += _fields(value, f"{path}{name}.")
            case _:  # text, or more of the same
                pass
    return found
