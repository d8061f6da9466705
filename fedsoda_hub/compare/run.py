"""Run the cells of a comparison, judge them, and go on where a call was stopped.

Everything lies below one directory: `prepared/` (full LLM to bundle, once for all cells that share it), `memory/` or
`network/` with a directory per cell, `judged/` for what is not federated. A result is kept with the fingerprint of the
settings and data that it is of. What results mean together is `summary.py`'s business.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch

from fedsoda_edge.data.local_data import LocalData, remedy_for_columns
from fedsoda_edge.errors import DataProblem
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.ports.console import Terminated
from fedsoda_edge.ports.disk import sha256_file, write_durably, write_durably_json
from fedsoda_edge.ports.system import on_signal_in
from fedsoda_edge.protocol.manifest import LayerPlan, LoRASpec
from fedsoda_hub import events as told
from fedsoda_hub.compare.central import train_central
from fedsoda_hub.compare.pictures import write_pages
from fedsoda_hub.compare.settings import Cell, Comparison
from fedsoda_hub.compare.splits import choose, deal
from fedsoda_hub.compare.summary import summarise
from fedsoda_hub.evaluation.evaluator import Evaluator, Judged
from fedsoda_hub.evaluation.export import RunJudge
from fedsoda_hub.events import Say
from fedsoda_hub.federation.records import Prepared, RoundClosed
from fedsoda_hub.local import in_process, processes
from fedsoda_hub.plan import predict
from fedsoda_hub.preparation.full_llm import open_full_llm
from fedsoda_hub.preparation.prepare import Preparation, made_of
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import opened
from fedsoda_hub.settings.run import RunSettings
from fedsoda_hub.settings.toml import write_toml

Result = dict[str, Any]
T = TypeVar("T")
MAX_LOSS = 1e4  # nats; of a model that says no number


class Stopped(Exception):
    """A signal came; what was done is kept."""


def run_comparison(comparison: Comparison, out: Path, transport: str, say: Say) -> Result:
    """Do what is not done; the report of `compare --json`, which is also written to `out`, with its pages and pictures.

    Raises:
        KeyboardInterrupt, Terminated: SIGINT or SIGTERM came; what was done is kept. UsageProblem, DataProblem: rows and splits do not fit.
    """
    threads = os.environ.get("FEDSODA_THREADS")
    if threads:
        torch.set_num_threads(int(threads))
    run = _Run(comparison, out, transport, say)
    try:
        results = asyncio.run(run.results())
    except Stopped:
        raise KeyboardInterrupt if run.signal == "SIGINT" else Terminated from None
    report = summarise(comparison, results, transport)
    report |= write_pages(report, run.plans(), run.out)
    write_durably_json(run.out / "compare.json", report)
    return {**report, "results": str(run.out / "compare.json")}


class _Run:
    def __init__(self, comparison: Comparison, out: Path, transport: str, say: Say) -> None:
        self.comparison, self.transport, self.out, self._say = comparison, transport, out.resolve(), say
        self._stop: asyncio.Future[str]
        self._judges: dict[str, RunJudge] = {}
        self._revisions: dict[str, str] = {}
        self._done = self._total = 0
        self._what = self.signal = ""
        self._read_data()

    # --- data ------------------------------------------------------------------------------------------------

    def _read_data(self) -> None:
        c, first = self.comparison.compare, self.comparison.settings[self.comparison.baseline_of]
        self._rows: list[dict[str, Any]] = []
        self._files: list[str] = []
        for name in c.data:
            data = LocalData(self.comparison.path.parent / name)
            with remedy_for_columns("rename one in the file, or use another in [task] prompt and completion"):
                data.check(first.prompt, first.completion)
            self._rows += [row for _, row in data.rows()]
            self._files += [name] * (len(self._rows) - len(self._files))
        assert first.eval_data is not None, "settings.py refuses a comparison without"
        asked = [row for _, row in LocalData(first.eval_data).rows()]
        chosen = sorted(choose(len(asked), c.eval_rows, 0))
        self.out.mkdir(parents=True, exist_ok=True)
        self._questions = _write_rows(self.out / "eval.jsonl", [asked[row] for row in chosen])
        self.parts = {(split, seed): self._deal(split, seed) for split in c.splits for seed in c.seeds}

    def _deal(self, split: str, seed: int) -> list[list[int]]:
        c = self.comparison.compare
        chosen = choose(len(self._rows), c.rows, seed)
        return deal(split, chosen, self._values(split), edges=c.edges, least=c.least_rows, seed=seed)

    def _values(self, split: str) -> list[str]:
        """Of each row what the split deals by."""
        if split == "files":
            return self._files
        column = split.removeprefix("users:") if split.startswith("users:") else self.comparison.compare.label
        if column is None:
            completion = self.comparison.settings[self.comparison.baseline_of].completion
            return [completion.render(row) for row in self._rows]
        missing = next((at for at, row in enumerate(self._rows) if column not in row), None)
        if missing is not None:
            raise DataProblem(
                f"split {split} asks for the column {column!r}; row {missing + 1} of [compare] data has "
                f"{', '.join(sorted(self._rows[missing]))}"
            )
        return [str(row[column]) for row in self._rows]

    def dealt(self, split: str, seed: int) -> dict[str, Result]:
        """Of each edge its number of rows, and how many of each label where there are few."""
        completion = self.comparison.settings[self.comparison.baseline_of].completion
        label = self.comparison.compare.label
        found = {}
        for name, part in self._named(split, seed).items():
            rows = [self._rows[row] for row in part]
            labels = Counter(str(row[label]) if label else completion.render(row) for row in rows)
            found[name] = {"rows": len(part), "labels": dict(sorted(labels.items())) if len(labels) <= 20 else {}}
        return found

    def _named(self, split: str, seed: int) -> dict[str, list[int]]:
        parts = self.parts[split, seed]
        return {f"edge-{number:0{len(str(len(parts) - 1))}d}": part for number, part in enumerate(parts)}

    # --- all of it -------------------------------------------------------------------------------------------

    async def results(self) -> dict[Cell | str, Result]:
        """Of all cells, and by name of what is not federated."""
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
                for alone in range(len(self.parts[split, seed]))
            ]
        rates = c.central_learning_rates or [base.local.learning_rate]
        central = [(s, seed) for seed in c.seeds for s in c.splits] if "central" in c.baselines else []
        self._total = sum(self._units(cell) for cell in cells) + len(central) * len(rates) * base.rounds.count + 1
        results: dict[Cell | str, Result] = {}
        for cell in cells:
            self._what = str(cell)
            results[cell] = await self._cell(cell)
        for split, seed in central:
            self._what = f"central, {split}, seed {seed}"
            results[f"central {split} {seed}"] = await self._central(split, seed, rates)
        if "untouched" in c.baselines:
            self._what = "untouched"
            results["untouched"] = await self._untouched()
        self._advance(self._total - self._done)
        for split, seed in self.parts:
            results[f"dealt {split} {seed}"] = self.dealt(split, seed)
        return results

    def plans(self) -> dict[str, LayerPlan]:
        """Of each variant that prunes, for the first seed. One of those that were pruned alike."""
        found: dict[str, LayerPlan] = {}
        for cell in list(self.comparison.cells())[: len(self.comparison.settings)]:
            plan = Bundle.open(RunDirectory(self._settings_of(cell, 1).run_dir).bundle).plan
            if plan.distances and plan not in found.values():
                found[cell.variant] = plan
        return found

    def _units(self, cell: Cell) -> int:
        """Of progress: its rounds, and judging it."""
        return self.comparison.settings[cell.variant].rounds.count + 1

    def _advance(self, units: int = 1) -> None:
        self._done += units
        self._say(
            told.StageProgress(job="compare", stage="comparing", detail=self._what, done=self._done, total=self._total)
        )

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """What computes here; the loop goes on and hears signals, which `_alive` looks for."""
        return await asyncio.to_thread(work)

    def _alive(self, *_: object) -> None:
        """Raises Stopped where a signal came: called wherever work in a thread says how far it is."""
        if self._stop.done():
            raise Stopped

    # --- a cell ------------------------------------------------------------------------------------------------

    async def _cell(self, cell: Cell) -> Result:
        """Run and judge one cell, unless it is done."""
        names = self._named(cell.split, cell.seed)
        if cell.alone is not None:
            names = dict([list(names.items())[cell.alone]])
        settings = self._settings_of(cell, len(names))
        directory = settings.directory
        fingerprint = await self._in_thread(lambda: self._fingerprint(settings, names))
        done, before = directory / "result.json", self._done
        result = _kept(done, fingerprint)
        if result is None:
            started = time.monotonic()
            # A run knows its model by its place: what was begun with another copy of the same model is begun anew.
            mark, begun = directory / "fingerprint", f"{fingerprint} {settings.model}"
            if not mark.exists() or mark.read_text() != begun:
                shutil.rmtree(directory, ignore_errors=True)
            self._alive()
            await self._in_thread(lambda: self._prepare(settings))
            self._lay_out(settings, names)
            write_durably(mark, begun.encode())
            await self._federate(settings, names)
            if self._stop.done():
                raise Stopped
            result = await self._in_thread(lambda: self._result(cell, settings))
            write_durably_json(done, {"fingerprint": fingerprint, **result})
            shutil.rmtree(directory / "homes", ignore_errors=True)  # a bundle and border states of each edge
            accuracy, seconds = result["rounds"][-1]["accuracy"], time.monotonic() - started
            self._say(told.CellDone(cell=str(cell), accuracy=accuracy, seconds=seconds))
        self._advance(before + self._units(cell) - self._done)
        return result

    def _settings_of(self, cell: Cell, num_edges: int) -> RunSettings:
        """Those of the cell's own run.toml. The hub is not asked to judge: questions are read once for all cells."""
        variant, replace = self.comparison.settings[cell.variant], msgspec.structs.replace
        return replace(
            variant,
            name="run",
            seed=cell.seed,
            rounds=replace(variant.rounds, min_edges=num_edges),
            task=replace(variant.task, eval_data=None),
            path=str(self.out / self.transport / cell.directory / "run.toml"),
        )

    def _fingerprint(self, settings: RunSettings, names: Mapping[str, Sequence[int]]) -> str:
        """Of all that a result depends on."""
        if settings.model not in self._revisions:
            self._revisions[settings.model] = open_full_llm(settings).revision
        values = msgspec.to_builtins(msgspec.structs.replace(settings, path="", model=""))
        rows = {name: [self._rows[row] for row in part] for name, part in names.items()}
        public = [sha256_file(path) for path in (settings.public_text, settings.like_task) if path is not None]
        parts = [values, rows, self._questions, public, self._revisions[settings.model]]
        parts.append(self.comparison.compare.eval_every)
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()

    def _prepared(self, settings: RunSettings) -> RunSettings:
        """The run that is only prepared, the same for all whose bundles are."""
        shared = [settings.seed, settings.model, settings.device, settings.dtype]
        key = hashlib.sha256(json.dumps([shared, made_of(settings), settings.task.prompt]).encode()).hexdigest()[:16]
        return msgspec.structs.replace(settings, path=str(self.out / "prepared" / key / "run.toml"))

    def _prepare(self, settings: RunSettings) -> None:
        """Full LLM to bundle, and a copy of that for the cell: a realignment needs what preparation left."""
        prepared = self._prepared(settings)
        Preparation(prepared, self._alive).run()
        if settings.run_dir.exists():
            return
        part = settings.run_dir.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(prepared.run_dir, part, copy_function=_link)
        os.replace(part, settings.run_dir)

    def _lay_out(self, settings: RunSettings, names: Mapping[str, Sequence[int]]) -> None:
        write_durably(Path(settings.path), write_toml(settings).encode())
        for name, part in names.items():
            _write_rows(settings.directory / "data" / f"{name}.jsonl", [self._rows[row] for row in part])

    async def _federate(self, settings: RunSettings, names: Mapping[str, Sequence[int]]) -> None:
        edges = {name: settings.directory / "data" / f"{name}.jsonl" for name in names}
        homes = settings.directory / "homes"

        def heard(event: told.Told) -> None:
            if isinstance(event, told.RoundClosed):
                self._advance()

        with contextlib.ExitStack() as files:
            (settings.directory / "events").mkdir(exist_ok=True)
            logs = {
                name: files.enter_context((settings.directory / "events" / f"{name}.jsonl").open("a", buffering=1))
                for name in names
            }

            def log_of(name: str) -> in_process.EdgeSay:
                return lambda event: print(json.dumps(event), file=logs[name])

            if self.transport == "memory":
                await in_process.federate(settings, edges, homes, self._stop, heard, log_of)
            else:
                given = {name: os.environ[name] for name in ("FEDSODA_THREADS",) if name in os.environ}
                await processes.federate(settings, edges, homes, self._stop, heard, log_of, given, given)

    # --- what came of it -----------------------------------------------------------------------------------------

    def _result(self, cell: Cell, settings: RunSettings) -> Result:
        with opened(RunDirectory(settings.run_dir)) as ledger:
            records, traffic, state = ledger.records(), ledger.traffic(), ledger.replay()
        largest = state.largest
        closed = [record for record in records if isinstance(record, RoundClosed)]
        judge, every = self._judge(settings), self.comparison.compare.eval_every
        rounds: list[Result] = []
        for record in closed:
            is_last = record.round == settings.rounds.count
            answered: Result | None = None
            if is_last or (every and record.round % every == 0 and cell.alone is None):
                self._alive()
                models = judge.models(record.master, largest.emulator.digest, largest.manifest)
                answered = _answered(judge.evaluator, models["plug_in"])
            sizes = [(up, down) for _, number, up, down in traffic if number == record.round]
            rounds.append(
                {
                    "round": record.round,
                    "master": record.master,
                    "accuracy": None if answered is None else _share(answered),
                    "bytes_up": sum(up for up, _ in sizes),
                    "bytes_down": sum(down for _, down in sizes),
                }
            )
        result: Result = {
            "cell": str(cell),
            "edges": settings.rounds.min_edges,
            "rounds": rounds,
            "answered": {"plug_in": answered},
        }
        if cell.alone is None:
            result["answered"]["sub_llm"] = _answered(judge.evaluator, models["sub_llm"])
            result["public_kl"] = next(record.public_kl for record in records if isinstance(record, Prepared))
            result["costs"] = self._costs(settings)
        judge.forget(models)
        return result

    def _judge(self, settings: RunSettings) -> RunJudge:
        """Questions and the full model's border states are shared by all cells that ask alike."""
        seed = settings.seed if settings.task.shots else 0
        about = [settings.model, settings.dtype, settings.device, msgspec.to_builtins(settings.task), seed]
        key = json.dumps(about)
        if key not in self._judges:
            self._judges[key] = RunJudge(settings, self.out / "eval.jsonl", self._alive)
        return self._judges[key].of(settings.run_dir)

    def _costs(self, settings: RunSettings) -> Result:
        """What an edge pays: of the bundle, by the formulas of `plan`, and as it was seen."""
        bundle, source = Bundle.open(RunDirectory(settings.run_dir).bundle), open_full_llm(settings)
        dtype = str(source.dtype).removeprefix("torch.")
        plan = predict(source.family, source.fields, dtype, bundle.plan, settings)
        trained: dict[tuple[str, int], Result] = {}
        planned, measured = [], []
        for path in sorted((settings.directory / "events").iterdir()):
            for event in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
                if event.get("event") == "trained":
                    trained[path.stem, event["round"]] = event
                elif event.get("event") == "memory":
                    planned.append(next(part["bytes"] for part in event["parts"] if part["part"] == "peak"))
                elif event.get("worker_peak_rss_bytes"):
                    measured.append(event["worker_peak_rss_bytes"])
        flop = plan["ours"]["gflop_per_token"]
        tokens = _mean([event["num_tokens"] for event in trained.values()])
        return {
            "trainable": _count(bundle.manifest.lora),
            "parameters_per_round": plan["paper"]["parameters_per_round"],
            "model_bytes": sum(file.bytes for file in bundle.manifest.files),
            "edge_memory_bytes": max(planned),
            "edge_peak_rss_bytes": max(measured, default=None),
            "gflop_per_edge_round": flop["cached"] * tokens,
            "seconds_per_edge_round": _mean([event["seconds"] for event in trained.values()]),
        }

    # --- what is not federated -------------------------------------------------------------------------------------

    async def _untouched(self) -> Result:
        first = Cell(self.comparison.baseline_of, self.comparison.compare.splits[0], self.comparison.compare.seeds[0])
        settings = self._prepared(self._settings_of(first, 1))

        def judged() -> Result:
            Preparation(settings, self._alive).run()
            judge = self._judge(settings)
            return {"answered": _answered(judge.evaluator, judge.judged({}, {})["full"])}

        return await self._once("untouched", self._fingerprint(settings, {}), judged)

    async def _central(self, split: str, seed: int, rates: Sequence[float]) -> Result:
        """Answers after central training with each rate; the best by these very answers: a ceiling, not a rival."""
        parts = self.parts[split, seed]
        settings = self._settings_of(Cell(self.comparison.baseline_of, split, seed), len(parts))
        rows = sorted(row for part in parts for row in part)
        prepared, before = self._prepared(settings), self._done

        def said() -> None:
            self._alive()
            self._advance()

        def judged() -> Result:
            Preparation(prepared, self._alive).run()
            data = self.out / "judged" / "central.jsonl"
            _write_rows(data, [self._rows[row] for row in rows])
            trained = train_central(prepared, data, [len(part) for part in parts], rates, said)
            judge = self._judge(prepared)
            answered = {
                rate: _answered(judge.evaluator, judge.judged(adapter, {})["plug_in"])
                for rate, adapter in trained.items()
            }
            best = max(rates, key=lambda rate: _share(answered[rate]))
            return {"answered": answered[best], "learning_rate": best}

        about = json.dumps([list(rates), sorted(map(len, parts))])
        fingerprint = self._fingerprint(settings, {about: rows})
        result = await self._once(f"central-{fingerprint[:16]}", fingerprint, judged)
        self._advance(before + len(rates) * settings.rounds.count - self._done)
        return result

    async def _once(self, name: str, fingerprint: str, work: Callable[[], Result]) -> Result:
        path = self.out / "judged" / f"{name}.json"
        result = _kept(path, fingerprint)
        if result is None:
            self._alive()
            result = await self._in_thread(work)
            write_durably_json(path, {"fingerprint": fingerprint, **result})
        return result


def _kept(path: Path, fingerprint: str) -> Result | None:
    """A result that is there and of these settings and data."""
    try:
        found: Result = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if found.pop("fingerprint") == fingerprint else None


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """JSON Lines; their sha256."""
    data = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows).encode()
    write_durably(path, data)
    return hashlib.sha256(data).hexdigest()


def _link(source: str, target: str) -> None:
    """A second name of the same file, which nobody changes in place; a copy where the disk knows no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _answered(evaluator: Evaluator, model: Judged) -> Result:
    """right: a 1 or 0 for each question. losses: of each, as `Answers` has them; JSON has no NaN."""
    answers = evaluator.answers(model)
    losses = answers.losses.nan_to_num(MAX_LOSS).clamp(max=MAX_LOSS)
    return {
        "right": "".join("01"[right] for right in evaluator.right(answers)),
        "losses": [round(loss, 6) for loss in losses.tolist()],
    }


def _share(answered: Result) -> float:
    right: str = answered["right"]
    return right.count("1") / len(right)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _count(spec: LoRASpec) -> int:
    return sum(one.shape[0] * one.shape[1] for one in spec.adapter)
