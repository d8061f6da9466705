"""Direct the worker of one join: open it with bundle and data, choose how it trains here, sweep before the first offer.

A worker that dies, or that a pause ended, is started again; where memory runs out it trains by a leaner plan. Which plans
there are is left to `device/fit.py`, files to `run_state.py`, all computing to the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fedsoda_edge import events as ev
from fedsoda_edge.device.facts import read_device
from fedsoda_edge.device.fit import Limits, fit, leaner, plan_sentence, room_for, same_way, table
from fedsoda_edge.errors import DeviceTooSmall, OutOfMemory, WorkerFailed
from fedsoda_edge.join.pause import Pauses
from fedsoda_edge.join.run_state import RunState
from fedsoda_edge.ports import TorchPort
from fedsoda_edge.ports.confine import Reach
from fedsoda_edge.protocol import commands as cmd
from fedsoda_edge.protocol.manifest import BundleManifest
from fedsoda_edge.protocol.messages import DeviceFacts, Digest, RoundOffer, ViewRef, Welcome
from fedsoda_edge.protocol.needs import MemoryPlan, SampleSizes, Shape, shape_of

T = TypeVar("T")

WORKER_MODULE = "fedsoda_edge.worker"
NO_REACH = Reach()
WORKER_TRIES = 3  # for a round; each begins at the checkpoint of the one before


def worker_environment(temporary: Path, reach: Reach = NO_REACH, *, threads: int = 0) -> dict[str, str]:
    """Return the variables of a worker's process beside ours: with them no library asks a network.

    Args:
        temporary: an absolute directory for what its libraries write meanwhile, which some ask for when they are imported.
        reach: the absolute paths that it needs beside this one and those of its programs.
        threads: CPU threads of torch; 0 leaves their number to torch.
    """
    environment = {"HF_HUB_OFFLINE": "1", "USE_HUB_KERNELS": "0", "TOKENIZERS_PARALLELISM": "false"}
    environment |= dict.fromkeys(("TMPDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"), str(temporary))
    environment |= msgspec.structs.replace(reach, writes=(*reach.writes, str(temporary))).as_variables()
    if threads:
        environment |= {"FEDSODA_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    return environment


@dataclass(frozen=True)
class Means:
    """The means that this device gives to training.

    device: "auto", "cpu", "cuda" or "cuda:N". home: the FEDSODA_HOME whose disk is measured.
    """

    device: str
    limits: Limits
    cache: cmd.BorderCache
    home: Path


@dataclass(frozen=True)
class WorkerClosed:
    """The state before a worker has read bundle and data."""


@dataclass(frozen=True)
class WorkerOpened:
    """The state once a worker has read bundle and data.

    pid: the worker's; its process may have ended meanwhile. plan: how it trains, also once another worker has read
    them. swept: the digest of the emulator's view with which it has swept; "": it has not.
    """

    pid: int | None
    answer: cmd.Opened
    plan: MemoryPlan
    swept: str = ""


@dataclass(frozen=True)
class NoSweep:
    """The state without an early sweep."""


@dataclass(frozen=True)
class EarlySweep:
    """The sweep that began before the first offer. emulator: the digest of the view with which it sweeps."""

    emulator: Digest
    task: asyncio.Task[None]


class Trainer:
    """The director of one join's worker, which does one piece of work after the other.

    Args:
        opening: the call that opens a worker with bundle and data.
        shape: the sizes of the bundle's sub-LLM.
    """

    def __init__(
        self,
        worker: TorchPort,
        means: Means,
        welcome: Welcome,
        state: RunState,
        pauses: Pauses,
        say: ev.EventSink,
        opening: cmd.Open,
        shape: Shape,
    ) -> None:
        self._worker = worker
        self._means = means
        self._welcome = welcome
        self._state = state
        self._pauses = pauses
        self._say = say
        self._opening = opening
        self._shape = shape
        self._work: WorkerClosed | WorkerOpened = WorkerClosed()
        self._early: NoSweep | EarlySweep = NoSweep()
        self._working = asyncio.Lock()

    @property
    def pid_on_gpu(self) -> int | None:
        """The worker's pid where it computes on a GPU; None: it does not."""
        return self._worker.pid if isinstance(self._work, WorkerOpened) and self._work.plan.device != "cpu" else None

    @property
    def _opened(self) -> WorkerOpened:
        assert isinstance(self._work, WorkerOpened), "the worker reads bundle and data first"
        return self._work

    # --- pieces of work ----------------------------------------------------------------------------------------------

    async def at_work(self, work: Callable[[], Coroutine[Any, Any, T]], tries: int = WORKER_TRIES) -> T:
        """Do a piece of work, alone with the worker. A worker that dies, or that a pause ended, is started again.

        Where memory runs out, the work begins again by a leaner plan, if there is one; a second kill from outside is
        taken as a lack of memory too.

        Args:
            tries: how often the worker may die before the work is given up.

        Raises:
            DeviceTooSmall, OutOfMemory: memory runs out with the leanest plan.
            WorkerFailed: the worker died that many times.
        """
        async with self._working:
            num_failures = 0
            while True:
                try:
                    return await self._pauses.run(work)
                except (DeviceTooSmall, OutOfMemory) as error:
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
                        self._say(ev.Notice(f"{error}; it is started again"))
                await self._worker.close()

    async def open(self) -> cmd.Opened:
        """Have the worker read bundle and data, unless it has."""
        held = self._work
        if not isinstance(held, WorkerOpened) or held.pid is None or held.pid != self._worker.pid:
            answer = await self._worker.call(self._opening)
            plan = held.plan if isinstance(held, WorkerOpened) else self._plan_memory(answer)
            self._work = WorkerOpened(self._worker.pid, answer, plan)
        return self._opened.answer

    async def sweep(self, emulator: str | None, digest: Digest) -> None:
        """Have the worker compute the border states of all samples with this emulator's view, unless it has.

        Args:
            emulator: the view's file; None: the bundle's own.
            digest: the view's digest.
        """
        opened = self._opened
        if opened.swept == digest:
            return
        room = room_for(opened.plan.device, self._facts(opened.answer), self._means.limits)
        call = cmd.Sweep(emulator=emulator, cache=self._means.cache, memory=opened.plan, room=room)
        swept = await self._worker.call(call, lambda at: self._say(ev.Sweeping(done=at.done, total=at.total)))
        self._say_damaged(swept.num_damaged)
        self._work = replace(opened, swept=digest)
        self._say(
            ev.SweepDone(
                num_examples=opened.answer.num_examples,
                num_kept=swept.num_kept,
                kept_bytes=swept.kept_bytes,
                num_damaged=swept.num_damaged,
            )
        )

    async def advance(self, step: cmd.Advance) -> cmd.Advanced:
        """Have the worker add a delta to a view."""
        return await self._worker.call(step)

    async def train(
        self, offer: RoundOffer, view: str | None, on_step: Callable[[cmd.TrainingStep], None]
    ) -> cmd.Trained:
        """Have the worker train a round from this view; update and new residual are then files of the run's state.

        Args:
            view: the file of the adapter LoRA; None: the bundle's own.
            on_step: called after each step.
        """
        call = cmd.Train(
            view=view,
            settings=offer.local,
            seed=self._welcome.seed,
            round=offer.round,
            edge=self._welcome.edge,
            codec=self._welcome.codec,
            trains=offer.trains,
            residual=self._state.residual(offer.round) if offer.has_feedback else None,
            update=str(self._state.update),
            new_residual=str(self._state.new_residual),
            checkpoint=str(self._state.checkpoint),
        )
        trained = await self._worker.call(call, on_step)
        self._say_damaged(trained.num_damaged)
        return trained

    async def follow(self, manifest: BundleManifest, digest: Digest) -> None:
        """Open the worker with another bundle, whose files are here: the hub has chosen other layers."""
        self._shape = shape_of(manifest)
        self._opening = msgspec.structs.replace(self._opening, manifest=digest)
        self._state.begin_bundle(digest)
        await self._worker.close()
        await self.open()

    def is_open_with(self, manifest: Digest) -> bool:
        """Tell whether the worker reads this bundle."""
        return self._opening.manifest == manifest

    def _say_damaged(self, count: int) -> None:
        if count:
            self._say(ev.Notice(f"{count} records of the border cache were damaged; they are computed again"))

    # --- before the first offer --------------------------------------------------------------------------------------

    def begin_early(self, parts: asyncio.TaskGroup, emulator: ViewRef) -> None:
        """Begin to sweep before the first offer, layer by layer as the bundle comes, as one of the join's parts."""
        task = parts.create_task(self.at_work(lambda: self._sweep_early(emulator)))
        self._early = EarlySweep(emulator.digest, task)

    async def _sweep_early(self, emulator: ViewRef) -> None:
        # Only with an emulator's view that is here: the hub may align again at any time and then drops this one's blobs.
        await self.open()
        held = await self._state.held("emulator", emulator.digest)
        if emulator.snapshot is None or held is not None:
            await self.sweep(None if emulator.snapshot is None else held, emulator.digest)

    async def use_early(self, emulator: Digest) -> None:
        """Wait for the early sweep if it sweeps with this emulator's view; break it off if it does not."""
        early = self._early
        if not isinstance(early, EarlySweep):
            return
        if not early.task.done() and early.emulator != emulator:
            await self.end_early()
            await self._worker.close()
        await asyncio.wait({early.task})
        if not early.task.cancelled():
            early.task.result()

    async def end_early(self) -> None:
        """Break the early sweep off, so that it says nothing more."""
        if isinstance(self._early, EarlySweep) and not self._early.task.done():
            self._early.task.cancel()
            await asyncio.wait({self._early.task})

    # --- how to train ------------------------------------------------------------------------------------------------

    def _samples(self, opened: cmd.Opened) -> SampleSizes:
        return SampleSizes(self._welcome.batch_size, opened.longest_ids, opened.longest_labels, opened.num_examples)

    def _facts(self, opened: cmd.Opened) -> DeviceFacts:
        """Measure what is free, and add what the worker holds already, since a plan counts that too.

        A GPU that the worker's torch cannot use is left out, unless the owner named it: then the worker says what to
        install.
        """
        facts = read_device(self._means.home)
        if self._means.device == "auto" and not opened.has_cuda:
            facts = msgspec.structs.replace(facts, vram_bytes=0, accelerator="")
        return msgspec.structs.replace(facts, ram_bytes=facts.ram_bytes + (self._worker.rss_bytes or 0))

    def _plan_memory(self, opened: cmd.Opened) -> MemoryPlan:
        """Choose the quickest plan that has room; a round in its middle keeps its plan, so that it ends with the same bits."""
        facts, limits, process = self._facts(opened), self._means.limits, opened.process_bytes
        samples = self._samples(opened)
        plan = fit(self._means.device, self._shape, samples, facts, limits, process_bytes=process)
        if self._state.has_checkpoint and (before := self._state.memory_plan()) is not None:
            again = same_way(before, self._shape, samples, process)
            if again is not None and again.device == plan.device and again.peak <= room_for(plan.device, facts, limits):
                plan = again
        self._note_plan(plan, facts)
        return plan

    def _note_plan(self, plan: MemoryPlan, facts: DeviceFacts) -> None:
        self._state.keep_memory_plan(plan)
        self._say(ev.memory(plan_sentence(plan, facts), plan, table(plan)))

    def _leaner(self) -> MemoryPlan | None:
        """Find the next plan that needs less; after the last one of a GPU, under auto, the CPU's first that has room."""
        if not isinstance(self._work, WorkerOpened):
            return None
        opened, before = self._work.answer, self._work.plan
        samples, process = self._samples(opened), opened.process_bytes
        plan = leaner(before, self._shape, samples, process)
        if plan is None and self._means.device == "auto" and before.device != "cpu":
            facts = self._facts(opened)
            with contextlib.suppress(DeviceTooSmall):  # no room there either: the GPU's error is raised
                plan = fit("cpu", self._shape, samples, facts, self._means.limits, process_bytes=process)
        return plan

    def _go_leaner(self, error: Exception, plan: MemoryPlan) -> None:
        self._say(ev.Notice(f"{error}; training continues in a way that needs less memory"))
        self._work = replace(self._opened, plan=plan)
        self._note_plan(plan, self._facts(self._work.answer))
