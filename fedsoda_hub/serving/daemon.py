"""Serve a run: hold it, let its parts work concurrently, and end them all when one fails or a signal comes.

What each part does is in the files beside this one; which decisions are made is `federation/rounds.py`'s.
"""

from __future__ import annotations

import asyncio

import msgspec

from fedsoda_edge.network.tls import pin_text
from fedsoda_edge.ports import Clock, SystemClock, TorchPort
from fedsoda_edge.ports.child import Child
from fedsoda_edge.ports.disk import write_durably
from fedsoda_edge.ports.ends import status_of
from fedsoda_edge.ports.system import on_signal_in
from fedsoda_hub import events
from fedsoda_hub.federation.rounds import RoundMachine
from fedsoda_hub.run.process import ProcessNote
from fedsoda_hub.run.status import RunningJob
from fedsoda_hub.serving.admission import Admission
from fedsoda_hub.serving.broadcast import Broadcast
from fedsoda_hub.serving.connection import Door, Hub
from fedsoda_hub.serving.decisions import Decisions, Inbox
from fedsoda_hub.serving.desk import desk_of
from fedsoda_hub.serving.event_files import EventFile, last_opened, write_run
from fedsoda_hub.serving.first_of import first_of
from fedsoda_hub.serving.gauges import Gauges
from fedsoda_hub.serving.greeting import Greeting
from fedsoda_hub.serving.listener import Listener
from fedsoda_hub.serving.metrics import Metrics
from fedsoda_hub.serving.monitoring import Monitoring
from fedsoda_hub.serving.notify import Notifier, Watched
from fedsoda_hub.serving.proofs import Proofs
from fedsoda_hub.serving.resume import ServedRun, resume, rules_of
from fedsoda_hub.serving.roster import Roster
from fedsoda_hub.serving.shelf import Shelf
from fedsoda_hub.serving.signer import Signer
from fedsoda_hub.serving.tls import Encryption, is_behind_proxy, way_in
from fedsoda_hub.serving.torch_jobs import TorchJobs
from fedsoda_hub.serving.uploads import Uploads
from fedsoda_hub.serving.ways import ways_of
from fedsoda_hub.settings.run import RunSettings

LINGER_SECONDS = 30.0


class Daemon:
    """A run that is served; `Daemon.open` makes one."""

    def __init__(
        self,
        settings: RunSettings,
        run: ServedRun,
        say: events.HubSay,
        clock: Clock,
        door: Door | None,
        torch: TorchPort,
    ) -> None:
        self.settings = settings
        self.disk = run
        self.broadcast = say = Broadcast(say)
        self.inbox: Inbox = asyncio.Queue()
        self.machine = RoundMachine(rules_of(settings), run.state)
        self.shelf = Shelf(run.directory, run.state)
        metrics = Metrics()
        self.broadcast.begin(metrics.hear)
        self.uploads = Uploads(run.directory.blobs, settings.wire.codec, run.directory.uploads, settings.task.best_by)
        state = run.state
        proofs = Proofs(run.key, run.ledger.devices, lambda: state.run_id, clock.monotonic, clock.wall)
        note = ProcessNote(run.directory.process, clock, "preparing" if not state.sub_llms else "serving")
        signer = Signer(run.key, state, tuple(settings.blobs.mirrors), self.shelf.ref, clock)
        greeting = Greeting(settings, state, self.shelf, signer, clock, self._work)
        self.roster = Roster(
            settings,
            self.machine,
            run.ledger,
            self.shelf,
            self.uploads,
            proofs,
            self.inbox.put_nowait,
            say,
            greeting,
            metrics,
        )
        self.monitoring = Monitoring(
            settings, self.machine, run.ledger, clock, self.roster, run.admin_secret, metrics, note
        )
        self.broadcast.begin(self.monitoring.heard)
        self.admission = Admission(run.ledger, self.roster, proofs, clock)
        self.jobs = TorchJobs(settings, torch, self.inbox.put_nowait, say, metrics.worked)
        self.decisions = Decisions(
            settings,
            self.machine,
            self.inbox,
            run.ledger,
            clock,
            self.shelf,
            self.uploads,
            self.roster,
            self.jobs,
            self.monitoring,
            say,
        )
        metrics.watch(
            Gauges(
                settings,
                self.machine,
                self.roster,
                torch,
                run.directory.path,
                {
                    "events": self.inbox.qsize,
                    "jobs": lambda: self.jobs.num_waiting,
                    "uploads": lambda: self.uploads.num_unjudged,
                    "notifications": lambda: self.notifier.num_waiting,
                },
                lambda: self.uploads.spooled_bytes,
            )
        )
        self.notifier = Notifier(
            settings,
            Watched(
                run.directory.path,
                run.state,
                lambda: self.machine.quorum,
                lambda: self.roster.connected,
                run.ledger.edges.all,
            ),
            clock,
            metrics.delivered,
        )
        self.broadcast.begin(self.notifier.hear)
        self.desk = desk_of(
            settings,
            self.machine,
            run.ledger,
            self.roster,
            self.monitoring,
            self.inbox,
            self.broadcast,
            clock,
        )
        self._clock = clock
        self._door = door

    @classmethod
    def open(
        cls,
        settings: RunSettings,
        say: events.HubSay,
        clock: Clock | None = None,
        *,
        door: Door | None = None,
        torch: TorchPort | None = None,
    ) -> Daemon:
        """Lock the run, replay its ledger, and get ready to serve it.

        Args:
            say: takes the events for people.
            door: where edges come in; None: the port of [listen].
            torch: what computes; None: a child process.

        Raises:
            UsageProblem: another hub has the run, or it was prepared with other settings.
            DiskFull: the disk has no space left.
        """
        run = resume(settings)
        return cls(settings, run, say, clock or SystemClock(), door, torch or Child("fedsoda_hub.compute"))

    def _work(self) -> RunningJob | None:
        return self.monitoring.work()

    @property
    def url(self) -> str:
        """The URL at which the hub serves; empty before it does."""
        return self.monitoring.url

    def close(self) -> None:
        """Release a run that was opened and is not served."""
        self.disk.close()

    async def run(self, *, exit_when_done: bool) -> None:
        """Serve until the run is over (with `exit_when_done`) or a signal comes.

        Raises:
            UsageProblem: the port is in use, or the owner's certificate cannot be used.
            WorkerFailed: the process that owns torch ended three times in one job.
            OutOfMemory: memory ran out as often, here or there.
            KeyboardInterrupt: SIGINT came.
        """
        loop = asyncio.get_running_loop()
        stop: asyncio.Future[str] = loop.create_future()

        def stopped(name: str) -> None:
            if not stop.done():
                stop.set_result(name)

        on_signal_in(loop, stopped)
        await self.serve(stop, exit_when_done=exit_when_done)

    async def serve(self, stop: asyncio.Future[str], *, exit_when_done: bool) -> None:
        """Serve as `run` does, until `stop` holds the name of a signal.

        Raises:
            UsageProblem, WorkerFailed, OutOfMemory, KeyboardInterrupt: as in `run`.
        """
        self.monitoring.note.begin()
        try:
            await self._serve(stop, exit_when_done=exit_when_done)
        except BaseException as error:
            self._note_end(error, stop)
            raise
        self._note_end(None, stop)

    def _note_end(self, error: BaseException | None, stop: asyncio.Future[str]) -> None:
        """Note how this process ends: what others read of it when it is gone."""
        is_stopped = isinstance(error, KeyboardInterrupt | asyncio.CancelledError)
        if error is not None and not is_stopped:
            self.monitoring.note.end(
                "failed", status_of(error), str(error) or type(error).__name__, type(error).__name__
            )
        elif self.machine.state.phase == "ended":
            self.monitoring.note.end("over", 0 if error is None else status_of(error))
        else:
            signal = stop.result() if stop.done() and not stop.cancelled() else "Ctrl+C"
            self.monitoring.note.end("stopped", 0 if error is None else status_of(error), signal)

    async def _serve(self, stop: asyncio.Future[str], *, exit_when_done: bool) -> None:
        listen = self.settings.listen
        try:
            encryption = Encryption.of(self.settings) if self._door is None else None
            door = self._door or Listener(listen.host, listen.port, encryption)
            scheme, host = "http" if encryption is None else "https", listen.host
            self.monitoring.url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{door.port}"
            self.shelf.follow(self.disk.ledger.records())
            await self.uploads.tidy(self.disk.state, self.shelf.lent_blobs, is_start=True)
            self.notifier.open(ways_of(self.settings, self.disk.directory, self._clock.wall))
            event_file = await asyncio.to_thread(self._event_file)
            if event_file is not None:
                self.broadcast.begin(lambda event: event_file.hear(event, self._clock.wall()))
            try:
                await self._until_over(door, stop, exit_when_done, event_file)
            finally:
                self.desk.close()
                await self.roster.close(self._clock)
                await door.close()
                await self.roster.flush_traffic()
                await self.jobs.close()
                await self.notifier.close()
                if event_file is not None:
                    await event_file.close()
                self.disk.directory.address.unlink(missing_ok=True)
                await self.admission.close()
        finally:
            self.disk.close()
        if stop.done() and stop.result() == "SIGINT":
            raise KeyboardInterrupt

    def _event_file(self) -> EventFile | None:
        """Write what the run's event file lacks; None: the owner wants none."""
        if (directory := self.settings.report.tensorboard) is None:
            return None
        settings, ledger = self.settings, self.disk.ledger
        path, _ = write_run(settings.directory / directory, settings.name, ledger, settings.rounds.count)
        return EventFile(path, last_opened(ledger))

    async def _until_over(
        self, door: Door, stop: asyncio.Future[str], exit_when_done: bool, event_file: EventFile | None
    ) -> None:
        """Let all parts work until the end. An error of one part ends the others and is raised."""
        try:
            async with asyncio.TaskGroup() as group:
                parts = [
                    group.create_task(part)
                    for part in (
                        self._let_in(door),
                        self.jobs.run(),
                        self.decisions.run(),
                        self.admission.run(),
                        self._welcome_all(),
                        self.monitoring.metrics.run(),
                        self.notifier.run(),
                        *([] if event_file is None else [event_file.run()]),
                    )
                ]
                await self._end(stop, exit_when_done)
                if stop.done():
                    self.broadcast(events.StoppedBySignal(signal=stop.result()))
                for part in parts:
                    part.cancel()
        except BaseExceptionGroup as failures:
            raise _first(failures) from None

    async def _let_in(self, door: Door) -> None:
        """Open the door, and raise what breaks it. An edge that comes before the run is prepared waits inside."""
        await door.open(Hub(self.roster, self.shelf, self.monitoring, self.desk))
        await asyncio.to_thread(write_durably, self.disk.directory.address, self.url.encode())
        self.broadcast(await asyncio.to_thread(self._listening, door))
        await door.broken()

    async def _welcome_all(self) -> None:
        """Welcome the edges that came before the run was prepared."""
        await self.roster.greeting.run(self.roster.waiting)
        self.monitoring.note.become("serving")

    def _listening(self, door: Door) -> events.Listening:
        """Tell where edges may join, as far as it is known."""
        said = events.Listening(url=self.url, run=self.settings.name)
        if self._door is not None:
            return said
        is_bare = is_behind_proxy(self.settings)
        if is_bare and self.settings.listen.public_url is None:
            return msgspec.structs.replace(said, is_behind_proxy=True)
        way = way_in(self.settings, door.port)
        pin = None if way.tls_pin is None else pin_text(way.tls_pin)
        return msgspec.structs.replace(
            said, public_url=way.urls[0], is_guess=way.is_guess, pin=pin, is_behind_proxy=is_bare
        )

    async def _end(self, stop: asyncio.Future[str], exit_when_done: bool) -> None:
        """Return when a signal came, or when the run is over and its edges know it or were waited for."""
        if not exit_when_done:
            await asyncio.wait({stop})
            return
        await first_of(asyncio.wait({stop}), self.decisions.is_over.wait())
        await first_of(asyncio.wait({stop}), self.roster.all_told(), self._clock.sleep(LINGER_SECONDS))


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first failure of a group; the failures that it caused follow it."""
    failure: BaseException = failures
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure
