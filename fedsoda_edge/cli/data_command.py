"""Parse `fedsoda-edge data check`, and show what a run would train on. Looking at rows is `data/inspection.py`'s."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from fedsoda_edge.cli import options as opt
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.ports.console import finish, note, reporting, working

data_app = typer.Typer(help="Check training data before it is used.", no_args_is_help=True)
COLUMN_REMEDY = "rename one, or name its column: --column {}=COLUMN"


def column_names(pairs: list[str]) -> dict[str, str]:
    """Read NAME=COLUMN pairs."""
    columns = {}
    for pair in pairs:
        name, mark, column = pair.partition("=")
        if not mark or not name or not column:
            raise UsageProblem(f"--column {pair!r} is not NAME=COLUMN; write it as --column passage=text")
        columns[name] = column
    return columns


@data_app.command("check", epilog="Example: fedsoda-edge data check visits.jsonl --tokenizer model-directory")
def data_check(
    file: Annotated[
        Path, typer.Argument(help="JSON Lines, JSON, CSV, TSV, Excel, Parquet, Arrow or a saved dataset's directory")
    ],
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            envvar="FEDSODA_TOKENIZER", help="directory with tokenizer.json; without it, the last joined run's"
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(envvar="FEDSODA_PROMPT", help="template with {column} places; without it, the last joined run's"),
    ] = None,
    completion: Annotated[
        str | None,
        typer.Option(
            envvar="FEDSODA_COMPLETION", help="template with {column} places; without it, the last joined run's"
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            envvar="FEDSODA_MAX_LENGTH", min=1, help="ids of a sample at most; without it, the last joined run's or 512"
        ),
    ] = None,
    column: opt.ColumnsOption = None,
    as_json: opt.JsonOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Show what is trained on and what is skipped and why, lengths, labels, duplicates. Nothing leaves this device."""
    with reporting(as_json, False, debug, is_private=True), working(f"reading {file}"):
        import asyncio

        from fedsoda_edge.cli.display import show_data
        from fedsoda_edge.data.chat import ChatTemplate
        from fedsoda_edge.data.inspection import DEFAULT_MAX_LENGTH, inspect
        from fedsoda_edge.data.local_data import LocalData, remedy_for_columns
        from fedsoda_edge.data.samples import SampleTokenizer
        from fedsoda_edge.join.home import Home
        from fedsoda_edge.join.tokenizer import load_tokenizer
        from fedsoda_edge.ports.system import keep_memory_off_disk
        from fedsoda_edge.protocol.commands import LoadedTokenizer
        from fedsoda_edge.protocol.template import DEFAULT_COMPLETION, DEFAULT_PROMPT, TextTemplate

        keep_memory_off_disk()
        joined = Home().last_joined()
        chat = encoder = None
        with tempfile.TemporaryDirectory(prefix="fedsoda-tokenizer-") as written:
            if tokenizer is not None:
                if not (path := tokenizer / "tokenizer.json").exists():
                    raise UsageProblem(
                        f"{path} cannot be read as a tokenizer (No such file or directory); name a model's directory: "
                        "--tokenizer DIRECTORY"
                    )
                loaded = asyncio.run(load_tokenizer(tokenizer, Path(written)))
            elif joined is not None:
                loaded = LoadedTokenizer(files=dict(joined.tokenizer), eos=joined.eos, vocab_size=joined.vocab_size)
                note(f"with the tokenizer and the template of the run {joined.run!r}")
            else:
                loaded = None
            if loaded is not None:
                files = {name: Path(path) for name, path in loaded.files.items()}
                encoder = SampleTokenizer.read(files, loaded.eos, loaded.vocab_size)
                chat = ChatTemplate.read(files)
        if prompt is None:
            prompt = DEFAULT_PROMPT if joined is None else joined.prompt
        if completion is None:
            completion = DEFAULT_COMPLETION if joined is None else joined.completion
        if max_length is None:
            max_length = DEFAULT_MAX_LENGTH if joined is None else joined.max_length
        data, templates = LocalData(file, column_names(column or [])), (TextTemplate(prompt), TextTemplate(completion))
        with remedy_for_columns(COLUMN_REMEDY):
            found = inspect(data, *templates, tokenizer=encoder, max_length=max_length, chat=chat)
        show_data(found, max_length)
        if templates[0].advice:
            note(f"note: {templates[0].advice}")
        finish({"status": "ok", **dataclasses.asdict(found)}, as_json, False)
