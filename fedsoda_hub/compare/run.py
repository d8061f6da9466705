"""Run the cells of a comparison, judge them, and continue where a call was stopped.

All files lie in one directory: `prepared/` (full LLM to bundle, once for all cells that share it), `memory/` or
`network/` with a directory per cell, `judged/` for baselines that are not federated. A result is kept with the fingerprint
of its settings and data. Who holds which rows is `dealt.py`'s, what results mean together is `summary.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import torch
from torch import Tensor

from fedsoda_edge import events as edge_events
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.ports.console import Terminated
from fedsoda_edge.ports.disk import sha256_file, write_durably, write_durably_json
from fedsoda_edge.ports.machine import threads
from fedsoda_edge.ports.system import on_signal_in
from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub import events
from fedsoda_hub.compare.attacking import Attack
from fedsoda_hub.compare.central import steps_a_round, train_central
from fedsoda_hub.compare.costs import costs_of
from fedsoda_hub.compare.dealt import DealtData, write_rows
from fedsoda_hub.compare.pictures import write_pages
from fedsoda_hub.compare.results import (
    BaselineResult,
    CellResult,
    CellRound,
    KeptAnswers,
    KeptChoices,
    Results,
    WrittenReport,
)
from fedsoda_hub.compare.settings import Cell, Comparison
from fedsoda_hub.compare.summary import summarise
from fedsoda_hub.evaluation import evaluator
from fedsoda_hub.evaluation.judge import KEPT_BORDER_BYTES, RunJudge
from fedsoda_hub.events import HubSay
from fedsoda_hub.federation import records as rec
from fedsoda_hub.federation.jobs import JobProgress, Stage
from fedsoda_hub.local import in_process, processes
from fedsoda_hub.preparation.full_llm import open_full_llm
from fedsoda_hub.preparation.prepare import RunPreparation, made_of
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import opened_to_read
from fedsoda_hub.settings.run import RunSettings
from fedsoda_hub.settings.toml import write_toml

T = TypeVar("T")
K = TypeVar("K", CellResult, BaselineResult)
MAX_LOSS = 1e4  # nats; the loss of a model whose loss is larger or not a number


class Interrupted(Exception):
    """The signal to stop came; results that were finished are kept."""


def run_comparison(comparison: Comparison, out: Path, transport: str, say: HubSay) -> WrittenReport:
    """Run the cells that are not done, and write the report of `compare --json` to `out`, with its pages and pictures.

    Args:
        transport: "memory" or "network".

    Raises:
        KeyboardInterrupt, Terminated: SIGINT or SIGTERM came; results that were finished are kept.
        UsageProblem, DataProblem: the rows do not suit a split or the template.
    """
    torch.set_num_threads(threads(torch.get_num_threads()))
    run = _Run(comparison, out, transport, say)
    try:
        results = asyncio.run(run.results())
    except Interrupted:
        raise KeyboardInterrupt if run.signal == "SIGINT" else Terminated(run.signal) from None
    report = summarise(comparison, results, transport)
    pages = write_pages(report, run.plans(), run.out)
    file = run.out / "compare.json"
    write_durably_json(file, msgspec.to_builtins(report) | msgspec.to_builtins(pages))
    asdict = msgspec.structs.asdict
    return WrittenReport(**asdict(report), **asdict(pages), results=str(file))


class _Run:
    """One call of `run_comparison`: its progress and its judges."""

    def __init__(self, comparison: Comparison, out: Path, transport: str, say: HubSay) -> None:
        self.comparison, self.transport, self.out, self._say = comparison, transport, out.resolve(), say
        self._stop: asyncio.Future[str]
        self._judges: dict[str, RunJudge] = {}
        self._revisions: dict[str, str] = {}
        self._done = self._total = 0
        self._what = self.signal = ""
        self._data, self._attack = DealtData(comparison, self.out), Attack.of(comparison, transport)
        self._prepared_here: set[Path] = set()

    # --- all of it -------------------------------------------------------------------------------------------

    async def results(self) -> Results:
        """Run all cells and baselines that are not done, and return all results."""
        loop = asyncio.get_running_loop()
        self._stop = loop.create_future()

        def stopped(name: str) -> None:
            self.signal = name
            if not self._stop.done():
                self._stop.set_result("SIGTERM")  # as a hub hears it: Ctrl+C is this command's to report

        on_signal_in(loop, stopped)
        c, base = self.comparison.compare, self.comparison.settings[self.comparison.baseline_of]
        cells = list(self.comparison.cells())
        if "alone" in c.baselines:
            cells += [
                Cell(self.comparison.baseline_of, split, seed, alone)
                for seed in c.seeds
                for split in c.splits
                for alone in range(len(self._data.parts[split, seed]))
            ]
        rates = c.central_learning_rates or [base.local.learning_rate]
        central = [(s, seed) for seed in c.seeds for s in c.splits] if "central" in c.baselines else []
        self._total = sum(self._units(cell) for cell in cells) + len(central) * len(rates) * base.rounds.count + 1
        results = Results()
        for cell in cells:
            self._what = str(cell)
            self._advance(0)
            results.cells[cell] = await self._cell(cell)
        for split, seed in central:
            self._what = f"central, {split}, seed {seed}"
            self._advance(0)
            results.central[split, seed] = (await self._central(split, seed, rates)).answered
        if "untouched" in c.baselines:
            self._what = "untouched"
            results.untouched = (await self._untouched()).answered
        self._advance(self._total - self._done)
        for split, seed in self._data.parts:
            results.dealt[split, seed] = self._data.described(split, seed)
        return results

    def plans(self) -> dict[str, LayerPlan]:
        """Collect the layer plans of variants that prune, for the first seed; of equal plans only one."""
        found: dict[str, LayerPlan] = {}
        for cell in list(self.comparison.cells())[: len(self.comparison.settings)]:
            plan = Bundle.open(RunDirectory(self._settings_of(cell, 1).run_dir).bundle).plan
            if plan.distances and plan not in found.values():
                found[cell.variant] = plan
        return found

    def _units(self, cell: Cell) -> int:
        """Count the units of progress of a cell: its rounds, and one for judging it."""
        return self.comparison.settings[cell.variant].rounds.count + 1

    def _advance(self, units: int = 1, within: str = "") -> None:
        """Say how far the comparison is. within: how far the present part of it is, where that is known."""
        self._done += units
        what, done, total = self._what + within, self._done, self._total
        self._say(events.StageProgress(job="compare", stage="comparing", detail=what, done=done, total=total))

    def _staged(self, progress: JobProgress) -> None:
        self._alive()
        if isinstance(progress, Stage):
            self._advance(0, f", {progress.stage}: {progress.done} of {progress.total}")

    def _alive(self, *_: object) -> None:
        """Raise Interrupted if a signal came; called wherever work in a thread reports progress."""
        if self._stop.done():
            raise Interrupted

    # --- a cell ------------------------------------------------------------------------------------------------

    async def _cell(self, cell: Cell) -> CellResult:
        """Run and judge one cell, unless it is done."""
        names = self._data.named(cell.split, cell.seed)
        if cell.alone is not None:
            names = dict([list(names.items())[cell.alone]])
        settings = self._settings_of(cell, len(names))
        directory = settings.directory
        fingerprint = await _in_thread(lambda: self._fingerprint(settings, names))
        done, before = directory / "result.json", self._done
        result = _kept(done, fingerprint, CellResult)
        if result is None:
            started = time.monotonic()
            # A run knows its model by its path: a cell that was begun with another copy of the model begins again.
            mark, begun = directory / "fingerprint", f"{fingerprint} {settings.model}"
            if not mark.exists() or mark.read_text() != begun:
                shutil.rmtree(directory, ignore_errors=True)
            self._alive()
            await _in_thread(lambda: self._prepare_cell(settings))
            self._lay_out(settings, names)
            write_durably(mark, begun.encode())
            if not done.exists():  # otherwise the run is over, and only its result lacks what one has
                await self._federate(settings, names)
            if self._stop.done():
                raise Interrupted
            result = await _in_thread(lambda: self._result(cell, settings))
            _keep(done, fingerprint, result)
            shutil.rmtree(directory / "homes", ignore_errors=True)  # a bundle and border states of each edge
            seconds = time.monotonic() - started
            self._say(events.CellDone(cell=str(cell), accuracy=result.answered["plug_in"].accuracy, seconds=seconds))
        self._advance(before + self._units(cell) - self._done)
        return result

    def _settings_of(self, cell: Cell, num_edges: int) -> RunSettings:
        """Make the settings of the cell's own run.toml.

        They have no evaluation data, since the hub does not judge: questions are read once for all cells.
        """
        variant, replace, c = self.comparison.settings[cell.variant], msgspec.structs.replace, self.comparison.compare
        return replace(
            variant,
            name="run",
            seed=c.seeds[0] if c.prepare == "once" else cell.seed,
            rounds=replace(variant.rounds, min_edges=num_edges),
            task=replace(variant.task, eval_data=None),
            path=str(self.out / self.transport / cell.directory / "run.toml"),
        )

    def _fingerprint(self, settings: RunSettings, names: Mapping[str, Sequence[int]]) -> str:
        """Compute the digest of everything that a result depends on."""
        if settings.model not in self._revisions:
            self._revisions[settings.model] = open_full_llm(settings).revision
        values = msgspec.to_builtins(msgspec.structs.replace(settings, path="", model=""))
        rows = self._attack.rows(self._data.held(names))
        public = [sha256_file(path) for path in (settings.public_text, settings.like_task) if path is not None]
        parts = [values, rows, self._data.questions, public, self._revisions[settings.model]]
        parts += [self.comparison.compare.eval_every, *self._attack.fingerprint(list(names))]
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()

    def _prepared(self, settings: RunSettings) -> RunSettings:
        """Return the settings of the run that is only prepared, the same for all cells with the same bundle."""
        shared = [settings.seed, settings.model, settings.device, settings.dtype]
        key = hashlib.sha256(json.dumps([shared, made_of(settings), settings.task.prompt]).encode()).hexdigest()[:16]
        return msgspec.structs.replace(settings, path=str(self.out / "prepared" / key / "run.toml"))

    def _prepare(self, prepared: RunSettings) -> None:
        """Prepare a run, once in a call, since each time reads text and weights again.

        What the full LLM writes for one variant serves all others of the same seed.
        """
        if prepared.run_dir not in self._prepared_here:
            own, shared = RunDirectory(prepared.run_dir).texts, self.out / "prepared" / "texts"
            _link_missing(shared, own)
            RunPreparation(prepared).run(self._staged)
            _link_missing(own, shared)
            self._prepared_here.add(prepared.run_dir)

    def _prepare_cell(self, settings: RunSettings) -> None:
        """Copy the prepared run for the cell, since a realignment needs the files of preparation."""
        prepared = self._prepared(settings)
        self._prepare(prepared)
        if settings.run_dir.exists():
            return
        part = settings.run_dir.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(prepared.run_dir, part, copy_function=_link)
        os.replace(part, settings.run_dir)

    def _lay_out(self, settings: RunSettings, names: Mapping[str, Sequence[int]]) -> None:
        write_durably(Path(settings.path), write_toml(settings).encode())
        for name, rows in self._attack.rows(self._data.held(names)).items():
            write_rows(settings.directory / "data" / f"{name}.jsonl", rows)

    async def _federate(self, settings: RunSettings, names: Mapping[str, Sequence[int]]) -> None:
        edges = {name: settings.directory / "data" / f"{name}.jsonl" for name in names}
        homes = settings.directory / "homes"

        def heard(event: events.HubEvent) -> None:
            if isinstance(event, events.RoundClosed):
                self._advance()
            if isinstance(event, events.EdgeProgress):
                self._advance(0, f", round {event.round}: {event.edge} at step {event.step} of {event.steps}")

        with contextlib.ExitStack() as files:
            (settings.directory / "events").mkdir(exist_ok=True)
            logs = {
                name: files.enter_context((settings.directory / "events" / f"{name}.jsonl").open("a", buffering=1))
                for name in names
            }

            def log_of(name: str) -> processes.EdgeSay:
                return lambda event: print(edge_events.line_of(event), file=logs[name])

            if self.transport == "memory":
                ports = self._attack.ports(list(names))
                await in_process.federate(settings, edges, homes, self._stop, heard, log_of, ports)
            else:
                given = {name: os.environ[name] for name in ("FEDSODA_THREADS",) if name in os.environ}
                await processes.federate(settings, edges, homes, self._stop, heard, log_of, given, given)

    # --- what came of it -----------------------------------------------------------------------------------------

    def _result(self, cell: Cell, settings: RunSettings) -> CellResult:
        with opened_to_read(RunDirectory(settings.run_dir)) as ledger:
            records, traffic, state = ledger.records(), ledger.traffic(), ledger.replay()
        largest = state.largest
        closed = [record for record in records if isinstance(record, rec.RoundClosed)]
        judge, every = self._judge(settings), self.comparison.compare.eval_every
        rounds: list[CellRound] = []
        answered: dict[str, KeptAnswers] = {}
        for record in closed:
            is_last = record.round == settings.rounds.count
            accuracy = None
            if is_last or (every and record.round % every == 0 and cell.alone is None):
                self._alive()
                models = judge.models(record.master, largest.emulator.digest, largest.manifest)
                answered["plug_in"] = self._answered(judge, models["plug_in"])
                accuracy = answered["plug_in"].accuracy
            sizes = [(up, down) for _, number, up, down in traffic if number == record.round]
            rounds.append(
                CellRound(
                    round=record.round,
                    master=record.master,
                    accuracy=accuracy,
                    bytes_up=sum(up for up, _ in sizes),
                    bytes_down=sum(down for _, down in sizes),
                )
            )
        public_kl, costs = None, None
        if cell.alone is None:
            answered["sub_llm"] = self._answered(judge, models["sub_llm"])
            public_kl = next(record.public_kl for record in records if isinstance(record, rec.RunPrepared))
            costs = costs_of(settings)
        judge.evaluator.keep(KEPT_BORDER_BYTES)
        return CellResult(
            cell=str(cell),
            edges=settings.rounds.min_edges,
            rounds=rounds,
            answered=answered,
            public_kl=public_kl,
            costs=costs,
        )

    def _judge(self, settings: RunSettings) -> RunJudge:
        """Return the judge of a cell, which shares questions and the full model's border states with all cells like it."""
        seed = settings.seed if settings.task.shots else 0
        about = [settings.model, settings.dtype, settings.device, msgspec.to_builtins(settings.task), seed]
        key = json.dumps(about)
        if key not in self._judges:
            self._judges[key] = RunJudge(settings, self._data.eval_file)
        return self._judges[key].of(settings.run_dir)

    def _answered(self, judge: RunJudge, model: evaluator.JudgedModel) -> KeptAnswers:
        """Let a model answer the questions, and keep its answers."""
        answers = judge.evaluator.answers(model, _judging(self._staged))
        losses = answers.losses.nan_to_num(MAX_LOSS).clamp(max=MAX_LOSS)  # JSON has no NaN
        return KeptAnswers(
            right="".join("01"[right] for right in judge.evaluator.right(answers)),
            losses=_rounded(losses),
            of_choices=_kept_choices(judge.evaluator, answers),
        )

    # --- what is not federated -------------------------------------------------------------------------------------

    async def _untouched(self) -> BaselineResult:
        first = Cell(self.comparison.baseline_of, self.comparison.compare.splits[0], self.comparison.compare.seeds[0])
        settings = self._prepared(self._settings_of(first, 1))

        def judged() -> BaselineResult:
            self._prepare(settings)
            judge = self._judge(settings)
            return BaselineResult(answered=self._answered(judge, judge.judged({}, {})["full"]))

        return await self._once("untouched", self._fingerprint(settings, {}), judged)

    async def _central(self, split: str, seed: int, rates: Sequence[float]) -> BaselineResult:
        """Judge central training with each rate, and take the best by the same answers: it is a ceiling, not a rival.

        It is the same for all splits whose cohorts take as many steps.
        """
        parts = self._data.parts[split, seed]
        settings = self._settings_of(Cell(self.comparison.baseline_of, split, seed), 1)
        rows, steps = sorted(row for part in parts for row in part), steps_a_round(settings, list(map(len, parts)))
        prepared, before = self._prepared(settings), self._done

        def said() -> None:
            self._alive()
            self._advance()

        def judged() -> BaselineResult:
            self._prepare(prepared)
            data = self.out / "judged" / "central.jsonl"
            write_rows(data, self._data.rows(rows))
            trained = train_central(prepared, data, steps, rates, said)
            judge = self._judge(prepared)
            answered = {
                rate: self._answered(judge, judge.judged(adapter, {})["plug_in"]) for rate, adapter in trained.items()
            }
            best = max(rates, key=lambda rate: answered[rate].accuracy)
            return BaselineResult(answered=answered[best], learning_rate=best)

        about = json.dumps([list(rates), steps])
        fingerprint = self._fingerprint(settings, {about: rows})
        result = await self._once(f"central-{fingerprint[:16]}", fingerprint, judged)
        self._advance(before + len(rates) * settings.rounds.count - self._done)
        return result

    async def _once(self, name: str, fingerprint: str, work: Callable[[], BaselineResult]) -> BaselineResult:
        path = self.out / "judged" / f"{name}.json"
        result = _kept(path, fingerprint, BaselineResult)
        if result is None:
            self._alive()
            result = await _in_thread(work)
            _keep(path, fingerprint, result)
        return result


def _judging(say: Callable[[JobProgress], None]) -> Callable[[int, int], None]:
    return lambda done, total: say(Stage(stage="judging", done=done, total=total))


async def _in_thread(work: Callable[[], T]) -> T:
    """Compute in a thread, so that the loop stays free for signals, which `_alive` looks for."""
    return await asyncio.to_thread(work)


def _kept_choices(judge: evaluator.Evaluator, answers: evaluator.Answers) -> KeptChoices | None:
    if answers.scores is None:
        return None
    margins, ranks = judge.margins(answers), judge.ranks(answers)
    return KeptChoices(
        choices=judge.choices,
        gold=judge.gold,
        chosen=[judge.choices.index(made) for made in answers.chosen],
        margins=None if margins is None else _rounded(margins),
        ranks=None if ranks is None else _rounded(ranks),
    )


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]


def _keep(path: Path, fingerprint: str, result: CellResult | BaselineResult) -> None:
    write_durably_json(path, {"fingerprint": fingerprint, **msgspec.to_builtins(result)})


def _kept(path: Path, fingerprint: str, kind: type[K]) -> K | None:
    """Read a kept result; None: it is missing, of other settings or data, or lacks what a result has."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return msgspec.convert(found, kind) if found["fingerprint"] == fingerprint else None
    except (FileNotFoundError, ValueError, msgspec.ValidationError):
        return None


def _link_missing(source: Path, target: Path) -> None:
    """Link each file of a directory that another one lacks."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.glob("*"):
        if not (target / path.name).exists():
            _link(str(path), str(target / path.name))


def _link(source: str, target: str) -> None:
    """Link a file, which nobody changes in place, or copy it where the disk has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
