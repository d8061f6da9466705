"""Join a hub from Python: Edge, Participation, Offer and Update, the public SDK.

The agent's asyncio loop runs in a daemon thread; the caller's code may block for as long as it likes. What a join does
is left to `join/agent.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from fedsoda_edge import events as ev
from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.device.fit import Limits, check_device_name
from fedsoda_edge.device.pause_rules import parse_pause_rules
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.join import inspect
from fedsoda_edge.join.agent import Agent
from fedsoda_edge.join.conversation import RunOver
from fedsoda_edge.join.doctor import linked
from fedsoda_edge.join.home import CACHE_DTYPES, Home
from fedsoda_edge.join.link import link_or_url
from fedsoda_edge.join.settings import AgentSettings, Cache
from fedsoda_edge.join.token import read_token
from fedsoda_edge.join.trainer import WORKER_MODULE, worker_environment
from fedsoda_edge.network.hub_transport import HubTransport
from fedsoda_edge.network.mirror import Mirror
from fedsoda_edge.network.tls import Trust, read_pin
from fedsoda_edge.ports import Clock, SystemClock, TorchPort, Transport
from fedsoda_edge.ports.child import Child
from fedsoda_edge.ports.confine import Reach
from fedsoda_edge.protocol.join_link import JoinLink
from fedsoda_edge.units import counted

T = TypeVar("T")


@dataclass(frozen=True)
class Update:
    """A trained round: the coded delta as a file, never a tensor.

    digest: the file's sha256. num_examples: distinct samples trained on. loss: mean over completion ids, in nats; NaN
    where it was not finite.
    """

    round_number: int
    path: Path
    digest: str
    num_examples: int
    loss: float


@dataclass(frozen=True)
class Offer:
    """An invitation of the hub to a round.

    rounds: how many the run has. due_seconds: the time until the hub closes the round.
    """

    round_number: int
    rounds: int
    due_seconds: float
    _participation: Participation

    def train(self) -> Update:
        """Train the round in the worker and return its update; blocks until that is done, during a pause too.

        When the hub has begun a later round during a pause, the update belongs to that round. When the run ends
        meanwhile, the `with` block of the participation ends too, without an error.

        Raises:
            FedSODAError: what ended the join, such as DeviceTooSmall, WorkerFailed or RefusedByHub.
        """
        agent = self._participation._agent
        start = self._participation._call(agent.train(self.round_number))
        loss = float("nan") if start.loss is None else start.loss
        return Update(start.round, agent.update_path, start.digest, start.num_examples, loss)

    def submit(self, update: Update) -> bool:
        """Send the update until the hub answers; return True for a receipt, False for a refusal, whose reason is an event.

        Raises:
            UsageProblem: it is not the update that `train` returned last, or its file was changed since.
            FedSODAError: what ended the join.
        """
        agent = self._participation._agent
        return self._participation._call(agent.submit(update.round_number, update.digest, update.path))


class Edge:
    """A hub as this device sees it.

    Args:
        hub: its URL, a join link, or a Transport such as `testing.ScriptedHub`; None: there is a link elsewhere.
        token_file: the file with the token ("-": stdin); None: the token is in FEDSODA_TOKEN. A join link needs none.
        link: a join link, as `hub` takes it too.
        link_file: the file with the join link ("-": stdin); without hub, link and link_file it is in FEDSODA_LINK.
        pin: the pin of the hub's TLS key, "sha256/..." as it prints it; None: what the link says, or a certificate authority.
        insecure_http: whether plain HTTP may leave this machine, where everybody on the way reads token and updates.
        home: the directory where state is kept; None: FEDSODA_HOME or the platform's user directory.
        device: "auto", "cpu", "cuda" or "cuda:N".
        threads: CPU threads of the worker; 0 leaves their number to torch.
        max_disk: bytes that border states may take on disk; None: what is free.
        cache: "bf16" or "int8", the form in which border states are kept.
        keep_cache_key: whether a later join can read the border states of this one.
        max_ram, max_vram: bytes that training may take; None: what is free. A join whose sub-LLMs all need more raises
            DeviceTooSmall.

    Raises:
        UsageProblem: cache or device has another value, the pin is not one, or both a hub and a link were given.
    """

    def __init__(
        self,
        hub: str | Transport | None = None,
        *,
        token_file: str | Path | None = None,
        link: str | None = None,
        link_file: str | Path | None = None,
        pin: str | None = None,
        insecure_http: bool = False,
        home: str | Path | None = None,
        device: str = "auto",
        threads: int = 0,
        max_disk: int | None = None,
        cache: str = "bf16",
        keep_cache_key: bool = False,
        max_ram: int | None = None,
        max_vram: int | None = None,
    ) -> None:
        if cache not in CACHE_DTYPES:
            raise UsageProblem(f"cache={cache!r} is not known; choose {' or '.join(CACHE_DTYPES)}")
        check_device_name(device)
        if hub is not None and link is not None:
            raise UsageProblem("a hub and link were both given; leave one of them out")
        self._hub = link if hub is None else hub
        self._link_file = link_file
        self._token_file = token_file
        self._trust = Trust(None if pin is None else read_pin(pin), insecure_http)
        self._home = Path(home) if home is not None else None
        self._device = device
        self._threads = threads
        self._cache = Cache(max_disk, cache, keep_cache_key)
        self._limits = Limits(max_ram, max_vram)

    def transport(self) -> Transport:
        """Make the transport to the hub, which is not connected yet.

        Raises:
            UsageProblem: the URL is not one of a hub, the link is damaged, there is neither token nor link, or plain HTTP
                would leave this machine and may not.
        """
        match self._found:
            case JoinLink() as link:
                return HubTransport.by_link(linked(Home(self._home), link, self._trust))
            case str() as url:
                return HubTransport(url, read_token(self._token_file), self._trust)
            case transport:
                return transport

    @property
    def hub_key(self) -> bytes | None:
        """The hub's public key, as the join link names it; None: there is no link.

        Raises:
            UsageProblem: the link is damaged, or there is neither token nor link.
        """
        return self._found.hub_key if isinstance(self._found, JoinLink) else None

    @cached_property
    def _found(self) -> JoinLink | str | Transport:
        """The way to the hub; stdin is read once."""
        if self._hub is not None and not isinstance(self._hub, str):
            return self._hub
        return link_or_url(self._hub, self._link_file, self._token_file)

    def join(
        self,
        data: LocalData,
        *,
        on_event: Callable[[dict[str, Any]], None] = lambda _: None,
        unattended: bool = False,
        max_rounds: int = 0,
        pause_on: str = "",
    ) -> Participation:
        """Take part with this data: return a context manager that yields offers.

        Args:
            on_event: called from another thread with one dict per event (`events.py`), for progress displays.
            unattended: whether to try until the hub answers, also at the start.
            max_rounds: updates to submit before this edge leaves; 0: all until the run ends.
            pause_on: what pauses the join without a request, such as "battery,gpu-busy,hours=9-17".

        Raises:
            UsageProblem: pause_on has a rule that is not known, or the hub's URL or token is missing or wrong.
        """
        return take_part(
            self,
            data,
            lambda event: on_event(ev.as_json(event)),
            unattended=unattended,
            max_rounds=max_rounds,
            pause_on=pause_on,
        )


class Participation:
    """A join as a context manager and an iterator over offers, which ends with the run.

    Errors of the agent's thread are raised in the caller's. A run that ends while a round is trained or handed in ends
    the `with` block there, without an error.
    """

    def __init__(
        self, agent: Agent, max_rounds: int, beside: Callable[[], Coroutine[Any, Any, None]] | None = None
    ) -> None:
        self._agent = agent
        self._max_rounds = max_rounds
        self._beside = beside
        self._attending: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fedsoda-edge", daemon=True)

    def __enter__(self) -> Participation:
        self._thread.start()
        if self._beside is not None:
            self._call(self._attend(self._beside))
        try:
            self._call(self._agent.start())
        except BaseException as error:
            self._stop(error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        is_over = isinstance(error, RunOver)
        self._stop(None if is_over else error)
        return is_over

    def __iter__(self) -> Iterator[Offer]:
        while True:
            if self._max_rounds and self._agent.submitted >= self._max_rounds:
                self._call(self._agent.leave(f"took part in {counted(self._agent.submitted, 'round')}"))
                return
            offer = self._call(self._agent.next_offer())
            if offer is None:
                if self._agent.is_finishing:
                    self._call(self._agent.leave("the owner of the device finished"))
                return
            yield Offer(offer.round, offer.rounds, offer.due_seconds, self)

    @property
    def report(self) -> dict[str, Any]:
        """Rounds, bytes and peak memory so far, as JSON values."""
        found: dict[str, object] = msgspec.to_builtins(self._agent.report())
        return found

    def leave(self, reason: str) -> None:
        """Tell the hub that this edge leaves and does not come back by itself; there are no more offers then."""
        self._call(self._agent.leave(reason))

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        if not self._thread.is_alive():  # nobody would ever do the work
            work.close()
            raise UsageProblem(
                "this join has not begun, or is over; use it within `with edge.join(...) as participation:`"
            )
        waiting = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return waiting.result()
        except BaseException:
            waiting.cancel()  # Ctrl+C here must not leave the other thread's work behind
            raise

    def _stop(self, error: BaseException | None) -> None:
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(self._close(error), self._loop).result(timeout=15)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=15)
        if not self._thread.is_alive():
            self._loop.close()

    async def _attend(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._attending = asyncio.create_task(work())

    async def _close(self, error: BaseException | None) -> None:
        await self._agent.close(error)
        if self._attending is not None:
            self._attending.cancel()
            await asyncio.gather(self._attending, return_exceptions=True)


def take_part(
    edge: Edge,
    data: LocalData,
    say: ev.EventSink,
    *,
    unattended: bool = False,
    max_rounds: int = 0,
    pause_on: str = "",
    beside: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> Participation:
    """Join as `Edge.join` does; `say` is called from another thread with each event as its struct.

    Args:
        beside: what runs in the agent's event loop as long as the join does.
    """
    return Participation(agent_of(edge, data, say, unattended=unattended, pause_on=pause_on), max_rounds, beside)


def agent_of(
    edge: Edge,
    data: LocalData,
    say: ev.EventSink,
    *,
    unattended: bool = False,
    pause_on: str = "",
    worker: TorchPort | None = None,
    clock: Clock | None = None,
) -> Agent:
    """Make the agent of a join that has not begun.

    Args:
        worker: what trains; None: a child process. clock: None: the system's.
    """
    settings = AgentSettings(
        edge._device, data, unattended, edge._cache, edge._limits, parse_pause_rules(pause_on), edge.hub_key
    )
    home = Home(edge._home)
    if worker is None:
        reach = Reach(
            reads=(str(data.path.absolute()), str(home.store)),
            writes=(str(home.runs),),
            may_use_gpu=edge._device != "cpu",
        )
        worker = Child(WORKER_MODULE, worker_environment(home.temporary, reach, threads=edge._threads))
    return Agent(edge.transport(), worker, home, settings, say, clock or SystemClock(), Mirror)


async def look_at(edge: Edge) -> inspect.Found:
    """Greet the hub, read its manifest and compare it with this device, without joining the run.

    Raises:
        DeviceTooSmall: there is no room for the smallest sub-LLM of the run. HubUnreachable, RefusedByHub.
    """
    return await inspect.look_at(edge.transport(), Home(edge._home), edge._device, edge._limits, edge.hub_key)


async def say_goodbye(edge: Edge) -> str:
    """Tell the hub that this edge does not come back by itself; return the run's name.

    Raises:
        HubUnreachable, RefusedByHub: the hub did not hear it.
    """
    return await inspect.say_goodbye(edge.transport(), Home(edge._home), edge.hub_key)
