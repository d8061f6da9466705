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
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.ports.child import Child
from fedsoda_edge.ports.console import note
from fedsoda_edge.ports.disk import sha256_file
from fedsoda_edge.protocol import commands as cmd
from fedsoda_edge.protocol.manifest import parse_manifest
from fedsoda_edge.protocol.messages import Digest
from fedsoda_edge.protocol.needs import SampleSizes, plans, shape_of
from fedsoda_edge.protocol.template import TextTemplate
from fedsoda_edge.units import counted
from fedsoda_hub import events
from fedsoda_hub.demo import task
from fedsoda_hub.events import HubSay
from fedsoda_hub.local.processes import EdgeSay, federate
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.settings.run import read_settings

DemoReport = dict[str, Any]  # the report of `demo --json`: docs/guide.md (g6-json)
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
realign_every = 5

[public]
text = "public.txt"         # sampled from the model itself
sequences = {SEQUENCES}
length = {LENGTH}

[align]
border_map = "none"         # for one, the full LLM would have to write prompts first
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
    """Do the whole job, and return the report of `demo --json`: docs/guide.md (g6-json).

    Raises:
        UsageProblem: the directory holds something else, or cannot be made.
        WorkerFailed: the hub or an edge ended with a status other than 0.
    """
    started = time.monotonic()
    directory = directory.resolve()
    run_file = write_run(directory, rounds, seed)
    note(
        f"a hub, {len(task.OFFICES)} edges and {counted(rounds, 'round')} on this machine; all files are in {directory}"
    )
    prepared, ended, peaks = await _federate(directory, run_file, say)
    say(_progress("training each edge alone", 0, len(task.OFFICES)))
    alone = await _train_alone(directory, rounds, seed, say)
    report = _judge(directory, run_file, directory / "export", alone, say)
    seconds = {
        "prepare": prepared - started,
        "rounds": ended - prepared,
        "total": time.monotonic() - started,
    }
    report |= {
        "rounds": rounds,
        "edges": [
            {"examples": sum(office.messages.values()), "labels": dict(office.messages)} for office in task.OFFICES
        ],
        **peaks,
        "seconds": seconds,
    }
    return report


async def _federate(directory: Path, run_file: Path, say: HubSay) -> tuple[float, float, dict[str, int]]:
    """Run hub and edges to the end; return when the hub was prepared, when the run ended, and peak memory of the edges."""
    times: dict[type[events.HubEvent], float] = {}
    last: dict[str, dict[str, Any]] = {}

    def heard(event: events.HubEvent) -> None:
        times[type(event)] = time.monotonic()
        say(event)

    def keep_last(office: str) -> EdgeSay:
        return lambda event: last.update({office: event})

    await federate(
        read_settings(run_file),
        {office.name: directory / f"{office.name}.jsonl" for office in task.OFFICES},
        directory / "homes",
        asyncio.get_running_loop().create_future(),
        heard,
        keep_last,
        {"FEDSODA_THREADS": "1"},
    )
    peaks = {
        "edge_peak_rss_bytes": max(one["worker_peak_rss_bytes"] for one in last.values()),
        "agent_peak_rss_bytes": max(one["agent_peak_rss_bytes"] for one in last.values()),
    }
    return times[events.Listening], times[events.RunEnded], peaks


async def _train_alone(directory: Path, rounds: int, seed: int, say: HubSay) -> dict[str, Path]:
    """Train each edge alone for as many rounds and steps, with the same worker; return the files of their adapter LoRA."""
    done = 0

    async def one(office: str) -> Path:
        nonlocal done
        trained = await _alone(directory, office, rounds, seed)
        done += 1
        say(_progress("training each edge alone", done, len(task.OFFICES)))
        return trained

    paths = await asyncio.gather(*(one(office.name) for office in task.OFFICES))
    return dict(zip([office.name for office in task.OFFICES], paths, strict=True))


async def _alone(directory: Path, office: str, rounds: int, seed: int) -> Path:
    settings = read_settings(directory / "run.toml")
    manifest = RunDirectory(settings.run_dir).manifest
    work = directory / "alone" / office
    work.mkdir(parents=True)
    worker = Child("fedsoda_edge.worker", {"FEDSODA_THREADS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    try:
        opened = await worker.call(
            cmd.Open(
                store=str(directory / "homes" / office / "store"),
                manifest=Digest(sha256_file(manifest)),
                rows=cmd.Rows(
                    path=str(directory / f"{office}.jsonl"),
                    columns={},
                    prompt=task.PROMPT,
                    completion=task.COMPLETION,
                ),
                max_length=MAX_LENGTH,
            )
        )
        longest = SampleSizes(BATCH, opened.longest_ids, opened.longest_labels, opened.num_examples)
        shape = shape_of(parse_manifest(manifest.read_bytes()))
        memory = next(plans(shape, "cpu", longest))  # the fastest plan, since the model is small
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


def _judge(directory: Path, run_file: Path, export_to: Path, alone: dict[str, Path], say: HubSay) -> DemoReport:
    """Export the run, and judge what needs torch; this process holds no socket."""
    from fedsoda_edge.data.samples import SampleTokenizer
    from fedsoda_edge.model import delta
    from fedsoda_edge.model.bundle import Bundle
    from fedsoda_edge.model.source import Checkpoint
    from fedsoda_hub.evaluation.evaluator import Evaluator, JudgedModel
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
    evaluator = Evaluator(
        read_questions(settings.eval_data, settings.prompt, settings.completion),
        SampleTokenizer(MODEL / "tokenizer.json", source.fields.get("eos_token_id")),
    )

    def evaluating(done: int, total: int) -> None:
        say(_progress("evaluating", done, total))

    none: dict[str, Any] = {}
    accuracies = {}
    for office, path in alone.items():
        trained = delta.from_bytes(path.read_bytes(), spec.adapter)
        model = JudgedModel(source, range(plan.border), range(plan.border, plan.num_layers), spec, none, trained)
        accuracies[office] = evaluator.verdict(model, evaluating).accuracy
    with opened(of_run) as ledger:
        state = ledger.replay()
        status = run_status(settings.name, settings.rounds.count, ledger, state)
    assert state.evaluation is not None, "the run has evaluation data"

    def count(specs: Any) -> int:
        return sum(spec.shape[0] * spec.shape[1] for spec in specs)

    return {
        "run": str(run_file),
        "bundle": str(of_run.bundle),
        "export": str(export_to),
        "report": written.report,
        "model": str(MODEL),
        "eval_data": str(settings.eval_data),
        "accuracy": {**state.evaluation["accuracy"], "local_only": max(accuracies.values())},
        "local_only": accuracies,
        "public": {"text": str(settings.public_text), "sequences": SEQUENCES, "length": LENGTH},
        "public_kl": state.public_kl,
        "bytes": {
            "bundle": sum(file.bytes for file in bundle.manifest.files),
            "full_model": (MODEL / "model.safetensors").stat().st_size,
            **msgspec.structs.asdict(status.bytes),
        },
        "bits_per_parameter": bundle.manifest.bits_per_parameter,
        "lora_parameters": {"adapter": count(spec.adapter), "emulator": count(spec.emulator)},
    }


def print_summary(report: DemoReport) -> None:
    """Print the results of the demo as a table on stderr."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="FedSODA demo", show_header=False, title_justify="left")
    accuracy, size, kl = report["accuracy"], report["bytes"], report["public_kl"]
    labels = [f"{n} {k}" for edge in report["edges"] for k, n in Counter(edge["labels"]).most_common(1)]
    rows = [
        ("accuracy, full model untouched", f"{accuracy['full']:.1%}"),
        ("accuracy, best edge alone, plugged in", f"{accuracy['local_only']:.1%}"),
        ("accuracy, sub-LLM after the rounds", f"{accuracy['sub_llm']:.1%}"),
        ("accuracy, plug-in: full model + adapter LoRA", f"[bold]{accuracy['plug_in']:.1%}[/bold]"),
        ("public KL, pruned / NF4 / aligned", f"{kl['pruned']:.3f} / {kl['quantized']:.3f} / {kl['aligned']:.3f}"),
        ("rounds x edges", f"{report['rounds']} x {len(report['edges'])} (each holds mostly {', '.join(labels)})"),
        ("bundle / full model", f"{size['bundle'] / 1e6:.1f} MB / {size['full_model'] / 1e6:.1f} MB"),
        (
            "bytes per edge and round, up / down",
            f"{size['up_per_edge_round'] / 1e3:.1f} kB / {size['down_per_edge_round'] / 1e3:.1f} kB",
        ),
        (
            "peak memory, agent (holds the socket) / worker (holds torch)",
            f"{report['agent_peak_rss_bytes'] / 1e6:.0f} MB / {report['edge_peak_rss_bytes'] / 1e6:.0f} MB",
        ),
        (
            "seconds, prepare / rounds / total",
            " / ".join(f"{report['seconds'][k]:.0f}" for k in ("prepare", "rounds", "total")),
        ),
    ]
    for row in rows:
        table.add_row(*row)
    Console(stderr=True).print(table)
    note(f"PEFT adapter for the full model: {report['export']}\nwhat happened, in pictures: {report['report']}")
