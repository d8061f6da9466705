"""Run a join: wire its parts together, and pass on to each what another one finds out. Sockets, never torch.

The parts run in one task group: the first that fails ends all of them, and whatever the join's owner waits for. What
each part decides or does is left to the file that bears its name.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedsoda_edge import events as ev
from fedsoda_edge.errors import HubUnreachable
from fedsoda_edge.join import control
from fedsoda_edge.join.attended import attended
from fedsoda_edge.join.conversation import Connected, Conversation, RunOver
from fedsoda_edge.join.home import Home
from fedsoda_edge.join.inspect import hello
from fedsoda_edge.join.offered import Offered
from fedsoda_edge.join.patience import FIRST_SECONDS, Patience
from fedsoda_edge.join.pause import Look, PauseBegins, PauseEnds, PauseLasts, Pauses
from fedsoda_edge.join.preparation import Equipment, JoinPreparation
from fedsoda_edge.join.presence import Presence
from fedsoda_edge.join.receipts import ReceiptLog
from fedsoda_edge.join.rounds import RoundRunner
from fedsoda_edge.join.run_state import RunState
from fedsoda_edge.join.settings import AgentSettings
from fedsoda_edge.join.sources import OpenMirror, Sources
from fedsoda_edge.join.status import Status
from fedsoda_edge.join.witness import HubWitness
from fedsoda_edge.ports import Clock, TorchPort, Transport
from fedsoda_edge.ports.system import peak_rss_bytes
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol import trace

log = logging.getLogger("fedsoda_edge.join")

T = TypeVar("T")


@dataclass(frozen=True)
class Ungreeted:
    """The state before the hub's first answer."""


@dataclass(frozen=True)
class Greeted:
    """The state once the hub knows this edge, before a sub-LLM is taken.

    life: the task in which all parts run; it ends with the run, or with what ended the join.
    """

    welcome: ms.Welcome
    state: RunState
    rounds: RoundRunner
    life: asyncio.Task[None]


@dataclass(frozen=True)
class Equipped(Greeted):
    """The state once a sub-LLM is taken; when the data is read too, this edge can train."""

    equipment: Equipment


class Agent:
    """A join. Its owner calls it from the event loop on which it runs.

    Args:
        say: gets each event of the join.
        open_mirror: makes the way to a mirror of the bundle; None: its files come from the hub alone.
    """

    def __init__(
        self,
        transport: Transport,
        worker: TorchPort,
        home: Home,
        settings: AgentSettings,
        say: ev.EventSink,
        clock: Clock,
        open_mirror: OpenMirror | None = None,
    ) -> None:
        self.transport = transport
        self.worker = worker
        self.home = home
        self._settings = settings
        self._show = say
        self._clock = clock
        self._status: Status | None = None  # from when this join has locked the home
        patience = Patience.of(clock, unattended=settings.unattended)
        witness = HubWitness.of(transport.url, home, self.say, clock, settings.hub_key)
        self._sources = Sources(transport, self.say, witness, open_mirror)
        self._conversation = Conversation(transport, lambda: hello(home), self.say, clock, patience, witness)
        self._presence = Presence()
        self._pauses = Pauses(home.control, settings.rules, clock)
        self._offered = Offered()
        self._run: Ungreeted | Greeted | Equipped = Ungreeted()
        self._news = asyncio.Event()  # an offer, Ready or finish; replaced after each

    @property
    def is_finishing(self) -> bool:
        """Whether its owner has asked to finish: the round in hand is the last."""
        return self._pauses.is_finishing

    @property
    def is_paused(self) -> bool:
        """Whether a pause is on, from the moment that it breaks work off."""
        return self._pauses.is_paused

    @property
    def submitted(self) -> int:
        """The number of updates that the hub accepted."""
        return self._offered.num_accepted

    @property
    def in_hand(self) -> int | None:
        """The round that is trained or handed in; None: none is."""
        return self._offered.in_hand

    @property
    def update_path(self) -> Path:
        """The coded delta of the round that was trained last, until the hub's answer."""
        return self._greeted.state.update

    @property
    def _greeted(self) -> Greeted:
        assert isinstance(self._run, Greeted), "start comes first"
        return self._run

    def say(self, event: ev.AnyEvent) -> None:
        """Tell people, and the file that `status` reads."""
        if self._status is not None:
            self._status.note(event)
        self._show(event)

    # --- what its owner asks -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect, check the device, fetch the bundle, read the data, say Ready; hand in what an earlier join left.

        Returns early when the run is over or its owner has asked to finish: then there is no next offer.

        Raises:
            FedSODAError: what ended the join: HomeInUse, HubUnreachable, RefusedByHub, DeviceTooSmall, DataProblem, ...
        """
        self.home.lock()
        self.home.make_directories()
        control.forget(self.home.control)
        ReceiptLog(self.home.receipts).shorten()
        if not self._settings.cache.keep_key:
            self.home.forget_borders()  # a join that was killed left them, and nobody has its key
        self._status = Status(self.home.status, self.transport.url, self._clock, lambda: self.worker.rss_bytes)
        first = None if self._settings.unattended else FIRST_SECONDS
        greeting = self._conversation.greet(Patience(self._clock, first))
        if (welcome := await attended(greeting, self._pauses, self._heed)) is None:
            return
        self.say(ev.Joined(run=welcome.run_name, edge=welcome.edge, rounds=welcome.rounds))
        self._presence.connected()
        await self._heed(await self._pauses.look(None))
        await self._tell()  # of a pause that began before the hub could hear of it
        if not self._pauses.is_paused:
            await self.worker.start()  # its imports take seconds; nothing below needs it yet
        state = RunState(self.home.run(welcome.run_id), welcome.codec)
        upload = Patience.of(self._clock, unattended=self._settings.unattended)
        rounds = RoundRunner(welcome, state, self._offered, self._conversation, self.say, self._clock, upload)
        self._run = Greeted(welcome, state, rounds, asyncio.create_task(self._live()))
        with contextlib.suppress(RunOver):
            await self._within(self._prepared())
            if self._presence.is_prepared and (left := await rounds.left_over()) is not None:
                # An update that had no answer before a crash goes first: the hub knows whether it has it.
                await self._hand_in(left)

    async def next_offer(self) -> ms.RoundOffer | None:
        """Wait for the next offer worth taking; None when no more will come.

        Raises:
            FedSODAError: what ended the join.
        """
        with contextlib.suppress(RunOver):
            if isinstance(self._run, Greeted):  # else the owner has asked to finish before the hub's Welcome
                return await self._within(self._next_offer())
        return None

    async def train(self, round_number: int) -> ms.UpdateStart:
        """Train the round in the worker; return what is to be announced of its update.

        When the hub begins a later round during a pause, the update belongs to that round.

        Raises:
            RunOver: the run was over before that.
            ProtocolViolation: the hub offers another round by now.
            FedSODAError: what ended the join.
        """
        run = self._run
        assert isinstance(run, Equipped), "an offer comes after the preparation"
        return await self._within(run.rounds.train(round_number, run.equipment))

    async def submit(self, round_number: int, digest: str, path: Path | None = None) -> bool:
        """Hand an update in; return whether the hub accepted it. A second call returns the first answer again.

        Args:
            digest: the update's, as `train` returned it.
            path: its file, where the caller has had it; None: the file that `train` wrote.

        Raises:
            UsageProblem: it is not the update that was trained last, or its file was changed.
            RunOver: the run was over before the hub's answer.
            FedSODAError: what ended the join.
        """
        if (answered := self._offered.answer_to(round_number, digest)) is not None:
            return answered
        return await self._hand_in(await self._greeted.rounds.check(round_number, digest, path or self.update_path))

    async def leave(self, reason: str) -> None:
        """Tell people, and the hub where it can be reached, that this edge leaves: the last sentence of a join."""
        await self._conversation.leave(reason)
        if isinstance(self._run, Greeted):
            self._run.life.cancel()  # it may be waiting for a hub that is away
            await asyncio.wait({self._run.life})  # nothing is said after the last sentence
        self.say(ev.Notice(f"left the run: {reason}"))

    async def close(self, error: BaseException | None = None) -> None:
        """End all parts, close the connection and unlock the home.

        Args:
            error: why the join ends before the run does; None: it does not.
        """
        if self._status is not None:
            self._status.end(error)
        if isinstance(self._run, Greeted):
            self._run.life.cancel()
            await asyncio.wait({self._run.life})
            if not self._run.life.cancelled():
                self._run.life.exception()  # whoever waited for something has had it already
        async with contextlib.AsyncExitStack() as closing:  # runs all, the last first, even if one of them raises
            closing.callback(self.home.unlock)
            if isinstance(self._run, Equipped) and not self._settings.cache.keep_key:
                closing.callback(self.home.forget_borders)  # nobody can read them without the key
            closing.push_async_callback(self.worker.close)
            closing.push_async_callback(self._sources.close)
            closing.push_async_callback(self._conversation.close)

    def report(self) -> ev.JoinReport:
        """Report what this join did so far."""
        welcome = self._run.welcome if isinstance(self._run, Greeted) else None
        return ev.JoinReport(
            run=None if welcome is None else welcome.run_name,
            edge=None if welcome is None else welcome.edge,
            rounds=list(self._offered.rounds),
            num_examples=self._presence.num_examples,
            bytes=ev.ConversationBytes(up=self.transport.up, down=self.transport.down),
            agent_peak_rss_bytes=peak_rss_bytes(),
            worker_peak_rss_bytes=self.worker.peak_rss_bytes,
        )

    # --- the parts ---------------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        """Run all parts until the run is over.

        Raises:
            FedSODAError: what the first part that fails raises.
        """
        try:
            async with asyncio.TaskGroup() as both:
                beside = both.create_task(self._beside())
                await self._listen()
                beside.cancel()
        except BaseExceptionGroup as group:
            error = _first(group)
            log.info(trace.went_wrong(error))
            raise error from None

    async def _beside(self) -> None:
        """Run the parts beside the conversation."""
        async with asyncio.TaskGroup() as parts:
            parts.create_task(self._watch())
            parts.create_task(self._greeted.rounds.pass_progress_on())
            await self._prepare(parts)

    async def _listen(self) -> None:
        """Take in what the hub says, until it says Farewell or this edge leaves."""
        async with contextlib.aclosing(self._conversation.messages()) as messages:
            async for message in messages:
                match message:
                    case Connected():
                        self._presence.connected()
                        if await self._tell_all():
                            self.say(ev.Reconnected())
                    case ms.RoundOffer():
                        self._offered.offered(message)
                        self.say(ev.RoundOffered(round=message.round, due_seconds=message.due_seconds))
                        self._ring()
                    case ms.RoundClosed():
                        self.say(ev.RoundOver(round=message.round, updates=message.num_updates))
                    case ms.Farewell():
                        self.say(ev.RunFinished(rounds=message.rounds, reason=message.reason))

    async def _watch(self) -> None:
        """Look twice a second what the owner of the device asks for and what the rules say."""
        while True:
            await self._clock.sleep(control.LOOK_SECONDS)
            on_gpu = self._run.equipment.trainer.pid_on_gpu if isinstance(self._run, Equipped) else None
            await self._heed(await self._pauses.look(on_gpu))

    async def _prepare(self, parts: asyncio.TaskGroup) -> None:
        """Get ready for the run, and tell the hub."""
        run = self._greeted
        preparation = JoinPreparation(
            run.welcome, run.state, self.home, self._settings, self._sources, self.worker, self._pauses, self.say,
            self._clock,
        )  # fmt: skip
        rows = await preparation.check_data()
        equipment, taken = await preparation.take()
        self._run = Equipped(run.welcome, run.state, run.rounds, run.life, equipment)
        num_examples = await preparation.open(equipment.trainer, taken, rows, parts)
        self._presence.prepared(num_examples, taken.number)
        await self._tell()
        self._ring()

    # --- between the parts -------------------------------------------------------------------------------------------

    async def _heed(self, look: Look) -> None:
        """Do what the begin or the end of a pause asks for: the worker ends, with all it made on disk; the hub hears."""
        freed = 0
        match look.change:
            case PauseBegins(reason, seconds):
                freed = self.worker.rss_bytes or 0
                await self.worker.close()
                self._presence.paused(reason)
                self.say(ev.JoinPaused(reason=reason, seconds=seconds))
                await self._tell()
            case PauseEnds():
                self._presence.resumed()
                await self._tell()
                self.say(ev.JoinResumed())
                self._pauses.let_work()
            case PauseLasts(seconds):
                assert self._status is not None, "the owner is heard from `start` on"
                self._status.still_paused(seconds)
        self._pauses.answer(look, freed, self.in_hand)
        if self.is_finishing:
            self._ring()

    async def _tell(self) -> None:
        """Tell the hub whether this edge can train, but not before an update on its way: on a pause it closes the round."""
        if not (isinstance(self._run, Greeted) and self._run.rounds.is_handing_in):
            await self._tell_all()

    async def _tell_all(self) -> bool:
        """Tell the hub whether this edge can train; return False when it cannot be reached: the next connection says it."""
        try:
            while (message := self._presence.next()) is not None:
                await self._conversation.send(message)
        except HubUnreachable:
            return False
        return True

    async def _hand_in(self, start: ms.UpdateStart) -> bool:
        try:
            return await self._within(self._greeted.rounds.hand_in(start), outlives_run=True)
        finally:
            await self._tell()

    async def _prepared(self) -> None:
        while not (self._presence.is_prepared or self.is_finishing):
            await self._news.wait()

    async def _next_offer(self) -> ms.RoundOffer | None:
        while not self.is_finishing:
            if (offer := self._offered.next()) is not None:
                return offer
            await self._news.wait()
        return None

    def _ring(self) -> None:
        """Wake those who wait for an offer, for Ready, or for finish."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _within(self, work: Coroutine[Any, Any, T], *, outlives_run: bool = False) -> T:
        return await _while_alive(self._greeted.life, work, outlives_run=outlives_run)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error that came first: the others follow from it."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


async def _while_alive(life: asyncio.Task[None], work: Coroutine[Any, Any, T], *, outlives_run: bool) -> T:
    """Do a piece of work while the join lives.

    Args:
        outlives_run: whether the work ends by itself when the run is over; otherwise it is broken off then.

    Raises:
        RunOver: the run was over first.
        FedSODAError: what ended the join first.
    """
    task = asyncio.create_task(work)
    try:
        await asyncio.wait({task, life}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            if not life.cancelled() and (error := life.exception()) is not None:
                raise error
            if life.cancelled() or not outlives_run:
                raise RunOver("the run is over")
        return await task
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
