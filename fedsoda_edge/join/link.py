"""Find the join link that this device is given: as the hub's address, in a file, on stdin, or in FEDSODA_LINK.

It may stand on a command line, which others can read: it is worth nothing once a device has used it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.join_link import MAX_LINK_CHARACTERS, JoinLink, is_link, read_link

NO_HUB = (
    "there is no hub to join; give the join link that `fedsoda-hub invite` printed (or name its file with link_file, or set "
    "FEDSODA_LINK), or the hub's address and a token"
)


def link_or_url(hub: str | None, link_file: str | Path | None, token_file: str | Path | None) -> JoinLink | str:
    """Return the join link that counts, or the URL of a hub that is joined with a token.

    Args:
        hub: a join link or a URL; None: neither was given, so the link is in a file or in FEDSODA_LINK.

    Raises:
        UsageProblem: there is no hub, or more than one way to it; the link is damaged, or its file cannot be read.
    """
    if hub is not None and link_file is not None:
        raise UsageProblem("a hub and link_file were both given; leave one of them out")
    if hub is not None and not is_link(hub):
        return hub
    if token_file is not None and (hub is not None or link_file is not None):
        raise UsageProblem("a join link and token_file were both given; leave one of them out: a link needs no token")
    if hub is not None:
        return read_link(hub)
    if link_file is not None:
        return read_link(_text_of(link_file))
    if given := os.environ.get("FEDSODA_LINK", "").strip():
        return read_link(given)
    raise UsageProblem(NO_HUB)


def is_given(hub: str | None, link_file: str | Path | None) -> bool:
    """Tell whether there is a hub or a join link to go to."""
    return hub is not None or link_file is not None or bool(os.environ.get("FEDSODA_LINK", "").strip())


def without_secret(hub: str) -> str:
    """Return what was given as a hub as people may see it: of a join link, nothing from its # sign on."""
    return f"{hub.partition('#')[0]}#..." if is_link(hub) else hub


def _text_of(link_file: str | Path) -> str:
    if str(link_file) == "-":
        return sys.stdin.readline(MAX_LINK_CHARACTERS + 2)
    try:
        with Path(link_file).open(encoding="utf-8-sig", errors="replace") as file:
            return file.read(MAX_LINK_CHARACTERS + 2)
    except OSError as error:
        raise UsageProblem(
            f"the file of the join link {link_file} cannot be read: {error.strerror}; check the path, or ask the hub's owner"
        ) from error
