"""Read what a command said on a stderr that is no terminal, as people would have seen it on one."""

from __future__ import annotations

import re

_TIMED = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (\w+): ", re.MULTILINE)
_SPOKEN = {"error": "error: ", "notice": "note: "}


def for_people(log: str) -> str:
    """Leave out time and level, but where sentences say them too."""
    return _TIMED.sub(lambda start: _SPOKEN.get(start[1], ""), log)
