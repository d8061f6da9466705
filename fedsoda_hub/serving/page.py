"""Serve the page of the hub's owner: who may see it, its files, what it shows, and what its owner asks.

The page itself is one HTML file without data; all data comes to whoever is signed in, as JSON and server-sent events. Who is
signed in is `sign_in.py`'s to say, what is shown `feed.py`'s, what is done `actions.py`'s.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import msgspec
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fedsoda_edge.errors import DiskFull, FedSODAError, UsageProblem
from fedsoda_edge.ports.system import is_strangers_connection
from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.serving.actions import Done, OneEdge, OtherRules
from fedsoda_hub.serving.desk import Desk
from fedsoda_hub.serving.sign_in import BegunSession, Session, TooManyTries

STATIC = Path(__file__).with_name("static")
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
MAX_BODY_BYTES = 4096
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
NO_STORE = {**HEADERS, "Cache-Control": "no-store"}
Endpoint = Callable[[Request], Awaitable[Response]]
S = TypeVar("S", bound=msgspec.Struct)


class _Refusal(Exception):
    """An answer other than what was asked for: its HTTP status and a sentence."""

    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        self.reason = reason


class _SecretAsk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request to sign in. secret: that of a sign-in link."""

    secret: str


class _Planned(msgspec.Struct, frozen=True):
    """The plan in the manifest of the hub's own bundle."""

    plan: LayerPlan


class Page:
    """The routes of the page.

    is_here: tells whether a request comes from this machine, and not through a proxy on it. is_admin: tells whether a secret is
    the one in the run's admin.token.
    """

    def __init__(self, desk: Desk, is_here: Callable[[Request], bool], is_admin: Callable[[str], bool]) -> None:
        self._desk = desk
        self._is_here = is_here
        self._is_admin = is_admin
        self._actions: dict[str, tuple[type[msgspec.Struct] | None, Callable[..., Awaitable[Done]]]] = {
            "pause": (None, desk.actions.pause),
            "resume": (None, desk.actions.resume),
            "finish": (None, desk.actions.finish),
            "change": (OtherRules, desk.actions.change),
            "invite": (OneEdge, desk.actions.invite),
            "rebind": (OneEdge, desk.actions.rebind),
            "revoke": (OneEdge, desk.actions.revoke),
        }

    def routes(self, answered: Callable[[Endpoint], Endpoint]) -> list[Route]:
        """Return the routes.

        Args:
            answered: wraps an answer, for defects of the hub's own code.
        """

        def route(path: str, answer: Endpoint, method: str = "GET") -> Route:
            return Route(path, answered(partial(_polite, answer)), methods=[method])

        return [
            route("/", self._index),
            route("/page/session", self._session),
            route("/page/sign-in", self._sign_in, "POST"),
            route("/page/sign-out", self._sign_out, "POST"),
            route("/page/link", self._link, "POST"),
            route("/page/state", self._state),
            route("/page/layers", self._layers),
            route("/page/events", self._events),
            route("/page/do/{action}", self._do, "POST"),
            route("/page/download/{what}", self._download),
            route("/page/static/{name}", self._static),
        ]

    # --- files ---------------------------------------------------------------------------------------------

    async def _index(self, request: Request) -> Response:
        return _file(request, "index.html")

    async def _static(self, request: Request) -> Response:
        return _file(request, request.path_params["name"])

    # --- who it is -----------------------------------------------------------------------------------------

    def _cookie(self, request: Request) -> str:
        return f"__Host-{self._desk.cookie}" if request.url.scheme == "https" else self._desk.cookie

    def _find(self, request: Request) -> Session | None:
        return self._desk.sign_in.find(request.cookies.get(self._cookie(request)))

    async def _needs_no_link(self, request: Request) -> bool:
        # A proxy that adds no header speaks HTTP/1.0 as a rule; no browser does.
        is_direct = self._is_here(request) and request.scope.get("http_version") != "1.0"
        if not is_direct or not self._desk.sign_in.needs_no_link(request.headers.get("host", "")):
            return False
        there, here = request.client, request.scope.get("server")
        if there is None or not here or here[1] is None:
            return False
        return not await asyncio.to_thread(is_strangers_connection, there.port, here[1])

    async def _session(self, request: Request) -> Response:
        """Say who it is; who needs no link is signed in by asking."""
        session = self._find(request)
        if session is not None:
            return _json({"csrf": session.csrf, "run": self._desk.settings.name})
        if await self._needs_no_link(request):
            return self._welcome(request, self._desk.sign_in.begin())
        raise _Refusal(
            401,
            "sign in with a link: `fedsoda-hub open RUN.toml` prints one on the hub's machine; it works once, within 15 minutes",
        )

    def _welcome(self, request: Request, entry: BegunSession) -> Response:
        response = _json({"csrf": entry.session.csrf, "run": self._desk.settings.name})
        response.set_cookie(
            self._cookie(request),
            entry.secret,
            secure=request.url.scheme == "https",
            httponly=True,
            samesite="strict",
            path="/",
        )
        return response

    def _signed_in(self, request: Request) -> Session:
        session = self._find(request)
        if session is None:
            raise _Refusal(401, "the session has ended; sign in with a new link: `fedsoda-hub open RUN.toml`")
        return session

    def _may_change(self, request: Request) -> None:
        """Refuse a change that does not come from this page, in a session, or from who holds the run's admin token."""
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            if not self._is_admin(secret):
                raise _Refusal(401, "this is not the token in the run's admin.token")
            return
        session = self._signed_in(request)
        self._check_origin(request)
        if not _is_equal(request.headers.get("x-csrf-token", ""), session.csrf):
            raise _Refusal(403, "the page is of another session; load it again")

    def _check_origin(self, request: Request) -> None:
        origin, host = request.headers.get("origin"), request.headers.get("host", "")
        if not self._desk.sign_in.is_of_page(origin, host) or request.headers.get("sec-fetch-site", "same-origin") != (
            "same-origin"
        ):
            raise _Refusal(403, "the request comes from another site, so it is not done")

    async def _sign_in(self, request: Request) -> Response:
        self._check_origin(request)
        asked = await _read(request, _SecretAsk)
        try:
            entry = self._desk.sign_in.use_link(asked.secret, request.client.host if request.client else "")
        except TooManyTries:
            raise _Refusal(429, "too many wrong sign-ins come from this address; try again in a minute") from None
        if entry is None:
            raise _Refusal(
                401,
                "this link was used before, is older than 15 minutes, or is of an earlier start of the hub; "
                "`fedsoda-hub open RUN.toml` prints a new one",
            )
        return self._welcome(request, entry)

    async def _sign_out(self, request: Request) -> Response:
        self._may_change(request)
        self._desk.sign_in.end(request.cookies.get(self._cookie(request)))
        response = _json({})
        response.delete_cookie(self._cookie(request), path="/", secure=request.url.scheme == "https")
        return response

    async def _link(self, request: Request) -> Response:
        """Make a sign-in link, for the command `open` alone."""
        if "authorization" not in request.headers:
            raise _Refusal(401, "send the token in the run's admin.token")
        self._may_change(request)
        return _json({"secret": self._desk.sign_in.new_link()})

    # --- what there is to see ------------------------------------------------------------------------------

    async def _state(self, request: Request) -> Response:
        self._signed_in(request)
        return _encoded(await self._desk.feed.state())

    async def _layers(self, request: Request) -> Response:
        """Send the plan of the largest sub-LLM's layers; null before the run is prepared."""
        self._signed_in(request)
        file = self._desk.directory.manifest
        found = msgspec.json.decode(file.read_bytes(), type=_Planned) if file.exists() else None
        return _encoded(None if found is None else found.plan)

    async def _events(self, request: Request) -> Response:
        session = self._signed_in(request)

        async def events() -> AsyncIterator[bytes]:
            async for event in self._desk.feed.follow(lambda: self._desk.sign_in.is_alive(session)):
                yield event

        headers = {**NO_STORE, "X-Accel-Buffering": "no"}  # a proxy that buffers would tell nothing for minutes
        return StreamingResponse(events(), media_type="text/event-stream", headers=headers)

    # --- what is asked -------------------------------------------------------------------------------------

    async def _do(self, request: Request) -> Response:
        self._may_change(request)
        known = self._actions.get(request.path_params["action"])
        if known is None:
            raise _Refusal(404, f"there is no such action; the actions are {', '.join(self._actions)}")
        kind, act = known
        return _encoded(await (act() if kind is None else act(await _read(request, kind))))

    async def _download(self, request: Request) -> Response:
        self._signed_in(request)
        match request.path_params["what"]:
            case "report" | "export" as what:
                made = await self._desk.downloads.make(what)
            case _:
                raise _Refusal(404, "there is no such download; there are report and export")
        return FileResponse(
            made.file,
            media_type=made.media_type,
            filename=made.name,
            headers=NO_STORE,
            background=BackgroundTask(made.forget),
        )


async def _polite(answer: Endpoint, request: Request) -> Response:
    """Endpoint with a sentence where something is refused; a defect is raised."""
    try:
        return await answer(request)
    except _Refusal as refusal:
        return _json({"reason": refusal.reason}, refusal.status)
    except (UsageProblem, DiskFull) as problem:
        return _json({"reason": str(problem)}, 409)
    except FedSODAError as problem:
        return _json({"reason": str(problem)}, 500)
    except ClientDisconnect:
        return Response(status_code=400)


async def _read(request: Request, kind: type[S]) -> S:
    """Read a request's JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise _Refusal(415, "send JSON")
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise _Refusal(413, f"a request has at most {MAX_BODY_BYTES} bytes")
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _Refusal(400, f"this cannot be asked: {error}") from None


def _json(values: dict[str, str], status: int = 200) -> JSONResponse:
    return JSONResponse(values, status, NO_STORE)


def _encoded(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json", headers=NO_STORE)


def _is_equal(one: str, other: str) -> bool:
    return hashlib.sha256(one.encode()).digest() == hashlib.sha256(other.encode()).digest()


@cache
def _files() -> dict[str, tuple[bytes, str, str]]:
    """Read the page's files: name to content, type and tag."""
    found = {}
    for path in sorted(STATIC.iterdir()):
        if path.suffix in TYPES:
            data = path.read_bytes()
            found[path.name] = data, TYPES[path.suffix], f'"{hashlib.sha256(data).hexdigest()[:16]}"'
    return found


def _file(request: Request, name: str) -> Response:
    if name not in _files():
        raise _Refusal(404, "the page has no such file")
    data, kind, tag = _files()[name]
    headers = {**HEADERS, "Cache-Control": "no-cache", "ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=kind, headers=headers)
