"""The asyncio side of a join: one connection at a time, one worker, state on disk. It holds the socket.

What may be said when is `protocol/session.py`'s, pauses are `aside.py`'s; the numbers are the worker's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.device.facts import read_device
from fedsoda_edge.device.fit import Limits, fit, leaner, memory_report, room_for, same_way
from fedsoda_edge.device.pause_rules import Rules
from fedsoda_edge.errors import (
    DeviceTooSmall,
    HubUnreachable,
    ProtocolMismatch,
    ProtocolViolation,
    RefusedByHub,
    WorkerFailed,
)
from fedsoda_edge.join import control, size_class
from fedsoda_edge.join.download import Download, backoff_seconds
from fedsoda_edge.join.home import Home
from fedsoda_edge.join.pause import Aside, end
from fedsoda_edge.join.status import Status
from fedsoda_edge.join.views import Views
from fedsoda_edge.ports import Clock, TorchPort, Transport
from fedsoda_edge.ports.disk import sha256_file, write_durably
from fedsoda_edge.ports.store import FileStore
from fedsoda_edge.ports.system import peak_rss_bytes
from fedsoda_edge.protocol import commands as cmd
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.manifest import TOKENIZER_FILES, parse_manifest
from fedsoda_edge.protocol.needs import SHORTEST, MemoryPlan, Samples, Shape, shape_of
from fedsoda_edge.protocol.session import Blob, EdgeSession, chunks
from fedsoda_edge.protocol.template import DEFAULT_COMPLETION, DEFAULT_PROMPT, TextTemplate

Say = Callable[[dict[str, Any]], None]
T = TypeVar("T")

PROGRESS_SECONDS = 0.5
WORKER_TRIES = 3  # a round may take; the second begins at the first one's checkpoint

WHAT_LEAVES = (
    "What leaves this device: coded LoRA deltas, the number of examples, the mean loss, the device's sizes. Never text, "
    "never hidden states. Text can be partly recovered from deltas (arXiv 2601.17533): join only hubs you trust."
)


@dataclass(frozen=True)
class Cache:
    """How border states are kept. max_bytes: None: what is free on the disk."""

    max_bytes: int | None = None
    dtype: str = "bf16"
    keep_key: bool = False


@dataclass(frozen=True)
class AgentSettings:
    """What one join is asked to do. unattended: retry for ever, even when the hub cannot be reached at first."""

    device: str
    data: LocalData = field(default_factory=lambda: LocalData(Path()))
    unattended: bool = False
    cache: Cache = Cache()
    limits: Limits = field(default_factory=Limits)
    rules: Rules = field(default_factory=Rules)


class Agent:
    """A join as it runs. Its owner calls it from the loop that it lives on."""

    def __init__(
        self, transport: Transport, worker: TorchPort, home: Home, settings: AgentSettings, say: Say, clock: Clock
    ) -> None:
        self.transport = transport
        self.worker = worker
        self.home = home
        self._settings = settings
        self._show = say
        self._clock = clock
        self._aside = Aside(self, home.control, settings.rules, clock)
        self._session = EdgeSession()
        self._status: Status | None = None  # from the moment the home is this join's
        self._welcome: ms.Welcome | None = None
        self._num_examples = 0
        self._size_class = 0
        self._cache_key = b""
        self._download: Download | None = None
        self._opening: cmd.Open | None = None  # what the worker was opened with, for the next one
        self._reader: asyncio.Task[None] | None = None
        self._connected = asyncio.Event()
        self._ready = asyncio.Event()  # the hub takes updates on this connection
        self._telling = asyncio.Lock()
        self._told_pause: bool | None = None  # on this connection
        self._blob: asyncio.Future[bytes] | None = None
        self._blob_lock = asyncio.Lock()
        self._transfer: asyncio.Task[bytes] | None = None
        self._answer: asyncio.Future[ms.Receipt | ms.Refusal] | None = None
        self._offer: ms.RoundOffer | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._is_prepared = False  # bundle and data are here
        self._working = asyncio.Lock()
        self._opened: cmd.Opened | None = None
        self._shape: Shape | None = None
        self._memory: MemoryPlan | None = None  # how to train, from the moment the data is read
        self._opened_by: int | None = None
        self._early: asyncio.Task[None] | None = None
        self._early_for = ms.Digest("")
        self._border_for: str | None = None
        self._working_on = 0
        self._submitting = asyncio.Lock()
        self._progress_tasks: set[asyncio.Task[None]] = set()
        self._told_what_leaves = False
        self.in_hand: int | None = None  # the round that is trained or handed in
        self._offers: asyncio.Queue[ms.RoundOffer | BaseException | None] = asyncio.Queue()
        self.submitted = 0
        self.rounds: list[dict[str, Any]] = []

    @property
    def is_finishing(self) -> bool:
        """Its owner wants the round in hand to be the last."""
        return self._aside.finishing.is_set()

    def say(self, event: dict[str, Any]) -> None:
        if self._status is not None:
            self._status.note(event)
        self._show(event)

    # --- what a pause asks of it ---------------------------------------------------------------------------

    @property
    def pid_on_gpu(self) -> int | None:
        """Of the worker, where it computes on one."""
        on_gpu = self._memory is not None and self._memory.device != "cpu"
        return self.worker.pid if on_gpu else None

    def still_paused(self, seconds: float) -> None:
        assert self._status is not None
        self._status.still_paused(seconds)

    # --- joining -------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect, check the device, fetch the bundle, read the data, say Ready."""
        self.home.lock()
        control.forget(self.home.control)
        self._cache_key = self.home.cache_key(keep=self._settings.cache.keep_key)
        if not self._settings.cache.keep_key:
            self.home.forget_borders()  # of a join that was killed: nobody has its key
        hub = getattr(self.transport, "url", "a script")
        self._status = Status(self.home.status, hub, self._clock, lambda: self.worker.rss_bytes)
        welcome = await self._greet(keep_trying=self._settings.unattended)
        self.say({"event": "joined", "run": welcome.run_name, "edge": welcome.edge, "rounds": welcome.rounds})
        await self._aside.look()
        if self._aside.pause is None:
            await self.worker.start()  # its imports take seconds; nothing below needs it yet
        self._connected.set()
        await self.tell()
        self._reader = asyncio.create_task(self._converse())
        self._aside.watch(self._offers.put_nowait)
        self._preparing = asyncio.create_task(self._prepare(welcome))
        finishing = asyncio.create_task(self._aside.finishing.wait())
        try:
            await asyncio.wait({self._preparing, self._reader, finishing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            finishing.cancel()
        if not self._preparing.done():
            return  # this edge goes, or the hub wants it no more: `next_offer` knows
        self._preparing.result()
        self._is_prepared = True
        await self.tell()
        if (self._run_dir / "pending" / "meta.json").exists():
            # An update without receipt from before a crash goes first: the hub knows whether it has it.
            await self._submit_pending()

    async def _prepare(self, welcome: ms.Welcome) -> None:
        """Check data and device, fetch the bundle; the data is read and swept while it comes."""
        rows = await self._check_data()
        store = FileStore(self.home.store)
        self._download = download = Download(
            self.transport, store, run=self._aside.run, say=self.say, keep_trying=self._settings.unattended
        )
        taken = await size_class.take(
            welcome,
            lambda manifest: download.file(manifest.digest, manifest.bytes),
            store,
            self.home.directory,
            self._settings.device,
            SHORTEST,  # rows are not read yet: a device is refused now that could train on none
            self._settings.limits,
            self.say,
        )
        manifest, manifest_digest = taken.manifest, taken.size_class.manifest.digest
        self._size_class, self._shape = taken.number, shape_of(manifest)
        self._views(welcome).begin(manifest_digest)
        self.say(
            {
                "event": "device",
                "device": taken.memory.device,
                "ram_needed": taken.memory.peak if taken.memory.device == "cpu" else 0,
                "ram_free": taken.facts.ram_bytes,
                "disk_needed": taken.disk_needed,
                "disk_free": taken.facts.disk_bytes,
                "size_class": taken.number,
            }
        )
        prompt, completion = self._template()
        self._opening = cmd.Open(
            store=str(self.home.store), manifest=manifest_digest, rows=self._rows(), max_length=welcome.max_length
        )
        async with download.bundle(manifest, manifest_digest) as fetch:
            opened = await _beside(fetch(), self._read(welcome, taken.size_class.emulator))
        tokenizer = {file.name: str(store.path(file.sha256)) for file in manifest.files if file.name in TOKENIZER_FILES}
        about = {
            "run": welcome.run_name,
            "prompt": prompt.text,
            "completion": completion.text,
            "max_length": welcome.max_length,
            "tokenizer": tokenizer,
            "eos": manifest.config.get("eos_token_id"),
        }
        self.home.remember_run(welcome.run_id, about)
        counts = {"num_examples": opened.num_examples, "num_skipped": opened.num_skipped, "threads": opened.threads}
        self.say({"event": "data", "rows": rows, **counts})
        for missing in self._aside.missing():
            self.say({"event": "notice", "message": missing})

    async def _read(self, welcome: ms.Welcome, emulator: ms.ViewRef | None) -> cmd.Opened:
        """Read the data in the worker, and begin to sweep it with the alignment that is in force."""
        opened = await self._at_work(self._open, tries=1)
        self._num_examples = opened.num_examples
        if emulator is not None:
            self._early_for = emulator.digest
            self._early = asyncio.create_task(self._at_work(lambda: self._sweep_early(welcome, emulator)))
            self._early.add_done_callback(self._early_ended)
        return opened

    async def _open(self) -> cmd.Opened:
        """Let the worker have bundle and data, unless it does."""
        if self._opened is None or self.worker.pid is None or self.worker.pid != self._opened_by:
            assert self._opening is not None
            self._opened = await self.worker.call(self._opening)
            self._opened_by, self._border_for = self.worker.pid, None
            if self._memory is None:
                self._plan_memory()
        return self._opened

    @property
    def _samples(self) -> Samples:
        assert self._welcome is not None
        assert self._opened is not None
        longest = self._opened.longest_ids, self._opened.longest_labels
        return Samples(self._welcome.batch_size, *longest, self._opened.num_examples)

    def _facts(self) -> ms.DeviceFacts:
        """What is free, with what the worker holds already: a plan counts it in.

        A GPU that its torch cannot use is none, unless it was asked for: then the worker says what to install.
        """
        facts = read_device(self.home.directory)
        assert self._opened is not None
        if self._settings.device == "auto" and not self._opened.has_cuda:
            facts = msgspec.structs.replace(facts, vram_bytes=0, accelerator="")
        return msgspec.structs.replace(facts, ram_bytes=facts.ram_bytes + (self.worker.rss_bytes or 0))

    def _plan_memory(self) -> None:
        """The quickest way that has room; a round that is in the middle goes on the way it began, to the same bits."""
        assert self._shape is not None
        assert self._opened is not None
        facts, limits, kept = self._facts(), self._settings.limits, self._run_dir / "memory.json"
        process = self._opened.process_bytes
        plan = fit(self._settings.device, self._shape, self._samples, facts, limits, process_bytes=process)
        if any((self._run_dir / "checkpoint").glob("round.*")) and (before := _read_plan(kept)) is not None:
            again = same_way(before, self._shape, self._samples, process)
            if again is not None and again.device == plan.device and again.peak <= room_for(plan.device, facts, limits):
                plan = again
        self._train_by(plan, facts)

    def _train_by(self, plan: MemoryPlan, facts: ms.DeviceFacts) -> None:
        self._memory = plan
        write_durably(self._run_dir / "memory.json", msgspec.json.encode(plan))
        self.say({"event": "memory", **memory_report(plan, facts)})

    def _leaner(self) -> MemoryPlan | None:
        """The next way that needs less; after a GPU's last one, under auto, the CPU's first that has room."""
        if self._memory is None or self._shape is None or self._opened is None:
            return None
        process, limits = self._opened.process_bytes, self._settings.limits
        plan = leaner(self._memory, self._shape, self._samples, process)
        if plan is None and self._settings.device == "auto" and self._memory.device != "cpu":
            with contextlib.suppress(DeviceTooSmall):  # no room there either: what the GPU said is told
                plan = fit("cpu", self._shape, self._samples, self._facts(), limits, process_bytes=process)
        return plan

    async def _sweep_early(self, welcome: ms.Welcome, emulator: ms.ViewRef) -> None:
        """Before the first offer, and layer by layer as the bundle comes.

        Only with an emulator that is here: the hub may align again any time, and then it has this one's blobs no more.
        """
        await self._open()
        held = await self._views(welcome).held("emulator", emulator.digest)
        if emulator.snapshot is None or held is not None:
            await self._sweep(None if emulator.snapshot is None else held, emulator.digest)

    def _early_ended(self, early: asyncio.Task[None]) -> None:
        if not early.cancelled() and (error := early.exception()) is not None:
            self._offers.put_nowait(error)

    async def _use_early(self, emulator: ms.Digest) -> None:
        """Let the early sweep end, where the round asks for it; else end it."""
        if (early := self._early) is None:
            return
        if not early.done() and self._early_for != emulator:
            early.cancel()
            await asyncio.wait([early])
            await end(self.worker)
        await asyncio.wait([early])
        if not early.cancelled():
            early.result()

    async def _at_work(self, work: Callable[[], Coroutine[Any, Any, T]], tries: int = WORKER_TRIES) -> T:
        """What the worker does, one piece after the other. One that dies, or that a pause ended, is started again.

        Where memory ran out it goes on a leaner way, if there is one; a kill from outside counts as that when it
        comes a second time.
        """
        async with self._working:
            num_failures = 0
            while True:
                try:
                    return await self._aside.run(work)
                except DeviceTooSmall as error:
                    plan = self._leaner()
                    if plan is None:
                        raise
                    self._go_leaner(error, plan)
                except WorkerFailed as error:
                    num_failures += 1
                    plan = self._leaner() if error.was_killed and num_failures > 1 else None
                    if plan is not None:
                        self._go_leaner(error, plan)
                    elif num_failures >= tries:
                        raise
                    else:
                        self.say({"event": "notice", "message": f"{error}; starting it again"})
                await end(self.worker)

    def _go_leaner(self, error: Exception, plan: MemoryPlan) -> None:
        self.say({"event": "notice", "message": f"{error}; going on in a way that needs less"})
        self._train_by(plan, self._facts())

    async def _check_data(self) -> int:
        """Every row, before anything is fetched; the number of rows."""
        prompt, completion = self._template()
        if self._settings.data.is_text:
            return self._settings.data.check(prompt, completion)
        checked = await self._at_work(lambda: self.worker.call(cmd.Check(rows=self._rows())), tries=1)
        return checked.rows

    def _rows(self) -> cmd.Rows:
        data, (prompt, completion) = self._settings.data, self._template()
        return cmd.Rows(
            path=str(data.path.absolute()),
            columns=dict(data.columns),
            prompt=prompt.text,
            completion=completion.text,
        )

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
                return await self.greet_once()
            except HubUnreachable as error:
                if not keep_trying:
                    raise
                if attempt == 0:
                    self.say({"event": "reconnecting", "message": str(error)})
                await asyncio.sleep(backoff_seconds(attempt))
                attempt += 1

    async def greet_once(self) -> ms.Welcome:
        await self.transport.connect()
        self._session = EdgeSession()
        self._told_pause = None
        self._ready.clear()
        await self.transport.send(
            self._session.send(
                ms.Hello(
                    protocol=ms.PROTOCOL_VERSION,
                    software=f"fedsoda {version('fedsoda')}",
                    device_id=self.home.device_id(),
                    device=read_device(self.home.directory),
                )
            )
        )
        async for frame in self.transport.frames():
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
        await self._tell_now()
        self._connected.set()

    async def _tell_now(self) -> None:
        """Say Ready, Paused or Resumed until the hub knows how it is. A connection that begins in a pause has no Ready."""
        async with self._telling:
            while (is_paused := self._aside.pause is not None) != self._told_pause:
                if self._aside.pause is not None:
                    await self._send(ms.Paused(reason=self._aside.pause.reason))
                elif not self._is_prepared:
                    return  # neither the one nor the other
                elif self._ready.is_set():
                    await self._send(ms.Resumed())
                else:
                    await self._send(ms.Ready(num_examples=self._num_examples, size_class=self._size_class))
                    self._ready.set()
                self._told_pause = is_paused

    async def tell(self) -> None:
        """The update that is being handed in goes first: a hub that hears of the pause before may close the round."""
        if self._connected.is_set() and not self._submitting.locked():
            with contextlib.suppress(HubUnreachable):  # then the next connection begins with it
                await self._tell_now()

    # --- the conversation ----------------------------------------------------------------------------------

    async def _converse(self) -> None:
        """Read for ever; reconnect for ever. Ends with Farewell or an error that retrying cannot mend."""
        try:
            while True:
                async for frame in self.transport.frames():
                    if self._received(self._session.receive(frame)):
                        self._offers.put_nowait(None)
                        return
                if self._session.state == "over":  # this edge left
                    return
                self._lost()
                await self._greet(keep_trying=True)
                try:
                    await self._resume()
                except HubUnreachable:  # gone again already
                    continue
                self.say({"event": "reconnected"})
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._lost()
            self._offers.put_nowait(error)

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
                self.say({"event": "offer", "round": message.round, "due_seconds": message.due_seconds})
                if is_new or not self._is_busy(message.round):
                    self._offers.put_nowait(message)
            case ms.Receipt():
                if self._answer is not None and not self._answer.done():
                    self._answer.set_result(message)
            case ms.Refusal():
                if message.fatal:
                    raise RefusedByHub(f"the hub refused: {message.reason}")
                if self._answer is not None and not self._answer.done():
                    self._answer.set_result(message)
            case ms.RoundClosed():
                self.say({"event": "round_closed", "round": message.round, "updates": message.num_updates})
            case ms.Farewell():
                self.say({"event": "farewell", "rounds": message.rounds, "reason": message.reason})
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

    @property
    def _open_session(self) -> EdgeSession:
        """HubUnreachable from a loss to the next Welcome, and after Leave: work on the old connection may still speak."""
        if self._session.state != "open":
            raise HubUnreachable("the connection ended", "TCP")
        return self._session

    async def _send(self, message: ms.EdgeMessage, payload: bytes | memoryview = b"") -> None:
        await self.transport.send(self._open_session.send(message, payload))

    async def _patiently(self, may: asyncio.Event, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do again what a lost connection broke off, each time when it may be."""
        while True:
            await may.wait()
            try:
                return await work()
            except HubUnreachable:
                await asyncio.sleep(0.05)  # until `_converse` has seen it too

    async def _fetch(self, blob: ms.BlobRef) -> bytes:
        async def once() -> bytes:
            async with self._blob_lock:
                self._blob = asyncio.get_running_loop().create_future()
                await self.transport.send(self._open_session.request(blob))
                return await self._blob

        # A pause breaks off who waits, not the transfer: its chunks come all the same, and the next one has to wait.
        self._transfer = asyncio.create_task(self._patiently(self._connected, once))
        return await asyncio.shield(self._transfer)

    # --- rounds --------------------------------------------------------------------------------------------

    @property
    def _run_dir(self) -> Path:
        assert self._welcome is not None
        return self.home.run(self._welcome.run_id)

    @property
    def update_path(self) -> Path:
        """The coded delta of the round that was trained last, until its receipt."""
        return self._run_dir / "pending" / "update"

    def _views(self, welcome: ms.Welcome) -> Views:
        return Views(self._run_dir, welcome.codec, self.worker, self._fetch)

    async def next_offer(self) -> ms.RoundOffer | None:
        """The next round worth taking, when there is one; None when no more will come. Raises what ended the join."""
        while True:
            item = await self._offers.get()
            if isinstance(item, BaseException):
                raise item
            if item is None or self.is_worth_taking(item.round):
                return item

    async def train(self, round_number: int) -> ms.UpdateStart:
        """Bring views up to date, sweep the border if the alignment changed, train; what is to be announced."""
        offer, welcome = self._offer, self._welcome
        assert offer is not None
        assert welcome is not None
        if offer.round != round_number:
            raise ProtocolViolation(f"round {round_number} is over, the hub offers {offer.round}; take the next offer")
        self._working_on = self.in_hand = round_number
        try:
            pending = self._run_dir / "pending"
            pending.mkdir(exist_ok=True)
            (pending / "meta.json").unlink(missing_ok=True)
            await self._use_early(offer.emulator.digest)
            trained = await self._at_work(lambda: self._train_once(welcome, pending))
            offer, result = trained
            digest = await asyncio.to_thread(sha256_file, self.update_path)
            start = ms.UpdateStart(
                round=offer.round,
                base=offer.view.digest,
                alignment=offer.alignment,
                digest=ms.Digest(digest),
                bytes=self.update_path.stat().st_size,
                codec=welcome.codec,
                num_examples=result.num_examples,
                loss=result.loss,
            )
            write_durably(pending / "meta.json", msgspec.json.encode(start))
            figures = msgspec.to_builtins(result)
            del figures["num_damaged"]
            self.say({"event": "trained", "round": offer.round, "edge": welcome.edge, **figures})
            return start
        except BaseException:
            self.in_hand = None
            raise
        finally:
            self._working_on = 0

    async def _train_once(self, welcome: ms.Welcome, pending: Path) -> tuple[ms.RoundOffer, cmd.Trained]:
        await self._open()
        offer = self._offer
        assert offer is not None
        if offer.round != self._working_on:
            message = f"round {self._working_on} is over, going on with round {offer.round}"
            self.say({"event": "notice", "message": message})
            self._working_on = self.in_hand = offer.round
        views = self._views(welcome)
        if offer.manifest is not None:
            await self._follow(offer.manifest, views)
        emulator = await views.bring_up("emulator", offer.emulator, offer.alignment)
        view = await views.bring_up("adapter", offer.view, offer.round)
        if self._border_for != offer.emulator.digest:
            await self._sweep(emulator, offer.emulator.digest)
        result = await self.worker.call(
            cmd.Train(
                view=view,
                settings=offer.local,
                seed=welcome.seed,
                round=offer.round,
                edge=welcome.edge,
                codec=welcome.codec,
                trains=offer.trains,
                residual=views.residual(offer.round) if offer.has_feedback else None,
                update=str(self.update_path),
                new_residual=str(pending / "residual"),
                checkpoint=str(self._run_dir / "checkpoint"),
            ),
            self._reporter(offer.round),
        )
        self._say_damaged(result.num_damaged)
        return offer, result

    async def _follow(self, wanted: ms.BlobRef, views: Views) -> None:
        """Other layers are in force since the last round: fetch what is not here, and begin with them."""
        assert self._opening is not None
        assert self._download is not None
        if self._opening.manifest == wanted.digest:
            return
        manifest = parse_manifest((await self._download.file(wanted.digest, wanted.bytes)).read_bytes())
        async with self._download.bundle(manifest, wanted.digest) as fetch:
            await fetch()
        self._shape = shape_of(manifest)
        self._opening = msgspec.structs.replace(self._opening, manifest=wanted.digest)
        views.begin(wanted.digest)
        await end(self.worker)
        await self._open()
        layers = ", ".join(map(str, manifest.plan.kept))
        self.say({"event": "notice", "message": f"the hub has chosen layers anew; this device now trains {layers}"})

    async def _sweep(self, emulator: str | None, digest: ms.Digest) -> None:
        """Border states of all samples, those that are on the disk already left as they are."""
        assert self._welcome is not None
        cache = cmd.BorderCache(
            directory=str(self.home.border(self._welcome.run_id)),
            key=self._cache_key.hex(),
            dtype=self._settings.cache.dtype,
            max_bytes=self._settings.cache.max_bytes,
        )
        assert self._memory is not None
        room = room_for(self._memory.device, self._facts(), self._settings.limits)
        sweep = cmd.Sweep(emulator=emulator, cache=cache, memory=self._memory, room=room)
        swept = await self.worker.call(sweep, self._report_sweep)
        self._say_damaged(swept.num_damaged)
        self._border_for = digest
        self.say({"event": "swept", "num_examples": self._num_examples, **msgspec.to_builtins(swept)})

    def _say_damaged(self, count: int) -> None:
        if count:
            message = f"{count} records of the border cache were not as they were written; computed anew"
            self.say({"event": "notice", "message": message})

    def _report_sweep(self, progress: cmd.SweepProgress) -> None:
        self.say({"event": "sweep", "stage": "sweep", "done": progress.done, "total": progress.total})

    def _reporter(self, round_number: int) -> Callable[[cmd.TrainingStep], None]:
        """Tell people and the hub how far training is, twice a second at most."""
        last = -PROGRESS_SECONDS

        def report(taken: cmd.TrainingStep) -> None:
            nonlocal last
            now = self._clock.monotonic()
            if now - last < PROGRESS_SECONDS and taken.step != taken.steps:
                return
            last = now
            self.say({"event": "training", "round": round_number, "stage": "train", **msgspec.to_builtins(taken)})
            if self._connected.is_set() and self._session.state == "open":
                message = ms.Progress(
                    round=round_number,
                    step=taken.step,
                    steps=taken.steps,
                    loss=taken.loss,
                    tokens_per_second=taken.tokens_per_second,
                )
                task = asyncio.get_running_loop().create_task(self._try_send(message))
                self._progress_tasks.add(task)
                task.add_done_callback(self._progress_tasks.discard)

        return report

    async def _try_send(self, message: ms.EdgeMessage) -> None:
        with contextlib.suppress(HubUnreachable):
            await self._send(message)

    async def submit(self) -> bool:
        """Announce, send in chunks, wait for the receipt; then the residual counts."""
        if not self._told_what_leaves:
            self._told_what_leaves = True
            self.say({"event": "notice", "message": WHAT_LEAVES})
        return await self._submit_pending()

    async def _submit_pending(self) -> bool:
        try:
            return await self._hand_in()
        finally:
            self.in_hand = None
            await self.tell()

    async def _hand_in(self) -> bool:
        async with self._submitting:
            pending = self._run_dir / "pending"
            meta = pending / "meta.json"
            if not meta.exists():  # the receipt came by another way
                return True
            start = msgspec.json.decode(meta.read_bytes(), type=ms.UpdateStart)
            self.in_hand = start.round
            data = await asyncio.to_thread(self.update_path.read_bytes)
            while True:
                answer = await self._patiently(self._ready, lambda: self._upload(start, data))
                if not (isinstance(answer, ms.Refusal) and answer.retry):
                    break
                self.say({"event": "retrying", "round": start.round, "reason": answer.reason})
                await asyncio.sleep(5.0)
            taken = isinstance(answer, ms.Receipt)
            if taken:
                assert self._welcome is not None
                self._views(self._welcome).keep_residual(pending / "residual", start.round)
                self.submitted += 1
            meta.unlink()  # last: until then a crash sends the update again, and the hub has its first receipt
            self.rounds.append({"round": start.round, "loss": start.loss, "accepted": taken})
            event: dict[str, Any] = {"event": "accepted" if taken else "refused", "round": start.round}
            if isinstance(answer, ms.Refusal):
                event["reason"] = answer.reason
            self.say(event | {"num_examples": start.num_examples, "loss": start.loss, "bytes": len(data)})
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
        """Tell the hub, where it can be reached, and whoever watches: the last sentence of a join that ends early."""
        if self._early is not None and not self._early.done():
            self._early.cancel()  # nothing is said after the last sentence
            await asyncio.wait([self._early])
        if self._session.state == "open":
            await self._try_send(ms.Leave(reason=reason))
        self.say({"event": "notice", "message": f"left the run: {reason}"})

    async def close(self, error: BaseException | None = None) -> None:
        if self._status is not None:
            self._status.end(error)
        for task in (self._aside.watcher, self._reader, self._transfer, self._preparing, self._early):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        async with contextlib.AsyncExitStack() as closing:  # from the last to the first, whatever one of them raises
            closing.callback(self.home.unlock)
            if self._opening is not None and not self._settings.cache.keep_key:
                closing.callback(self.home.forget_borders)  # without the key they are of no use
            closing.push_async_callback(end, self.worker)
            closing.push_async_callback(self.transport.close)

    def report(self) -> dict[str, Any]:
        return {
            "run": self._welcome.run_name if self._welcome else None,
            "edge": self._welcome.edge if self._welcome else None,
            "rounds": self.rounds,
            "num_examples": self._num_examples,
            "bytes": {"up": getattr(self.transport, "up", 0), "down": getattr(self.transport, "down", 0)},
            "agent_peak_rss_bytes": peak_rss_bytes(),
            "worker_peak_rss_bytes": self.worker.peak_rss_bytes,
        }


def _read_plan(path: Path) -> MemoryPlan | None:
    """None where there is none, or none that this version reads."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=MemoryPlan)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


async def _beside(one: Coroutine[Any, Any, object], other: Coroutine[Any, Any, T]) -> T:
    """Both at the same time; the other's result. Where one fails, the other ends too."""
    tasks = asyncio.create_task(one), asyncio.create_task(other)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task.done():
                task.result()
        return tasks[1].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
