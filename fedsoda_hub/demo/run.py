"""Run the demo: the whole job on this machine, offline, with the real commands as processes.

It starts `fedsoda-hub serve` and three `fedsoda-edge join`, follows their events, exports, and also judges each
edge trained alone. The data is `task.py`'s; the rounds are the daemon's.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from fedsoda_edge import events as edge_events
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.join.trainer import WORKER_MODULE, worker_environment
from fedsoda_edge.ports.child import Child
from fedsoda_edge.ports.confine import Reach
from fedsoda_edge.ports.console import note
from fedsoda_edge.ports.disk import sha256_file
from fedsoda_edge.protocol import commands as cmd
from fedsoda_edge.protocol.manifest import TensorSpec, parse_manifest
from fedsoda_edge.protocol.messages import Digest
from fedsoda_edge.protocol.needs import SampleSizes, plans, shape_of
from fedsoda_edge.protocol.template import TextTemplate
from fedsoda_edge.units import counted
from fedsoda_hub import events
from fedsoda_hub.demo import task
from fedsoda_hub.demo.report import DemoBytes, DemoReport, DemoSeconds, EdgeData, JudgedDemo, LoRAParameters, PublicText
from fedsoda_hub.events import HubSay
from fedsoda_hub.local.processes import federate
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.settings.run import read_settings

HERE = Path(__file__).resolve().parent
MODEL = HERE / "model"
STEPS, BATCH, LEARNING_RATE, MAX_LENGTH = 40, 8, 2e-3, 96
SEQUENCES, LENGTH = 96, 128
MARK = ".fedsoda-demo"


def write_run(directory: Path, rounds: int, seed: int) -> Path:
    """Write RUN.toml, the edges' private data and the evaluation rows, and return the path of RUN.toml.

    An earlier demo in the directory is replaced; a directory that a demo did not make is never touched.

    Raises:
        UsageProblem: the directory holds something else, or cannot be made.
    """
    try:
        if directory.is_dir() and any(directory.iterdir()) and not (directory / MARK).exists():
            raise UsageProblem(
                f"{directory} is not empty and was not made by a demo; name another directory with --dir"
            )
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        (directory / MARK).touch()
    except OSError as error:
        raise UsageProblem(
            f"--dir {directory} cannot be made ({error.strerror}); name a directory that you may write to"
        ) from error
    for number, office in enumerate(task.OFFICES):
        write_rows(directory / f"{office.name}.jsonl", task.training(number, seed))
    prompt, completion = TextTemplate(task.PROMPT), TextTemplate(task.COMPLETION)
    write_rows(
        directory / "eval.jsonl",
        [{"prompt": prompt.render(row), "completion": completion.render(row)} for row in task.evaluation(seed)],
    )
    shutil.copyfile(HERE / "public.txt", directory / "public.txt")
    run_file = directory / "run.toml"
    run_file.write_text(
        f"""name = "demo"
model = {json.dumps(str(MODEL))}
seed = {seed}

[method]                    # the paper's configuration
adapter_layers = 3
layers_per_group = 3
groups = 4
distance = "angular"
realign_every = 5

[public]
text = "public.txt"         # sampled from the model itself
sequences = {SEQUENCES}
length = {LENGTH}

[align]
heal = false                # like the border map, it wants prompts that the full LLM would have to write first
border_map = "none"
steps = 40
realign_steps = 12
learning_rate = 3e-3

[rounds]
count = {rounds}
min_edges = {len(task.OFFICES)}
quorum = 1.0

[local]
epochs = 100
max_steps = {STEPS}
batch_size = {BATCH}
learning_rate = {LEARNING_RATE}
max_length = {MAX_LENGTH}

[task]
prompt = {json.dumps(task.PROMPT)}
completion = {json.dumps(task.COMPLETION)}
eval_data = "eval.jsonl"

[listen]
port = 0                    # any free one
""",
        encoding="utf-8",
    )
    return run_file


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


async def run_demo(directory: Path, *, rounds: int, seed: int, say: HubSay) -> DemoReport:
    """Do the whole job, and return what it came to."""
    started = time.monotonic()
    directory = directory.resolve()
    run_file = write_run(directory, rounds, seed)
    note(
        f"a hub, {len(task.OFFICES)} edges and {counted(rounds, 'round')} on this machine; all files are in {directory}"
    )
    federated = await _federate(directory, run_file, say)
    say(_progress("training each edge alone", 0, len(task.OFFICES)))
    alone = await _train_alone(directory, rounds, seed, say)
    judged = _judge(directory, run_file, directory / "export", alone, say)
    return DemoReport(
        **msgspec.structs.asdict(judged),
        rounds=rounds,
        edges=[
            EdgeData(examples=sum(office.messages.values()), labels=dict(office.messages)) for office in task.OFFICES
        ],
        edge_peak_rss_bytes=max(report.worker_peak_rss_bytes for report in federated.reports),
        agent_peak_rss_bytes=max(report.agent_peak_rss_bytes for report in federated.reports),
        seconds=DemoSeconds(
            prepare=federated.prepared_at - started,
            rounds=federated.ended_at - federated.prepared_at,
            total=time.monotonic() - started,
        ),
    )


@dataclass(frozen=True)
class _Federated:
    """The times at which the run was prepared and ended, in monotonic seconds, and what each edge reported at its end."""

    prepared_at: float
    ended_at: float
    reports: Sequence[edge_events.JoinEnded]


async def _federate(directory: Path, run_file: Path, say: HubSay) -> _Federated:
    """Run hub and edges to the end."""
    times: dict[type[events.HubEvent], float] = {}
    reports: list[edge_events.JoinEnded] = []

    def heard(event: events.HubEvent) -> None:
        times[type(event)] = time.monotonic()
        say(event)
        if isinstance(event, events.Listening):
            note(f"watch it in a browser while it runs: {event.url}/")

    def keep_report(event: edge_events.AnyEvent | edge_events.JoinEnded) -> None:
        if isinstance(event, edge_events.JoinEnded):
            reports.append(event)

    await federate(
        read_settings(run_file),
        {office.name: directory / f"{office.name}.jsonl" for office in task.OFFICES},
        directory / "homes",
        asyncio.get_running_loop().create_future(),
        heard,
        lambda _: keep_report,
        {"FEDSODA_THREADS": "1"},
    )
    began_at = max(times[events.Listening], times.get(events.RunPrepared, 0.0))  # edges that came before that waited
    return _Federated(began_at, times[events.RunEnded], reports)


async def _train_alone(directory: Path, rounds: int, seed: int, say: HubSay) -> dict[str, Path]:
    """Train each edge alone for as many rounds and steps, with the same worker; return the files of their adapter LoRA."""
    done = 0

    async def one(office: str) -> Path:
        nonlocal done
        trained = await train_alone_at(directory, office, rounds, seed)
        done += 1
        say(_progress("training each edge alone", done, len(task.OFFICES)))
        return trained

    paths = await asyncio.gather(*(one(office.name) for office in task.OFFICES))
    return dict(zip([office.name for office in task.OFFICES], paths, strict=True))


async def train_alone_at(directory: Path, office: str, rounds: int, seed: int) -> Path:
    settings = read_settings(directory / "run.toml")
    manifest = RunDirectory(settings.run_dir).manifest
    work = directory / "alone" / office
    work.mkdir(parents=True)
    store, data = directory / "homes" / office / "store", directory / f"{office}.jsonl"
    reach = Reach(
        reads=(str(store.absolute()), str(data.absolute())), writes=(str(work.absolute()),), may_use_gpu=False
    )
    worker = Child(WORKER_MODULE, worker_environment(work.absolute(), reach, threads=1))
    try:
        opened = await worker.call(
            cmd.Open(
                store=str(store),
                manifest=Digest(sha256_file(manifest)),
                rows=cmd.Rows(
                    path=str(data),
                    columns={},
                    prompt=task.PROMPT,
                    completion=task.COMPLETION,
                ),
                max_length=MAX_LENGTH,
            )
        )
        longest = SampleSizes(BATCH, opened.longest_ids, opened.longest_labels, opened.num_examples)
        shape = shape_of(parse_manifest(manifest.read_bytes()))
        memory = next(plans(shape, "cpu", longest, opened.process_bytes))  # the fastest plan, since the model is small
        cache = cmd.BorderCache(directory=str(work / "border"), key=os.urandom(32).hex(), dtype="bf16", max_bytes=None)
        await worker.call(cmd.Sweep(emulator=None, cache=cache, memory=memory, room=sys.maxsize))
        view: Path | None = None
        residual: Path | None = None
        codec = settings.wire.codec
        for number in range(1, rounds + 1):
            update, left = work / "update", work / f"residual.{number}"
            held = None if view is None else str(view)
            await worker.call(
                cmd.Train(
                    view=held,
                    settings=settings.local,
                    seed=seed,
                    round=number,
                    edge=office,
                    codec=codec,
                    trains="both",
                    residual=None if residual is None else str(residual),
                    update=str(update),
                    new_residual=str(left),
                    checkpoint=str(work / "checkpoint"),
                )
            )
            out = work / f"view.{number}"
            await worker.call(
                cmd.Advance(which="adapter", view=held, delta=str(update), moved="both", codec=codec, out=str(out))
            )
            view, residual = out, left
        assert view is not None
        return view
    finally:
        await worker.close()


def _progress(stage: str, done: int, total: int) -> events.StageProgress:
    return events.StageProgress(job="demo", stage=stage, done=done, total=total)


def _judge(directory: Path, run_file: Path, export_to: Path, alone: dict[str, Path], say: HubSay) -> JudgedDemo:
    """Export the run, and judge what only torch can; this process holds no socket."""
    from fedsoda_edge.data.samples import SampleTokenizer
    from fedsoda_edge.model import delta
    from fedsoda_edge.model.bundle import Bundle
    from fedsoda_edge.model.source import Checkpoint
    from fedsoda_hub.evaluation import evaluator as judging
    from fedsoda_hub.evaluation.export import export
    from fedsoda_hub.evaluation.questions import read_questions
    from fedsoda_hub.report.page import write_report
    from fedsoda_hub.run.ledger import opened
    from fedsoda_hub.run.status import run_status

    settings = read_settings(run_file)
    of_run = RunDirectory(settings.run_dir)
    export(settings, export_to)
    written = write_report(settings, directory / "report")
    bundle = Bundle.open(of_run.bundle)
    spec, plan = bundle.manifest.lora, bundle.plan
    source = Checkpoint.open(str(MODEL))
    assert settings.eval_data is not None
    evaluator = judging.Evaluator(
        read_questions(settings.eval_data, settings.prompt, settings.completion),
        SampleTokenizer(MODEL / "tokenizer.json", source.fields.get("eos_token_id")),
    )

    def evaluating(done: int, total: int) -> None:
        say(_progress("evaluating", done, total))

    # One object for all: what it says below the border is computed once.
    full = judging.JudgedModel(source, range(plan.border), range(plan.border, plan.num_layers), spec, {}, {})
    accuracies = {}
    for office, path in alone.items():
        trained = delta.from_bytes(path.read_bytes(), spec.adapter)
        accuracies[office] = evaluator.verdict(replace(full, adapter_lora=trained), evaluating).accuracy
    with opened(of_run) as ledger:
        state = ledger.replay()
        status = run_status(settings.name, settings.rounds.count, ledger.traffic(), state)
    assert state.evaluation is not None, "the run has evaluation data"

    def count(specs: Iterable[TensorSpec]) -> int:
        return sum(spec.shape[0] * spec.shape[1] for spec in specs)

    return JudgedDemo(
        run=str(run_file),
        bundle=str(of_run.bundle),
        export=str(export_to),
        report=written.report,
        model=str(MODEL),
        eval_data=str(settings.eval_data),
        accuracy={**state.evaluation.accuracy, "local_only": max(accuracies.values())},
        local_only=accuracies,
        public=PublicText(text=str(settings.public_text), sequences=SEQUENCES, length=LENGTH),
        public_kl=state.public_kl,
        bytes=DemoBytes(
            bundle=sum(file.bytes for file in bundle.manifest.files),
            full_model=(MODEL / "model.safetensors").stat().st_size,
            up_per_edge_round=status.bytes.up_per_edge_round,
            down_per_edge_round=status.bytes.down_per_edge_round,
        ),
        bits_per_parameter=bundle.manifest.bits_per_parameter,
        lora_parameters=LoRAParameters(adapter=count(spec.adapter), emulator=count(spec.emulator)),
    )
