"""Show a join at a glance on a page of this machine: `fedsoda-edge status --web`. The server is `network/own_page.py`'s."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from importlib.resources import files
from typing import TYPE_CHECKING

import msgspec

from fedsoda_edge.ports.console import note

if TYPE_CHECKING:
    from fedsoda_edge.join.glance import Glance
    from fedsoda_edge.network.own_page import OwnPage

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}


def made_page(look: Callable[[], Glance], port: int) -> OwnPage:
    """Make the page's server, which answers when it is told to serve.

    Raises:
        UsageProblem: the port cannot be used.
    """
    from fedsoda_edge.network.own_page import OwnPage, Served

    lock = threading.Lock()

    def facts() -> bytes:
        with lock:  # the looks keep what they read
            return msgspec.json.encode(look())

    folder = files("fedsoda_edge.cli").joinpath("page")
    paths = {path: Served(kind, folder.joinpath(name).read_bytes) for path, (name, kind) in FILES.items()}
    return OwnPage(port, {**paths, "/facts.json": Served("application/json", facts)})


def serve_page(look: Callable[[], Glance], port: int) -> None:
    """Serve the page until Ctrl+C.

    Raises:
        UsageProblem: the port cannot be used.
    """
    with made_page(look, port) as page:
        note(
            f"the join of this device is shown at {page.url} to this machine alone; Ctrl+C ends this page, not the join"
        )
        with contextlib.suppress(KeyboardInterrupt):
            page.serve_forever()
