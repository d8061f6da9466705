"""Parse the command line of fedsoda-hub, call, print. Deciding is left to the rooms below."""

from __future__ import annotations

import asyncio
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from fedsoda_edge.ports.console import EXIT_HELP, finish, is_asked, note, reporting, working
from fedsoda_edge.ports.console import run as run_command
from fedsoda_edge.ports.log_lines import LogChoices
from fedsoda_edge.ports.log_options import LogFileOption, LogFormatOption, LogKeepOption, LogSizeOption
from fedsoda_edge.ports.program import Program
from fedsoda_edge.units import human_bytes
from fedsoda_hub.cli import steering
from fedsoda_hub.cli.bundle_command import bundle
from fedsoda_hub.cli.config_command import config
from fedsoda_hub.cli.extra import check_extra
from fedsoda_hub.cli.found import status_of_run
from fedsoda_hub.cli.guests import invite, rebind, revoke
from fedsoda_hub.cli.import_command import import_model
from fedsoda_hub.cli.notify_command import notify
from fedsoda_hub.cli.of_run import reset, token_app
from fedsoda_hub.cli.options import OUTPUT, CompareCommand, Debug, Json, JsonLines, RunFile, TensorBoard, setting
from fedsoda_hub.cli.service_command import service_app
from fedsoda_hub.settings.rates import Rates

if TYPE_CHECKING:
    from fedsoda_hub.run.edges import KnownEdge


class HubProgram(Program):
    """The commands of fedsoda-hub."""

    package = "fedsoda_hub"


app = typer.Typer(cls=HubProgram, epilog=EXIT_HELP, no_args_is_help=True)
app.add_typer(token_app, name="token")
app.add_typer(service_app, name="service")
app.command(epilog="Example: fedsoda-hub invite triage.toml --name clinic-7\n\n" + EXIT_HELP)(invite)
app.command(epilog="Example: fedsoda-hub revoke triage.toml clinic-7")(revoke)
app.command(epilog="Example: fedsoda-hub rebind triage.toml clinic-7")(rebind)
app.command("open", epilog="Example: fedsoda-hub open triage.toml")(steering.open_page)
app.command(epilog="Example: fedsoda-hub pause triage.toml")(steering.pause)
app.command(epilog="Example: fedsoda-hub resume triage.toml")(steering.resume)
app.command(epilog="Example: fedsoda-hub finish triage.toml")(steering.finish)
app.command(epilog="Example: fedsoda-hub change triage.toml --deadline 30m")(steering.change)
app.command(epilog="Example: fedsoda-hub reset triage.toml --yes\n\n" + EXIT_HELP)(reset)


@app.callback()
def _begin() -> None:
    """Prepare, serve and evaluate a federated run."""
    with reporting(is_asked("--json"), is_asked("--jsonl"), False):
        check_extra()


class CompareTransport(StrEnum):
    """The ways in which edges of a comparison reach their hub."""

    memory = "memory"
    network = "network"


@app.command(epilog="Example: fedsoda-hub demo --rounds 4\n\n" + EXIT_HELP)
def demo(
    directory: Annotated[
        Path,
        typer.Option(
            "--dir", envvar="FEDSODA_DEMO_DIR", help="directory of the demo; an earlier demo there is replaced"
        ),
    ] = Path("fedsoda-demo"),
    rounds: Annotated[int, setting("[rounds] count", envvar="FEDSODA_DEMO_ROUNDS", show_default=True)] = 6,
    seed: Annotated[int, typer.Option(envvar="FEDSODA_DEMO_SEED", help="seed of data and training")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Do the whole job on this machine, offline: hub, three edges, all rounds, export, evaluation."""
    with reporting(as_json, False, debug), working("running the demo"):
        from fedsoda_hub.cli.display import HubDisplay
        from fedsoda_hub.demo.report import print_summary
        from fedsoda_hub.demo.run import run_demo

        with HubDisplay(jsonl=False) as display:
            report = asyncio.run(run_demo(directory, rounds=rounds, seed=seed, say=display.say))
        print_summary(report)
        finish({"status": "ok", **msgspec.to_builtins(report)}, as_json, False)


app.command(epilog="Example: fedsoda-hub config triage.toml")(config)
app.command(epilog="Example: fedsoda-hub bundle triage.toml --to cdn\n\n" + EXIT_HELP)(bundle)
app.command(epilog="Example: fedsoda-hub notify triage.toml\n\n" + EXIT_HELP)(notify)
app.command("import", epilog="Example: fedsoda-hub import tiny.Q4_K_M.gguf --to tiny")(import_model)


@app.command(epilog="Example: fedsoda-hub plan config.json --groups 4 --layers-per-group 3\n\n" + EXIT_HELP)
def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="a model directory or a bare config.json; with --measure a RUN.toml")
    ],
    method: Annotated[str | None, setting("[method] name", envvar="FEDSODA_METHOD")] = None,
    layers_per_group: Annotated[int | None, setting("[method] layers_per_group")] = None,
    groups: Annotated[int | None, setting("[method] groups")] = None,
    classes: Annotated[list[int] | None, setting("[method] classes", more="may be repeated")] = None,
    drop_layers: Annotated[int | None, setting("[method] drop_layers")] = None,
    adapter_layers: Annotated[int | None, setting("[method] adapter_layers")] = None,
    bottom_layers: Annotated[int | None, setting("[method] bottom_layers")] = None,
    rank: Annotated[int | None, setting("[lora] rank")] = None,
    realign_every: Annotated[int | None, setting("[method] realign_every")] = None,
    targets: Annotated[str | None, setting("[lora] targets", more="separated by commas")] = None,
    codec: Annotated[str | None, setting("[wire] codec")] = None,
    adapter_base: Annotated[str | None, setting("[method] adapter_base")] = None,
    emulator_base: Annotated[str | None, setting("[method] emulator_base")] = None,
    quantize_embedding: Annotated[bool | None, setting("[method] quantize_embedding", "--quantize-embedding")] = None,
    mbit: Annotated[
        float, typer.Option("--mbit", min=0.001, envvar="FEDSODA_MBIT", help="assumed Mbit/s of an edge's line")
    ] = Rates.mbit_per_second,
    tflops: Annotated[
        float, typer.Option("--tflops", min=0.001, envvar="FEDSODA_TFLOPS", help="assumed TFLOP/s of an edge")
    ] = Rates.tflop_per_second,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", envvar="FEDSODA_MEASURE", help="heal sub-LLMs of several sizes, and show how near each stays"
        ),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Predict what a run of this model costs an edge, beside the paper's arithmetic; needs no weights but to measure."""
    with reporting(as_json, False, debug), working("planning"):
        on_method: dict[str, object] = {
            "name": method,
            "adapter_layers": adapter_layers,
            "bottom_layers": bottom_layers,
            "layers_per_group": layers_per_group,
            "groups": groups,
            "classes": classes or None,
            "drop_layers": drop_layers,
            "realign_every": realign_every,
            "adapter_base": adapter_base,
            "emulator_base": emulator_base,
            "quantize_embedding": quantize_embedding,
        }
        names = None if targets is None else [name.strip() for name in targets.split(",")]
        on_lora: dict[str, object] = {"rank": rank, "targets": names}
        tables: dict[str, dict[str, object]] = {"method": on_method, "lora": on_lora, "wire": {"codec": codec}}
        given = {
            table: {key: value for key, value in values.items() if value is not None}
            for table, values in tables.items()
        }
        if measure:
            from fedsoda_hub.cli.measure import measured

            report = measured(Path(model), given, Rates(mbit, tflops))
        else:
            from fedsoda_hub.plan import plan_report
            from fedsoda_hub.settings.run import settings_for_plan

            report = plan_report(model, settings_for_plan(model, **given), Rates(mbit, tflops))
        from fedsoda_hub.cli.tables import plan_table

        plan_table(report)
        finish({"status": "ok", **msgspec.to_builtins(report)}, as_json, False)


@app.command(epilog="Example: fedsoda-hub prepare triage.toml")
def prepare(run: RunFile, as_json: Json = False, debug: Debug = False) -> None:
    """Prune, quantize and align the model into a bundle, as the run's method does; continues where it stopped."""
    with reporting(as_json, False, debug), working("preparing the run"):
        from fedsoda_hub.cli.advice import advice_on
        from fedsoda_hub.cli.display import HubDisplay
        from fedsoda_hub.cli.reports import prepared_values
        from fedsoda_hub.report.history import kl_sentence
        from fedsoda_hub.run.directory import RunDirectory
        from fedsoda_hub.settings.run import read_settings

        settings = read_settings(run)
        directory = RunDirectory(settings.run_dir)
        lock = directory.lock()
        try:
            from fedsoda_hub.cli.noted import noting
            from fedsoda_hub.evaluation.judge import check_evaluation
            from fedsoda_hub.events import event_of_progress
            from fedsoda_hub.federation.jobs import JobProgress, Stage
            from fedsoda_hub.preparation.prepare import READING, RunPreparation

            check_evaluation(settings)
            with HubDisplay(jsonl=False) as display, noting(directory) as noted:

                def report(progress: JobProgress) -> None:
                    event = event_of_progress("prepare", progress)
                    noted(event)
                    display.say(event)

                report(Stage(stage=READING, done=0, total=0))
                result = RunPreparation(settings).run(report)
        finally:
            lock.release()
        for sentence in advice_on(settings):
            note(f"note: {sentence}")
        note(f"bundle: {directory.bundle}; {kl_sentence(result.sub_llms[0].public_kl)}")
        finish({"status": "ok", "bundle": str(directory.bundle), **prepared_values(result)}, as_json, False)


@app.command(epilog="Example: fedsoda-hub serve triage.toml --exit-when-done\n\n" + EXIT_HELP)
def serve(
    run: RunFile,
    exit_when_done: Annotated[
        bool, typer.Option("--exit-when-done", envvar="FEDSODA_EXIT_WHEN_DONE", help="end when the run is over")
    ] = False,
    as_json: Json = False,
    log_format: LogFormatOption = "auto",
    log_file: LogFileOption = None,
    log_size: LogSizeOption = "10MB",
    log_keep: LogKeepOption = 5,
    jsonl: JsonLines = False,
    debug: Debug = False,
) -> None:
    """Prepare the run if needed, then accept edges and run the rounds; survives restarts."""
    logs = LogChoices(log_format, log_file, log_size, log_keep)
    with reporting(as_json, jsonl, debug, logs=logs), working("opening the run"):
        from fedsoda_edge.ports.service import Supervisor
        from fedsoda_hub.cli.advice import advice_on
        from fedsoda_hub.cli.attended import served
        from fedsoda_hub.cli.display import HubDisplay
        from fedsoda_hub.events import SettingInForce, SettingsInForce
        from fedsoda_hub.serving.daemon import Daemon
        from fedsoda_hub.settings.run import defaults_of, effective, read_settings

        supervisor = Supervisor.taken()
        settings = read_settings(run)
        with HubDisplay(jsonl, is_detailed=debug, defaults=defaults_of(settings)) as display:
            daemon = Daemon.open(settings, display.say)
            daemon.broadcast.begin(steering.telling_where_the_page_is(daemon, display.tell))
            for sentence in advice_on(settings):  # what is refused has one sentence of its own
                note(f"note: {sentence}")
            values = {
                key: SettingInForce(value=one.value, source=one.source) for key, one in effective(settings).items()
            }
            display.say(SettingsInForce(values=values))
            display.begins(daemon.machine.state, daemon.machine.rules.count)
            asyncio.run(served(daemon, supervisor, exit_when_done=exit_when_done))
        finish({"status": "ok", "run": settings.name, "phase": daemon.machine.state.phase}, as_json, jsonl)


def _edges(run: Path) -> list[KnownEdge]:
    """Return who may join, also where the run has not been started.

    Raises:
        UsageProblem: nobody may join yet.
    """
    from fedsoda_hub.run.directory import RunDirectory
    from fedsoda_hub.run.ledger import opened_to_read
    from fedsoda_hub.settings.run import read_settings

    directory = RunDirectory(read_settings(run).run_dir)
    if directory.ledger.exists():
        with opened_to_read(directory) as ledger:
            if not ledger.replay().run_id and (known := ledger.edges.all()):
                return known
    return status_of_run(run)[1].edges


@app.command(epilog="Example: fedsoda-hub status triage.toml --json")
def status(run: RunFile, as_json: Json = False, debug: Debug = False) -> None:
    """Show rounds, losses, bytes and accuracy, whether the hub runs or not."""
    with reporting(as_json, False, debug):
        import msgspec

        from fedsoda_hub.cli.tables import process_words
        from fedsoda_hub.run.sentence import sentence_of

        is_running, found = status_of_run(run)
        sentence = sentence_of(found)
        note(
            f"{found.run}: {found.phase}, round {found.round} of {found.rounds}, "
            f"{found.rounds_closed} closed, hub {process_words(found) if is_running else 'not running'}"
        )
        note(f"now: {sentence}")
        if found.losses:
            note("losses: " + " ".join(f"{loss:.3f}" for loss in found.losses))
        if found.cross_terms:
            shares = " ".join(f"{share:.2%}" for share in found.cross_terms.values())
            note(f"lost of the mean product by averaging A and B apart: {shares}")
        if found.rounds_closed:  # before that, only greetings have travelled
            up, down = human_bytes(found.bytes.up_per_edge_round), human_bytes(found.bytes.down_per_edge_round)
            note(f"bytes an edge and round: {up} up, {down} down")
        if found.evaluation:
            note("accuracy: " + ", ".join(f"{name} {value:.1%}" for name, value in found.evaluation.accuracy.items()))
        values = msgspec.to_builtins(found, str_keys=True)
        finish({"status": "ok", "running": is_running, "sentence": sentence, **values}, as_json, False)


@app.command(epilog="Example: fedsoda-hub edges triage.toml")
def edges(run: RunFile, as_json: Json = False, debug: Debug = False) -> None:
    """List the edges that may join: token or link, the device's fingerprint, when it was seen, which are connected, and its last update."""
    with reporting(as_json, False, debug):
        import msgspec

        from fedsoda_hub.cli.tables import edge_line

        found = _edges(run)
        for edge in found:
            note(edge_line(edge))
        finish({"status": "ok", "edges": msgspec.to_builtins(found)}, as_json, False)


@app.command(epilog="Example: fedsoda-hub export triage.toml --to triage-adapter")
def export(
    run: RunFile,
    to: Annotated[Path, typer.Option("--to", envvar="FEDSODA_EXPORT_TO", help="a new directory")],
    merge: Annotated[
        bool,
        typer.Option("--merge", envvar="FEDSODA_MERGE", help="write a merged Transformers checkpoint instead"),
    ] = False,
    round_number: Annotated[
        int | None,
        typer.Option(
            "--round",
            min=1,
            envvar="FEDSODA_ROUND",
            help="a round whose master is still there; not given: what [task] keep says",
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the PEFT adapter for the full model, of the last round, the best one or any that is still there."""
    with reporting(as_json, False, debug), working("writing the adapter"):
        from fedsoda_hub.run.outcome import read_outcome
        from fedsoda_hub.settings.run import read_settings

        settings = read_settings(run)
        best_by = settings.task.best_by
        read_outcome(  # refuses at once; loading torch takes seconds
            settings.run_dir, settings.path, best_by=best_by, round_number=round_number
        )
        from fedsoda_hub.cli.tables import export_words
        from fedsoda_hub.evaluation.export import export as write_export

        result = write_export(settings, to, merge=merge, round_number=round_number)
        note(f"wrote {result.export}: {export_words(result)}")
        finish({"status": "ok", **msgspec.to_builtins(result)}, as_json, False)


@app.command(epilog="Example: fedsoda-hub evaluate triage-adapter --data eval.jsonl")
def evaluate(
    run_or_export: Annotated[Path, typer.Argument(metavar="RUN_OR_EXPORT")],
    data: Annotated[
        Path,
        typer.Option(
            "--data", envvar="FEDSODA_EVAL_DATA", help="rows with the template's columns, or prompt and completion"
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", envvar="FEDSODA_MODEL", help="the full model of an export whose run is not on this machine"
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option("--samples", min=0, envvar="FEDSODA_SAMPLES", help="number of questions to show with the answers"),
    ] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure accuracy and loss: full model untouched, sub-LLM, plug-in."""
    with reporting(as_json, False, debug), working("evaluating"):
        from fedsoda_hub.cli.display import HubDisplay
        from fedsoda_hub.cli.tables import evaluation_lines
        from fedsoda_hub.evaluation.judge import evaluate_path
        from fedsoda_hub.events import StageProgress

        with HubDisplay(jsonl=False) as display:
            result = evaluate_path(
                run_or_export,
                data,
                lambda done, total: display.say(
                    StageProgress(job="evaluate", stage="evaluating", done=done, total=total)
                ),
                model,
                samples,
            )
        for sample in result.samples:
            note(f"--- {sample['prompt']}")
            for name in ("completion", "full", "sub_llm", "plug_in"):
                if name in sample:
                    lines = sample[name].replace("\n", "\n" + 11 * " ")
                    note(f"{'wanted' if name == 'completion' else name:<10} {lines}")
        if samples:
            note("---")
        for line in evaluation_lines(result):
            note(line)
        finish({"status": "ok", **msgspec.to_builtins(result)}, as_json, False)


@app.command(epilog="Example: fedsoda-hub report triage.toml --to triage-report")
def report(
    run: RunFile,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to", envvar="FEDSODA_REPORT_TO", help="a directory; not given: `report` in the run's directory"
        ),
    ] = None,
    tensorboard: TensorBoard = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write one HTML file and PNGs of loss, accuracy, layers, alignment, bytes and contributions; at any time."""
    with reporting(as_json, False, debug), working("writing the report"):
        from fedsoda_hub.settings.run import read_settings

        settings = read_settings(run)
        from fedsoda_hub.report.page import write_report
        from fedsoda_hub.run.directory import RunDirectory

        written = write_report(settings, to or RunDirectory(settings.run_dir).report)
        if tensorboard is not None:
            from fedsoda_hub.cli.reports import write_event_file

            written = write_event_file(settings, tensorboard, written)
        note(f"wrote {written.report} and {len(written.pictures)} pictures beside it")
        finish({"status": "ok", **msgspec.to_builtins(written)}, as_json, False)


@app.command(cls=CompareCommand, epilog="Example: fedsoda-hub compare COMPARE.toml --out comparison\n\n" + EXIT_HELP)
def compare(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="COMPARE.toml",
            help=r"the tables of a RUN.toml, \[compare] with seeds and splits, and \[variants.NAME] with what differs",
            rich_help_panel="What to compare",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            envvar="FEDSODA_COMPARE_OUT",
            help="a directory; not given: beside the file, named after it",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    transport: Annotated[
        CompareTransport,
        typer.Option(
            "--transport",
            envvar="FEDSODA_TRANSPORT",
            help="memory: hub and edges in one process; network: each in a process of its own",
        ),
    ] = CompareTransport.memory,
    as_json: Json = False,
    jsonl: JsonLines = False,
    debug: Debug = False,
) -> None:
    """Compare methods x seeds x splits on one task, with the daemon's own rounds and codecs; continues where it stopped."""
    with reporting(as_json, jsonl, debug), working("comparing"):
        from fedsoda_hub.cli.display import HubDisplay
        from fedsoda_hub.compare.settings import read_comparison

        comparison = read_comparison(file)  # refuses at once; loading torch takes seconds
        from fedsoda_hub.compare.run import run_comparison

        with HubDisplay(jsonl) as display:
            report = run_comparison(comparison, out or file.with_suffix(".compare"), transport.value, display.say)
        note(Path(report.markdown).read_text(encoding="utf-8"))
        note(f"wrote {report.report} and {len(report.pictures)} pictures beside it")
        finish({"status": "ok", **msgspec.to_builtins(report)}, as_json, jsonl)


def main() -> None:
    """Run the command."""
    # Threads that spin while they wait make torch several times slower once another process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    run_command(app)


if __name__ == "__main__":
    main()
