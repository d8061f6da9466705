"""Say where devices reach a run's hub, for its join links."""

from __future__ import annotations

import platform
from urllib.parse import urlsplit

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.ports.console import note
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.settings.run import RunSettings

EVERYWHERE = ("0.0.0.0", "::")


def reached_at(settings: RunSettings) -> tuple[tuple[str, ...], bytes | None, bool]:
    """Return (addresses HOST:PORT, the pin of the hub's own TLS key or None, whether it speaks plain HTTP).

    Raises:
        UsageProblem: [listen] port = 0, and no hub serves the run.
    """
    host, port = settings.listen.host, settings.listen.port
    if port == 0:
        address = RunDirectory(settings.run_dir).address
        port = (urlsplit(address.read_text(errors="replace")).port if address.exists() else 0) or 0
        if port == 0:
            raise UsageProblem(
                "[listen] port = 0 takes any free port, so nobody knows it before the hub runs; choose one, or start the hub"
            )
    if host in EVERYWHERE:
        host = platform.node() or "localhost"
        note(f"note: [listen] has no address that others know, so the link names this machine, {host}:{port}")
    return (f"[{host}]:{port}" if ":" in host else f"{host}:{port}",), None, True
