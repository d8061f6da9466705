"""Edge and Participation: join a hub, take offers, train, submit, reconnect.

An asyncio loop in a daemon thread holds the socket; torch lives in the worker process; user code may block as
long as it likes. What may be said when is `protocol/session.py`'s; the numbers are the worker's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from fedsoda_edge import control
from fedsoda_edge.config import Home, read_token
from fedsoda_edge.data import DEFAULT_COMPLETION, DEFAULT_PROMPT, LocalData, TextTemplate
from fedsoda_edge.device import choose_device_within, read_device
from fedsoda_edge.errors import (
    BlobCorrupt,
    HubUnreachable,
    ProtocolMismatch,
    ProtocolViolation,
    RefusedByHub,
    UsageProblem,
    WorkerFailed,
)
from fedsoda_edge.neighbour import SENSE_SECONDS, Neighbour, Pause, Readings, Rules, Sensors, parse_rules
from fedsoda_edge.ports import Clock, SystemClock, Transport
from fedsoda_edge.ports.child import Child
from fedsoda_edge.ports.disk import sha256, sha256_file, write_durably
from fedsoda_edge.ports.system import peak_rss_bytes
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.manifest import TOKENIZER_FILES, BundleManifest, parse_manifest
from fedsoda_edge.protocol.session import Blob, EdgeSession, chunks
from fedsoda_edge.status import Status
from fedsoda_edge.store import FileStore
from fedsoda_edge.transport import HubTransport

Say = Callable[[dict[str, Any]], None]
T = TypeVar("T")

MAX_BACKOFF_SECONDS = 30.0
FORGET_RESIDUAL_AFTER = 5  # missed rounds
PROGRESS_SECONDS = 0.5
WORKER_TRIES = 3  # a round may take; the second begins at the first one's checkpoint
CACHE_DTYPES = ("bf16", "int8")
END_SECONDS = 5.0  # a worker whose stdin closed may take; then it is killed
REFRESH_SECONDS = 30.0  # so often `status` learns how long a pause still is

WHAT_LEAVES = (
    "What leaves this device: coded LoRA deltas, the number of examples, the mean loss, the device's sizes. Never text, "
    "never hidden states. Text can be partly recovered from deltas (arXiv 2601.17533): join only hubs you trust."
)


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
        return self._participation._call(self._participation._agent.train(self.round_number))

    def submit(self, update: Update) -> bool:
        """Send the update until the hub's receipt; False when the hub refused it (its reason is said)."""
        return self._participation._call(self._participation._agent.submit(update))


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
            raise UsageProblem(f"cache is {cache!r}; it must be one of {', '.join(CACHE_DTYPES)}")
        self._hub = hub
        self._token_file = token_file
        self._home = Path(home) if home is not None else None
        self._device = device
        self._threads = threads
        self._cache = _Cache(max_disk, cache, keep_cache_key)
        self._limits = _Limits(max_ram, max_vram)

    def transport(self) -> Transport:
        """A fresh conversation with the hub."""
        if isinstance(self._hub, str):
            return HubTransport(self._hub, read_token(self._token_file))
        return self._hub

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
        agent = _Agent(
            self.transport(),
            Home(self._home),
            data,
            self._device,
            self._threads,
            unattended,
            on_event,
            SystemClock(),
            self._cache,
            self._limits,
            parse_rules(pause_on),
        )
        return Participation(agent, max_rounds)


class Participation:
    """Iterate to take part; ends with the run. Errors of the other thread are raised here."""

    def __init__(self, agent: _Agent, max_rounds: int) -> None:
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
                self._call(self._agent.leave(f"took part in {self._agent.submitted} rounds"))
                return
            item = self._next()
            if item is None:
                if self._agent.is_finishing:
                    self._call(self._agent.leave("the owner of the device finished"))
                return
            if isinstance(item, BaseException):
                raise item
            yield Offer(item.round, item.rounds, item.due_seconds, self)

    def _next(self) -> ms.RoundOffer | BaseException | None:
        while not self._agent.is_finishing:
            with contextlib.suppress(queue.Empty):
                item = self._agent.offers.get(timeout=0.5)
                if not isinstance(item, ms.RoundOffer) or self._agent.is_worth_taking(item.round):
                    return item
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


@dataclass(frozen=True)
class _Cache:
    """How border states are kept. max_bytes: None: what is free on the disk."""

    max_bytes: int | None = None
    dtype: str = "bf16"
    keep_key: bool = False


@dataclass(frozen=True)
class _Limits:
    """Bytes that training may take. None: what is free."""

    max_ram: int | None = None
    max_vram: int | None = None


class _Agent:
    """The asyncio side: one connection at a time, one worker, state on disk."""

    def __init__(
        self,
        transport: Transport,
        home: Home,
        data: LocalData,
        device: str,
        threads: int,
        unattended: bool,
        say: Say,
        clock: Clock,
        cache: _Cache = _Cache(),
        limits: _Limits = _Limits(),
        rules: Rules = Rules(),
    ) -> None:
        self._limits = limits
        self._rules = rules
        self._sensors = Sensors(rules)
        self._readings = Readings()
        self._sensed = self._refreshed = float("-inf")
        self._neighbour = Neighbour(rules)
        self._pause: Pause | None = None
        self._running = asyncio.Event()  # not paused
        self._running.set()
        self._watcher: asyncio.Task[None] | None = None
        self._training: asyncio.Task[tuple[ms.RoundOffer, dict[str, Any]]] | None = None
        self._transfer: asyncio.Task[bytes] | None = None
        self._in_hand: int | None = None  # the round that is trained or handed in
        self._telling = asyncio.Lock()
        self._told_pause: bool | None = None  # on this connection
        self._ready = asyncio.Event()  # the hub takes updates on this connection
        self.is_finishing = False
        self._cache = cache
        self._cache_key = b""
        self._opening: dict[str, Any] | None = None  # what the worker was opened with, for the next one
        self._transport = transport
        self._home = home
        self._data = data
        self._device = device
        self._unattended = unattended
        self._show = say
        self._clock = clock
        self._session = EdgeSession()
        environment = {"HF_HUB_OFFLINE": "1", "USE_HUB_KERNELS": "0", "TOKENIZERS_PARALLELISM": "false"}
        if threads:
            environment |= {"FEDSODA_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
        self._worker = Child("fedsoda_edge.worker", environment)
        self._status: Status | None = None  # from the moment the home is this join's
        self._welcome: ms.Welcome | None = None
        self._manifest: BundleManifest | None = None
        self._num_examples = 0
        self._reader: asyncio.Task[None] | None = None
        self._connected = asyncio.Event()
        self._blob: asyncio.Future[bytes] | None = None
        self._blob_lock = asyncio.Lock()
        self._answer: asyncio.Future[ms.Receipt | ms.Refusal] | None = None
        self._offer: ms.RoundOffer | None = None
        self._border_for: str | None = None
        self._working_on = 0
        self._submitting = asyncio.Lock()
        self._progress_tasks: set[asyncio.Task[None]] = set()
        self._told_what_leaves = False
        self.offers: queue.Queue[ms.RoundOffer | BaseException | None] = queue.Queue()
        self.submitted = 0
        self.rounds: list[dict[str, Any]] = []

    def _say(self, event: dict[str, Any]) -> None:
        if self._status is not None:
            self._status.note(event)
        self._show(event)

    # --- joining -------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect, check the device, fetch the bundle, read the data, say Ready."""
        self._home.lock()
        control.forget(self._home.control)
        self._cache_key = self._home.cache_key(keep=self._cache.keep_key)
        if not self._cache.keep_key:
            self._home.forget_borders()  # of a join that was killed: nobody has its key
        hub = getattr(self._transport, "url", "a script")
        self._status = Status(self._home.status, hub, self._clock, lambda: self._worker.rss_bytes)
        welcome = await self._greet(keep_trying=self._unattended)
        self._say({"event": "joined", "run": welcome.run_name, "edge": welcome.edge, "rounds": welcome.rounds})
        rows = await self._check_data()
        store = FileStore(self._home.store)
        manifest_path = await store.fetch(self._transport, welcome.manifest.digest, welcome.manifest.bytes)
        manifest = parse_manifest(manifest_path.read_bytes())
        self._manifest = manifest
        wanted = [(file.sha256, file.bytes) for file in manifest.files]
        held = store.held_bytes(wanted)
        facts = read_device(self._home.directory)
        device = self._fitting_device(manifest, facts, held)
        self._say(
            {
                "event": "device",
                "device": device,
                "ram_needed": manifest.needs.ram_bytes,
                "ram_free": facts.ram_bytes,
                "disk_needed": max(0, manifest.needs.disk_bytes - held),
                "disk_free": facts.disk_bytes,
            }
        )
        total, done = sum(size for _, size in wanted), 0

        def came(count: int) -> None:
            nonlocal done
            done += count
            self._say({"event": "download", "done": done, "total": total})

        for digest, size in wanted:
            await store.fetch(self._transport, digest, size, came)
        prompt, completion = self._template()
        self._opening = {
            "store": str(self._home.store),
            "manifest": welcome.manifest.digest,
            "data": str(self._data.path.absolute()),
            "columns": dict(self._data.columns),
            "prompt": prompt.text,
            "completion": completion.text,
            "max_length": welcome.max_length,
            "device": device,
        }
        opened = await self._worker.call("open", self._opening)
        self._num_examples = opened["num_examples"]
        tokenizer = {file.name: str(store.path(file.sha256)) for file in manifest.files if file.name in TOKENIZER_FILES}
        about = {
            "run": welcome.run_name,
            "prompt": prompt.text,
            "completion": completion.text,
            "max_length": welcome.max_length,
            "tokenizer": tokenizer,
            "eos": manifest.config.get("eos_token_id"),
        }
        self._home.remember_run(welcome.run_id, about)
        self._say({"event": "data", "rows": rows, **opened})
        for missing in self._sensors.missing():
            self._say({"event": "notice", "message": missing})
        await self._look()
        await self._resume()
        self._reader = asyncio.create_task(self._converse())
        self._watcher = asyncio.create_task(self._watch())
        if (self._run_dir / "pending" / "meta.json").exists():
            # An update without receipt from before a crash goes first: the hub knows whether it has it.
            await self._submit_pending()

    def _fitting_device(self, manifest: BundleManifest, facts: ms.DeviceFacts, held_bytes: int) -> str:
        limits = self._limits
        return choose_device_within(
            self._device, manifest.needs, facts, held_bytes, max_ram=limits.max_ram, max_vram=limits.max_vram
        )

    async def _check_data(self) -> int:
        """Every row, before anything is fetched; the number of rows."""
        prompt, completion = self._template()
        if self._data.is_text:
            return self._data.check(prompt, completion)
        values = {"data": str(self._data.path.absolute()), "columns": dict(self._data.columns)}
        checked = await self._worker.call("check", {**values, "prompt": prompt.text, "completion": completion.text})
        return int(checked["rows"])

    def _template(self) -> tuple[TextTemplate, TextTemplate]:
        template = self._welcome.template if self._welcome else None
        if template is None:
            return TextTemplate(DEFAULT_PROMPT), TextTemplate(DEFAULT_COMPLETION)
        return TextTemplate(template.prompt), TextTemplate(template.completion)

    async def _greet(self, *, keep_trying: bool) -> ms.Welcome:
        """Connect and shake hands; with `keep_trying` for ever, with paced back-off."""
        attempt = 0
        while True:
            try:
                return await self._greet_once()
            except HubUnreachable as error:
                if not keep_trying:
                    raise
                if attempt == 0:
                    self._say({"event": "reconnecting", "message": str(error)})
                delay = min(MAX_BACKOFF_SECONDS, 0.5 * 2.0 ** min(attempt, 10))
                attempt += 1
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # not all edges at once

    async def _greet_once(self) -> ms.Welcome:
        await self._transport.connect()
        self._session = EdgeSession()
        self._told_pause = None
        self._ready.clear()
        await self._transport.send(
            self._session.send(
                ms.Hello(
                    protocol=ms.PROTOCOL_VERSION,
                    software=f"fedsoda {version('fedsoda')}",
                    device_id=self._home.device_id(),
                    device=read_device(self._home.directory),
                )
            )
        )
        async for frame in self._transport.frames():
            answer = self._session.receive(frame)
            if isinstance(answer, ms.Refusal):
                raise RefusedByHub(f"the hub refused: {answer.reason}")
            assert isinstance(answer, ms.Welcome)
            if answer.protocol != ms.PROTOCOL_VERSION:
                raise ProtocolMismatch(ms.PROTOCOL_VERSION, answer.protocol)
            if self._welcome is not None and answer.run_id != self._welcome.run_id:
                raise RefusedByHub(
                    f"the hub now serves run {answer.run_id}, this join began with {self._welcome.run_id}; join again"
                )
            self._welcome = answer
            return answer
        raise HubUnreachable("the hub closed the connection before it answered Hello", "HTTP")

    async def _resume(self) -> None:
        """After every (re)connect: this edge may be invited, or it is paused."""
        await self._tell()
        self._connected.set()

    async def _tell(self) -> None:
        """Say Ready, Paused or Resumed until the hub knows how it is. A connection that begins in a pause has no Ready."""
        async with self._telling:
            while (is_paused := self._pause is not None) != self._told_pause:
                if self._pause is not None:
                    await self._send(ms.Paused(reason=self._pause.reason))
                elif self._ready.is_set():
                    await self._send(ms.Resumed())
                else:
                    await self._send(ms.Ready(num_examples=self._num_examples))
                    self._ready.set()
                self._told_pause = is_paused

    async def _tell_if_connected(self) -> None:
        """The update that is being handed in goes first: a hub that hears of the pause before may close the round."""
        if self._connected.is_set() and not self._submitting.locked():
            with contextlib.suppress(HubUnreachable, AssertionError):  # then the next connection begins with it
                await self._tell()

    # --- a good neighbour ----------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Do what the owner wishes and what the rules ask for."""
        try:
            while True:
                await asyncio.sleep(control.LOOK_SECONDS)
                await self._look()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self.offers.put(error)

    async def _look(self) -> None:
        now, freed, before = self._clock.monotonic(), 0, self._pause
        taken = control.wishes(self._home.control)
        for wish in taken:
            if wish.do == "pause":
                self._neighbour.pause(now, wish.seconds)
            elif wish.do == "resume":
                self._neighbour.resume()
            elif wish.do == "finish":
                self._neighbour.finish()
                self.is_finishing = True
        if self._rules != Rules() and now - self._sensed >= SENSE_SECONDS:
            self._sensed = now
            device = self._opening["device"] if self._opening else "cpu"
            ours = self._worker.pid if device != "cpu" else None
            hour = time.localtime(self._clock.wall()).tm_hour
            self._readings = await asyncio.to_thread(self._sensors.read, hour, ours)
        wanted = self._neighbour.look(now, self._readings)
        if wanted is None and before is not None:
            await self._end_pause()
        elif wanted is not None and (before is None or (before.by, before.until) != (wanted.by, wanted.until)):
            freed = await self._begin_pause(wanted, now)
        elif wanted is not None and wanted.until is not None and now - self._refreshed >= REFRESH_SECONDS:
            self._refreshed = now
            assert self._status is not None
            self._status.still_paused(wanted.until - now)
        pause = self._pause
        for wish in taken:
            control.answer(
                wish,
                {
                    "state": "paused" if pause else "finishing" if self.is_finishing else "running",
                    "was_paused": before is not None,
                    "reason": pause.reason if pause else None,
                    "seconds": pause.until - now if pause and pause.until is not None else None,
                    "freed_bytes": freed,
                    "round": self._in_hand,
                },
            )

    async def _begin_pause(self, pause: Pause, now: float) -> int:
        """End the worker, which keeps all on the disk, and tell the hub; the bytes that are free again."""
        self._pause, self._refreshed = pause, now
        self._running.clear()
        if (training := self._training) is not None:
            training.cancel()
            await asyncio.wait([training])
        freed = self._worker.rss_bytes or 0
        try:
            async with asyncio.timeout(END_SECONDS):
                await self._worker.close()
        except TimeoutError:
            import psutil

            with contextlib.suppress(psutil.Error):
                psutil.Process(self._worker.pid).kill()
            await self._worker.close()
        seconds = None if pause.until is None else pause.until - now
        self._say({"event": "paused", "reason": pause.reason, "seconds": seconds})
        await self._tell_if_connected()
        return freed

    async def _end_pause(self) -> None:
        self._pause = None
        await self._tell_if_connected()
        self._say({"event": "resumed"})
        self._running.set()

    # --- the conversation ----------------------------------------------------------------------------------

    async def _converse(self) -> None:
        """Read for ever; reconnect for ever. Ends with Farewell or an error that retrying cannot mend."""
        try:
            while True:
                async for frame in self._transport.frames():
                    if self._received(self._session.receive(frame)):
                        self.offers.put(None)
                        return
                if self._session.state == "over":  # this edge left
                    return
                self._lost()
                await self._greet(keep_trying=True)
                try:
                    await self._resume()
                except HubUnreachable:  # gone again already
                    continue
                self._say({"event": "reconnected"})
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._lost()
            self.offers.put(error)

    def _lost(self) -> None:
        self._connected.clear()
        self._ready.clear()
        gone = HubUnreachable("the connection ended", "TCP")
        for waiting in (self._blob, self._answer):
            if waiting is not None and not waiting.done():
                waiting.set_exception(gone)

    def _received(self, message: ms.HubMessage | Blob | None) -> bool:
        """Whether that was the last message."""
        match message:
            case Blob():
                if self._blob is not None and not self._blob.done():
                    self._blob.set_result(message.data)
            case ms.RoundOffer():
                is_new = self._offer is None or self._offer.round != message.round
                self._offer = message
                self._say({"event": "offer", "round": message.round, "due_seconds": message.due_seconds})
                if is_new or not self._is_busy(message.round):
                    self.offers.put(message)
            case ms.Receipt():
                if self._answer is not None and not self._answer.done():
                    self._answer.set_result(message)
            case ms.Refusal():
                if message.fatal:
                    raise RefusedByHub(f"the hub refused: {message.reason}")
                if self._answer is not None and not self._answer.done():
                    self._answer.set_result(message)
            case ms.RoundClosed():
                self._say({"event": "round_closed", "round": message.round, "updates": message.num_updates})
            case ms.Farewell():
                self._say({"event": "farewell", "rounds": message.rounds, "reason": message.reason})
                return True
            case _:
                pass
        return False

    def _is_busy(self, round_number: int) -> bool:
        """The same offer comes again after a reconnect; a round in hand or handed in is not begun again."""
        return self._working_on == round_number or self.has_handed_in(round_number)

    def has_handed_in(self, round_number: int) -> bool:
        return any(done["round"] == round_number and done["accepted"] for done in self.rounds)

    def is_worth_taking(self, round_number: int) -> bool:
        """Not one that was handed in, nor one that the hub has left behind."""
        is_latest = self._offer is None or self._offer.round <= round_number
        return is_latest and not self.has_handed_in(round_number)

    async def _send(self, message: ms.EdgeMessage, payload: bytes | memoryview = b"") -> None:
        await self._transport.send(self._session.send(message, payload))

    async def _patiently(self, may: asyncio.Event, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do again what a lost connection broke off, each time when it may be."""
        while True:
            await may.wait()
            try:
                return await work()
            except (HubUnreachable, AssertionError) as error:
                if isinstance(error, AssertionError) and may.is_set():
                    raise
                await asyncio.sleep(0.05)

    async def _fetch(self, blob: ms.BlobRef) -> bytes:
        async def once() -> bytes:
            async with self._blob_lock:
                self._blob = asyncio.get_running_loop().create_future()
                await self._transport.send(self._session.request(blob))
                return await self._blob

        # A pause breaks off who waits, not the transfer: its chunks come all the same, and the next one has to wait.
        self._transfer = asyncio.create_task(self._patiently(self._connected, once))
        return await asyncio.shield(self._transfer)

    # --- rounds --------------------------------------------------------------------------------------------

    @property
    def _run_dir(self) -> Path:
        assert self._welcome is not None
        return self._home.run(self._welcome.run_id)

    async def train(self, round_number: int) -> Update:
        """Bring views up to date, sweep the border if the alignment changed, train."""
        offer, welcome = self._offer, self._welcome
        assert offer is not None
        assert welcome is not None
        if offer.round != round_number:
            raise ProtocolViolation(f"round {round_number} is over, the hub offers {offer.round}; take the next offer")
        self._working_on = self._in_hand = round_number
        try:
            pending = self._run_dir / "pending"
            pending.mkdir(exist_ok=True)
            (pending / "meta.json").unlink(missing_ok=True)
            offer, result = await self._train_in_worker(welcome, pending)
            path = pending / "update"
            digest = await asyncio.to_thread(sha256_file, path)
            start = ms.UpdateStart(
                round=offer.round,
                base=offer.view.digest,
                alignment=offer.alignment,
                digest=ms.Digest(digest),
                bytes=path.stat().st_size,
                codec=welcome.codec,
                num_examples=result["num_examples"],
                loss=result["loss"],
            )
            write_durably(pending / "meta.json", msgspec.json.encode(start))
            self._say({"event": "trained", "round": offer.round, "edge": welcome.edge, **result})
            loss = float("nan") if result["loss"] is None else result["loss"]
            return Update(offer.round, path, digest, result["num_examples"], loss)
        except BaseException:
            self._in_hand = None
            raise
        finally:
            self._working_on = 0

    async def _train_in_worker(self, welcome: ms.Welcome, pending: Path) -> tuple[ms.RoundOffer, dict[str, Any]]:
        """The round's result. A worker that dies, or that a pause ended, is started again; it has its checkpoint."""
        num_failures = 0
        while True:
            await self._running.wait()
            self._training = asyncio.create_task(self._train_once(welcome, pending))
            try:
                return await self._training
            except asyncio.CancelledError:
                this = asyncio.current_task()
                if this is None or this.cancelling():
                    raise  # not by a pause
            except WorkerFailed as error:
                num_failures += 1
                if num_failures == WORKER_TRIES:
                    raise
                self._say({"event": "notice", "message": f"{error}; starting it again"})
                await self._worker.close()
            finally:
                self._training = None

    async def _train_once(self, welcome: ms.Welcome, pending: Path) -> tuple[ms.RoundOffer, dict[str, Any]]:
        if self._worker.pid is None and self._opening is not None:
            await self._worker.call("open", self._opening)
            self._border_for = None
        offer = self._offer
        assert offer is not None
        if offer.round != self._working_on:
            message = f"round {self._working_on} is over, going on with round {offer.round}"
            self._say({"event": "notice", "message": message})
            self._working_on = self._in_hand = offer.round
        emulator = await self._bring_up("emulator", offer.emulator, offer.alignment)
        view = await self._bring_up("adapter", offer.view, offer.round)
        if self._border_for != offer.emulator.digest:
            await self._sweep(emulator)
            self._border_for = offer.emulator.digest
        result = await self._worker.call(
            "train",
            {
                "view": view,
                "settings": msgspec.to_builtins(offer.local),
                "seed": welcome.seed,
                "round": offer.round,
                "edge": welcome.edge,
                "codec": welcome.codec,
                "residual": self._residual(offer.round),
                "update": str(pending / "update"),
                "new_residual": str(pending / "residual"),
                "checkpoint": str(self._run_dir / "checkpoint"),
            },
            self._reporter(offer.round),
        )
        self._say_damaged(result.pop("num_damaged"))
        return offer, result

    async def _sweep(self, emulator: str | None) -> None:
        """Border states of all samples, those that are on the disk already left as they are."""
        assert self._welcome is not None
        cache = {
            "directory": str(self._home.border(self._welcome.run_id)),
            "key": self._cache_key.hex(),
            "dtype": self._cache.dtype,
            "max_bytes": self._cache.max_bytes,
        }
        swept = await self._worker.call("border", {"emulator": emulator, "cache": cache}, self._report_sweep)
        self._say_damaged(swept["num_damaged"])
        self._say({"event": "swept", "num_examples": self._num_examples, **swept})

    def _say_damaged(self, count: int) -> None:
        if count:
            message = f"{count} records of the border cache were not as they were written; computed anew"
            self._say({"event": "notice", "message": message})

    def _report_sweep(self, values: Mapping[str, Any]) -> None:
        self._say({"event": "sweep", **values})

    def _reporter(self, round_number: int) -> Callable[[dict[str, Any]], None]:
        """Tell people and the hub how far training is, twice a second at most."""
        last = -PROGRESS_SECONDS

        def report(values: dict[str, Any]) -> None:
            nonlocal last
            now = self._clock.monotonic()
            if now - last < PROGRESS_SECONDS and values["step"] != values["steps"]:
                return
            last = now
            self._say({"event": "training", "round": round_number, **values})
            if self._connected.is_set() and self._session.state == "open":
                message = ms.Progress(
                    round=round_number,
                    step=values["step"],
                    steps=values["steps"],
                    loss=values["loss"],
                    tokens_per_second=values["tokens_per_second"],
                )
                task = asyncio.get_running_loop().create_task(self._try_send(message))
                self._progress_tasks.add(task)
                task.add_done_callback(self._progress_tasks.discard)

        return report

    async def _try_send(self, message: ms.EdgeMessage) -> None:
        with contextlib.suppress(HubUnreachable, AssertionError):
            await self._send(message)

    async def _bring_up(self, which: str, wanted: ms.ViewRef, number: int) -> str | None:
        """The file of a view; None for the bundle's own. By delta from the one before, else by snapshot."""
        path = self._run_dir / f"{which}.safetensors"
        mark = self._run_dir / f"{which}.number"
        if wanted.snapshot is None or wanted.delta is None:
            return None
        if path.exists() and await asyncio.to_thread(sha256_file, path) == wanted.digest:
            write_durably(mark, str(number).encode())
            return str(path)
        assert self._welcome is not None
        held = int(mark.read_text()) if path.exists() and mark.exists() else 0
        first = 1 if which == "emulator" else 2
        if (path.exists() and held == number - 1) or (not path.exists() and number == first):
            coded = self._run_dir / f"{which}.delta"
            moved = self._run_dir / f"{which}.moved"
            write_durably(coded, await self._fetch(wanted.delta))
            answer = await self._worker.call(
                "advance",
                {
                    "which": which,
                    "view": str(path) if path.exists() else None,
                    "delta": str(coded),
                    "codec": self._welcome.codec,
                    "out": str(moved),
                },
            )
            coded.unlink()
            if answer["digest"] == wanted.digest:
                os.replace(moved, path)
                write_durably(mark, str(number).encode())
                return str(path)
        data = await self._fetch(wanted.snapshot)
        if sha256(data) != wanted.digest:
            raise BlobCorrupt(f"the hub's snapshot of the {which} LoRA has digest {sha256(data)[:12]}, not its own")
        write_durably(path, data)
        write_durably(mark, str(number).encode())
        return str(path)

    def _residual(self, round_number: int) -> str | None:
        """The error feedback of the last receipt; dropped after five missed rounds."""
        path, mark = self._run_dir / "residual", self._run_dir / "residual.round"
        if not path.exists() or round_number - int(mark.read_text()) > FORGET_RESIDUAL_AFTER:
            return None
        return str(path)

    async def submit(self, update: Update) -> bool:
        """Announce, send in chunks, wait for the receipt; then the residual counts."""
        if not self._told_what_leaves:
            self._told_what_leaves = True
            self._say({"event": "notice", "message": WHAT_LEAVES})
        return await self._submit_pending()

    async def _submit_pending(self) -> bool:
        try:
            return await self._hand_in()
        finally:
            self._in_hand = None
            await self._tell_if_connected()

    async def _hand_in(self) -> bool:
        async with self._submitting:
            pending = self._run_dir / "pending"
            meta = pending / "meta.json"
            if not meta.exists():  # the receipt came by another way
                return True
            start = msgspec.json.decode(meta.read_bytes(), type=ms.UpdateStart)
            self._in_hand = start.round
            data = await asyncio.to_thread((pending / "update").read_bytes)
            while True:
                answer = await self._patiently(self._ready, lambda: self._upload(start, data))
                if not (isinstance(answer, ms.Refusal) and answer.retry):
                    break
                self._say({"event": "retrying", "round": start.round, "reason": answer.reason})
                await asyncio.sleep(5.0)
            taken = isinstance(answer, ms.Receipt)
            if taken:
                if (pending / "residual").exists():  # gone when a crash came between this line and the last
                    os.replace(pending / "residual", self._run_dir / "residual")
                write_durably(self._run_dir / "residual.round", str(start.round).encode())
                self.submitted += 1
            meta.unlink()  # last: until then a crash sends the update again, and the hub has its first receipt
            self.rounds.append({"round": start.round, "loss": start.loss, "accepted": taken})
            event: dict[str, Any] = {"event": "accepted" if taken else "refused", "round": start.round}
            if isinstance(answer, ms.Refusal):
                event["reason"] = answer.reason
            self._say(event | {"num_examples": start.num_examples, "loss": start.loss, "bytes": len(data)})
            return taken

    async def _upload(self, start: ms.UpdateStart, data: bytes) -> ms.Receipt | ms.Refusal:
        self._answer = asyncio.get_running_loop().create_future()
        await self._send(start)
        for offset, piece in chunks(data):
            await self._send(ms.UpdateChunk(digest=start.digest, offset=offset), piece)
        while True:
            answer = await self._answer
            if answer.round == start.round:
                return answer
            self._answer = asyncio.get_running_loop().create_future()

    # --- the end -------------------------------------------------------------------------------------------

    async def leave(self, reason: str) -> None:
        if self._session.state == "open":
            await self._try_send(ms.Leave(reason=reason))

    async def close(self, error: BaseException | None = None) -> None:
        if self._status is not None:
            self._status.end(error)
        for task in (self._watcher, self._reader, self._transfer):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        await self._transport.close()
        await self._worker.close()
        if self._opening is not None and not self._cache.keep_key:
            self._home.forget_borders()  # without the key they are of no use
        self._home.unlock()

    def report(self) -> dict[str, Any]:
        return {
            "run": self._welcome.run_name if self._welcome else None,
            "edge": self._welcome.edge if self._welcome else None,
            "rounds": self.rounds,
            "num_examples": self._num_examples,
            "bytes": {"up": getattr(self._transport, "up", 0), "down": getattr(self._transport, "down", 0)},
            "agent_peak_rss_bytes": peak_rss_bytes(),
            "worker_peak_rss_bytes": self._worker.peak_rss_bytes,
        }


async def look_at(edge: Edge) -> dict[str, Any]:
    """Greet the hub, read its manifest, compare with this device; nothing is joined. Raises DeviceTooSmall."""
    home = Home(edge._home)
    agent = _Agent(
        edge.transport(),
        home,
        LocalData(Path()),
        edge._device,
        0,
        False,
        lambda _: None,
        SystemClock(),
        limits=edge._limits,
    )
    try:
        welcome = await agent._greet_once()
        store = FileStore(home.store)
        path = await store.fetch(agent._transport, welcome.manifest.digest, welcome.manifest.bytes)
        manifest = parse_manifest(path.read_bytes())
        facts = read_device(home.directory)
        held = store.held_bytes([(file.sha256, file.bytes) for file in manifest.files])
        return {
            "run": welcome.run_name,
            "source": manifest.source,
            "layers": manifest.plan.num_layers,
            "layers_kept": len(manifest.plan.kept),
            "adapter_layers": len(manifest.plan.adapter),
            "rank": manifest.lora.rank,
            "rounds": welcome.rounds,
            "largest_file": max(manifest.files, key=lambda file: file.bytes).sha256,
            "disk_needed": max(0, manifest.needs.disk_bytes - held),
            "disk_free": facts.disk_bytes,
            "ram_needed": manifest.needs.ram_bytes,
            "ram_free": facts.ram_bytes,
            "vram_needed": manifest.needs.vram_bytes,
            "vram_free": facts.vram_bytes,
            "device": agent._fitting_device(manifest, facts, held),
        }
    finally:
        await agent._transport.close()


async def say_goodbye(edge: Edge) -> str:
    """Tell the hub that this edge does not come back; the run's name."""
    agent = _Agent(
        edge.transport(), Home(edge._home), LocalData(Path()), "auto", 0, False, lambda _: None, SystemClock()
    )
    try:
        welcome = await agent._greet_once()
        await agent.leave("the owner of the device left")
        if not agent._home.is_in_use():  # a join that runs here deletes them itself
            agent._home.forget_borders()
        return welcome.run_name
    finally:
        await agent._transport.close()
