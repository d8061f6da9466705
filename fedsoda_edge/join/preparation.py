"""Prepare a join, from the hub's Welcome to a worker that can train: check data, take a sub-LLM, fetch it, read rows.

The early sweep begins here and continues afterwards; what the hub hears then is left to the agent.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from fedsoda_edge import events as ev
from fedsoda_edge.join import size_class
from fedsoda_edge.join.download import Download
from fedsoda_edge.join.home import Home, JoinedRun
from fedsoda_edge.join.patience import Patience
from fedsoda_edge.join.pause import Pauses
from fedsoda_edge.join.run_state import RunState
from fedsoda_edge.join.settings import AgentSettings
from fedsoda_edge.join.sources import Sources
from fedsoda_edge.join.trainer import Means, Trainer
from fedsoda_edge.ports import Clock, TorchPort
from fedsoda_edge.ports.store import FileStore
from fedsoda_edge.protocol import commands as cmd
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.manifest import TOKENIZER_FILES, BundleManifest
from fedsoda_edge.protocol.needs import SHORTEST, shape_of
from fedsoda_edge.protocol.template import DEFAULT_COMPLETION, DEFAULT_PROMPT, TextTemplate


@dataclass(frozen=True)
class Equipment:
    """The means by which this device trains a run, from when the sub-LLM is taken."""

    trainer: Trainer
    download: Download
    size_class: int


class JoinPreparation:
    """The preparation of one join for its run, in the order of its public methods."""

    def __init__(
        self,
        welcome: ms.Welcome,
        state: RunState,
        home: Home,
        settings: AgentSettings,
        sources: Sources,
        worker: TorchPort,
        pauses: Pauses,
        say: ev.EventSink,
        clock: Clock,
    ) -> None:
        self._welcome = welcome
        self._state = state
        self._home = home
        self._settings = settings
        self._worker = worker
        self._pauses = pauses
        self._say = say
        self._store = FileStore(home.store)
        self._download = Download(
            sources,
            self._store,
            run=pauses.run,
            say=say,
            patience=Patience.of(clock, unattended=settings.unattended),
            clock=clock,
            stall_seconds=welcome.stall_seconds,
        )

    async def check_data(self) -> int:
        """Read every row before anything is fetched; return how many there are.

        Raises:
            DataProblem: a row lacks a column or is damaged.
        """
        if self._settings.data.is_text:
            return self._settings.data.check(*self._templates())
        checked = await self._pauses.run(lambda: self._worker.call(cmd.Check(rows=self._rows())))
        return checked.rows

    async def take(self) -> tuple[Equipment, size_class.Taken]:
        """Take the largest of the run's sub-LLMs for which this device has room.

        Raises:
            DeviceTooSmall: there is no room for the smallest either.
        """
        taken = await size_class.take(
            self._welcome,
            self._download.manifest,
            self._store,
            self._home.directory,
            self._settings.device,
            SHORTEST,  # rows are not read yet: only a device that could train on no row is refused now
            self._settings.limits,
            self._say,
        )
        digest = taken.size_class.manifest.digest
        self._state.begin_bundle(digest)
        self._state.bound_views(taken.manifest)
        self._say(
            ev.DeviceFits(
                device=taken.memory.device,
                ram_needed=taken.memory.peak if taken.memory.device == "cpu" else 0,
                ram_free=taken.facts.ram_bytes,
                disk_needed=taken.disk_needed,
                disk_free=taken.facts.disk_bytes,
                size_class=taken.number,
            )
        )
        opening = cmd.Open(
            store=str(self._home.store), manifest=digest, rows=self._rows(), max_length=self._welcome.max_length
        )
        trainer = Trainer(
            self._worker,
            Means(self._settings.device, self._settings.limits, self._border_cache(), self._home.directory),
            self._welcome,
            self._state,
            self._pauses,
            self._say,
            opening,
            shape_of(taken.manifest),
        )
        return Equipment(trainer, self._download, taken.number), taken

    async def open(self, trainer: Trainer, taken: size_class.Taken, rows: int, parts: asyncio.TaskGroup) -> int:
        """Fetch the bundle, and have the data read and swept meanwhile; return the number of samples.

        Args:
            rows: how many the data has.
            parts: the tasks of the join, which the early sweep joins.
        """
        async with (
            self._download.bundle(taken.manifest, taken.size_class.manifest.digest) as fetch,
            asyncio.TaskGroup() as both,
        ):
            both.create_task(fetch())
            opened = await trainer.at_work(trainer.open, tries=1)
            if taken.size_class.emulator is not None:
                trainer.begin_early(parts, taken.size_class.emulator)
        self._remember(taken.manifest)
        for clause in opened.confinement.missing if opened.confinement else ():
            self._say(ev.Notice(f"the worker, which reads the data, cannot be confined: {clause}"))
        self._say(ev.DataRead(rows, opened.num_examples, opened.num_skipped, opened.threads))
        for missing in self._pauses.missing():
            self._say(ev.Notice(missing))
        return opened.num_examples

    def _rows(self) -> cmd.Rows:
        data, (prompt, completion) = self._settings.data, self._templates()
        return cmd.Rows(
            path=str(data.path.absolute()),
            columns=dict(data.columns),
            prompt=prompt.text,
            completion=completion.text,
        )

    def _templates(self) -> tuple[TextTemplate, TextTemplate]:
        template = self._welcome.template
        if template is None:
            return TextTemplate(DEFAULT_PROMPT), TextTemplate(DEFAULT_COMPLETION)
        return TextTemplate(template.prompt), TextTemplate(template.completion)

    def _border_cache(self) -> cmd.BorderCache:
        cache = self._settings.cache
        return cmd.BorderCache(
            directory=str(self._home.border(self._welcome.run_id)),
            key=self._home.cache_key(keep=cache.keep_key).hex(),
            dtype=cache.dtype,
            max_bytes=cache.max_bytes,
        )

    def _remember(self, manifest: BundleManifest) -> None:
        """Keep what `data check` needs of this run."""
        prompt, completion = self._templates()
        files = [file for file in manifest.files if file.name in TOKENIZER_FILES]
        joined = JoinedRun(
            run=self._welcome.run_name,
            prompt=prompt.text,
            completion=completion.text,
            max_length=self._welcome.max_length,
            tokenizer={file.name: str(self._store.path(file.sha256)) for file in files},
            eos=manifest.config.get("eos_token_id"),
            vocab_size=int(manifest.config["vocab_size"]),
        )
        self._home.remember_run(self._welcome.run_id, joined)
