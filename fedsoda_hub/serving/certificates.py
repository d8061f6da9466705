"""Make the key and the certificate of a hub's own TLS, and read an owner's own PEM files.

The key is made once and stays, since devices pin it; a certificate is made whenever one is needed. What is done with
both is left to `tls.py`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.network.tls import pin_of
from fedsoda_edge.ports.disk import write_durably

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

VALID = timedelta(days=90)
RENEWED = timedelta(days=30)  # before the end
BACKDATED = timedelta(days=1)  # for clocks that are behind; who has pinned the key looks at no date


@dataclass(frozen=True)
class HubCertificate:
    """A certificate and its key, read and checked.

    leaf: the first certificate of the chain, which is the hub's. content: what tells this pair from another.
    """

    leaf: x509.Certificate
    content: bytes

    @property
    def pin(self) -> bytes:
        """The pin of the key."""
        return pin_of(self.leaf.public_key())

    @property
    def valid_until(self) -> datetime:
        """The end of the certificate."""
        return self.leaf.not_valid_after_utc

    @property
    def vouches_for_itself(self) -> bool:
        """Whether no authority signed the certificate, so that devices must pin the key."""
        from cryptography.exceptions import InvalidSignature

        try:
            self.leaf.verify_directly_issued_by(self.leaf)
        except (
            ValueError,
            TypeError,
            InvalidSignature,
        ):  # another issuer, a key that signs nothing, another's signature
            return False
        return True


# --- the hub's own ---------------------------------------------------------------------------------------------------


def own_key(path: Path) -> EllipticCurvePrivateKey:
    """Read the hub's own TLS key, ECDSA over P-256, and make it the first time in a file of mode 0600.

    Raises:
        UsageProblem: the file cannot be read or written, or holds no such key.
        DiskFull: the disk has no space left.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        if not path.exists():
            made = ec.generate_private_key(ec.SECP256R1()).private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            write_durably(path, made, 0o600)
        data = path.read_bytes()
    except OSError as error:
        raise UsageProblem(
            f"the hub's TLS key {path} cannot be used ({error.strerror}); run this as the user whom the run's directory "
            "belongs to"
        ) from error
    try:
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise UsageProblem(
            f"the hub's TLS key {path} has {len(data)} bytes and does not hold a key over P-256: it was cut or changed; put it back "
            "from a copy, since devices pin it, or delete it and give every device the new pin"
        )
    return key


def own_pin(path: Path) -> bytes:
    """Return the pin of the hub's own key, which is made the first time.

    Raises:
        UsageProblem, DiskFull: as in `own_key`.
    """
    return pin_of(own_key(path).public_key())


def write_certificate(key_file: Path, certificate_file: Path, names: Iterable[str], now: datetime) -> HubCertificate:
    """Make a certificate that the hub's own key signs itself, and write it.

    Args:
        names: hosts and IP addresses at which the hub is reached.

    Raises:
        UsageProblem, DiskFull: as in `own_key`.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding
    from cryptography.x509.oid import ExtendedKeyUsageOID

    key = own_key(key_file)
    public = key.public_key()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "FedSODA hub")])
    identifier = x509.SubjectKeyIdentifier.from_public_key(public)
    others = "content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign encipher_only"
    usage = x509.KeyUsage(digital_signature=True, decipher_only=False, **dict.fromkeys(others.split(), False))
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + VALID)
        .add_extension(x509.SubjectAlternativeName(list(_general_names(names))), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier(identifier.digest, None, None), critical=False)
        .sign(key, hashes.SHA256())
    )
    data = made.public_bytes(Encoding.PEM)
    try:
        write_durably(certificate_file, data)
    except OSError as error:
        raise UsageProblem(
            f"the hub's certificate {certificate_file} cannot be written ({error.strerror}); run this as the user whom the "
            "run's directory belongs to"
        ) from error
    return HubCertificate(made, data)


def _general_names(names: Iterable[str]) -> Iterable[x509.GeneralName]:
    from cryptography import x509

    for name in dict.fromkeys(names):
        try:
            yield x509.IPAddress(ipaddress.ip_address(name.strip("[]").partition("%")[0]))
        except ValueError:
            if name.isascii():
                yield x509.DNSName(name)


# --- the owner's -----------------------------------------------------------------------------------------------------


def read_certificate(certificate_file: Path, key_file: Path, now: datetime) -> HubCertificate:
    """Read an owner's certificate, its chain and its key, and check that a hub can serve with them now.

    Raises:
        UsageProblem: a file cannot be read, holds no certificate or key, the key is another one's or has a passphrase, or
            the certificate is of another time.
    """
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    chain, secret = _read("certificate", certificate_file), _read("key", key_file)
    try:
        leaf = x509.load_pem_x509_certificates(chain)[0]
        public = leaf.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageProblem(
            f"[tls] certificate: {certificate_file} holds no certificate that can be read; name a PEM file that "
            "begins with the hub's own certificate (of certbot, fullchain.pem)"
        ) from error
    try:
        key = load_pem_private_key(secret, None)
    except TypeError:
        raise UsageProblem(
            f"[tls] key: {key_file} has a passphrase, which a hub that starts by itself cannot ask for; write the key without "
            "one (openssl pkey -in KEY -out NEW)"
        ) from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageProblem(
            f"[tls] key: {key_file} holds no private key that can be read; name the PEM file of the certificate's "
            "key (of certbot, privkey.pem)"
        ) from error
    spki = [each.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) for each in (key.public_key(), public)]
    if spki[0] != spki[1]:
        raise UsageProblem(
            f"[tls] key: {key_file} is not the key of the first certificate in {certificate_file}; name the two files that "
            "were made together"
        )
    if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
        which, at = (
            ("expired", leaf.not_valid_after_utc)
            if now > leaf.not_valid_after_utc
            else ("is not valid before", leaf.not_valid_before_utc)
        )
        raise UsageProblem(
            f"[tls] certificate: {certificate_file} {which} {_day(at)}, and it is {_day(now)}; renew it, or set this "
            "machine's clock"
        )
    return HubCertificate(leaf, chain + secret)


def _read(key: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageProblem(
            f"[tls] {key}: {path} cannot be read ({error.strerror}); correct the path, which is relative to the RUN.toml's "
            "directory, or let the user that the hub runs as read it"
        ) from error


def _day(when: datetime) -> str:
    return f"{when.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
