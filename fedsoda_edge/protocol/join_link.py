"""Write and read join links: one line with all that a device needs to join one hub and to know it from any other.

    fedsoda://HOST[:PORT][/prefix]/#k=KEY&s=SECRET[&t=PIN][&a=HOST[:PORT][/prefix]...][&plain]

The fragment of an address is never sent to a server, nor are the parts of this one: k is the hub's public key (Ed25519),
s the invitation's secret, t the sha256 of the public key of the hub's own TLS (SPKI, RFC 7469), a another address of the
same hub; `plain` says that the hub speaks plain HTTP, as on loopback. Keys and digests are base64url.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.signatures import KEY_BYTES, as_text, from_text
from fedsoda_edge.units import one_line

SCHEME = "fedsoda"
SECRET_BYTES = 24
PIN_BYTES = 32
MAX_LINK_CHARACTERS = 2048
MAX_ADDRESSES = 8
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?(/[A-Za-z0-9._~/-]*)?")
_AGAIN = "copy the whole line that `fedsoda-hub invite` printed, or ask the hub's owner for a new one"


@dataclass(frozen=True)
class JoinLink:
    """A join link, taken apart.

    addresses: HOST[:PORT][/prefix] of the hub, the first one first. hub_key: its public key, 32 bytes. secret: of the
    invitation, 24 bytes. tls_pin: sha256 of the SPKI of the hub's own TLS key; None: a certificate authority vouches for
    what answers. is_plain: the hub speaks plain HTTP.
    """

    addresses: tuple[str, ...]
    hub_key: bytes
    secret: bytes
    tls_pin: bytes | None = None
    is_plain: bool = False

    @property
    def urls(self) -> tuple[str, ...]:
        """The hub's addresses as URLs."""
        scheme = "http" if self.is_plain else "https"
        return tuple(f"{scheme}://{address}" for address in self.addresses)

    def __str__(self) -> str:
        first, *others = self.addresses
        parts = [f"k={as_text(self.hub_key)}", f"s={as_text(self.secret)}"]
        parts += [f"t={as_text(self.tls_pin)}"] if self.tls_pin is not None else []
        parts += [f"a={address}" for address in others]
        parts += ["plain"] if self.is_plain else []
        return f"{SCHEME}://{first}/#{'&'.join(parts)}"

    def __repr__(self) -> str:  # secrets never reach a log or a traceback
        return f"JoinLink({', '.join(self.addresses)})"


def is_link(text: str) -> bool:
    """Tell whether this is meant as a join link, whole or damaged."""
    return _line(text).lower().startswith(f"{SCHEME}:")


def read_link(text: str) -> JoinLink:
    """Take a join link apart.

    Raises:
        UsageProblem: it is not one, or a part of it was lost or changed on the way. The secret is not in the sentence.
    """
    line = _line(text)
    if len(line) > MAX_LINK_CHARACTERS:
        raise UsageProblem(
            f"the join link has {len(line)} characters, but at most {MAX_LINK_CHARACTERS} are one; {_AGAIN}"
        )
    try:
        parts = urlsplit(line)
    except ValueError as error:  # brackets of no address, letters that become a / or a : in another form
        raise UsageProblem(f"the join link names no host ({one_line(str(error))}); {_AGAIN}") from None
    if parts.scheme != SCHEME:
        raise UsageProblem(f"a join link begins with {SCHEME}://, this one with {line[:12]!r}; {_AGAIN}")
    found: dict[str, list[str]] = {}
    for part in parts.fragment.split("&"):
        key, _, value = part.partition("=")
        found.setdefault(key, []).append(value)
    addresses = [f"{parts.netloc}{parts.path}".rstrip("/"), *found.get("a", [])]
    if len(addresses) > MAX_ADDRESSES or not all(_is_address(address) for address in addresses):
        raise UsageProblem(f"the join link does not name a host as HOST, HOST:PORT or HOST/prefix; {_AGAIN}")
    pin = found.get("t")
    return JoinLink(
        addresses=tuple(addresses),
        hub_key=_bytes(found.get("k"), KEY_BYTES, "the hub's key"),
        secret=_bytes(found.get("s"), SECRET_BYTES, "the secret"),
        tls_pin=_bytes(pin, PIN_BYTES, "the pin of the hub's TLS key") if pin is not None else None,
        is_plain="plain" in found,
    )


def _line(text: str) -> str:
    """Return a link without what mails and chats put around it."""
    return text.strip().strip("<>\"'").strip()


def _is_address(text: str) -> bool:
    match = _ADDRESS.fullmatch(text)
    return match is not None and int((match[2] or ":1")[1:]) in range(1, 65536)


def _bytes(values: list[str] | None, size: int, what: str) -> bytes:
    if values is None or len(values) != 1:
        raise UsageProblem(f"the join link lacks {what} (it may end at its # sign); {_AGAIN}")
    try:
        return from_text(values[0], size)
    except ValueError:
        raise UsageProblem(
            f"{what} in the join link has {len(values[0])} characters and is damaged; {_AGAIN}"
        ) from None
