"""Render a message for the log: `< RoundOffer round=3 alignment=0`. Numbers and digests only; never text or payloads.

`<` received, `>` sent, `=` changed state, `%` keepalive, `!` went wrong.
"""

from __future__ import annotations

import re

import msgspec

_DIGEST = re.compile(r"[0-9a-f]{64}")


def line(mark: str, message: msgspec.Struct, note: str = "") -> str:
    """Return one line for the log. note: what the caller knows beside it, such as whose message it is."""
    words = [mark, type(message).__name__]
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if isinstance(value, bool | int):
            words.append(f"{name}={value}")
        elif isinstance(value, float):
            words.append(f"{name}={value:g}")
        elif isinstance(value, str) and _DIGEST.fullmatch(value):
            words.append(f"{name}=sha256:{value[:8]}…")
    return " ".join([*words, note] if note else words)
