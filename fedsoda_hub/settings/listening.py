"""Check what [listen] and [tls] say together: where edges reach the hub, and who encrypts what travels there.

Whether the files of a certificate can be used is `serving/certificates.py`'s, which looks when the hub starts.
"""

from __future__ import annotations

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.join_link import SECRET_BYTES, JoinLink, read_link
from fedsoda_edge.protocol.signatures import KEY_BYTES
from fedsoda_hub.settings.tables import TLS, Listen

_HOW = "write https://HOST, https://HOST:PORT or https://HOST/prefix"


def check_listening(listen: Listen, tls: TLS, speaks_tls: bool, file: str) -> None:
    """Check both tables.

    Raises:
        UsageProblem: an address is none, or a value does not go with another.
    """
    if tls.key is not None and tls.certificate is None:
        raise UsageProblem(
            f"[tls] key = {tls.key!r} in {file} stands without a certificate; name it as [tls] certificate, or delete key"
        )
    if tls.mode == "off" and tls.certificate is not None:
        raise UsageProblem(
            f'[tls] mode = "off" in {file} does not go with certificate = {tls.certificate!r}; delete one of them'
        )
    if listen.public_url is None:
        return
    scheme, address = split_url(listen.public_url, file)
    if scheme == "http" and speaks_tls:
        raise UsageProblem(
            f"[listen] public_url = {listen.public_url!r} in {file} is plain HTTP, but the hub speaks TLS at "
            f'{listen.host}; write https://{address}, or [tls] mode = "off" where a proxy is in front of it'
        )


def split_url(url: str, file: str) -> tuple[str, str]:
    """Split an address of the hub into its scheme and HOST[:PORT][/prefix], as a join link carries it.

    Raises:
        UsageProblem: it is not an address, or one that a join link cannot carry.
    """
    scheme, mark, rest = url.strip().partition("://")
    address = rest.rstrip("/")
    try:
        known = read_link(str(JoinLink((address,), bytes(KEY_BYTES), bytes(SECRET_BYTES)))).addresses
    except (UsageProblem, ValueError):  # ValueError: an open bracket
        known = ()
    if not mark or scheme.lower() not in ("http", "https") or known != (address,):
        shown = rest.rpartition("@")[2]  # a password that was written there stays out of the sentence
        raise UsageProblem(
            f"[listen] public_url = {scheme + mark + shown if mark else url!r} in {file} is not an address of a hub; {_HOW}"
        )
    return scheme.lower(), address
