"""fedsoda-hub: parse, call, print. It decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from fedsoda_edge.ports.console import EXIT_HELP, finish, note, reporting
from fedsoda_edge.ports.console import run as run_command
from fedsoda_edge.units import human_bytes

if TYPE_CHECKING:
    from fedsoda_hub.federation.jobs import PrepareResult, Progress

app = typer.Typer(help="Prepare, serve and evaluate a federated run.", epilog=EXIT_HELP, no_args_is_help=True)
token_app = typer.Typer(help="What an edge needs to join.", no_args_is_help=True)
app.add_typer(token_app, name="token")


class Transport(StrEnum):
    """How edges of a comparison reach their hub."""

    memory = "memory"
    network = "network"


RunFile = Annotated[Path, typer.Argument(metavar="RUN.toml", help="the run's settings")]
Json = Annotated[bool, typer.Option("--json", envvar="FEDSODA_JSON", help="one JSON object on stdout")]
JsonLines = Annotated[bool, typer.Option("--jsonl", envvar="FEDSODA_JSONL", help="one JSON event a line on stdout")]
Debug = Annotated[bool, typer.Option("--debug", envvar="FEDSODA_DEBUG", help="add the traceback to an error")]


@app.command(epilog="Example: fedsoda-hub demo --rounds 4\n\n" + EXIT_HELP)
def demo(
    directory: Annotated[
        Path, typer.Option("--dir", envvar="FEDSODA_DEMO_DIR", help="where the run lies; a demo's own is replaced")
    ] = Path("fedsoda-demo"),
    rounds: Annotated[int, typer.Option(min=1, envvar="FEDSODA_DEMO_ROUNDS", help="rounds to run")] = 6,
    seed: Annotated[int, typer.Option(envvar="FEDSODA_DEMO_SEED", help="of data and training")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The whole job on this machine, offline: hub, three edges, all rounds, export, evaluation."""
    with reporting(as_json, False, debug):
        from fedsoda_hub.demo.run import run_demo

        report = asyncio.run(run_demo(directory, rounds=rounds, seed=seed))
        finish({"status": "ok", **report}, as_json, False)


@app.command(epilog="Example: fedsoda-hub plan config.json --groups 4 --layers-per-group 3\n\n" + EXIT_HELP)
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a model directory or a bare config.json")],
    method: Annotated[
        str,
        typer.Option(
            envvar="FEDSODA_METHOD", help="fedsoda, exact, fedbiot, fedot, fedpetuning, fedpruner or fedpruner+"
        ),
    ] = "fedsoda",
    layers_per_group: Annotated[
        int | None, typer.Option(min=0, envvar="FEDSODA_LAYERS_PER_GROUP", help="n; fedsoda: 3")
    ] = None,
    groups: Annotated[int | None, typer.Option(min=0, envvar="FEDSODA_GROUPS", help="p; fedsoda: 4")] = None,
    classes: Annotated[
        list[int] | None,
        typer.Option(
            envvar="FEDSODA_CLASSES", help="groups of a smaller sub-LLM, fedpruner: dropped layers; may be repeated"
        ),
    ] = None,
    drop_layers: Annotated[
        int | None,
        typer.Option(min=0, envvar="FEDSODA_DROP_LAYERS", help="in all; fedbiot, fedot, fedpruner, fedpruner+: 12"),
    ] = None,
    adapter_layers: Annotated[
        int | None, typer.Option(min=1, envvar="FEDSODA_ADAPTER_LAYERS", help="last layers that train: 3; fedot: 2")
    ] = None,
    bottom_layers: Annotated[
        int | None, typer.Option(min=0, envvar="FEDSODA_BOTTOM_LAYERS", help="first layers that train; fedot: 1")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, envvar="FEDSODA_RANK", help="of LoRA")] = 8,
    realign_every: Annotated[
        int | None,
        typer.Option(min=0, envvar="FEDSODA_REALIGN_EVERY", help="rounds; 0: never; fedsoda: 5, fedbiot: 1"),
    ] = None,
    targets: Annotated[
        str, typer.Option(envvar="FEDSODA_TARGETS", help="modules with LoRA, by comma")
    ] = "q_proj,k_proj,v_proj,up_proj,down_proj",
    codec: Annotated[str, typer.Option(envvar="FEDSODA_CODEC", help="of deltas: nf4, int8 or bf16")] = "nf4",
    adapter_base: Annotated[
        str | None,
        typer.Option(envvar="FEDSODA_ADAPTER_BASE", help="nf4 or bf16; fedsoda and exact: nf4, the others: bf16"),
    ] = None,
    emulator_base: Annotated[
        str | None, typer.Option(envvar="FEDSODA_EMULATOR_BASE", help="nf4 or bf16, as for the adapter")
    ] = None,
    quantize_embedding: Annotated[
        bool, typer.Option("--quantize-embedding", envvar="FEDSODA_QUANTIZE_EMBEDDING", help="embedding and head too")
    ] = False,
    mbit: Annotated[
        float, typer.Option("--mbit", min=0.001, envvar="FEDSODA_MBIT", help="Mbit/s of an edge's line, assumed")
    ] = 100.0,
    tflops: Annotated[
        float, typer.Option("--tflops", min=0.001, envvar="FEDSODA_TFLOPS", help="TFLOP/s of an edge, assumed")
    ] = 1.0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What a run of this model would cost an edge, and the paper's arithmetic; needs no weights."""
    with reporting(as_json, False, debug):
        from fedsoda_hub.cli.display import plan_table
        from fedsoda_hub.plan import Rates, plan_report
        from fedsoda_hub.settings.run import settings_for_plan

        given = {
            "adapter_layers": adapter_layers,
            "bottom_layers": bottom_layers,
            "layers_per_group": layers_per_group,
            "groups": groups,
            "classes": classes or None,
            "drop_layers": drop_layers,
            "realign_every": realign_every,
            "adapter_base": adapter_base,
            "emulator_base": emulator_base,
        }
        settings = settings_for_plan(
            model,
            method={
                "name": method,
                "quantize_embedding": quantize_embedding,
                **{key: value for key, value in given.items() if value is not None},
            },
            lora={"rank": rank, "targets": [name.strip() for name in targets.split(",")]},
            wire={"codec": codec},
        )
        report = msgspec.to_builtins(plan_report(model, settings, Rates(mbit, tflops)))
        plan_table(report)
        finish({"status": "ok", **report}, as_json, False)


@app.command(epilog="Example: fedsoda-hub prepare triage.toml")
def prepare(run: RunFile, as_json: Json = False, debug: Debug = False) -> None:
    """SGP, NF4 and alignment into a bundle, as the run's method has them; goes on where it stopped."""
    with reporting(as_json, False, debug):
        from fedsoda_hub.cli.display import Display
        from fedsoda_hub.report.history import kl_sentence
        from fedsoda_hub.serving.daemon import lock_run
        from fedsoda_hub.settings.run import read_settings

        settings = read_settings(run)
        lock = lock_run(settings.run_dir)
        try:
            from fedsoda_hub.evaluation.judge import check_evaluation
            from fedsoda_hub.preparation.prepare import Preparation

            check_evaluation(settings)
            with Display(jsonl=False) as display:
                result = Preparation(settings).run(lambda progress: display.say(_progress_event("prepare", progress)))
        finally:
            lock.release()
        note(f"bundle: {settings.run_dir / 'bundle'}; {kl_sentence(result.sub_llms[0].public_kl)}")
        finish({"status": "ok", "bundle": str(settings.run_dir / "bundle"), **_prepared(result)}, as_json, False)


def _progress_event(job: str, progress: Progress) -> dict[str, Any]:
    values = msgspec.to_builtins(progress)
    del values["kind"]
    return {"event": "progress", "job": job, **values}


def _prepared(result: PrepareResult) -> dict[str, Any]:
    """Show the result of `prepare --json`: the largest sub-LLM, and the smaller ones and the master where there are any."""
    largest, *smaller = msgspec.to_builtins(result.sub_llms)
    for one in smaller:
        if one["adapter_view"] == largest["adapter_view"]:
            one["adapter_view"] = None
    return largest | ({"smaller": smaller, "master": result.master} if smaller else {})


@app.command(epilog="Example: fedsoda-hub serve triage.toml --exit-when-done\n\n" + EXIT_HELP)
def serve(
    run: RunFile,
    exit_when_done: Annotated[
        bool, typer.Option("--exit-when-done", envvar="FEDSODA_EXIT_WHEN_DONE", help="end when the run is over")
    ] = False,
    as_json: Json = False,
    jsonl: JsonLines = False,
    debug: Debug = False,
) -> None:
    """Prepare if needed, then accept edges and run the rounds; survives restarts."""
    with reporting(as_json, jsonl, debug):
        from fedsoda_hub.cli.display import Display
        from fedsoda_hub.serving.daemon import Daemon
        from fedsoda_hub.settings.run import effective, read_settings

        settings = read_settings(run)
        with Display(jsonl) as display:
            daemon = Daemon(settings, display.say)
            display.say({"event": "settings", "values": effective(settings)})
            asyncio.run(daemon.run(exit_when_done=exit_when_done))
        finish({"status": "ok", "run": settings.name, "phase": daemon.machine.state.phase}, as_json, jsonl)


@token_app.command("create", epilog="Example: fedsoda-hub token create triage.toml --name clinic-7 > clinic-7.token")
def token_create(
    run: RunFile,
    name: Annotated[str, typer.Option("--name", envvar="FEDSODA_TOKEN_NAME", help="the edge's id")],
    out: Annotated[
        Path | None, typer.Option("--out", envvar="FEDSODA_TOKEN_OUT", help="write the token there, mode 0600")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print a new token; it is kept nowhere else."""
    with reporting(as_json, False, debug):
        from fedsoda_hub.run.ledger import write_secret

        with contextlib.closing(_ledger(run)) as ledger:
            token = ledger.create_token(name)
            if out is not None:
                try:
                    write_secret(out, token + "\n")
                except BaseException:
                    ledger.revoke_token(name)  # nobody has it, and the name is to be had again
                    raise
        if out is not None:
            note(f"wrote the token of {name} to {out}")
        elif not as_json:
            print(token)
        shown = {} if out is not None else {"token": token}
        finish({"status": "ok", "edge": name, **shown}, as_json, False)


@token_app.command("list", epilog="Example: fedsoda-hub token list triage.toml")
def token_list(run: RunFile, as_json: Json = False, debug: Debug = False) -> None:
    """Edges that may join, and whether a device has."""
    with reporting(as_json, False, debug):
        with contextlib.closing(_ledger(run)) as ledger:
            tokens = ledger.tokens()
        for token in tokens:
            state = "revoked" if token.revoked else "in use" if token.device else "unused"
            note(f"{token.edge:<24} {state}")
        rows = [{"edge": t.edge, "device": t.device, "revoked": t.revoked} for t in tokens]
        finish({"status": "ok", "tokens": rows}, as_json, False)


@token_app.command("revoke", epilog="Example: fedsoda-hub token revoke triage.toml clinic-7")
def token_revoke(
    run: RunFile, name: Annotated[str, typer.Argument()], as_json: Json = False, debug: Debug = False
) -> None:
    """The edge is refused from its next connection on."""
    with reporting(as_json, False, debug):
        with contextlib.closing(_ledger(run)) as ledger:
            ledger.revoke_token(name)
        note(f"revoked the token of {name}")
        finish({"status": "ok", "edge": name}, as_json, False)


def _ledger(run: Path) -> Any:
    from fedsoda_hub.run.ledger import Ledger
    from fedsoda_hub.settings.run import read_settings

    return Ledger(read_settings(run).run_dir / "ledger.sqlite")


def _status(run: Path) -> dict[str, Any]:
    """Of the running hub, else of the ledger."""
    from fedsoda_hub.run.ledger import Ledger, not_started
    from fedsoda_hub.serving.daemon import run_status
    from fedsoda_hub.serving.listener import ask_running_hub
    from fedsoda_hub.settings.run import read_settings

    settings = read_settings(run)
    path = settings.run_dir / "ledger.sqlite"
    if not path.exists():
        raise not_started(settings.path)
    with contextlib.closing(Ledger(path)) as ledger:
        state = ledger.replay()
        if not state.run_id:  # there are tokens, and no more
            raise not_started(settings.path)
        live = ask_running_hub(settings.run_dir)
        if live is not None and live.get("run_id") == state.run_id:  # not another run's hub at an old address
            return {"running": True, **live}
        unknown = {"connected": False, "eligible": False, "size_class": None, "step": None, "steps": None}
        edges = [{"edge": token.edge, "revoked": token.revoked, **unknown} for token in ledger.tokens()]
        shown = run_status(settings, ledger, state)
        return {"running": False, **shown, "url": None, "due_seconds": None, "edges": edges}


@app.command(epilog="Example: fedsoda-hub status triage.toml --json")
def status(run: RunFile, as_json: Json = False, debug: Debug = False) -> None:
    """Rounds, losses, bytes, accuracy; of the running hub, else of what it left."""
    with reporting(as_json, False, debug):
        found = _status(run)
        note(
            f"{found['run']}: {found['phase']}, round {found['round']} of {found['rounds']}, "
            f"{found['rounds_closed']} closed, hub {'running' if found['running'] else 'not running'}"
        )
        if found["losses"]:
            note("losses: " + " ".join(f"{loss:.3f}" for loss in found["losses"]))
        if found["cross_terms"]:
            shares = " ".join(f"{share:.2%}" for share in found["cross_terms"].values())
            note(f"of the mean product, averaging A and B apart loses: {shares}")
        if found["rounds_closed"]:  # until then greetings travelled
            size = found["bytes"]
            up, down = human_bytes(size["up_per_edge_round"]), human_bytes(size["down_per_edge_round"])
            note(f"an edge and round: {up} up, {down} down")
        if found["evaluation"]:
            note(
                "accuracy: "
                + ", ".join(f"{name} {value:.1%}" for name, value in found["evaluation"]["accuracy"].items())
            )
        finish({"status": "ok", **found}, as_json, False)


@app.command(epilog="Example: fedsoda-hub edges triage.toml")
def edges(run: RunFile, as_json: Json = False, debug: Debug = False) -> None:
    """Who may join, who is in."""
    with reporting(as_json, False, debug):
        found = _status(run)["edges"]
        for edge in found:
            state = "revoked" if edge["revoked"] else "connected" if edge["connected"] else "away"
            step = f", step {edge['step']} of {edge['steps']}" if edge.get("step") else ""
            taken = f", size class {edge['size_class']}" if edge.get("size_class") else ""
            note(f"{edge['edge']:<24} {state}{taken}{step}")
        finish({"status": "ok", "edges": found}, as_json, False)


@app.command(epilog="Example: fedsoda-hub export triage.toml --to triage-adapter")
def export(
    run: RunFile,
    to: Annotated[Path, typer.Option("--to", envvar="FEDSODA_EXPORT_TO", help="a new directory")],
    merge: Annotated[
        bool, typer.Option("--merge", envvar="FEDSODA_MERGE", help="a merged Transformers checkpoint instead")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The PEFT adapter for the full model."""
    with reporting(as_json, False, debug):
        from fedsoda_hub.run.ledger import read_outcome
        from fedsoda_hub.settings.run import read_settings

        settings = read_settings(run)
        read_outcome(settings.run_dir, settings.path)  # refuses in no time; loading torch takes seconds
        from fedsoda_hub.evaluation.export import export as write_export

        result = write_export(settings, to, merge=merge)
        note(f"wrote {result.export}")
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
        typer.Option("--model", envvar="FEDSODA_MODEL", help="the full model of an export that left its run"),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=0, envvar="FEDSODA_SAMPLES", help="show so many questions with the answers")
    ] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Accuracy and loss: full model untouched, sub-LLM, plug-in."""
    with reporting(as_json, False, debug):
        from fedsoda_hub.cli.display import Display
        from fedsoda_hub.evaluation.judge import evaluate_path

        with Display(jsonl=False) as display:
            result = evaluate_path(
                run_or_export,
                data,
                lambda done, total: display.say(
                    {"event": "progress", "job": "evaluate", "stage": "evaluating", "done": done, "total": total}
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
        for name, value in result.accuracy.items():
            if value is None:
                note(f"{name:<8} not judged: the run directory is not beside this export")
                continue
            loss = result.loss[name]
            note(f"{name:<8} accuracy {value:6.1%}  loss " + ("not a number" if loss is None else f"{loss:.3f}"))
        finish({"status": "ok", **msgspec.to_builtins(result)}, as_json, False)


@app.command(epilog="Example: fedsoda-hub report triage.toml --to triage-report")
def report(
    run: RunFile,
    to: Annotated[
        Path | None,
        typer.Option("--to", envvar="FEDSODA_REPORT_TO", help="a directory; else `report` in the run's own"),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """One HTML file and PNGs: loss, accuracy, layers, alignment, bytes, contributions; of a live run too."""
    with reporting(as_json, False, debug):
        from fedsoda_hub.settings.run import read_settings

        settings = read_settings(run)
        from fedsoda_hub.report.page import write_report
        from fedsoda_hub.run.directory import RunDirectory

        written = write_report(settings, to or RunDirectory(settings.run_dir).report)
        note(f"wrote {written.report} and {len(written.pictures)} pictures beside it")
        finish({"status": "ok", **msgspec.to_builtins(written)}, as_json, False)


@app.command(epilog="Example: fedsoda-hub compare COMPARE.toml --out comparison\n\n" + EXIT_HELP)
def compare(
    file: Annotated[Path, typer.Argument(metavar="COMPARE.toml", help="methods, seeds and splits on one task")],
    out: Annotated[
        Path | None,
        typer.Option("--out", envvar="FEDSODA_COMPARE_OUT", help="a directory; else beside the file, named after it"),
    ] = None,
    transport: Annotated[
        Transport,
        typer.Option("--transport", envvar="FEDSODA_TRANSPORT", help="memory: one process; network: real ones"),
    ] = Transport.memory,
    as_json: Json = False,
    jsonl: JsonLines = False,
    debug: Debug = False,
) -> None:
    """Methods x seeds x splits on one task, with the daemon's own machine and codecs; goes on where it stopped."""
    with reporting(as_json, jsonl, debug):
        from fedsoda_hub.cli.display import Display
        from fedsoda_hub.compare.settings import read_comparison

        comparison = read_comparison(file)  # refuses in no time; loading torch takes seconds
        from fedsoda_hub.compare.run import run_comparison

        with Display(jsonl) as display:
            report = run_comparison(comparison, out or file.with_suffix(".compare"), transport.value, display.say)
        note(Path(report.markdown).read_text(encoding="utf-8"))
        note(f"wrote {report.report} and {len(report.pictures)} pictures beside it")
        finish({"status": "ok", **msgspec.to_builtins(report)}, as_json, jsonl)


def main() -> None:
    """The command."""
    # Threads that spin while they wait make torch several times slower once another process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    run_command(app)


if __name__ == "__main__":
    main()
