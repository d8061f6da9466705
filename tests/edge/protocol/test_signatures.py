"""Signatures are Ed25519's own, for one purpose each; text forms have one way to be written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsoda_edge.protocol.signatures import NotSigned, SigningKey, as_text, fingerprint, from_text, verify

# RFC 8032, section 7.1, test 1: seed and public key.
SEED = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
PUBLIC = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")


def test_the_public_key_is_that_of_rfc_8032() -> None:
    assert SigningKey(SEED).public == PUBLIC


def test_a_signature_proves_its_payload_for_its_purpose_alone() -> None:
    key = SigningKey(SEED)
    signature = key.sign("receipt", b"update 7")
    verify(PUBLIC, "receipt", b"update 7", signature)
    other = SigningKey(bytes(32)).public
    for public, purpose, payload, signed in (
        (PUBLIC, "receipt", b"update 8", signature),
        (PUBLIC, "manifest", b"update 7", signature),
        (other, "receipt", b"update 7", signature),
        (PUBLIC, "receipt", b"update 7", signature[:-1]),
        (PUBLIC, "receipt", b"update 7", bytes(64)),
        (b"short", "receipt", b"update 7", signature),
    ):
        with pytest.raises(NotSigned):
            verify(public, purpose, payload, signed)  # type: ignore[arg-type]


def test_fingerprints_are_four_groups_of_letters_that_people_can_read_out() -> None:
    assert fingerprint(PUBLIC) == "eh7d-dx5b-ksrg-cytl"  # base32 of the first ten bytes of sha256
    assert fingerprint(PUBLIC) != fingerprint(bytes(32))


@given(st.binary(max_size=40))
def test_text_forms_come_back(data: bytes) -> None:
    assert from_text(as_text(data), len(data)) == data


@pytest.mark.parametrize("text", ["AA==", "AB", "A", "A+", "AA AA", "AAA", "ÄA"])
def test_another_way_to_write_one_byte_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="base64url"):
        from_text(text, 1)
