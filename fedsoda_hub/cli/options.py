"""Make options and help texts from settings: their words, ranges and defaults come from the tables of `settings/`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from typer.core import TyperCommand

from fedsoda_hub.settings.keys import Key, keys_of
from fedsoda_hub.settings.methods import default_in_words
from fedsoda_hub.settings.tables import Tables

RunFile = Annotated[Path, typer.Argument(metavar="RUN.toml", help="the run's settings")]
OUTPUT = "Output"
Json = Annotated[
    bool,
    typer.Option("--json", envvar="FEDSODA_JSON", help="one JSON object on stdout", rich_help_panel=OUTPUT),
]
JsonLines = Annotated[
    bool,
    typer.Option("--jsonl", envvar="FEDSODA_JSONL", help="one JSON event a line on stdout", rich_help_panel=OUTPUT),
]
TensorBoard = Annotated[
    Path | None,
    typer.Option(
        "--tensorboard",
        envvar="FEDSODA_REPORT_TENSORBOARD",
        help="also write the figures of all rounds into this directory, as TensorBoard reads them",
    ),
]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug",
        envvar="FEDSODA_DEBUG",
        help="log what happens on stderr, and add the traceback to an error",
        rich_help_panel=OUTPUT,
    ),
]


def setting(name: str, *options: str, more: str = "", **others: Any) -> Any:
    """Make the option of a key of RUN.toml, with its help, range and default.

    Args:
        name: as in messages: "[lora] rank".
        options: where the parameter's name does not say it: "--rank".
        more: what the help says beside the key's description.
        others: what typer's Option takes, such as another envvar.
    """
    key = keys_of(Tables)[name].number
    least, most = key.bounds
    words = "" if key.bounds != (None, None) else _allowed(key)  # typer shows a range of numbers itself
    default = f" [{_default(key)}]" if _default(key) and "show_default" not in others else ""
    others.setdefault("envvar", f"FEDSODA_{key.name.upper()}")
    others.setdefault("show_default", False)
    said = (_joined(key.description, words, more) + default).replace("[", r"\[")  # a bracket is markup there
    return typer.Option(*options, help=said, min=least, max=most, **others)


class CompareCommand(TyperCommand):
    """The command `fedsoda-hub compare`, whose `--help` ends with the keys of [compare]."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write typer's panels, then those of the keys."""
        super().format_help(ctx, formatter)
        from fedsoda_hub.compare.settings import Compare

        show_keys(Compare, "compare")


def show_keys(section: type[msgspec.Struct], table: str) -> None:
    """Print the keys of a table in panels, those with keys that are required first."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    panels: dict[str, list[Key]] = {}
    for key in keys_of(section, table).values():
        panels.setdefault(key.panel, []).append(key)
    console = Console()
    for title, keys in sorted(panels.items(), key=lambda panel: not any(key.is_required for key in panel[1])):
        rows = Table.grid(padding=(0, 2))
        for key in keys:
            needed = "required" if key.is_required else _default(key)
            said = _joined(key.description, _allowed(key), needed)
            rows.add_row(Text(key.name, style="bold cyan", no_wrap=True), Text(said))
        console.print(Panel(rows, title=Text(f"In COMPARE.toml, [{table}]: {title}"), title_align="left", expand=True))


def _allowed(key: Key) -> str:
    """Say which values a key takes, unless it is what people would expect."""
    is_plain = key.values.allowed == "at least 0" or key.values.sort == "a list"
    return "" if is_plain else key.values.allowed


def _default(key: Key) -> str:
    """Say the default of a key, unless it is none."""
    is_nothing = key.default is None or key.default is False or key.default == []
    return "" if is_nothing else f"default: {default_in_words(key)}"


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
