"""Keep the connected edges: greet them, turn messages into events, send what is decided, count what travels.

What events lead to is `decisions.py`'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from fedsoda_edge.errors import DiskFull
from fedsoda_edge.ports import Clock
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.proof import TICKET_PREFIX
from fedsoda_edge.protocol.session import Gathered, Upload
from fedsoda_edge.protocol.versions import SPEAKS, agreed_with
from fedsoda_edge.units import one_line
from fedsoda_hub import events
from fedsoda_hub.federation import events as ev
from fedsoda_hub.federation.refusals import RefusalKind
from fedsoda_hub.federation.rounds import RoundMachine
from fedsoda_hub.federation.schedule import trained_factor
from fedsoda_hub.federation.state import LedgerState
from fedsoda_hub.run.ledger import Ledger
from fedsoda_hub.run.tokens import Token
from fedsoda_hub.serving.connection import Connection
from fedsoda_hub.serving.first_of import first_of
from fedsoda_hub.serving.greeting import Greeting
from fedsoda_hub.serving.hearing import Hearing
from fedsoda_hub.serving.metrics import Metrics
from fedsoda_hub.serving.proofs import Proofs
from fedsoda_hub.serving.shelf import Shelf
from fedsoda_hub.serving.spool import NoRoom, Spool, Useless
from fedsoda_hub.serving.traffic import Traffic
from fedsoda_hub.serving.uploads import Uploads
from fedsoda_hub.settings.run import RunSettings

GOODBYE_SECONDS = 5.0  # that queued frames may take to leave at the end
_log = logging.getLogger("fedsoda_hub.serving")


class Roster:
    """The connected edges. report: takes what they said, as events of the round machine.

    An edge is heard again only when all but a few of its events are handled, so that none can fill the inbox.
    """

    def __init__(
        self,
        settings: RunSettings,
        machine: RoundMachine,
        ledger: Ledger,
        shelf: Shelf,
        uploads: Uploads,
        proofs: Proofs,
        report: Callable[[ev.RoundEvent], None],
        say: events.HubSay,
        greeting: Greeting,
        metrics: Metrics,
    ) -> None:
        self.progress: dict[ms.EdgeId, ms.Progress] = {}
        self._settings = settings
        self._machine = machine
        self._ledger = ledger
        self._shelf = shelf
        self._uploads = uploads
        self._proofs = proofs
        self._hearing = Hearing(report)
        self._say = say
        self.greeting = greeting
        self._metrics = metrics
        self._connections: dict[ms.EdgeId, Connection] = {}
        self._passed: set[ms.EdgeId] = set()
        self._farewelled: set[ms.EdgeId] = set()
        self._has_farewelled = asyncio.Event()
        self._traffic = Traffic(ledger)

    @property
    def _state(self) -> LedgerState:
        return self._machine.state

    @property
    def connected(self) -> set[ms.EdgeId]:
        """The ids of the connected edges."""
        return set(self._connections)

    @property
    def devices(self) -> dict[ms.EdgeId, ms.DeviceFacts]:
        """The facts of the connected edges' devices, as they said them."""
        return {edge: one.hello.device for edge, one in self._connections.items() if one.hello is not None}

    def why_idle(self, edge: ms.EdgeId) -> str | None:
        """Say why a connected edge does not work, as far as its connection tells; None: it may."""
        connection = self._connections.get(edge)
        if connection is None:
            return None
        if connection.session.state == "greeted":
            return "waits for the end of the preparation"
        if connection.session.paused is not None:
            return f"paused: {one_line(connection.session.paused)}"
        return "fetches the bundle and reads its data" if connection.session.state == "open" else None

    def admitted(self) -> list[Token]:
        """Return what the connected edges came in with."""
        return [connection.token for connection in self._connections.values()]

    def waiting(self) -> list[Connection]:
        """Return the connections of edges that wait for the end of the preparation."""
        return [connection for connection in self._connections.values() if connection.session.state == "greeted"]

    def passed(self) -> set[ms.EdgeId]:
        """Return the edges that came or went since the last call."""
        passed, self._passed = self._passed, set()
        return passed

    # --- what connections ask ------------------------------------------------------------------------------

    @property
    def stall_seconds(self) -> float:
        """The time after which an upload without progress is given up."""
        return self._settings.wire.stall_seconds

    def token(self, secret: str) -> Token | None:
        """Return what a token or a ticket stands for; None: the run does not know it, or the ticket has ended."""
        if secret.startswith(TICKET_PREFIX):
            return self._proofs.tickets.find(secret)
        return self._ledger.tokens.find(secret)

    async def prove(self, request: bytes) -> tuple[int, bytes]:
        """Answer the body of a request to /v1/proof: (HTTP status, JSON)."""
        return await self._proofs.reply(request)

    def gather(self, edge: ms.EdgeId, start: ms.UpdateStart) -> Gathered:
        """Make the place for an announced update."""
        why_useless = self._machine.why_useless(edge, start.round, start.digest)
        return self._uploads.gather(start, self._shelf.max_update_bytes, why_useless)

    async def greet(self, connection: Connection, hello: ms.Hello) -> ms.Preparing | ms.Welcome | ms.Refusal | None:
        """Answer a Hello; None: the disk is full, so the device cannot be noted; it may come again."""
        edge = connection.edge
        agreed = agreed_with(hello)
        if agreed is None:
            self._metrics.refused(RefusalKind.OTHER_PROTOCOL)
            return ms.Refusal(
                reason=f"protocol mismatch: this edge speaks {hello.protocol}, the hub {SPEAKS.newest}; "
                "upgrade the older side: pip install -U fedsoda",
                fatal=True,
                speaks=SPEAKS,
            )
        try:
            is_its_device = connection.token.key is not None or await asyncio.to_thread(
                self._ledger.tokens.bind, edge, hello.device_id
            )
        except DiskFull as error:
            self._say(events.OutOfDisk(message=str(error)))
            return None  # a Refusal would send the edge away for good
        if not is_its_device:
            self._metrics.refused(RefusalKind.OTHER_DEVICE)
            return ms.Refusal(
                reason=f"the token of {edge} is already in use on another device, or on this one before it lost its "
                "FEDSODA_HOME (a container needs a volume for it); ask the hub's owner for a token of your own, or for "
                f"`fedsoda-hub token rebind RUN.toml {edge}`",
                fatal=True,
            )
        old = self._connections.get(edge)
        if old is not None and (refusal := refused_as_a_copy(old, hello)) is not None:
            self._metrics.refused(RefusalKind.COPIED_IDENTITY)
            return refusal
        connection.hello = hello
        self._connections[edge] = connection
        self._passed.add(edge)
        if old is not None:  # the device reconnected before the hub noticed that its old connection had ended
            old.close()
            self._hearing.report(ev.EdgeGone(edge))  # until its Ready it is not invited
        self._say(events.EdgeConnected(edge=edge, software=one_line(hello.software)))
        return self.greeting.of(edge, agreed)

    async def said(self, connection: Connection, message: ms.EdgeMessage | Upload) -> None:
        """Report what an edge said as an event of the round machine."""
        edge = connection.edge
        match message:
            case ms.Ready() if not 0 <= message.size_class < len(self._state.sub_llms):
                last = len(self._state.sub_llms) - 1
                reason = f"this run has size classes 0 to {last}, and the edge took {message.size_class}; join again"
                self._metrics.refused(RefusalKind.SIZE_CLASS)
                self.send(edge, ms.Refusal(reason=reason, fatal=True))
            case ms.Ready():
                connection.size_class = message.size_class
                self._hearing.tell(ev.EdgeReady(edge, message.size_class))
            case ms.Resumed():
                self._hearing.tell(ev.EdgeResumed(edge))
            case ms.Paused():
                self._hearing.tell(ev.EdgeAway(edge, "paused"))
            case ms.Leave():
                self._hearing.tell(ev.EdgeAway(edge, "left"))
                self._note_farewell(edge)
                self._say(events.EdgeLeft(edge=edge, reason=one_line(message.reason)))
            case ms.Decline():
                self._say(events.Declined(edge=edge, round=message.round, reason=one_line(message.reason)))
                self._hearing.tell(ev.EdgeDeclined(edge, message.round, message.reason))
            case ms.UpdateStart():
                self._hearing.tell(ev.UploadStarted(edge, message.round))
            case ms.Progress():
                self.progress[edge] = message
                self._say(events.EdgeProgress(edge=edge, **msgspec.structs.asdict(message)))
            case Upload():
                await self._uploaded(connection, message)
        await self._hearing.wait(edge)

    def handled(self, event: ev.RoundEvent) -> None:
        """Note that the round machine has handled an event."""
        self._hearing.handled(event)

    async def _uploaded(self, connection: Connection, upload: Upload) -> None:
        """Check and store an update, then let the round machine judge it."""
        edge, start, size_class = connection.edge, upload.start, connection.size_class
        layout = self._shelf.layout(size_class, trained_factor(self._machine.rules.aggregation, start.round))
        problem: str | None
        try:
            problem = await self._uploads.take(upload, layout)
        except Useless as error:
            problem = str(error)
        except (DiskFull, NoRoom) as error:
            self._metrics.refused(RefusalKind.DISK_FULL if isinstance(error, DiskFull) else RefusalKind.NO_ROOM)
            if isinstance(error, DiskFull):
                self._say(events.OutOfDisk(message=str(error)))
            self.send(edge, ms.Refusal(round=start.round, reason=str(error), retry=True))
            self._hearing.tell(ev.UploadStalled(edge))
            return
        if isinstance(upload.place, Spool):
            self._metrics.uploaded(upload.place.seconds)
        self._hearing.tell(
            ev.UpdateArrived(
                edge,
                start.round,
                start.base,
                start.alignment,
                start.digest,
                start.num_examples,
                start.loss,
                problem,
                size_class,
            )
        )

    def ended(self, connection: Connection) -> None:
        """Forget a connection that is over."""
        edge = connection.edge
        self._count_traffic(connection)
        self._passed.add(edge)
        if self._connections.get(edge) is connection:
            del self._connections[edge]
            self.progress.pop(edge, None)
            self._hearing.report(ev.EdgeGone(edge))
            self._say(events.EdgeDisconnected(edge=edge))

    # --- what is decided -----------------------------------------------------------------------------------

    def send(self, edge: ms.EdgeId, message: ms.HubMessage) -> None:
        """Say this to the edge, if it is connected."""
        connection = self._connections.get(edge)
        if connection is not None:
            if isinstance(message, ms.RoundOffer) and connection.session.state != "ready":
                return  # it answers the Ready of a connection before this one; this one's own brings another
            connection.send(self.greeting.signer.signed(edge, message))
            if isinstance(message, ms.Farewell):
                self._note_farewell(edge)

    def dismiss(self, token: Token, reason: str) -> None:
        """End the connection that came in with this, for that reason: the edge does not come back."""
        connection = self._connections.get(token.edge)
        if connection is None or connection.token != token or connection.session.state == "over":
            return
        self._metrics.refused(RefusalKind.REVOKED)
        connection.send(ms.Refusal(reason=reason, fatal=True))
        connection.close()
        self._hearing.report(ev.EdgeAway(token.edge, "left"))
        self._note_farewell(token.edge)
        self._say(events.EdgeLeft(edge=token.edge, reason=reason))

    def _note_farewell(self, edge: ms.EdgeId) -> None:
        self._farewelled.add(edge)
        self._has_farewelled.set()

    async def all_told(self) -> None:
        """Return when every edge of this run has its Farewell or has left."""
        known = await asyncio.to_thread(self._ledger.edges.all)
        missing = {one.edge for one in known if one.used and not one.revoked}
        while missing:
            missing -= self._farewelled
            self._farewelled.clear()
            if missing:
                self._has_farewelled.clear()
                await self._has_farewelled.wait()

    async def close(self, clock: Clock) -> None:
        """End all conversations when everything that is queued has left; edges that do not read are not waited for."""
        connections = list(self._connections.values())
        for connection in connections:
            connection.close()

        async def flushed() -> None:
            for connection in connections:
                await connection.flushed.wait()

        await first_of(flushed(), clock.sleep(GOODBYE_SECONDS))

    # --- traffic -------------------------------------------------------------------------------------------

    def _count_traffic(self, connection: Connection) -> None:
        up, down = connection.up, connection.down
        if up or down:
            self._traffic.add(connection.edge, max(1, self._state.round), up, down)
        connection.up -= up
        connection.down -= down

    @property
    def travelled(self) -> tuple[int, int]:
        """The bytes up and down of all edges since the run began, up to the last `flush_traffic`."""
        return self._traffic.travelled

    def bytes_now(self) -> tuple[int, int]:
        """Return the bytes up and down of all edges since the run began, up to now."""
        up, down = self.travelled
        here = self._connections.values()
        return up + sum(one.up for one in here), down + sum(one.down for one in here)

    async def flush_traffic(self) -> None:
        """Add the traffic up to now to the ledger."""
        for connection in self._connections.values():
            self._count_traffic(connection)
        await self._traffic.flush()


def refused_as_a_copy(old: Connection, hello: ms.Hello) -> ms.Refusal | None:
    """Return the refusal of a device that says Hello while another one with its identity is connected; None: it is the same.

    The refusal may be tried again: the old connection may be dead, which is noticed within half a minute.
    """
    place = "" if old.hello is None else old.hello.place
    if not (hello.place and place) or hello.place == place:
        return None
    if not old.is_contested:
        old.is_contested = True
        _log.warning("two devices share the identity of %s; the one that came later is refused", old.edge)
    return ms.Refusal(
        reason=f"two devices share one identity: {old.edge} is connected from another machine, or from another copy of its "
        "FEDSODA_HOME; stop the join there, or ask for a token or join link of this device's own and set FEDSODA_HOME to a new directory",
        retry=True,
        fatal=True,
    )
