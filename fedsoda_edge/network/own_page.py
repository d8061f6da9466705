"""Serve a page to this machine alone, for who sits at it: a few files, and one JSON that is asked for again and again.

A site that the browser visits cannot read it: the Host header must be this machine's (DNS rebinding), nothing is allowed to
other origins, and nothing can be changed here. What the page shows is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from fedsoda_edge.errors import UsageProblem

REQUEST_SECONDS = 10.0  # in which a request must be whole
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Served:
    """The answer of one path. read: makes the bytes at each request."""

    content_type: str
    read: Callable[[], bytes]


class OwnPage(ThreadingHTTPServer):
    """The server, on 127.0.0.1.

    Args:
        port: 0: any that is free.
        paths: what there is.

    Raises:
        UsageProblem: the port is in use, or this user may not take it.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int, paths: Mapping[str, Served]) -> None:
        self.paths = paths
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise UsageProblem(f"port {port} cannot be used ({why}); choose another with --port") from error

    @property
    def hosts(self) -> set[str]:
        """The Host headers that are this page's."""
        return {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing where a browser went away."""


class _Handler(BaseHTTPRequestHandler):
    """One connection of a browser."""

    server: OwnPage
    server_version = "fedsoda"
    sys_version = ""
    timeout = REQUEST_SECONDS

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def _answer(self, *, has_body: bool) -> None:
        if self.headers.get_all("Host") is None or self.headers.get_all("Host") != [self.headers["Host"]]:
            return self._give(400, "text/plain; charset=utf-8", b"one Host header is needed\n", has_body)
        if self.headers["Host"].lower() not in self.server.hosts:
            return self._give(403, "text/plain; charset=utf-8", b"this page is for this machine alone\n", has_body)
        served = self.server.paths.get(self.path)
        if served is None:
            return self._give(404, "text/plain; charset=utf-8", b"there is no such page\n", has_body)
        return self._give(200, served.content_type, served.read(), has_body)

    def _give(self, status: int, content_type: str, data: bytes, has_body: bool) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": content_type, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if has_body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the terminal quiet: the page asks every two seconds."""
