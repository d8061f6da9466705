"""Declare the options by which a command of either side is told where its log goes, and how it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_PANEL = "Output"
# Names of the options here: they say nothing of what a command does.
LOG_OPTIONS = ("log_format", "log_file", "log_size", "log_keep")

LogFormatOption = Annotated[
    str,
    typer.Option(
        "--log-format",
        envvar="FEDSODA_LOG_FORMAT",
        help="auto: for people on a terminal, else a line a fact with time and level; text, json: so everywhere",
        rich_help_panel=_PANEL,
    ),
]
LogFileOption = Annotated[
    Path | None,
    typer.Option(
        "--log-file",
        envvar="FEDSODA_LOG_FILE",
        help="write the log to this file too, mode 0600",
        rich_help_panel=_PANEL,
    ),
]
LogSizeOption = Annotated[
    str,
    typer.Option(
        "--log-size",
        envvar="FEDSODA_LOG_SIZE",
        help="bytes of the file after which a new one begins",
        rich_help_panel=_PANEL,
    ),
]
LogKeepOption = Annotated[
    int,
    typer.Option(
        "--log-keep", envvar="FEDSODA_LOG_KEEP", min=0, help="how many older files stay", rich_help_panel=_PANEL
    ),
]
