"""Keep the key by which hubs know this device, and where each hub was reached last.

The key is made when the device first has a join link; a hub binds the link to it (`protocol/proof.py`). Afterwards the key
alone counts, so that a link that was used, or is too old, still names the hub.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence
from pathlib import Path

from fedsoda_edge.errors import DiskFull, UsageProblem
from fedsoda_edge.join.home import Home
from fedsoda_edge.ports.disk import write_durably, write_once
from fedsoda_edge.protocol.join_link import JoinLink
from fedsoda_edge.protocol.signatures import KEY_BYTES, SigningKey, fingerprint


def device_key(home: Home) -> SigningKey:
    """Read the device's key, and make it the first time: 32 random bytes in a file of mode 0600.

    Raises:
        UsageProblem: the file is damaged, or the directory cannot be used.
        DiskFull: the disk has no space left.
    """
    with home.usable():
        if not home.device_key.exists():
            write_once(home.device_key, secrets.token_bytes(KEY_BYTES), 0o600)
        seed = home.device_key.read_bytes()
    if len(seed) != KEY_BYTES:
        raise UsageProblem(
            f"the device's key {home.device_key} has {len(seed)} bytes instead of {KEY_BYTES}: it was cut or changed; put it "
            "back from a copy, or delete it and ask the hub's owner for `fedsoda-hub rebind`"
        )
    return SigningKey(seed)


def addresses(home: Home, link: JoinLink) -> Sequence[str]:
    """Return the hub's URLs in the order in which to try them: where it was reached last comes first."""
    last = ""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        last = _place(home, link).read_text(encoding="ascii").strip()
    return sorted(link.urls, key=lambda url: url != last)


def reached(home: Home, link: JoinLink, url: str) -> None:
    """Remember where the hub of this link was reached; a disk that does not take it changes nothing."""
    if len(link.addresses) > 1 and addresses(home, link)[0] != url:
        with contextlib.suppress(OSError, DiskFull):
            write_durably(_place(home, link), url.encode())


def _place(home: Home, link: JoinLink) -> Path:
    return home.hubs / fingerprint(link.hub_key)
