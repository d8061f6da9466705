"""Job 2: wire ledger, round machine, listener and compute child; signals and shutdown. It decides nothing itself."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from fedsoda_edge.errors import DiskFull, FedSODAError, ProtocolViolation, UsageProblem, WorkerFailed
from fedsoda_edge.ports import Clock, SystemClock, TorchPort
from fedsoda_edge.ports.child import Child
from fedsoda_edge.ports.disk import BlobStore, write_durably
from fedsoda_edge.ports.system import Held, Lock, on_signal_in
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.coded import check, coded_bytes, of_factor
from fedsoda_edge.protocol.manifest import ADAPTER_LORA, EMULATOR_LORA, BundleManifest
from fedsoda_edge.protocol.session import Upload
from fedsoda_hub.federation import events as ev
from fedsoda_hub.federation.rounds import RoundMachine, Rules, trained_factor
from fedsoda_hub.run.ledger import Ledger, Token, write_secret
from fedsoda_hub.serving.listener import Connection, Door, Listener, is_same_secret
from fedsoda_hub.settings.run import RunSettings, differences

COMPUTE_TRIES = 3
DISK_RETRY_SECONDS = 10.0
LINGER_SECONDS = 30.0

Say = Callable[[dict[str, Any]], None]


def lock_run(run_dir: Path) -> Lock:
    """One live hub per run directory.

    Raises:
        UsageProblem: another one has it.
    """
    try:
        return Lock(run_dir / "lock")
    except Held as held:
        raise UsageProblem(f"{run_dir} is in use by a running hub (pid {held.pid}); stop that first") from None


class Daemon:
    """A run that serves. `say` gets one dict per event, for people and `--jsonl`.

    Args:
        door: where edges come in; None: the port of [listen]. compute: what has torch; None: a child process.
    """

    def __init__(
        self,
        settings: RunSettings,
        say: Say,
        clock: Clock | None = None,
        *,
        door: Door | None = None,
        compute: TorchPort | None = None,
    ) -> None:
        self.settings = settings
        self.say = say
        self.clock = clock or SystemClock()
        self.run_dir = settings.run_dir
        self.stall_seconds = settings.wire.stall_seconds
        self.max_update_bytes = 1
        self.blobs = BlobStore(self.run_dir / "blobs")
        self._lock = lock_run(self.run_dir)
        self.ledger = Ledger(self.run_dir / "ledger.sqlite")
        self._events: asyncio.Queue[ev.Event | None] = asyncio.Queue()
        self._connections: dict[ms.EdgeId, Connection] = {}
        self._progress: dict[ms.EdgeId, ms.Progress] = {}
        self._size_classes: dict[ms.EdgeId, int] = {}  # as each said when it was last ready
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._door = door
        self._compute: TorchPort = compute or Child("fedsoda_hub.compute")
        self._manifests: list[BundleManifest] = []  # in force, by size class
        self._files: dict[str, Path] = {}
        self._arriving: Counter[ms.Digest] = Counter()  # uploads whose blob is written, until they are judged
        self._unkept: set[ms.Digest] = set()  # blobs that an upload brought, until it is known that they stay
        self._farewelled: set[ms.EdgeId] = set()
        self._failure: FedSODAError | None = None
        self._finished = asyncio.Event()
        self.port = settings.listen.port
        try:
            self.machine = RoundMachine(self._rules(), self._state())
            self._admin = self._admin_token()
        except BaseException:
            self._let_go()
            raise

    # --- start -------------------------------------------------------------------------------------------

    def _rules(self) -> Rules:
        s = self.settings
        return Rules(
            count=s.rounds.count,
            min_edges=s.rounds.min_edges,
            cohort=s.rounds.cohort,
            quorum=s.rounds.quorum,
            deadline_seconds=s.rounds.deadline_seconds,
            stall_seconds=s.wire.stall_seconds,
            realign_every=s.method.realign_every,
            reprune_every=s.method.reprune_every,
            seed=s.seed,
            has_eval=s.eval_data is not None,
            eval_every=s.task.eval_every,
        )

    def _state(self) -> Any:
        """Replay; a run that was begun with other settings is refused with both values."""
        state = self.ledger.replay()
        if not state.run_id:
            record = ev.RunStarted(run_id=secrets.token_hex(8), fixed=self.settings.fixed())
            self.ledger.append(record)
            state.apply(record)
        changed = differences(state.fixed, self.settings)
        if changed:
            raise UsageProblem(
                f"{Path(self.settings.path).name} changed since this run began: {'; '.join(changed)}. "
                "Put it back, or give the run another name"
            )
        rounds = self.settings.rounds
        values = {
            "count": rounds.count,
            "quorum": rounds.quorum,
            "deadline_seconds": rounds.deadline_seconds,
            "host": self.settings.listen.host,
            "port": self.settings.listen.port,
        }
        last = [r.values for r in self.ledger.records() if isinstance(r, ev.SettingsChanged)]
        if not last or last[-1] != values:
            record_ = ev.SettingsChanged(values=values)
            self.ledger.append(record_)
            state.apply(record_)
        return state

    def _admin_token(self) -> str:
        path = self.run_dir / "admin.token"
        if not path.exists():
            write_secret(path, secrets.token_urlsafe(32))
        return path.read_text().strip()

    def _let_go(self) -> None:
        """Of the run directory: another hub may have it."""
        self.ledger.close()
        self._lock.release()

    async def run(self, *, exit_when_done: bool) -> None:
        """Serve until the run is over (with `exit_when_done`) or a signal comes.

        Raises:
            UsageProblem: the port is in use. WorkerFailed: torch work failed again and again.
        """
        loop = asyncio.get_running_loop()
        stop: asyncio.Future[str] = loop.create_future()

        def stopped(name: str) -> None:
            if not stop.done():
                stop.set_result(name)

        on_signal_in(loop, stopped)
        await self.serve(stop, exit_when_done=exit_when_done)

    async def serve(self, stop: asyncio.Future[str], *, exit_when_done: bool) -> None:
        """As `run`, until `stop` holds the name of a signal."""
        try:
            door = self._door or Listener(self.settings.listen.host, self.settings.listen.port)
        except UsageProblem:
            self._let_go()
            raise
        self.port = door.port
        is_open = False
        deciding = asyncio.create_task(self._decide())
        watched: set[asyncio.Future[Any]] = {stop, deciding}
        try:
            await self._compute.call("open", {"settings": msgspec.to_builtins(self.settings)})
            self._events.put_nowait(None)  # what a restart owes
            while not stop.done() and not deciding.done() and self._failure is None:
                if not self._manifests and self.machine.state.manifest:
                    self._load_manifests(self.ledger.records())
                if not is_open and self._manifests:
                    await door.open(self)
                    is_open = True
                    write_durably(self.run_dir / "address", self.url.encode())
                    self.say({"event": "listening", "url": self.url, "run": self.settings.name})
                if self._finished.is_set() and exit_when_done:
                    await self._linger(stop)
                    break
                await asyncio.wait(watched, timeout=0.05, return_when=asyncio.FIRST_COMPLETED)
            if deciding.done():
                await deciding
            if self._failure is not None:
                raise self._failure
            if stop.done():
                self.say({"event": "stopped", "signal": stop.result()})
                if stop.result() == "SIGINT":
                    raise KeyboardInterrupt
        finally:
            deciding.cancel()
            for task in self._tasks:
                task.cancel()
            for connection in list(self._connections.values()):
                connection.close()
            await door.close()
            self._flush_traffic()
            await self._compute.close()
            with contextlib.suppress(OSError):
                (self.run_dir / "address").unlink()
            self._let_go()

    @property
    def url(self) -> str:
        host = self.settings.listen.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    async def _linger(self, stop: asyncio.Future[str]) -> None:
        """Until every edge of this run got its Farewell, at most 30 s."""
        known = {token.edge for token in self.ledger.tokens() if token.device and not token.revoked}
        until = self.clock.monotonic() + LINGER_SECONDS
        while not known <= self._farewelled and self.clock.monotonic() < until and not stop.done():
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.2)  # let the last frames leave

    def _load_manifests(self, records: Iterable[ev.AnyRecord]) -> None:
        """Those in force, and the files of all that these records name: an edge may still be fetching one of before."""
        for digest in (digest for record in records for digest in _manifests_of(record)):
            self._files[digest] = self.blobs.path(digest)
            for file in self._manifest(digest).files:
                is_lora = file.name in (ADAPTER_LORA, EMULATOR_LORA)
                shard = self.run_dir / "bundle" / file.name
                self._files[file.sha256] = self.blobs.path(file.sha256) if is_lora else shard
        self._manifests = [self._manifest(digest) for digest in self.machine.state.manifests]
        # Names and offsets of the safetensors header: at most 256 bytes a tensor.
        self.max_update_bytes = 4096 + max(
            sum(256 + max(coded_bytes(spec.shape, codec) for codec in ("bf16", "int8")) for spec in one.lora.adapter)
            for one in self._manifests
        )

    def _manifest(self, digest: ms.Digest) -> BundleManifest:
        return msgspec.json.decode(self.blobs.get(digest), type=BundleManifest)

    # --- the loop of decisions ------------------------------------------------------------------------------

    async def _decide(self) -> None:
        """One event after the other: handle, perform, then all that is owed."""
        while True:
            event = await self._events.get()
            if event is not None:
                await self._perform(self.machine.handle(event), event)
            if isinstance(event, ev.UpdateArrived) and event.problem is None:
                self._arriving[event.digest] -= 1
            while await self._perform(self.machine.owed(self.clock.wall()), None):
                pass
            self._delete_refused()

    def _delete_refused(self) -> None:
        """Blobs that came with updates none of which was accepted. One that was there before is never touched."""
        if self.machine.is_computing:  # a result may have the same bytes; until it is written down nobody knows
            return
        state = self.machine.state
        kept = {update.digest for update in (*state.accepted.values(), *state.receipts.values())}
        kept |= {state.master, *self._views()} | ({state.moments} if state.moments is not None else set())
        for digest in [digest for digest in self._unkept if not self._arriving[digest]]:
            self._unkept.discard(digest)
            del self._arriving[digest]
            if digest not in kept:
                with contextlib.suppress(OSError):  # it only takes space
                    self.blobs.path(digest).unlink()

    async def _perform(self, effects: list[ev.Effect], cause: ev.Event | None) -> bool:
        """In order; whether a record was appended. A record that cannot be written stops what hangs on it."""
        appended = False
        for effect in effects:
            match effect:
                case ev.Append(record):
                    try:
                        await asyncio.to_thread(self.ledger.append, record)
                    except DiskFull as error:
                        self._say_disk_full(error, cause)
                        return False
                    self.machine.apply(record)
                    appended = True
                    self._recorded(record)
                case ev.Send(edge, message):
                    self._send(edge, message)
                case ev.Offer(edge):
                    self._send(edge, self._offer(self._size_classes.get(edge, 0)))
                case ev.SetDeadline(number, at):
                    self._set_deadline(number, at)
                case ev.Compute(job, arguments):
                    self._start(job, arguments)
                case ev.Waiting(why):
                    self.say({"event": "waiting", "why": why})
                case ev.Finish():
                    self._finished.set()
                case ev.Ignored():
                    pass
        return appended

    def _say_disk_full(self, error: DiskFull, cause: ev.Event | None) -> None:
        self.say({"event": "disk_full", "message": str(error)})
        if isinstance(cause, ev.UpdateArrived):
            self._send(cause.edge, ms.Refusal(round=cause.round, reason=str(error), retry=True))
        # Torch work that is done comes again as it was; anything else `owed` finds.
        again = cause if isinstance(cause, ev.ComputeDone) else None
        asyncio.get_running_loop().call_later(DISK_RETRY_SECONDS, self._events.put_nowait, again)

    def _recorded(self, record: ev.AnyRecord) -> None:
        """Say what became a fact."""
        values = msgspec.to_builtins(record)
        name = values.pop("record")
        state = self.machine.state
        if isinstance(record, ev.Repruned):
            self._load_manifests([record])
        if isinstance(record, ev.RoundClosed):
            self._flush_traffic()
            with contextlib.suppress(DiskFull):  # it only bounds replay
                self.ledger.snapshot(state)
            rows = self.ledger.traffic()
            sizes = {"bytes_up": sum(row[2] for row in rows), "bytes_down": sum(row[3] for row in rows)}
            values |= {"loss": state.losses[-1], "updates": len(state.accepted), **sizes}
        if isinstance(record, ev.RunEnded):
            values["summary"] = self.status()
        self.say({"event": name, "rounds": self.settings.rounds.count, **values})

    def _send(self, edge: ms.EdgeId, message: Any) -> None:
        connection = self._connections.get(edge)
        if connection is not None:
            connection.send(message)
            if isinstance(message, ms.Farewell):
                self._farewelled.add(edge)

    def _offer(self, size_class: int) -> ms.RoundOffer:
        state, rule = self.machine.state, self.settings.aggregation.rule
        manifest = self._blob_ref(state.manifests[size_class]) if state.repruned_for else None
        return ms.RoundOffer(
            round=state.round,
            rounds=self.settings.rounds.count,
            view=self._view_ref(*state.adapter(size_class), trained_factor(rule, state.round - 1)),
            alignment=state.alignment,
            emulator=self._view_ref(*state.emulator(size_class)),
            local=self.settings.local,
            due_seconds=max(0.0, state.deadline_at - self.clock.wall()),
            trains=trained_factor(rule, state.round),
            has_feedback=rule != "flexlora",
            manifest=manifest,
        )

    def _view_ref(self, view: ms.Digest, delta: ms.Digest | None, moved: ms.Factor = "both") -> ms.ViewRef:
        if delta is None:
            return ms.ViewRef(digest=view, delta=None, snapshot=None)
        return ms.ViewRef(digest=view, delta=self._blob_ref(delta), snapshot=self._blob_ref(view), moved=moved)

    def _blob_ref(self, digest: ms.Digest) -> ms.BlobRef:
        return ms.BlobRef(digest=digest, bytes=self.blobs.path(digest).stat().st_size)

    def _set_deadline(self, number: int, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay = max(0.0, at - self.clock.wall())
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(delay, self._events.put_nowait, ev.DeadlineReached(number, at))

    def _start(self, job: str, arguments: dict[str, Any]) -> None:
        task = asyncio.create_task(self._computing(job, arguments))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _computing(self, job: str, arguments: dict[str, Any]) -> None:
        """A child that dies (out of memory, say) is started again; what it did not finish is done again."""
        for attempt in range(1, COMPUTE_TRIES + 1):
            try:
                if self._compute.pid is None:
                    await self._compute.call("open", {"settings": msgspec.to_builtins(self.settings)})
                result = await self._compute.call(
                    job, arguments, lambda values: self.say({"event": "progress", "job": job, **values})
                )
                self._events.put_nowait(ev.ComputeDone(job, result))
                return
            except WorkerFailed as error:
                self.say({"event": "compute_failed", "job": job, "message": str(error), "details": error.details})
                if attempt == COMPUTE_TRIES:
                    self._fail(error)
            except FedSODAError as error:
                self._fail(error)
                return

    def _fail(self, error: FedSODAError) -> None:
        self._failure = error
        self._finished.set()
        for task in list(self._tasks):
            if task is not asyncio.current_task():
                task.cancel()
        self._events.put_nowait(None)

    # --- what the listener asks ---------------------------------------------------------------------------

    def token(self, secret: str) -> Token | None:
        return self.ledger.find_token(secret)

    def is_admin(self, secret: str) -> bool:
        return is_same_secret(secret, self._admin)

    def bundle_file(self, digest: str) -> Path | None:
        return self._files.get(digest)

    def run_blob(self, digest: str) -> bytes | None:
        return self.blobs.get(digest) if digest in self._views() else None

    def _views(self) -> set[ms.Digest]:
        """Views of the open round, or of the one before the next, and the coded steps to them."""
        state = self.machine.state
        classes = range(1 + len(state.smaller))
        found = (blob for number in classes for blob in (*state.adapter(number), *state.emulator(number)))
        return {blob for blob in found if blob is not None}

    def greet(self, connection: Connection, hello: ms.Hello) -> ms.Welcome | ms.Refusal:
        if hello.protocol != ms.PROTOCOL_VERSION:
            return ms.Refusal(
                reason=f"protocol mismatch: this edge speaks {hello.protocol}, the hub {ms.PROTOCOL_VERSION}; "
                "upgrade the older side: pip install -U fedsoda",
                fatal=True,
            )
        try:
            is_its_device = self.ledger.bind_device(connection.edge, hello.device_id)
        except DiskFull as error:
            self.say({"event": "disk_full", "message": str(error)})
            raise  # a Refusal would send the edge away for good
        if not is_its_device:
            return ms.Refusal(
                reason=f"the token of {connection.edge} is already in use on another device; ask for one of your own",
                fatal=True,
            )
        state = self.machine.state
        old = self._connections.get(connection.edge)
        self._connections[connection.edge] = connection
        if old is not None:  # the same device came back before its old connection was missed
            old.close()
            self._events.put_nowait(ev.EdgeGone(connection.edge))  # until its Ready it is not invited
        self.say({"event": "edge_connected", "edge": connection.edge, "software": hello.software})
        task = self.settings.task
        return ms.Welcome(
            protocol=ms.PROTOCOL_VERSION,
            run_id=state.run_id,
            run_name=self.settings.name,
            edge=connection.edge,
            manifest=self._blob_ref(state.manifest),
            rounds=self.settings.rounds.count,
            rounds_done=len(state.losses),
            template=ms.Template(prompt=task.prompt, completion=task.completion),
            max_length=self.settings.local.max_length,
            batch_size=self.settings.local.batch_size,
            codec=self.settings.wire.codec,
            seed=self.settings.seed,
            stall_seconds=self.settings.wire.stall_seconds,
            emulator=self._view_ref(*state.emulator(0)),
            smaller=tuple(
                ms.SizeClass(manifest=self._blob_ref(held.manifest), emulator=self._view_ref(*state.emulator(number)))
                for number, held in enumerate(state.smaller, 1)
            ),
        )

    async def said(self, connection: Connection, message: ms.EdgeMessage | Upload) -> None:
        edge = connection.edge
        match message:
            case ms.Ready() if not 0 <= message.size_class <= len(self.machine.state.smaller):
                last = len(self.machine.state.smaller)
                reason = f"there is no size class {message.size_class}; this run has 0 to {last}: join again"
                self._send(edge, ms.Refusal(reason=reason, fatal=True))
            case ms.Ready():
                self._size_classes[edge] = message.size_class
                self._events.put_nowait(ev.EdgeReady(edge))
            case ms.Resumed():
                self._events.put_nowait(ev.EdgeReady(edge))
            case ms.Paused():
                self._events.put_nowait(ev.EdgeAway(edge, "paused"))
            case ms.Leave():
                self._events.put_nowait(ev.EdgeAway(edge, "left"))
                self._farewelled.add(edge)
                self.say({"event": "edge_left", "edge": edge, "reason": message.reason})
            case ms.Decline():
                self.say({"event": "declined", "edge": edge, "round": message.round, "reason": message.reason})
                self._events.put_nowait(ev.Declined(edge, message.round, message.reason))
            case ms.UpdateStart():
                self._events.put_nowait(ev.UploadStarted(edge, message.round))
            case ms.Progress():
                self._progress[edge] = message
                values = msgspec.structs.asdict(message)
                self.say({"event": "edge_progress", "edge": edge, **values})
            case Upload():
                await self._uploaded(edge, message)

    async def _uploaded(self, edge: ms.EdgeId, upload: Upload) -> None:
        """Check, store durably, then let the machine judge."""
        start, size_class = upload.start, self._size_classes.get(edge, 0)
        problem = None
        try:
            if start.codec != self.settings.wire.codec:
                raise ProtocolViolation(f"the update is coded as {start.codec}, the run as {self.settings.wire.codec}")
            factor = trained_factor(self.settings.aggregation.rule, start.round)
            layout = of_factor(self._manifests[size_class].lora.adapter, factor)
            await asyncio.to_thread(check, upload.data, layout, self.settings.wire.codec)
            await self._store(upload)
        except ProtocolViolation as error:
            problem = str(error)
        except DiskFull as error:
            self.say({"event": "disk_full", "message": str(error)})
            self._send(edge, ms.Refusal(round=start.round, reason=str(error), retry=True))
            self._events.put_nowait(ev.UploadStalled(edge))
            return
        self._events.put_nowait(
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

    async def _store(self, upload: Upload) -> None:
        digest = upload.start.digest
        if not self.blobs.has(digest):
            self._unkept.add(digest)
        self._arriving[digest] += 1
        try:
            await asyncio.to_thread(self.blobs.put, upload.data)
        except BaseException:
            self._arriving[digest] -= 1
            raise

    def ended(self, connection: Connection) -> None:
        self._count_traffic(connection)
        if self._connections.get(connection.edge) is connection:
            del self._connections[connection.edge]
            self._progress.pop(connection.edge, None)
            self._events.put_nowait(ev.EdgeGone(connection.edge))
            self.say({"event": "edge_gone", "edge": connection.edge})

    # --- telling ------------------------------------------------------------------------------------------

    def _count_traffic(self, connection: Connection) -> None:
        up, down = connection.up, connection.down
        if up or down:
            with contextlib.suppress(DiskFull):  # telemetry must not stop a round
                self.ledger.add_traffic(connection.edge, max(1, self.machine.state.round), up, down)
        connection.up -= up
        connection.down -= down

    def _flush_traffic(self) -> None:
        for connection in self._connections.values():
            self._count_traffic(connection)

    def status(self) -> dict[str, Any]:
        """For /v1/status: what is, in words and numbers."""
        state = self.machine.state
        return {
            **run_status(self.settings, self.ledger, state),
            "url": self.url,
            "edges": [
                {
                    "edge": token.edge,
                    "connected": token.edge in self._connections,
                    "eligible": token.edge in self.machine.eligible,
                    "revoked": token.revoked,
                    "size_class": self._size_classes.get(token.edge),
                    "step": self._progress[token.edge].step if token.edge in self._progress else None,
                    "steps": self._progress[token.edge].steps if token.edge in self._progress else None,
                }
                for token in self.ledger.tokens()
            ],
            "due_seconds": max(0.0, state.deadline_at - self.clock.wall()) if state.phase == "collecting" else None,
        }

    def metrics(self) -> str:
        """Prometheus text."""
        state = self.machine.state
        values = {
            "fedsoda_round": state.round,
            "fedsoda_rounds_closed": len(state.losses),
            "fedsoda_updates_accepted": len(state.accepted),
            "fedsoda_edges_connected": len(self._connections),
            "fedsoda_edges_eligible": len(self.machine.eligible),
        }
        return "".join(f"# TYPE {name} gauge\n{name} {value}\n" for name, value in values.items())


def _manifests_of(record: ev.AnyRecord) -> tuple[ms.Digest, ...]:
    if isinstance(record, ev.Prepared | ev.Repruned):
        return record.manifest, *(one.manifest for one in record.smaller)
    return ()


def run_status(settings: RunSettings, ledger: Ledger, state: Any) -> dict[str, Any]:
    """What the ledger alone knows of a run, live or not."""
    rows = ledger.traffic()
    pairs = len({(edge, number) for edge, number, _, _ in rows}) or 1
    return {
        "run": settings.name,
        "run_id": state.run_id,
        "phase": state.phase,
        "round": state.round,
        "rounds": settings.rounds.count,
        "rounds_closed": len(state.losses),
        "cohort": state.cohort,
        "accepted": sorted(state.accepted),
        "answered": state.answered,
        "losses": state.losses,
        "cross_terms": state.cross_terms,
        "public_kl": state.public_kl,
        "realignments": state.realignments,
        "probes": state.probes,
        "evaluation": state.evaluation,
        "bytes": {
            "up_per_edge_round": sum(row[2] for row in rows) / pairs,
            "down_per_edge_round": sum(row[3] for row in rows) / pairs,
        },
        "traffic": [{"edge": e, "round": r, "up": up, "down": down} for e, r, up, down in rows],
    }
