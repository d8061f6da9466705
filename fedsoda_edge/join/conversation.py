"""Hold the conversation with the hub over as many connections as it takes: one at a time, each with one request at a time.

What may be said when is left to `protocol/session.py`, how frames travel to the transport, what to say to the agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from msgspec.structs import replace

from fedsoda_edge.errors import HubUnreachable, ProtocolViolation, RefusedByHub
from fedsoda_edge.events import EventSink, HubPreparing, Reconnecting
from fedsoda_edge.join.patience import Patience
from fedsoda_edge.ports import Clock, Transport, installer
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol import trace
from fedsoda_edge.protocol.session import Blob, EdgeSession, chunks
from fedsoda_edge.protocol.stages import words_of
from fedsoda_edge.protocol.versions import SPEAKS, Speaks
from fedsoda_edge.units import one_line

log = logging.getLogger("fedsoda_edge.join")

T = TypeVar("T")

ENDED = "the connection to the hub ended"
HELD_SECONDS = 30.0  # a connection that holds so long is progress, though nothing may be due on it
TOLD_SECONDS = 5.0  # at least between two sentences about a hub's preparation, however often it says one
SHARED_SECONDS = 45.0  # within which a hub notices that the other connection of this identity is dead


class RefusedForNow(RefusedByHub):
    """A refusal of the greeting that may end by itself: another connection with this identity may be dead."""


class Witness(Protocol):
    """The part of a join that hears what the hub says before it counts, and notes what this edge says before it leaves."""

    def hears(self, message: ms.HubMessage) -> None:
        """Refuse what the run's hub did not sign. Raises HubNotTrusted."""
        ...

    def sends(self, message: ms.EdgeMessage) -> None:
        """Note what leaves. Raises DiskFull where an update cannot be noted: then it does not leave."""
        ...


class RunOver(Exception):
    """The end of the run, or of this device's part in it, for all that still waits for the hub. It is not a failure."""


@dataclass(frozen=True)
class BlobDue:
    """The state while a requested blob has not arrived."""

    digest: ms.Digest
    blob: asyncio.Future[bytes]


@dataclass(frozen=True)
class AnswerDue:
    """The state while an announced update has no answer."""

    round: int
    digest: ms.Digest
    answer: asyncio.Future[ms.Receipt | ms.Refusal]


@dataclass(frozen=True)
class NothingDue:
    """The state while nothing is requested on a connection."""


@dataclass(frozen=True)
class Lost:
    """The state without a connection, while one is made."""


class Connected:
    """The state of a connection on which the hub welcomed this edge. since: monotonic seconds."""

    def __init__(self, session: EdgeSession, since: float) -> None:
        self.session = session
        self.since = since
        self.is_ready = False  # Ready was said: the hub takes updates
        self.due: BlobDue | AnswerDue | NothingDue = NothingDue()
        self.request: asyncio.Task[Any] | None = None  # the one that runs; it may outlive those who wait for it

    def blob(self, blob: Blob) -> None:
        """Give a blob to the request that waits for it."""
        if isinstance(self.due, BlobDue) and self.due.digest == blob.digest and not self.due.blob.done():
            self.due.blob.set_result(blob.data)

    def answer(self, answer: ms.Receipt | ms.Refusal) -> None:
        """Give the hub's answer to the request that sent the update.

        Raises:
            ProtocolViolation: it is a receipt for another update of the round.
        """
        if isinstance(self.due, AnswerDue) and self.due.round == answer.round and not self.due.answer.done():
            if isinstance(answer, ms.Receipt) and answer.digest != self.due.digest:
                raise ProtocolViolation(
                    f"the hub has the update {answer.digest[:12]} of round {answer.round}, {self.due.digest[:12]} was sent; "
                    "ask the hub's owner"
                )
            self.due.answer.set_result(answer)

    def lose(self) -> None:
        """Tell the waiting request that no answer will come on this connection."""
        match self.due:
            case BlobDue(blob=waiting) | AnswerDue(answer=waiting) if not waiting.done():
                waiting.set_exception(HubUnreachable(ENDED, "TCP"))
                waiting.exception()  # nobody may wait for it any more


@dataclass(frozen=True)
class Over:
    """The state after the conversation, with the reason of its end."""

    reason: Exception


def _refused(refusal: ms.Refusal) -> Exception:
    """Make the error of a hub that answers Hello with a refusal."""
    if isinstance(refusal.speaks, tuple) and SPEAKS.agreed(hub := Speaks(*refusal.speaks)) is None:
        return SPEAKS.mismatch(hub, installer.found().update)
    why = f"the hub refused: {one_line(refusal.reason)}"
    return RefusedForNow(why) if refusal.retry else RefusedByHub(why)


class Conversation:
    """The conversation of this edge with its hub, from the first Hello to Farewell or Leave.

    Args:
        hello: makes the first message of a connection.
        say: gets the events about lost connections.
        patience: how long to reconnect. Progress is a blob, an answer to an update, a connection that holds.
        witness: hears and notes all that is said, but for chunks.
    """

    def __init__(
        self,
        transport: Transport,
        hello: Callable[[], ms.Hello],
        say: EventSink,
        clock: Clock,
        patience: Patience,
        witness: Witness,
    ) -> None:
        self._transport = transport
        self._witness = witness
        self._hello = hello
        self._say = say
        self._clock = clock
        self._patience = patience
        self._state: Lost | Connected | Over = Lost()
        self._changed = asyncio.Event()  # set when the state changes, and replaced
        self._welcome: ms.Welcome | None = None
        self._is_awaited = False  # the hub said that it prepares its run, and its Welcome is still to come
        self._told_at = 0.0  # monotonic seconds

    # --- connections -------------------------------------------------------------------------------------------------

    async def greet(self, patience: Patience | None = None) -> ms.Welcome:
        """Connect, say Hello and return the hub's Welcome; wait for it as long as the hub prepares its run.

        Args:
            patience: how long to try for it; None: once, without waiting for a preparation.

        Raises:
            HubUnreachable: names the step that failed, or says how far the hub's preparation is.
            RefusedByHub: the hub refused, or now serves another run.
            ProtocolMismatch: the hub speaks no version that this device speaks.
        """
        shared = Patience(self._clock, SHARED_SECONDS)
        is_told = False
        while True:
            try:
                return await self._greet_once(waits=patience is not None)
            except (HubUnreachable, RefusedForNow) as error:
                log.info(trace.went_wrong(error))
                if patience is None:
                    raise
                if self._is_awaited:  # a hub that has answered comes back, and a restart of it takes its time
                    patience, is_told, self._is_awaited = self._patience, False, False
                    patience.progressed()
                if not is_told:
                    self._say(Reconnecting(str(error)))
                    is_told = True
                await (shared if isinstance(error, RefusedForNow) else patience).after(error)

    async def _greet_once(self, *, waits: bool) -> ms.Welcome:
        await self._transport.connect()
        session, hello = EdgeSession(), self._hello()
        log.debug(trace.line(">", hello))
        self._witness.sends(hello)
        await self._transport.send(session.send(hello))
        async for frame in self._transport.frames():
            answer = session.receive(frame)
            assert isinstance(answer, ms.Preparing | ms.Welcome | ms.Refusal), (
                "a session lets nothing else answer Hello"
            )
            log.debug(trace.line("<", answer))
            if isinstance(answer, ms.Refusal):
                raise _refused(answer)
            if not SPEAKS.oldest <= answer.protocol <= SPEAKS.newest:
                raise SPEAKS.mismatch(Speaks(answer.protocol, answer.protocol), installer.found().update)
            if self._welcome is not None and answer.run_id != self._welcome.run_id:
                raise RefusedByHub(
                    f"the hub now serves the run {one_line(answer.run_id)}, this join began with {self._welcome.run_id}; "
                    "join again"
                )
            if isinstance(answer, ms.Preparing):
                self._prepares(answer, waits=waits)
                continue
            self._witness.hears(answer)
            named = {"run_name": one_line(answer.run_name), "edge": ms.EdgeId(one_line(answer.edge))}
            self._welcome = answer = replace(answer, **named)
            self._is_awaited = False
            self._become(Connected(session, self._clock.monotonic()))
            return answer
        raise HubUnreachable("the hub closed the connection before it answered Hello; try again later", "HTTP")

    def _prepares(self, said: ms.Preparing, *, waits: bool) -> None:
        """Tell people how far the hub's preparation is.

        Raises:
            HubUnreachable: nobody waits for it.
        """
        run, words, now = one_line(said.run_name), words_of(said), self._clock.monotonic()
        if not waits:
            raise HubUnreachable(f"the hub of the run {run} answers, and is {words}; try again later", "HTTP")
        is_new = not self._is_awaited
        self._is_awaited = True
        if is_new or now - self._told_at >= TOLD_SECONDS:
            self._told_at = now
            self._say(
                HubPreparing(
                    run=run,
                    message=words,
                    done=said.done,
                    total=said.total,
                    seconds_left=said.seconds_left,
                )
            )

    def _become(self, state: Lost | Connected | Over) -> None:
        before = self._state
        if isinstance(before, Over):
            return  # a connection that comes or goes meanwhile changes nothing
        log.debug(trace.changed("connection", type(before).__name__, type(state).__name__))
        self._state = state
        if isinstance(before, Connected):
            before.lose()
        self._ring()

    def _ring(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    # --- what the hub says -------------------------------------------------------------------------------------------

    async def messages(self) -> AsyncGenerator[Connected | ms.RoundOffer | ms.RoundClosed | ms.Farewell]:
        """Yield what concerns rounds, until Farewell or Leave; connect again when a connection is lost, with patience.

        Yields Connected after each reconnect: the hub then knows only the name of this edge. All that waits for the hub
        ends with this iterator, for the same reason.

        Raises:
            RefusedByHub, ProtocolMismatch, ProtocolViolation: trying again would not help.
            HubUnreachable: there was no progress for as long as the patience lasts.
        """
        try:
            while not isinstance(self._state, Over):
                if not isinstance(self._state, Connected):
                    await self.greet(self._patience)
                    if isinstance(self._state, Connected):
                        yield self._state
                    continue
                connection = self._state
                async for frame in self._transport.frames():
                    if isinstance(self._state, Over):
                        return  # this device left, and what was on its way does not concern it
                    message = self._received(connection, frame)
                    if isinstance(message, ms.Farewell):
                        self._become(Over(RunOver(message.reason)))
                    if message is not None:
                        yield message
                    if isinstance(self._state, Over):
                        return
                self._become(Lost())
                await self._lost(connection)
        except Exception as error:
            log.info(trace.went_wrong(error))
            self._become(Over(error))
            raise

    async def _lost(self, connection: Connected) -> None:
        """Wait before the next greeting: one that only leads to the next loss must not be repeated at once.

        Raises:
            HubUnreachable: the patience is over.
        """
        if self._clock.monotonic() - connection.since >= HELD_SECONDS:
            self._patience.progressed()
        if not self._patience.is_new:
            self._say(Reconnecting(f"{ENDED} again, before anything was done on it"))
        await self._patience.after(HubUnreachable(f"{ENDED} again and again; join again later", "TCP"))

    def _received(self, connection: Connected, frame: bytes) -> ms.RoundOffer | ms.RoundClosed | ms.Farewell | None:
        message = connection.session.receive(frame)
        match message:
            case None:  # a chunk before the last
                pass
            case Blob():
                whole = ms.BlobChunk(digest=message.digest, offset=0, total=len(message.data))
                log.debug(trace.line("<", whole))
                self._patience.progressed()
                connection.blob(message)
            case _:
                log.debug(trace.line("<", message))
                if message is not None:
                    self._witness.hears(message)
        match message:
            case ms.Refusal() if message.fatal:
                raise RefusedByHub(f"the hub refused: {one_line(message.reason)}")
            case ms.Receipt():
                self._patience.progressed()
                connection.answer(message)
            case ms.Refusal():
                self._patience.progressed()
                connection.answer(replace(message, reason=one_line(message.reason)))
            case ms.RoundOffer() | ms.RoundClosed():
                return message
            case ms.Farewell():
                return replace(message, reason=one_line(message.reason))
        return None

    # --- what this edge says -----------------------------------------------------------------------------------------

    async def send(self, message: ms.EdgeMessage) -> None:
        """Send a message on the present connection.

        Raises:
            HubUnreachable: there is no connection, or it is lost by now.
        """
        if not isinstance(self._state, Connected):
            raise HubUnreachable(ENDED, "TCP")
        await self._send(self._state, message)

    async def _send(self, connection: Connected, message: ms.EdgeMessage, payload: memoryview | None = None) -> None:
        if self._state is not connection:  # lost meanwhile; on the next one everything begins again
            raise HubUnreachable(ENDED, "TCP")
        if payload is None:
            log.debug(trace.line(">", message))
            self._witness.sends(message)
        await self._transport.send(connection.session.send(message, payload or b""))
        if isinstance(message, ms.Ready):
            connection.is_ready = True
            self._ring()

    async def leave(self, reason: str) -> None:
        """Tell the hub, where it can be reached, that this edge leaves and does not come back by itself."""
        connection = self._state
        self._become(Over(RunOver(reason)))
        if isinstance(connection, Connected):
            leave = ms.Leave(reason=reason)
            log.debug(trace.line(">", leave))
            self._witness.sends(leave)
            with contextlib.suppress(HubUnreachable):
                await self._transport.send(connection.session.send(leave))

    async def close(self) -> None:
        """Close the connection. All that still waits for the hub ends with RunOver."""
        connection = self._state
        self._become(Over(RunOver("this join was closed")))
        if isinstance(connection, Connected) and connection.request is not None:
            connection.request.cancel()
            await asyncio.wait({connection.request})
        await self._transport.close()

    # --- requests ----------------------------------------------------------------------------------------------------

    async def fetch(self, blob: ms.BlobRef) -> bytes:
        """Fetch a blob of the run, over as many connections as it takes.

        Raises:
            RunOver: the run ended first, or this device left.
            FedSODAError: what ended `messages`.
        """

        async def transfer(connection: Connected) -> bytes:
            due = BlobDue(blob.digest, asyncio.get_running_loop().create_future())
            connection.due = due
            log.debug(trace.line(">", ms.BlobRequest(digest=blob.digest)))
            self._witness.sends(ms.BlobRequest(digest=blob.digest))
            if self._state is not connection:  # lost meanwhile: its answer would come on no connection
                raise HubUnreachable(ENDED, "TCP")
            await self._transport.send(connection.session.request(blob))
            return await due.blob

        return await self._ask(transfer, needs_ready=False)

    async def hand_in(self, start: ms.UpdateStart, data: bytes) -> ms.Receipt | ms.Refusal:
        """Send an update, on each further connection from its beginning, and return the hub's answer.

        Waits until Ready was said, which a pause may delay.

        Raises:
            RunOver: the run ended first, or this device left.
            FedSODAError: what ended `messages`.
        """

        async def upload(connection: Connected) -> ms.Receipt | ms.Refusal:
            due = AnswerDue(start.round, start.digest, asyncio.get_running_loop().create_future())
            connection.due = due
            await self._send(connection, start)
            for offset, piece in chunks(data):
                await self._send(connection, ms.UpdateChunk(digest=start.digest, offset=offset), piece)
            whole = ms.UpdateChunk(digest=start.digest, offset=0)
            log.debug(trace.line(">", whole, f"payload={len(data)}"))  # one line for all chunks
            return await due.answer

        return await self._ask(upload, needs_ready=True)

    async def _ask(self, request: Callable[[Connected], Coroutine[Any, Any, T]], *, needs_ready: bool) -> T:
        while True:
            connection = await self._free(needs_ready=needs_ready)
            # A pause breaks off whoever waits, not the request: the hub sends the chunks of a blob in any case.
            task = connection.request = asyncio.create_task(request(connection))
            task.add_done_callback(_take_note)
            try:
                return await asyncio.shield(task)
            except HubUnreachable:
                while self._state is connection:  # until `messages` has seen it too
                    await self._changed.wait()

    async def _free(self, *, needs_ready: bool) -> Connected:
        """Wait for a connection on which no other request runs."""
        while True:
            match self._state:
                case Over(reason):
                    raise reason
                case Connected(request=asked) if asked is not None and not asked.done():
                    await asyncio.wait({asked})
                case Connected() as connection if connection.is_ready or not needs_ready:
                    return connection
                case _:
                    await self._changed.wait()


def _take_note(task: asyncio.Task[Any]) -> None:
    """Keep asyncio from warning about an error that nobody waited for."""
    if not task.cancelled():
        task.exception()
