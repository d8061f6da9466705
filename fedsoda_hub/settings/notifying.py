"""Check what [notify] says together: where notices go, and that they are not read on the way."""

from __future__ import annotations

from urllib.parse import urlsplit

from fedsoda_edge.errors import UsageProblem
from fedsoda_hub.settings.tables import Notify, is_loopback_name


def check_notify(notify: Notify, file: str) -> None:
    """Check the table.

    Raises:
        UsageProblem: the webhook is not an address, or would be posted to in the clear; a key stands alone.
    """
    if notify.command and not notify.command[0].strip():
        raise UsageProblem(
            f"[notify] command in {file} begins with {notify.command[0]!r}; write a program and its arguments, each in "
            'quotes: ["python", "tell.py"]'
        )
    if notify.webhook is None:
        if notify.secret is not None:
            raise UsageProblem(f"[notify] secret in {file} stands without a webhook; name one, or delete secret")
        return
    try:
        url = urlsplit(notify.webhook)
        scheme, host, _ = url.scheme.lower(), url.hostname, url.port
    except ValueError:
        scheme, host = "", None
    if scheme not in ("http", "https") or not host or not notify.webhook.isprintable() or " " in notify.webhook:
        raise UsageProblem(f"[notify] webhook in {file} is not an address; write https://HOST/path")
    if scheme == "http" and not notify.insecure_http and not is_loopback_name(host):
        raise UsageProblem(
            f"[notify] webhook in {file} would be sent to {host} over plain http, where others can read it; write https://, "
            "or insecure_http = true where that network is yours alone"
        )
