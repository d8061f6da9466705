"""Find out who listens on a port of this machine that a hub wants for itself, and name it: the run, process and directory.

Nothing secret is sent, and what answers is only named: whether it may be believed does not matter here.
"""

from __future__ import annotations

import os

import msgspec

from fedsoda_edge.ports.processes import command_of, listener_on
from fedsoda_edge.units import one_line

ASK_SECONDS = 2.0


class _Process(msgspec.Struct):
    """The process of a hub, as far as it is named."""

    pid: int
    directory: str


class _Answer(msgspec.Struct):
    """The status of another hub, as far as it is named."""

    run: str
    hub: _Process | None = None


def who_listens(host: str, port: int) -> str:
    """Name whoever listens there: "the hub of run triage (pid 7) in /srv/triage.run has it"; "" where nobody can tell."""
    pid = listener_on(port)
    if pid == os.getpid():
        return "this process listens there already"
    found = _ask(host, port)
    if found is not None:
        process = f" (pid {found.hub.pid})" if found.hub is not None else ""
        place = f" in {one_line(found.hub.directory)}" if found.hub is not None else ""
        return f"the hub of run {one_line(found.run)}{process}{place} listens there"
    return "" if pid is None else f"{command_of(pid)} (pid {pid}) listens there"


def _ask(host: str, port: int) -> _Answer | None:
    """Ask for /v1/status, which a hub tells this machine without a secret."""
    import httpx

    here = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    address = f"[{here}]" if ":" in here else here
    for scheme in ("http", "https"):
        try:
            answer = httpx.get(
                f"{scheme}://{address}:{port}/v1/status", timeout=ASK_SECONDS, trust_env=False, verify=False
            )
            return msgspec.json.decode(answer.content, type=_Answer)
        except httpx.TimeoutException:
            return None
        except (httpx.HTTPError, httpx.InvalidURL, msgspec.MsgspecError, UnicodeDecodeError, OSError):
            continue
    return None
