"""Write bytes, seconds and counts as people do, and read them back. Which option a text comes from is the caller's."""

from __future__ import annotations

import math
import re

from fedsoda_edge.errors import UsageProblem

# Control characters, and what turns the direction of writing or ends a line: a terminal or a log would obey them.
_STEERING = {
    code: "\ufffd"
    for first, last in ((0, 0x1F), (0x7F, 0x9F), (0x61C, 0x61C), (0x200E, 0x200F), (0x2028, 0x202E), (0x2066, 0x2069))
    for code in range(first, last + 1)
}
MOST_SAID = 400  # characters of what another side says in its own words
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_seconds(text: str, option: str) -> float:
    """Read a time such as "90s", "30m", "1.5h" or "7d", in seconds.

    Args:
        option: the name by which the caller knows the text, for the error.

    Raises:
        UsageProblem: the text is not a time above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd])\s*", text.lower())
    if match is None or not float(match[1]):
        raise UsageProblem(f"{option} {text!r} is not a time; write it as 90s, 30m, 1h or 7d")
    return float(match[1]) * _UNITS[match[2]]


def one_line(text: str, most: int = MOST_SAID) -> str:
    """Write what another side says in its own words as a part of one line, cut after `most` characters."""
    shown = text[: most + 1].translate(_STEERING)
    return shown if len(text) <= most else f"{shown[: most - 1]}…"


def counted(number: int, noun: str, plural: str = "") -> str:
    """Write a number with its noun: "1 edge", "1,200 edges".

    Args:
        plural: "": the noun with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def finite(value: object) -> object:
    """Replace each number that is not finite by None, in lists and dicts too: JSON has none, and what is printed is JSON."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: finite(one) for key, one in value.items()}
        case list() | tuple():
            return [finite(one) for one in value]
        case _:
            return value


def human_bytes(size: float) -> str:
    """Write a size with three figures in the unit that suits it: 1536 is "1.50 KiB"."""
    if size < 1024:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        if size < 1000 or unit == "TiB":
            break
    return f"{size:.{2 if size < 10 else 1 if size < 100 else 0}f} {unit}"


def parse_bytes(text: str, option: str) -> int:
    """Read a size such as "8GB", "500 MiB" or "1.5T", in bytes; KB is 1000, KiB and K are 1024.

    Args:
        option: the name by which the caller knows the text, for the error.

    Raises:
        UsageProblem: the text is not a size.
    """
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d+)?)\s*(?:([kmgt])(i?b)?|b)?\s*", text.lower())
    if match is None:
        raise UsageProblem(f"{option} {text!r} is not a size; write it as 8GB, 500MiB or 2T")
    number, unit, kind = match.groups()
    return int(float(number) * (1000 if kind == "b" else 1024) ** " kmgt".index(unit or " "))


def human_seconds(seconds: float) -> str:
    """Write seconds in the unit that suits them: "75 s", "7 min", "2.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
