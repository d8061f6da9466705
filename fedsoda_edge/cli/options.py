"""Declare the options of fedsoda-edge, in the panels of `--help`. Defaults are left to the commands that have them."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from fedsoda_edge.errors import LocalError
from fedsoda_edge.ports.given_options import EffectiveOption

# The SDK's names of settings in sentences: name='value', or the name alone where no other word is written like it.
_GIVEN = re.compile(r"\b(cache|device|link_file|pause_on|pin|token_file)='([^']*)'")
_NAMED = re.compile(r"(?<![\w/.-])(insecure_http|link_file|max_disk|max_ram|max_vram|pause_on|token_file)(?![\w/.])")


def as_options(sentence: str) -> str:
    """Rewrite the SDK's names of settings as options: device='cpu' as --device cpu, max_ram as --max-ram."""
    given = _GIVEN.sub(lambda match: f"--{match[1].replace('_', '-')} {match[2]}", sentence)
    return _NAMED.sub(lambda match: f"--{match[1].replace('_', '-')}", given)


@contextlib.contextmanager
def named_as_options() -> Iterator[None]:
    """Let errors of the SDK name settings as options (`as_options`)."""
    try:
        yield
    except LocalError as error:
        error.message = as_options(error.message)
        raise


def without_secrets(settings: dict[str, EffectiveOption]) -> dict[str, EffectiveOption]:
    """Return the options of a join as logs and people may see them."""
    from fedsoda_edge.join.link import without_secret

    url = settings["url"]
    shown = without_secret(url.value) if isinstance(url.value, str) else None
    return {**settings, "url": dataclasses.replace(url, value=shown)}


# Panels of `--help`. What most joins need stands above them, in the panel that has no name of its own.
WHAT, DATA, LIMITS, PAUSES, OUTPUT = "What to join", "Data", "Limits", "Pauses", "Output"

UrlArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="LINK|URL",
        help="the join link that the hub's owner gave, or the hub's address: https://hub.example.org",
        rich_help_panel=WHAT,
    ),
]
LinkFileOption = Annotated[
    str | None,
    typer.Option(
        "--link-file",
        envvar="FEDSODA_LINK_FILE",
        help="file with the join link; - reads it from stdin; without it, FEDSODA_LINK",
    ),
]
PinOption = Annotated[
    str | None,
    typer.Option(
        "--pin",
        envvar="FEDSODA_PIN",
        help="sha256/...: the pin of the hub's TLS key, as the hub prints it at its start",
    ),
]
InsecureHttpOption = Annotated[
    bool,
    typer.Option(
        "--insecure-http",
        envvar="FEDSODA_INSECURE_HTTP",
        help="let plain HTTP leave this machine: whoever is on the way reads token and updates",
    ),
]
TokenFileOption = Annotated[
    str | None,
    typer.Option("--token-file", envvar="FEDSODA_TOKEN_FILE", help="file with the token; - reads it from stdin"),
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", envvar="FEDSODA_JSON", help="print one JSON object on stdout", rich_help_panel=OUTPUT),
]
JsonLinesOption = Annotated[
    bool,
    typer.Option(
        "--jsonl", envvar="FEDSODA_JSONL", help="print one JSON event a line on stdout", rich_help_panel=OUTPUT
    ),
]
ColumnsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column", envvar="FEDSODA_COLUMN", help="NAME=COLUMN: a name in the run's template, and your column for it"
    ),
]
DeviceOption = Annotated[str, typer.Option(envvar="FEDSODA_DEVICE", help="where to train: auto, cpu, cuda or cuda:N")]
MaxRamOption = Annotated[
    str | None,
    typer.Option(
        envvar="FEDSODA_MAX_RAM",
        help="memory that training may take, such as 6GB; exit 4 if it needs more",
        rich_help_panel=LIMITS,
    ),
]
MaxVramOption = Annotated[
    str | None,
    typer.Option(
        envvar="FEDSODA_MAX_VRAM", help="GPU memory that training may take, such as 6GB", rich_help_panel=LIMITS
    ),
]
DebugOption = Annotated[
    bool,
    typer.Option(
        "--debug",
        envvar="FEDSODA_DEBUG",
        help="log what happens on stderr, and show the traceback of an error",
        rich_help_panel=OUTPUT,
    ),
]

# --- options that only join has ------------------------------------------------------------------------------

DataOption = Annotated[
    Path,
    typer.Option(
        "--data",
        envvar="FEDSODA_DATA",
        help="JSON Lines, JSON, CSV, TSV, Excel, Parquet, Arrow or a saved dataset's directory",
    ),
]
UnattendedOption = Annotated[
    bool, typer.Option(envvar="FEDSODA_UNATTENDED", help="keep trying until the hub answers, also at the start")
]
MaxDiskOption = Annotated[
    str | None,
    typer.Option(
        envvar="FEDSODA_MAX_DISK",
        help="disk for cached border states, such as 8GB; without it, what is free",
        rich_help_panel=DATA,
    ),
]
CacheOption = Annotated[
    str,
    typer.Option(
        envvar="FEDSODA_CACHE", help="how border states are kept: bf16, or int8 in half the space", rich_help_panel=DATA
    ),
]
CacheKeyOption = Annotated[
    str,
    typer.Option(
        envvar="FEDSODA_CACHE_KEY",
        help="keep: later joins can read cached border states; forget: nobody can",
        rich_help_panel=DATA,
    ),
]
MaxRoundsOption = Annotated[
    int,
    typer.Option(
        envvar="FEDSODA_MAX_ROUNDS",
        min=0,
        help="leave after this number of rounds; 0: stay until the run ends",
        rich_help_panel=LIMITS,
    ),
]
ThreadsOption = Annotated[
    int,
    typer.Option(
        envvar="FEDSODA_THREADS", min=0, help="CPU threads for training; 0: torch's choice", rich_help_panel=LIMITS
    ),
]
PauseOnOption = Annotated[
    str | None,
    typer.Option(
        envvar="FEDSODA_PAUSE_ON",
        help="pause without a request: battery, gpu-busy, hours=9-17 (local time), separated by commas",
        rich_help_panel=PAUSES,
    ),
]
