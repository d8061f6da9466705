"""Say what the address of a mirror is, and where below it a file of the bundle lies. Fetching is `network/mirror.py`'s."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

MAX_MIRRORS = 8  # of a run
MAX_CHARACTERS = 512
_WRITTEN = re.compile(r"https?://[\x21-\x7e]+", re.IGNORECASE)  # no blanks, no control characters


def is_mirror(url: str) -> bool:
    """Tell whether this is a URL of a directory that a plain HTTP server serves."""
    if len(url) > MAX_CHARACTERS or not _WRITTEN.fullmatch(url) or "?" in url or "#" in url or "\\" in url:
        return False
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and "@" not in parts.netloc and parts.port != 0
    except ValueError:  # a port above 65535 or without digits, an open bracket
        return False


def file_url(mirror: str, digest: str) -> str:
    """Return where a mirror has the file with this digest."""
    return f"{mirror.rstrip('/')}/{digest}"
