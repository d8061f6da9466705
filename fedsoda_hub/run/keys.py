"""Keep the hub's keys of a run. What they sign is left to others."""

from __future__ import annotations

import secrets
from pathlib import Path

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.ports.disk import write_once
from fedsoda_edge.protocol.signatures import KEY_BYTES, SigningKey


def signing_key(path: Path) -> SigningKey:
    """Read the key by which devices know this hub, and make it the first time: 32 random bytes in a file of mode 0600.

    Raises:
        UsageProblem: the file cannot be read or written, or does not hold a key.
        DiskFull: the disk has no space left.
    """
    try:
        if not path.exists():
            write_once(path, secrets.token_bytes(KEY_BYTES), 0o600)
        seed = path.read_bytes()
    except OSError as error:
        raise UsageProblem(
            f"the hub's key {path} cannot be used ({error.strerror}); run this as the user whom the run's directory belongs to"
        ) from error
    if len(seed) != KEY_BYTES:
        raise UsageProblem(
            f"the hub's key {path} has {len(seed)} bytes instead of {KEY_BYTES}: it was cut or changed; put it back from a "
            "copy, since devices that joined know the hub by it"
        )
    return SigningKey(seed)
