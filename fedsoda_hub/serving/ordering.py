"""Ask the hub that serves a run for its status and what its owner wants, from a command on its machine, with the secret in the run's admin.token.

What a hub answers is `monitoring.py`'s and `page.py`'s.
"""

from __future__ import annotations

import json
import os
import ssl
from pathlib import Path

import httpx
import msgspec

from fedsoda_edge.errors import HubUnreachable, UsageProblem
from fedsoda_edge.network import tls
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.status import LiveStatus
from fedsoda_hub.serving.tls import way_in
from fedsoda_hub.settings.run import RunSettings

ANSWER_SECONDS = 30.0
STATUS_SECONDS = 5.0


def order(directory: RunDirectory, path: str, body: msgspec.Struct | None = None) -> dict[str, object]:
    """Post a request to the hub that serves this run, and return its answer.

    Args:
        path: the route, such as /page/do/pause.

    Raises:
        UsageProblem: no hub serves the run, or it does not do it, and why; or this user may not read the secret.
        HubUnreachable: the hub does not answer.
    """
    try:
        url = _from_here(directory.address.read_text(errors="replace").strip())
        secret = directory.admin_token.read_text(encoding="ascii").strip()
        pin = directory.tls_pin.read_text(errors="replace") if url.startswith("https://") else ""
    except FileNotFoundError:
        raise UsageProblem(f"no hub serves {directory.path.name} now; start it with `fedsoda-hub serve`") from None
    except OSError as error:
        raise UsageProblem(
            f"{error.filename} cannot be read ({error.strerror}); run this as the user whom the run's directory belongs to"
        ) from error
    verify: ssl.SSLContext | bool = tls.pinned(tls.read_pin(pin)) if pin else True
    try:
        answer = httpx.post(
            f"{url}{path}",
            headers={"Authorization": f"Bearer {secret}", "Content-Type": "application/json"},
            content=b"{}" if body is None else msgspec.json.encode(body),
            timeout=ANSWER_SECONDS,
            trust_env=False,
            verify=verify,
        )
        found = json.loads(answer.content)
    except (httpx.HTTPError, ValueError) as error:
        raise HubUnreachable(
            f"the hub at {url} does not answer ({error or type(error).__name__}); try again"
        ) from error
    if answer.status_code != 200:
        raise UsageProblem(str(found.get("reason", f"the hub answered with status {answer.status_code}")))
    return dict(found)


def ask_running_hub(directory: RunDirectory) -> LiveStatus | None:
    """Ask the hub that serves this run on this machine for its status; None: none does, or another directory's answers."""
    if not directory.address.exists():
        return None
    url = _from_here(directory.address.read_text(errors="replace"))
    try:
        secret = directory.admin_token.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):  # of another user; from its own machine a hub answers without it
        secret = ""
    verify: ssl.SSLContext | bool = False
    try:
        if url.startswith("https://"):  # the secret goes to who holds the hub's key, and to nobody else
            verify = tls.pinned(tls.read_pin(directory.tls_pin.read_text(errors="replace")))
        answer = httpx.get(
            f"{url}/v1/status",
            headers={"Authorization": f"Bearer {secret}"} if secret else {},
            timeout=STATUS_SECONDS,
            trust_env=False,
            verify=verify,
        )
        found = msgspec.json.decode(answer.content, type=LiveStatus) if answer.status_code == 200 else None
        # A copy of a run has its id, too: a hub that was left running in another checkout is not this one's.
        is_other = found is not None and found.hub is not None and not _is_same(found.hub.directory, directory.path)
        return None if is_other else found
    except (
        httpx.HTTPError,
        httpx.InvalidURL,
        ValueError,
        OSError,
        UsageProblem,
    ):  # a killed hub leaves its address, and others may take the port
        return None


def _is_same(one: str, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _from_here(url: str) -> str:
    """Return the URL of a hub on this machine, where it listens on all addresses."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def page_url(settings: RunSettings, directory: RunDirectory) -> str:
    """Return the address of the owner's page, as a browser reaches it, without a slash at its end.

    Raises:
        UsageProblem: only a proxy's owner knows it.
    """
    if settings.listen.is_loopback and settings.listen.public_url is None:
        return _from_here(directory.address.read_text(errors="replace").strip())
    return way_in(settings).urls[0].rstrip("/")
