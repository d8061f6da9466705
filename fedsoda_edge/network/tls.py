"""Make this device's TLS contexts, in one place for websockets, HTTP and `doctor`: whom to trust, and how a key is pinned.

A pin is the sha256 of the public key that a hub must hold (its SPKI, RFC 7469), as its owner gave it. It takes the place of
certificate authorities, names and dates: whoever gave it knows more of the hub than those can say. So a certificate that is
renewed, swapped or expired changes nothing as long as its key is the pinned one (a hub that was off for months, or a device
with a wrong clock, stays in), and a certificate of another key is refused, whoever vouches for it. Which way TLS goes is
left to `route.py`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.join_link import PIN_BYTES

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes

CA_FILES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
# As hubs print a pin, as curl takes it (sha256//...), as a header of RFC 7469 has it (pin-sha256="..."), as openssl (hex).
_BASE64_PIN = re.compile(r"""(?:(?:pin-)?sha256(?://|/|:|=))?["']?([A-Za-z0-9+/_-]{43})=?["']?""", re.IGNORECASE)
_HEX_PIN = re.compile(r"(?:sha256(?:/|:|=))?((?:[0-9a-f]{2}:?){31}[0-9a-f]{2})", re.IGNORECASE)


@dataclass(frozen=True)
class Trust:
    """The proof that a hub must give before this device tells it anything.

    pin: the sha256 of the SPKI of its TLS key; None: a certificate that an authority vouches for. insecure_http: whether
    plain HTTP may leave this machine.
    """

    pin: bytes | None = None
    insecure_http: bool = False


# --- pins ------------------------------------------------------------------------------------------------------------


def read_pin(text: str) -> bytes:
    """Read a pin as hubs, curl, RFC 7469 and openssl write it.

    Raises:
        UsageProblem: it is none.
    """
    line = text.strip()
    if found := _HEX_PIN.fullmatch(line):
        return bytes.fromhex(found[1].replace(":", ""))
    if found := _BASE64_PIN.fullmatch(line):
        with_padding = found[1].replace("-", "+").replace("_", "/") + "="
        try:
            pin = base64.b64decode(with_padding, validate=True)
        except binascii.Error:
            pin = b""
        if len(pin) == PIN_BYTES:
            return pin
    raise UsageProblem(
        f"the pin has {len(line)} characters and is not one; copy it as the hub prints it at its start: pin='sha256/' and "
        "44 characters"
    )


def pin_text(pin: bytes) -> str:
    """Write a pin: sha256/BASE64."""
    return f"sha256/{base64.b64encode(pin).decode()}"


def shortened(pin: bytes) -> str:
    """Return as much of a pin as people compare."""
    return f"{pin_text(pin)[:19]}…"


def pin_of(public: CertificatePublicKeyTypes) -> bytes:
    """Return the pin of a public key.

    Raises:
        ValueError, UnsupportedAlgorithm: the key is of a kind that nobody pins.
    """
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


class WrongKey(ssl.SSLCertVerificationError):
    """A peer whose certificate is of another key than the pinned one. found: the pin of that key; None: there is none."""

    def __init__(self, wanted: bytes, found: bytes | None) -> None:
        came = "no key that can be pinned" if found is None else f"the key {shortened(found)}"
        super().__init__(1, f"{came} instead of the pinned {shortened(wanted)}")
        self.wanted = wanted
        self.found = found


def _check_key(peer: Any, pin: bytes) -> None:
    """Check the key of the other side of a handshake that is over; it has signed the handshake with it (RFC 8446, 4.4.3).

    Raises:
        WrongKey: it is another one.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.x509 import load_der_x509_certificate

    try:
        found = pin_of(load_der_x509_certificate(peer.getpeercert(binary_form=True) or b"").public_key())
    except (ValueError, TypeError, UnsupportedAlgorithm):  # what OpenSSL takes and `cryptography` does not
        found = None
    if found != pin:
        raise WrongKey(pin, found)


class _PinnedObject(ssl.SSLObject):
    """TLS over memory, as asyncio and anyio use it. The key is checked as the last step of the handshake."""

    pin: bytes  # set by `pinned`
    _is_checked = False

    def do_handshake(self) -> None:
        super().do_handshake()
        _check_key(self, self.pin)
        self._is_checked = True

    def write(self, data: Any) -> int:
        if not self._is_checked:  # OpenSSL would do the handshake by itself, and nobody would look at the key
            self.do_handshake()
        return super().write(data)


class _PinnedSocket(ssl.SSLSocket):
    """TLS on a blocking socket, checked in the same way."""

    pin: bytes
    _is_checked = False

    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        _check_key(self, self.pin)
        self._is_checked = True

    def send(self, data: Any, flags: int = 0) -> int:  # `sendall` and `sendfile` call it
        if not self._is_checked:
            self.do_handshake()
        return super().send(data, flags)

    def write(self, data: Any) -> int:
        if not self._is_checked:
            self.do_handshake()
        return super().write(data)


def pinned(pin: bytes) -> ssl.SSLContext:
    """Return a context that speaks TLS 1.3 to whoever holds this key, and to nobody else.

    A handshake with another peer raises `WrongKey`, before a byte of what is to be sent can leave.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3  # nothing older is offered, so nothing can be agreed on
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # of chain and dates; `_check_key` is what decides
    context.sslobject_class = type("PinnedObject", (_PinnedObject,), {"pin": pin})
    context.sslsocket_class = type("PinnedSocket", (_PinnedSocket,), {"pin": pin})
    return context


def tls_failure(error: BaseException | None) -> ssl.SSLError | None:
    """Find the failure of TLS behind an error of a library; None: it was something else."""
    return next((each for each in _causes(error) if isinstance(each, ssl.SSLError)), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen = set[int]()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


# --- certificate authorities -----------------------------------------------------------------------------------------


def trusted(environment: Mapping[str, str]) -> ssl.SSLContext:
    """Return a context that trusts what the environment names, else this system, else the package certifi.

    Raises:
        UsageProblem: a variable names certificates that cannot be read.
    """
    for name in CA_FILES:
        if value := environment.get(name):
            return _trusting(name, value)
    if value := environment.get("SSL_CERT_DIR"):
        return _trusting("SSL_CERT_DIR", value)
    context = ssl.create_default_context()
    paths = ssl.get_default_verify_paths()
    has_directory = paths.capath is not None and any(Path(paths.capath).iterdir())
    if not (context.cert_store_stats()["x509_ca"] or has_directory):  # a small container, another Linux's Python
        import certifi

        context.load_verify_locations(certifi.where())
    return context


def _trusting(name: str, value: str) -> ssl.SSLContext:
    directories = value.split(os.pathsep) if name == "SSL_CERT_DIR" else [value]
    context = ssl.create_default_context()
    for path in map(Path, directories):
        try:
            if path.is_dir():
                context.load_verify_locations(capath=path)
            else:
                context.load_verify_locations(cafile=path)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise UsageProblem(
                f"{name} names {str(path)!r}, from which no certificates can be read ({error}); name a file of "
                "certificates in PEM form, or unset it"
            ) from error
    return context
