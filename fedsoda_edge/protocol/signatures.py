"""Sign what one side must be able to prove later, with Ed25519 (RFC 8032) as `cryptography` computes it.

Each signature is made for one purpose, so that none of them proves anything else. Where keys are kept is left to the
caller: a hub's is `fedsoda_hub/run/keys.py`'s, a device's `join/identity.py`'s.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY_BYTES = 32  # of a seed and of a public key
SIGNATURE_BYTES = 64
# What is signed: a device's proof that it holds its key, a hub's that it holds its own, that a device holds an invitation,
# that a ticket is the hub's (all of `proof.py`), a manifest, a receipt.
Purpose = Literal["device", "hub", "invitation", "ticket", "manifest", "receipt"]


class NotSigned(ValueError):
    """Bytes without a signature of that key for that purpose."""


class SigningKey:
    """A private key.

    Args:
        seed: 32 random bytes, which are the whole key.
    """

    def __init__(self, seed: bytes) -> None:
        self._seed = seed
        self._private: Ed25519PrivateKey | None = None

    @property
    def public(self) -> bytes:
        """The public key: 32 bytes."""
        return self._key().public_key().public_bytes_raw()

    def sign(self, purpose: Purpose, payload: bytes) -> bytes:
        """Sign a payload; the result has 64 bytes."""
        return self._key().sign(_signed(purpose, payload))

    def _key(self) -> Ed25519PrivateKey:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        if self._private is None:
            self._private = Ed25519PrivateKey.from_private_bytes(self._seed)
        return self._private


def verify(public: bytes, purpose: Purpose, payload: bytes, signature: bytes) -> None:
    """Check that the holder of a public key signed this payload for this purpose.

    Raises:
        NotSigned: it did not, or the key or the signature is none.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _signed(purpose, payload))
    except (InvalidSignature, ValueError):
        raise NotSigned(f"no signature of the key {fingerprint(public)} for a {purpose}") from None


def fingerprint(public: bytes) -> str:
    """Return what people compare keys by: the first 80 bits of the key's sha256, in groups of four letters."""
    letters = base64.b32encode(hashlib.sha256(public).digest()[:10]).decode().lower()
    return "-".join(re.findall("....", letters))


def as_text(data: bytes) -> str:
    """Write bytes as base64url without padding (RFC 4648, section 5)."""
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def from_text(text: str, size: int) -> bytes:
    """Read bytes that `as_text` wrote.

    Raises:
        ValueError: it is not the one way to write `size` bytes.
    """
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars="-_", validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("not base64url") from None
    if len(data) != size or as_text(data) != text:
        raise ValueError(f"not {size} bytes in base64url")
    return data


def _signed(purpose: Purpose, payload: bytes) -> bytes:
    return b"fedsoda " + purpose.encode() + b"\0" + payload
