"""One port: /v1/session (websocket), /v1/blobs/{digest} (HTTP ranges), /healthz, /metrics, /v1/status.

The only hub file that touches the network. A token is checked before the upgrade; what is said is judged by
`protocol/session.py`, what it means by the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from fedsoda_edge.errors import DiskFull, ProtocolViolation, UsageProblem
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.codec import MAX_FRAME_BYTES, wire_bytes
from fedsoda_edge.protocol.session import HubSession, Upload, chunks
from fedsoda_hub.run.ledger import Token


class Hub(Protocol):
    """What the listener needs of the daemon."""

    stall_seconds: float
    max_update_bytes: int

    def token(self, secret: str) -> Token | None: ...
    def is_admin(self, secret: str) -> bool: ...
    def bundle_file(self, digest: str) -> Path | None: ...
    def run_blob(self, digest: str) -> bytes | None: ...
    def status(self) -> dict[str, Any]: ...
    def metrics(self) -> str: ...
    def greet(self, connection: Connection, hello: ms.Hello) -> ms.Welcome | ms.Refusal: ...
    async def said(self, connection: Connection, message: ms.EdgeMessage | Upload) -> None: ...
    def ended(self, connection: Connection) -> None: ...


class Channel(Protocol):
    """Where one edge's frames come and go: a websocket, or queues where hub and edge share a process."""

    async def send_bytes(self, data: bytes) -> None: ...
    async def receive_bytes(self) -> bytes:
        """Raises ConnectionError, or WebSocketDisconnect, when the other side is gone."""
        ...

    async def close(self) -> None: ...


class Connection:
    """One edge's conversation. Frames leave through a queue, so that a slow edge never holds up the hub."""

    def __init__(self, hub: Hub, token: Token, channel: Channel) -> None:
        self.edge = token.edge
        self.up = 0
        self.down = 0
        self.session = HubSession(hub.max_update_bytes)
        self._hub = hub
        self._channel = channel
        self._out: asyncio.Queue[bytes | None] = asyncio.Queue()

    def send(self, message: ms.HubMessage, payload: bytes | memoryview = b"") -> None:
        if self.session.state != "over":
            self._out.put_nowait(self.session.send(message, payload))

    def close(self) -> None:
        """After what is queued has left."""
        self.session.state = "over"
        self._out.put_nowait(None)

    async def run(self) -> None:
        writer = asyncio.create_task(self._write())
        try:
            await self._read()
        except ProtocolViolation as error:
            self.send(ms.Refusal(reason=str(error), fatal=True))
        except (WebSocketDisconnect, ConnectionError, TimeoutError, RuntimeError, DiskFull):
            pass  # gone, stalled, closed under our hands, or no place to note its device: all the same to the round
        finally:
            self._hub.ended(self)
            self._out.put_nowait(None)
            await writer

    async def _write(self) -> None:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError, OSError):
            while (frame := await self._out.get()) is not None:
                await self._channel.send_bytes(frame)
                self.down += wire_bytes(frame, masked=False)
            await self._channel.close()

    async def _read(self) -> None:
        while self.session.state != "over":
            # The one timeout: an upload that moves never fails by wall clock (federation.md).
            stall = self._hub.stall_seconds if self.session.upload_progress is not None else None
            async with asyncio.timeout(stall):
                frame = await self._frame()
            self.up += wire_bytes(frame, masked=True)
            said = self.session.receive(frame)
            match said:
                case None | ms.UpdateChunk():
                    pass
                case ms.Hello():
                    answer = self._hub.greet(self, said)
                    self.send(answer)
                    if isinstance(answer, ms.Refusal):
                        return
                case ms.BlobRequest():
                    self._send_blob(said)
                case _:
                    await self._hub.said(self, said)

    async def _frame(self) -> bytes:
        try:
            return await self._channel.receive_bytes()
        except KeyError:  # starlette's answer to a text frame
            raise ProtocolViolation("the edge sent text, but frames are binary") from None

    def _send_blob(self, request: ms.BlobRequest) -> None:
        data = self._hub.run_blob(request.digest)
        if data is None or not 0 <= request.offset < len(data):
            raise ProtocolViolation(f"there is no blob {request.digest[:12]} at {request.offset} in this round")
        for offset, piece in chunks(data, request.offset):
            self.send(ms.BlobChunk(digest=request.digest, offset=offset, total=len(data)), piece)


def _bearer(request: HTTPConnection) -> str:
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    return secret if scheme.lower() == "bearer" else ""


def _refused(hub: Hub, request: HTTPConnection) -> tuple[Token | None, str]:
    """(token, "") or (None, why)."""
    secret = _bearer(request)
    if not secret:
        return None, "no token was sent; join with --token-file"
    token = hub.token(secret)
    if token is None:
        return None, "the hub does not know this token; ask its owner for a new one"
    if token.revoked:
        return None, f"the token of {token.edge} was revoked; ask the hub's owner"
    return token, ""


def make_app(hub: Hub) -> Starlette:
    async def session(websocket: WebSocket) -> None:
        token, why = _refused(hub, websocket)
        if token is None:
            await websocket.send_denial_response(JSONResponse({"reason": why}, status_code=401))
            return
        await websocket.accept()
        await Connection(hub, token, websocket).run()

    async def blob(request: Request) -> Response:
        token, why = _refused(hub, request)
        if token is None:
            return JSONResponse({"reason": why}, status_code=401)
        path = hub.bundle_file(request.path_params["digest"])
        if path is None:
            return JSONResponse({"reason": "no such file in this run's bundle"}, status_code=404)
        return FileResponse(path, media_type="application/octet-stream")

    async def health(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    def is_local(request: Request) -> bool:
        host = request.client.host if request.client else ""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(host).is_loopback
        return False

    async def status(request: Request) -> Response:
        if not is_local(request) and not hub.is_admin(_bearer(request)):
            return JSONResponse({"reason": "status is for loopback or the admin token"}, status_code=401)
        return JSONResponse(hub.status())

    async def metrics(request: Request) -> Response:
        if not is_local(request) and not hub.is_admin(_bearer(request)):
            return JSONResponse({"reason": "metrics are for loopback or the admin token"}, status_code=401)
        return PlainTextResponse(hub.metrics())

    return Starlette(
        routes=[
            WebSocketRoute("/v1/session", session),
            Route("/v1/blobs/{digest}", blob),
            Route("/v1/status", status),
            Route("/healthz", health),
            Route("/metrics", metrics),
        ]
    )


def is_same_secret(one: str, other: str) -> bool:
    """In constant time."""
    return hmac.compare_digest(one.encode(), other.encode())


def bind(host: str, port: int) -> socket.socket:
    """Take the port at once, so that one in use is known before any preparation.

    Raises:
        UsageProblem: it is in use or may not be taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except OSError as error:
        taken.close()
        raise _cannot_be_taken(host, port, error) from error
    return taken


def listen(taken: socket.socket) -> None:
    """Let edges connect. Several programs may bind one port as long as none listens: only one gets further.

    Raises:
        UsageProblem: another listens there by now.
    """
    try:
        taken.listen()
    except OSError as error:
        host, port, *_ = taken.getsockname()
        raise _cannot_be_taken(host, port, error) from error


def _cannot_be_taken(host: str, port: int, error: OSError) -> UsageProblem:
    return UsageProblem(
        f"[listen] {host}:{port} cannot be taken ({error.strerror}); stop what uses it or choose another port"
    )


def ask_running_hub(run_dir: Path) -> dict[str, Any] | None:
    """The status of the hub that serves this run on this machine; None when none does."""
    import httpx

    address = run_dir / "address"
    if not address.exists():
        return None
    url = address.read_text().replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    secret = (run_dir / "admin.token").read_text().strip()
    try:
        answer = httpx.get(
            f"{url}/v1/status", headers={"Authorization": f"Bearer {secret}"}, timeout=5, trust_env=False
        )
        return dict(answer.json()) if answer.status_code == 200 else None
    except (httpx.HTTPError, ValueError, TypeError):  # a killed hub leaves its address, and others may take the port
        return None


class Door(Protocol):
    """Where edges come in. port: of its address, as far as it has one."""

    port: int

    async def open(self, hub: Hub) -> None:
        """Let edges in from now on. Raises UsageProblem where something else took the place by now."""
        ...

    async def close(self) -> None: ...


class Listener:
    """A `Door` to the network. The port is taken at once, so that one in use is known before any preparation.

    Raises:
        UsageProblem: it is in use or may not be taken.
    """

    def __init__(self, host: str, port: int) -> None:
        self._taken = bind(host, port)
        self.port = int(self._taken.getsockname()[1])
        self._server: Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def open(self, hub: Hub) -> None:
        listen(self._taken)
        self._server = make_server(hub)
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._taken]))
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            with contextlib.suppress(asyncio.CancelledError):
                await self._serving
        self._taken.close()


class Server(uvicorn.Server):
    """uvicorn without signal handlers: signals are the daemon's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_server(hub: Hub) -> Server:
    return Server(
        uvicorn.Config(
            make_app(hub),
            log_config=None,
            lifespan="off",
            ws="websockets-sansio",
            ws_max_size=MAX_FRAME_BYTES,
            ws_per_message_deflate=False,  # costs 40 x throughput on tensors and 50 KiB a connection
            timeout_graceful_shutdown=5,
            server_header=False,
        )
    )
