"""Edge and Participation: join a hub, take offers, train, submit.

The agent's asyncio loop runs in a daemon thread; user code may block as long as it likes.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.device.fit import Limits, check_device_name, memory_report
from fedsoda_edge.device.pause_rules import parse_pause_rules
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.join import size_class
from fedsoda_edge.join.agent import Agent, AgentSettings, Cache, Say
from fedsoda_edge.join.home import CACHE_DTYPES, Home
from fedsoda_edge.join.token import read_token
from fedsoda_edge.network.hub_transport import HubTransport
from fedsoda_edge.ports import SystemClock, Transport
from fedsoda_edge.ports.child import Child
from fedsoda_edge.ports.store import FileStore
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.needs import SampleSizes
from fedsoda_edge.units import counted

T = TypeVar("T")

WORKER_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "USE_HUB_KERNELS": "0", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Update:
    """A trained round: the coded delta as a file, never a tensor."""

    round_number: int
    path: Path
    digest: str
    num_examples: int
    loss: float


@dataclass(frozen=True)
class Offer:
    """One round the hub invites this edge to."""

    round_number: int
    rounds: int
    due_seconds: float
    _participation: Participation

    def train(self) -> Update:
        """Train the round in the worker; blocks until it is done, during a pause too. Raises FedSODAError.

        Where the hub has gone on to a later round during a pause, the update is of that round.
        """
        agent = self._participation._agent
        start = self._participation._call(agent.train(self.round_number))
        loss = float("nan") if start.loss is None else start.loss
        return Update(start.round, agent.update_path, start.digest, start.num_examples, loss)

    def submit(self, update: Update) -> bool:
        """Send the update until the hub's receipt; False when the hub refused it (its reason is said)."""
        return self._participation._call(self._participation._agent.submit())


class Edge:
    """A hub as this device sees it.

    Args:
        hub: its URL, or a Transport such as `testing.ScriptedHub`.
        token_file: file with the token ("-": stdin); None: FEDSODA_TOKEN.
        home: where state is kept; None: FEDSODA_HOME or the platform's user directory.
        device: "auto", "cpu" or "cuda[:n]".
        threads: of the worker; 0 leaves it to torch.
        max_disk: bytes that border states may take; None: what is free.
        cache: "bf16" or "int8", how they are kept. keep_cache_key: whether a later join can read them.
        max_ram, max_vram: bytes that training may take; a sub-LLM that needs more is DeviceTooSmall. None: what is free.
    """

    def __init__(
        self,
        hub: str | Transport,
        *,
        token_file: str | Path | None = None,
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
            raise UsageProblem(f"--cache {cache!r} is none of {', '.join(CACHE_DTYPES)}")
        check_device_name(device)
        self._hub = hub
        self._token_file = token_file
        self._home = Path(home) if home is not None else None
        self._device = device
        self._threads = threads
        self._cache = Cache(max_disk, cache, keep_cache_key)
        self._limits = Limits(max_ram, max_vram)

    def transport(self) -> Transport:
        """A fresh conversation with the hub."""
        if isinstance(self._hub, str):
            return HubTransport(self._hub, read_token(self._token_file))
        return self._hub

    def _agent(self, settings: AgentSettings, say: Say = lambda _: None) -> Agent:
        environment = dict(WORKER_ENVIRONMENT)
        if self._threads:
            environment |= {"FEDSODA_THREADS": str(self._threads), "OMP_NUM_THREADS": str(self._threads)}
        worker = Child("fedsoda_edge.worker", environment)
        return Agent(self.transport(), worker, Home(self._home), settings, say, SystemClock())

    def join(
        self,
        data: LocalData,
        *,
        on_event: Say = lambda _: None,
        unattended: bool = False,
        max_rounds: int = 0,
        pause_on: str = "",
    ) -> Participation:
        """Take part with this data: a context manager that yields offers.

        Args:
            on_event: called from another thread with one dict per event, for progress displays.
            unattended: retry for ever, even when the hub cannot be reached at first.
            max_rounds: leave after that many submitted updates; 0: stay to the end.
            pause_on: what pauses by itself, such as "battery,gpu-busy,hours=9-17".
        """
        settings = AgentSettings(self._device, data, unattended, self._cache, self._limits, parse_pause_rules(pause_on))
        agent = self._agent(settings, on_event)
        return Participation(agent, max_rounds)


class Participation:
    """Iterate to take part; ends with the run. Errors of the other thread are raised here."""

    def __init__(self, agent: Agent, max_rounds: int) -> None:
        self._agent = agent
        self._max_rounds = max_rounds
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fedsoda-edge", daemon=True)

    def __enter__(self) -> Participation:
        self._thread.start()
        try:
            self._call(self._agent.start())
        except BaseException as error:
            self._stop(error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop(error)

    def __iter__(self) -> Iterator[Offer]:
        while True:
            if self._max_rounds and self._agent.submitted >= self._max_rounds:
                self._call(self._agent.leave(f"took part in {counted(self._agent.submitted, 'round')}"))
                return
            item = self._next()
            if item is None:
                if self._agent.is_finishing:
                    self._call(self._agent.leave("the owner of the device finished"))
                return
            yield Offer(item.round, item.rounds, item.due_seconds, self)

    def _next(self) -> ms.RoundOffer | None:
        while not self._agent.is_finishing:
            with contextlib.suppress(TimeoutError):
                return self._call(asyncio.wait_for(self._agent.next_offer(), 0.5))
        return None

    @property
    def report(self) -> dict[str, Any]:
        """Rounds, bytes and peak memory so far."""
        return self._agent.report()

    def leave(self, reason: str) -> None:
        """Tell the hub that this edge goes for good."""
        self._call(self._agent.leave(reason))

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        waiting = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return waiting.result()
        except BaseException:
            waiting.cancel()  # Ctrl+C here must not leave the other thread's work behind
            raise

    def _stop(self, error: BaseException | None) -> None:
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(self._agent.close(error), self._loop).result(timeout=15)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=15)
        if not self._thread.is_alive():
            self._loop.close()


async def look_at(edge: Edge) -> dict[str, Any]:
    """Greet the hub, read its manifest, compare with this device; nothing is joined. Raises DeviceTooSmall."""
    home = Home(edge._home)
    agent = edge._agent(AgentSettings(edge._device, limits=edge._limits))
    try:
        welcome = await agent.greet_once()
        store = FileStore(home.store)
        taken = await size_class.take(
            welcome,
            lambda manifest: store.fetch(agent.transport, manifest.digest, manifest.bytes),
            store,
            home.directory,
            edge._device,
            # The edge's rows are not looked at: as long as the run allows, and all of them completion.
            SampleSizes(welcome.batch_size, welcome.max_length, welcome.max_length),
            edge._limits,
            lambda _: None,  # which class it is says enough
        )
        manifest, memory, facts = taken.manifest, taken.memory, taken.facts
        on_cpu = memory.device == "cpu"
        return {
            "run": welcome.run_name,
            "source": manifest.source,
            "layers": manifest.plan.num_layers,
            "layers_kept": len(manifest.plan.kept),
            "adapter_layers": len(manifest.plan.adapter),
            "rank": manifest.lora.rank,
            "rounds": welcome.rounds,
            "largest_file": max(manifest.files, key=lambda file: file.bytes).sha256,
            "size_class": taken.number,
            "disk_needed": taken.disk_needed,
            "disk_free": facts.disk_bytes,
            "border_bytes_per_row": 2 * int(manifest.config["hidden_size"]) * welcome.max_length,
            "ram_needed": memory.peak if on_cpu else 0,
            "ram_free": facts.ram_bytes,
            "vram_needed": 0 if on_cpu else memory.peak,
            "vram_free": facts.vram_bytes,
            "device": memory.device,
            "memory": memory_report(memory, facts),
        }
    finally:
        await agent.transport.close()


async def say_goodbye(edge: Edge) -> str:
    """Tell the hub that this edge does not come back; the run's name."""
    agent = edge._agent(AgentSettings("auto"))
    try:
        welcome = await agent.greet_once()
        await agent.leave("the owner of the device left")
        if not agent.home.is_in_use():  # a join that runs here deletes them itself
            agent.home.forget_borders()
        return welcome.run_name
    finally:
        await agent.transport.close()
