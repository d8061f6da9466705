"""Make certificates for servers of tests: that sign themselves or are signed by an authority, of any time and key."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def new_rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@dataclass(frozen=True)
class Authority:
    """A certificate authority. file: its certificate."""

    key: PrivateKey
    certificate: x509.Certificate
    file: Path


def _built(
    subject: str, issuer: str, key: PrivateKey, signer: PrivateKey, days: tuple[float, float], is_authority: bool
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=days[0]))
        .not_valid_after(now + datetime.timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
    )


def new_authority(directory: Path) -> Authority:
    """Make an authority and write its certificate."""
    key, name = new_key(), "An authority that the system trusts"
    made = _built(name, name, key, key, (-1, 1), True).sign(key, hashes.SHA256())
    file = directory / "authority.pem"
    file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return Authority(key, made, file)


def write_certificate(
    directory: Path,
    host: str,
    *,
    key: PrivateKey | None = None,
    days: tuple[float, float] = (-1, 1),
    authority: Authority | None = None,
    password: bytes | None = None,
) -> tuple[Path, Path]:
    """Write a certificate for a host and its key; return their paths.

    Args:
        days: from now, of the first and the last day. authority: None: it signs itself. password: of the key's file.
    """
    directory.mkdir(exist_ok=True)
    key = key or new_key()
    signer, issuer = (key, host) if authority is None else (authority.key, "An authority that the system trusts")
    made = (
        _built(host, issuer, key, signer, days, authority is None)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(signer, hashes.SHA256())
    )
    certificate, secret = directory / "certificate.pem", directory / "key.pem"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    hidden = serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(password)
    secret.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden))
    return certificate, secret
