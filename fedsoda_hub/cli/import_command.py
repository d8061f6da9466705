"""Parse `fedsoda-hub import`, and tell how far it is. Reading GGUFs is left to `preparation/gguf.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from fedsoda_edge.ports.console import finish, note, reporting
from fedsoda_hub.cli.options import Debug, Json


def import_model(
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="a whole model, as Ollama and llama.cpp keep it")],
    to: Annotated[Path, typer.Option("--to", envvar="FEDSODA_IMPORT_TO", help="a new directory")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer",
            envvar="FEDSODA_IMPORT_TOKENIZER",
            help="the original model's directory, whose tokenizer files are taken; not given: made of the GGUF's vocabulary",
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a model directory of a GGUF: 16-bit weights of its quantized ones, config and tokenizer."""
    with reporting(as_json, False, debug):
        note(f"reading {file}; its model goes to {to}")  # loading torch takes seconds
        from fedsoda_hub.cli.display import HubDisplay
        from fedsoda_hub.events import StageProgress
        from fedsoda_hub.preparation.gguf import import_gguf

        with HubDisplay(jsonl=False) as display:

            def say(stage: str, done: int, total: int) -> None:
                detail = f"{done / 1e6:.0f} of {total / 1e6:.0f} million weights"
                display.say(StageProgress(job="import", stage=stage, done=done, total=total, detail=detail))

            result = import_gguf(file, to, say, tokenizer=tokenizer)
        note(f"wrote {result.model}: {result.family}, {result.weights / 1e6:.1f} million weights in bf16")
        note(f'name it in RUN.toml: model = "{to}"')
        finish({"status": "ok", **msgspec.to_builtins(result)}, as_json, False)
