"""Find out that a token or join link was made and written before, so that the same command does not make a second secret.

Only a file that still holds the secret in force counts. Making them is `tokens.py`'s and `devices.py`'s of `run/`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from fedsoda_edge.errors import UsageProblem

if TYPE_CHECKING:
    from fedsoda_hub.run.ledger import Ledger
    from fedsoda_hub.settings.run import RunSettings


def has_token(ledger: Ledger, name: str, out: Path | None) -> bool:
    """Tell whether the file holds the edge's token, which is in force."""
    token = ledger.tokens.find(_first_line(out))
    return token is not None and token.edge == name and not token.revoked


def has_link(settings: RunSettings, ledger: Ledger, name: str, out: Path | None) -> float | None:
    """Return until when the join link in the file lets a device in as this edge, by the ways that lead to the hub now.

    Returns:
        Seconds since 1970; None: there is no such link in it, or a device has used it or can use it no more.
    """
    from fedsoda_edge.protocol.join_link import JoinLink, is_link, read_link
    from fedsoda_edge.protocol.proof import invitation_key
    from fedsoda_hub.run.directory import RunDirectory
    from fedsoda_hub.run.keys import signing_key
    from fedsoda_hub.serving.tls import way_in

    text = _first_line(out)
    if not is_link(text):
        return None
    try:
        link = read_link(text)
    except UsageProblem:  # cut, or changed by hand
        return None
    there = ledger.devices.named(name)
    if there is None or there.invitation != invitation_key(link.secret).public or there.key is not None:
        return None
    way, key = way_in(settings), signing_key(RunDirectory(settings.run_dir).signing_key).public
    is_same_way = link == JoinLink(way.addresses, key, link.secret, way.tls_pin, way.is_plain)
    return there.expires if is_same_way and not there.is_revoked and there.expires > time.time() else None


def _first_line(path: Path | None) -> str:
    """Return the first line of a file; "" where there is none to read."""
    if path is None or not path.is_file():
        return ""
    try:
        with path.open(encoding="ascii") as file:
            return file.readline(4096).strip()
    except (OSError, UnicodeDecodeError):
        return ""
