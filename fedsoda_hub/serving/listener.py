"""Listen on one port: /v1/session (websocket), /v1/proof (who comes by a join link), /v1/blobs/{digest} (HTTP ranges), /healthz,
/metrics, /v1/status, and the owner's page.

Beside `page.py`, this is the only file of the hub that touches the network. A token or ticket is checked before the upgrade. Which message may come
when is `protocol/session.py`'s, what it means is `roster.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import logging
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from fedsoda_edge.errors import ProtocolViolation, UsageProblem
from fedsoda_edge.ports.system import descriptors_left
from fedsoda_edge.protocol.codec import MAX_FRAME_BYTES
from fedsoda_edge.protocol.messages import PROTOCOL_VERSION, EdgeId
from fedsoda_edge.protocol.proof import MAX_PROOF_BYTES, TICKET_PREFIX
from fedsoda_edge.units import finite
from fedsoda_hub.federation.refusals import RefusalKind
from fedsoda_hub.run.tokens import Token
from fedsoda_hub.serving.connection import Connection, Hub
from fedsoda_hub.serving.guarded import guarded
from fedsoda_hub.serving.neighbours import who_listens
from fedsoda_hub.serving.page import Page
from fedsoda_hub.serving.sign_in import is_address_or_own_name
from fedsoda_hub.serving.strangers import Complaints, ConnectionLimits, Handshakes, Strangers, is_loopback
from fedsoda_hub.serving.tls import Encryption, encrypted

PING_SECONDS = 10.0  # an edge that is gone is noticed within the sum of both; pings also keep proxies from timing out
PONG_SECONDS = 20.0
FILE_BYTES = 32 << 10  # of a file at once: as much of it as a download holds in memory
MAX_FILES = 8  # that one edge takes at once
PROXIES = "127.0.0.1,::1,::ffff:127.0.0.1"  # whose word for the address of others counts: those of this machine
FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-real-ip")  # headers of proxies
COLLECTIONS = 60  # of younger objects before one of all, which takes 0.1 s at 2,000 connections
UNKNOWN_TOKEN = (
    "the hub does not know this token: it is of another run, which another hub serves, or was made before a reset that lost it; "
    "compare the address with the one that came with the token, or ask the hub's owner for a new one"
)
FAILED = "the hub failed and ends; its owner sees the error where it ran"
Broke = Callable[[Exception], None]  # takes a defect of the hub's own code


class _WebSocket:
    """A websocket as a `Channel`. Starlette raises RuntimeError if a websocket was closed in the meantime."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket

    async def send_bytes(self, data: bytes) -> None:
        with _gone_as_connection_error():
            await self._websocket.send_bytes(data)

    async def receive_bytes(self) -> bytes:
        with _gone_as_connection_error():
            try:
                return await self._websocket.receive_bytes()
            except KeyError:  # starlette's answer to a text frame
                raise ProtocolViolation("the edge sent text, but frames are binary") from None

    async def close(self) -> None:
        with _gone_as_connection_error():
            await self._websocket.close()


@contextlib.contextmanager
def _gone_as_connection_error() -> Iterator[None]:
    """Raise ConnectionResetError for every way in which the other side can be gone."""
    try:
        yield
    except (WebSocketDisconnect, RuntimeError, OSError) as gone:
        raise ConnectionResetError("the edge is gone") from gone


def _bearer(request: HTTPConnection) -> str:
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    return secret if scheme.lower() == "bearer" else ""


def _refused(hub: Hub, request: HTTPConnection) -> tuple[Token | None, str]:
    """Return (token, "") if the request's token may join, else count a refusal and return (None, why not)."""
    secret = _bearer(request)
    token = hub.guests.token(secret) if secret else None
    if token is not None and not token.revoked:
        return token, ""
    if not secret:
        kind, why = RefusalKind.NO_TOKEN, "the request has no token; join with a join link or --token-file"
    elif token is not None:
        kind, why = RefusalKind.REVOKED, f"the token of {token.edge} was revoked; ask the hub's owner for a new one"
    elif secret.startswith(TICKET_PREFIX):
        kind, why = RefusalKind.TICKET_ENDED, "this device's ticket has ended; join again"
    else:
        kind, why = RefusalKind.UNKNOWN_TOKEN, UNKNOWN_TOKEN
    hub.monitoring.metrics.refused(kind)
    return None, why


def _is_loopback(request: Request) -> bool:
    """Tell whether a request comes from this machine, and neither through a proxy on it nor from a site that a browser shows here.

    A site whose name points to this machine (DNS rebinding) has a browser send its own name as Host.
    """
    if request.client is None or any(name in request.headers for name in FORWARDED):
        return False
    if not is_address_or_own_name(request.headers.get("host", "")):
        return False
    return is_loopback(request.client.host)


class _LentFile(FileResponse):
    """A file for one edge, which may take only a few at once: each holds a descriptor for as long as it is read."""

    chunk_size = FILE_BYTES

    def __init__(self, path: Path, edge: EdgeId, taking: Counter[EdgeId]) -> None:
        super().__init__(path, media_type="application/octet-stream")
        self._edge = edge
        self._taking = taking

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._taking[self._edge] += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._taking[self._edge] -= 1
            if not self._taking[self._edge]:
                del self._taking[self._edge]


def _who(hub: Hub) -> dict[str, str | int]:
    """Return the answer to /healthz."""
    return {"hub": "fedsoda", "protocol": PROTOCOL_VERSION, "state": hub.monitoring.health}


def _health_at_once(hub: Hub) -> bytes:
    """Write the whole answer to /healthz, for connections on which it is the first and only request."""
    body = json.dumps(_who(hub), separators=(",", ":")).encode()
    head = (
        f"HTTP/1.1 200 OK\r\ndate: {formatdate(usegmt=True)}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


def make_app(hub: Hub, broke: Broke, handshakes: Handshakes) -> ASGIApp:
    """Build the application of the one port.

    Args:
        broke: takes an exception of the hub's own code, which ends the hub.
        handshakes: bounds who comes through a proxy on this machine; all others are counted when they connect.
    """
    taking: Counter[EdgeId] = Counter()  # files under way

    def is_too_often(request: HTTPConnection) -> bool:
        is_proxied = request.client is not None and "x-forwarded-for" in request.headers
        return is_proxied and request.client is not None and not handshakes.may(request.client.host)

    def too_many(what: str) -> JSONResponse:
        hub.monitoring.metrics.refused(RefusalKind.TOO_OFTEN)
        return JSONResponse({"reason": f"{what}; try again later"}, status_code=429, headers={"Retry-After": "5"})

    async def session(websocket: WebSocket) -> None:
        try:
            token, why = _refused(hub, websocket)
            if token is not None:
                connection = Connection(hub, token, _WebSocket(websocket))
        except Exception as defect:
            broke(defect)
            return
        try:
            if is_too_often(websocket):
                await websocket.send_denial_response(too_many("too many connections come from this address"))
                return
            if token is None:
                await websocket.send_denial_response(JSONResponse({"reason": why}, status_code=401))
                return
            await websocket.accept()
        except (WebSocketDisconnect, RuntimeError, OSError):
            return  # the other side is gone already
        try:
            await connection.run()
        except Exception as defect:
            broke(defect)

    def answered(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            try:
                return await answer(request)
            except Exception as defect:
                broke(defect)
                return JSONResponse({"reason": FAILED}, status_code=500)

        return endpoint

    async def blob(request: Request) -> Response:
        token, why = _refused(hub, request)
        if token is None:
            if is_too_often(request):
                return too_many("too many requests without a good token come from this address")
            return JSONResponse({"reason": why}, status_code=401)
        if taking[token.edge] >= MAX_FILES:
            return too_many(f"{token.edge} takes {MAX_FILES} files at once already")
        path = hub.shelf.bundle_file(request.path_params["digest"])
        if path is None:
            return JSONResponse({"reason": "this run's bundle has no such file"}, status_code=404)
        return _LentFile(path, token.edge, taking)

    async def prove(request: Request) -> Response:
        body = b""
        try:
            async for piece in request.stream():
                body += piece
                if len(body) > MAX_PROOF_BYTES:
                    return JSONResponse({"reason": f"a proof has at most {MAX_PROOF_BYTES} bytes"}, status_code=413)
            status, reply = await hub.guests.prove(body)
        except ClientDisconnect:
            return Response(status_code=400)
        except Exception as defect:
            broke(defect)
            return JSONResponse({"reason": FAILED}, status_code=500)
        if status >= 400:
            hub.monitoring.metrics.refused(RefusalKind.BAD_PROOF)
        return Response(reply, status, media_type="application/json")

    async def health(_: Request) -> Response:
        return JSONResponse(_who(hub))

    def may_ask(request: Request) -> bool:
        return _is_loopback(request) or hub.monitoring.is_admin(_bearer(request))

    async def status(request: Request) -> Response:
        if not may_ask(request):
            return JSONResponse(
                {"reason": "the status is for loopback; from elsewhere, send the token in the run's admin.token"},
                status_code=401,
            )
        return JSONResponse(finite(msgspec.to_builtins(await hub.monitoring.status(), str_keys=True)))

    async def metrics(request: Request) -> Response:
        if not may_ask(request):
            return JSONResponse(
                {"reason": "metrics are for loopback; from elsewhere, send the token in the run's admin.token"},
                status_code=401,
            )
        written = await hub.monitoring.metrics.scrape(request.headers.get("accept", ""))
        return Response(written.data, headers={"Content-Type": written.content_type})

    owners = [] if hub.desk is None else Page(hub.desk, _is_loopback, hub.monitoring.is_admin).routes(answered)
    routes = Starlette(
        routes=[
            Route("/v1/proof", prove, methods=["POST"]),
            Route("/v1/blobs/{digest}", answered(blob)),
            Route("/v1/status", answered(status)),
            Route("/healthz", answered(health)),
            Route("/metrics", answered(metrics)),
            *owners,
        ]
    )

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and scope["path"] == "/v1/session":
            await session(WebSocket(scope, receive, send))  # starlette would hold 5 KiB for each conversation
        else:
            await routes(scope, receive, send)

    return app


def bind(host: str, port: int) -> socket.socket:
    """Bind the port now, so that a port in use is known before any preparation.

    Raises:
        UsageProblem: the port is in use, or this user may not bind it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        if (
            family == socket.AF_INET6
        ):  # "::" is for IPv4 too, as 0.0.0.0 is for all of IPv4, whatever the system's default
            taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        taken.bind((host, port))
    except OSError as error:
        taken.close()
        raise _cannot_be_taken(host, port, error) from error
    return taken


def listen(taken: socket.socket) -> None:
    """Let edges connect. Several programs can bind one port as long as none listens: only the first one succeeds here.

    Raises:
        UsageProblem: another program listens there by now.
    """
    try:
        taken.listen()
    except OSError as error:
        host, port, *_ = taken.getsockname()
        raise _cannot_be_taken(host, port, error) from error


def _cannot_be_taken(host: str, port: int, error: OSError) -> UsageProblem:
    who = who_listens(host, port) if error.errno == errno.EADDRINUSE else ""
    return UsageProblem(
        f"[listen] {host}:{port} cannot be used ({error.strerror}){f': {who}' if who else ''}; "
        "stop the program that uses it, or choose another port"
    )


class Listener:
    """A `Door` to the network. The port is bound now, so that a port in use is known before any preparation.

    Args:
        encryption: what connections are encrypted with; None: plain HTTP.

    Raises:
        UsageProblem: the port is in use, or this user may not bind it.
    """

    def __init__(self, host: str, port: int, encryption: Encryption | None = None) -> None:
        self._encryption = encryption
        self._renewing: asyncio.Task[None] | None = None
        self._taken = bind(host, port)
        self.port = int(self._taken.getsockname()[1])
        self._defects: asyncio.Queue[Exception] = asyncio.Queue()
        self._server: Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def open(self, hub: Hub) -> None:
        """Let edges in.

        Raises:
            UsageProblem: another program listens there by now.
        """
        listen(self._taken)
        self._server = Server(hub, self._defects.put_nowait, encryption=self._encryption)
        if self._encryption is not None:
            self._renewing = asyncio.create_task(self._encryption.keep())
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._taken]))
        started = asyncio.create_task(self._server.has_started.wait())
        await asyncio.wait({started, self._serving}, return_when=asyncio.FIRST_COMPLETED)
        started.cancel()

    async def broken(self) -> None:
        """Wait for a defect behind the port, or the end of the server; raise that."""
        assert self._serving is not None, "`open` comes first"
        defect = asyncio.create_task(self._defects.get())
        parts = {defect, self._serving} | ({self._renewing} if self._renewing is not None else set())
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            if defect.done():
                raise defect.result()
            if self._renewing is not None and self._renewing.done():
                self._renewing.result()
            self._serving.result()
            raise RuntimeError("uvicorn ended although the hub did not stop it")
        finally:
            defect.cancel()

    async def close(self) -> None:
        """End all connections and release the port."""
        if self._renewing is not None:
            self._renewing.cancel()
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await asyncio.wait({self._serving})
        self._taken.close()


class Server(uvicorn.Server):
    """A uvicorn without signal handlers: signals are the daemon's. Strangers are bounded, and told of once a minute.

    Args:
        limits: None: those of this process. encryption: None: plain HTTP.
        counts_loopback: whether the bound of handshakes holds on this machine too.
    """

    def __init__(
        self,
        hub: Hub,
        broke: Broke,
        limits: ConnectionLimits | None = None,
        encryption: Encryption | None = None,
        *,
        counts_loopback: bool = False,
    ) -> None:
        limits = limits or ConnectionLimits(descriptors_left())
        now = asyncio.get_running_loop().time
        self._complaints = Complaints(now)
        handshakes = Handshakes(now)
        strangers = Strangers(limits, self._complaints, handshakes, counts_loopback=counts_loopback)
        http, websocket = guarded(strangers, lambda: hub.guests.stall_seconds, lambda: _health_at_once(hub))
        super().__init__(
            uvicorn.Config(
                make_app(hub, broke, handshakes),
                log_config=None,
                lifespan="off",
                http=http if encryption is None else encrypted(http, encryption),  # type: ignore[arg-type]
                ws=websocket,
                ws_max_size=MAX_FRAME_BYTES,
                ws_per_message_deflate=False,  # costs 40 x throughput on tensors and 50 KiB a connection
                ws_ping_interval=PING_SECONDS,
                ws_ping_timeout=PONG_SECONDS,
                backlog=limits.backlog,
                forwarded_allow_ips=PROXIES,
                timeout_graceful_shutdown=5,
                server_header=False,
            )
        )
        self.has_started = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._complaints.handle)
        logging.getLogger("uvicorn.error").addFilter(self._complaints.filter)
        self._collects = gc.get_threshold()
        gc.set_threshold(*self._collects[:2], COLLECTIONS)
        await super().startup(sockets)
        for taken in sockets or ():
            taken.listen(socket.SOMAXCONN)  # uvicorn's backlog is also how many are accepted at once
        self.has_started.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        gc.set_threshold(*self._collects)
        self._complaints.tell()
        logging.getLogger("uvicorn.error").removeFilter(self._complaints.filter)
        asyncio.get_running_loop().set_exception_handler(None)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
