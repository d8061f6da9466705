"""Write and read what a hub signs: which bundles of a run an edge may fetch, and that it accepted an update.

A statement travels as the JSON text that was signed, byte for byte, so that nobody has to agree on how JSON is written.
Whether an edge believes one is left to `join/trust.py`, with which key a hub signs to its `serving/signer.py`.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from fedsoda_edge.protocol.messages import BlobRef, Digest, EdgeId, Signed
from fedsoda_edge.protocol.signatures import (
    KEY_BYTES,
    SIGNATURE_BYTES,
    NotSigned,
    Purpose,
    SigningKey,
    as_text,
    from_text,
    verify,
)

MAX_TEXT_CHARACTERS = 16 << 10


class Statement(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The root of what is signed. Unknown fields are ignored, so that a newer hub may say more."""


class BundleStatement(Statement, frozen=True):
    """The sub-LLMs of a run, which are all that an edge may fetch of it.

    version: grows when other layers are drawn, and never falls. signed_at, expires: seconds since 1970 by the hub's clock.
    manifests: of each size class, the largest first. mirrors: where files of the bundle lie too, by digest.
    """

    run_id: str
    version: int
    signed_at: int
    expires: int
    manifests: tuple[BlobRef, ...]
    mirrors: tuple[str, ...] = ()


class ReceiptStatement(Statement, frozen=True):
    """The update that the hub has accepted. accepted_at: seconds since 1970 by the hub's clock, when it was signed."""

    run_id: str
    round: int
    edge: EdgeId
    digest: Digest
    num_examples: int
    accepted_at: int


S = TypeVar("S", BundleStatement, ReceiptStatement)


def sign(key: SigningKey, statement: BundleStatement | ReceiptStatement) -> Signed:
    """Sign a statement for its purpose."""
    text = msgspec.json.encode(statement)
    signature = key.sign(_purpose(type(statement)), text)
    return Signed(text=text.decode(), key=as_text(key.public), signature=as_text(signature))


def key_of(signed: Signed) -> bytes:
    """Return the public key that a statement names as its signer's; whether it is, `read` finds out.

    Raises:
        NotSigned: it is not a key.
    """
    try:
        return from_text(signed.key, KEY_BYTES)
    except ValueError as error:
        raise NotSigned(f"the signer's key is {error}") from None


def read(signed: Signed, key: bytes, kind: type[S]) -> S:
    """Return what the holder of this key signed.

    Raises:
        NotSigned: the key did not sign this text for this purpose, or the text is not such a statement.
    """
    if len(signed.text) > MAX_TEXT_CHARACTERS:
        raise NotSigned(f"a statement has {len(signed.text)} characters, and at most {MAX_TEXT_CHARACTERS} are read")
    try:
        verify(key, _purpose(kind), signed.text.encode(), from_text(signed.signature, SIGNATURE_BYTES))
        return msgspec.json.decode(signed.text, type=kind)
    except NotSigned:
        raise
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise NotSigned(f"it cannot be read as {kind.__name__} with a signature ({error!s:.120})") from None


def _purpose(kind: type[Statement]) -> Purpose:
    return "manifest" if kind is BundleStatement else "receipt"
