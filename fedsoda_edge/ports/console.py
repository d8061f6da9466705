"""Speak to terminals and scripts, in the same way from both commands: JSON envelope, sentences, exit statuses.

What a command does, and which events it shows, is left to the two `cli` rooms.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import typer

from fedsoda_edge.errors import FedSODAError, UsageProblem
from fedsoda_edge.ports.logs import logs_shown, printable
from fedsoda_edge.ports.system import on_stop
from fedsoda_edge.units import counted, human_bytes, human_seconds

EXIT_HELP = (
    "Exit status: 0 done; 1 failed, do not retry; 2 wrong usage, settings or data; 3 temporary (network, hub away, "
    "disk full), retry is sensible; 4 this device cannot hold the model; 5 refused by the hub; 130 Ctrl+C. "
    "SIGTERM saves state and exits 0."
)


class Terminated(BaseException):
    """The request of SIGTERM to save state and exit 0."""


@contextlib.contextmanager
def reporting(as_json: bool, jsonl: bool, debug: bool) -> Iterator[None]:
    """Show an error as one sentence, and exit with the status of its class.

    Args:
        as_json, jsonl: whether stdout gets one JSON object, or one event a line.
        debug: whether to show logs and tracebacks on stderr.
    """

    def terminate(_: int, __: Any) -> None:
        raise Terminated

    on_stop(terminate)
    try:
        if as_json and jsonl:
            raise UsageProblem("--json prints one object and --jsonl one event a line; give only one of them")
        with logs_shown(is_debug=debug):
            yield
    except FedSODAError as error:
        _fail(error, error.exit_status, as_json, jsonl, debug, getattr(error, "details", ""))
    except typer.Exit:
        raise
    except Exception as error:
        _fail(error, 1, as_json, jsonl, debug, "")
    except Terminated:
        note("stopped; the same command continues where this one ended")
        finish({"status": "ok", "stopped": "SIGTERM"}, as_json, jsonl)
        raise typer.Exit(0) from None
    except KeyboardInterrupt:
        note("stopped; the same command continues where this one ended")
        finish({"status": "error", "error": "Interrupted", "message": "Ctrl+C", "exit_status": 130}, as_json, jsonl)
        raise typer.Exit(130) from None


def _fail(error: Exception, status: int, as_json: bool, jsonl: bool, debug: bool, details: str) -> None:
    if isinstance(error, FedSODAError):
        note(f"error: {error}")
    elif isinstance(error, OSError):
        note(f"error: {error}; correct this on this machine, then try again")
    else:
        note(
            f"error: {type(error).__name__}: {error}; this is a defect of fedsoda: please report it, with what --debug shows"
        )
    if debug:
        note(details or traceback.format_exc())
    fields = {"status": "error", "error": type(error).__name__, "message": str(error), "exit_status": status}
    finish(fields, as_json, jsonl)
    raise typer.Exit(status) from None


def run(app: typer.Typer) -> None:
    """Run the command and exit with its status. Wrong usage is shown as one sentence too, with --json as an object."""
    try:
        status = app(standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer brings its own click, whose classes have no public name
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
        else:
            note(f"error: {error.format_message().rstrip('.')}{_where(error)}; --help shows how to use it")
        fields = {"status": "error", "error": "Usage", "message": error.format_message(), "exit_status": 2}
        finish(fields, is_asked("--json"), is_asked("--jsonl"))
        status = 2
    sys.exit(status if isinstance(status, int) else 0)


def _where(error: Any) -> str:
    """Name the wrong value and where it comes from, unless that is the command line."""
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    if context is None or parameter is None:
        return ""
    source = getattr(context.get_parameter_source(parameter.name), "name", "")
    if source == "ENVIRONMENT":
        return f" ({parameter.envvar} is {os.environ.get(str(parameter.envvar), '')!r})"
    if source == "DEFAULT_MAP":
        return f" (config.toml has {parameter.name} = {context.lookup_default(parameter.name)!r})"
    return ""


def is_asked(option: str) -> bool:
    """Tell whether the command line, which may have mistakes elsewhere, or the environment asks for this option."""
    return option in sys.argv or os.environ.get(f"FEDSODA_{option[2:].upper()}", "").lower() in (
        "1",
        "true",
        "yes",
        "on",
    )


def finish(values: Mapping[str, object], as_json: bool, jsonl: bool) -> None:
    """Print the object of --json, or the last event of --jsonl."""
    if as_json:
        print(json.dumps({"schema": 1, **values}, allow_nan=False))
    elif jsonl:
        print(json.dumps({"schema": 1, "event": "end", "terminal": True, **values}, allow_nan=False), flush=True)


@dataclass(frozen=True)
class EffectiveOption:
    """The value of an option that is in force, and where it comes from."""

    value: str | int | float | None
    source: str


def effective_settings(context: typer.Context) -> dict[str, EffectiveOption]:
    """Collect the options of the running command by name.

    Returns:
        For each option its value and its source: "option", "argument", the environment variable's name, "config.toml"
        or "default".
    """
    found = {}
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in ("as_json", "jsonl", "debug") or name not in context.params:
            continue
        value, origin = context.params[name], context.get_parameter_source(name)
        source = {"COMMANDLINE": "option", "ENVIRONMENT": str(parameter.envvar), "DEFAULT_MAP": "config.toml"}.get(
            origin.name if origin else "", "default"
        )
        if source == "option" and parameter.param_type_name == "argument":
            source = "argument"
        if isinstance(value, list | tuple):
            value = " ".join(map(str, value)) or None
        found[name] = EffectiveOption(value if isinstance(value, int | float | str | None) else str(value), source)
    return found


ON_COMMAND_LINE = ("option", "argument")  # the sources of `effective_settings` that stand on the command line


def settings_lines(settings: Mapping[str, tuple[Any, str]], *, is_detailed: bool) -> str:
    """List the settings that were given, a line each, by where they come from.

    Args:
        settings: {name: (value, source)}; a value of None is left out.
        is_detailed: whether to list the defaults too.
    """
    by_source: dict[str, list[str]] = {}
    for name, (value, source) in settings.items():
        if value is not None:
            where = "the command line" if source in ON_COMMAND_LINE else source
            shown = json.dumps(value, ensure_ascii=False)  # a prompt of several lines is one here
            by_source.setdefault(where, []).append(f"  {name} = {shown}")
    defaults = by_source.pop("default", [])
    lines = [line for source, given in by_source.items() for line in (f"settings from {source}:", *given)]
    if is_detailed:
        lines += ["defaults:", *defaults]
    elif defaults:
        lines.append(f"{counted(len(defaults), 'other setting')} at the default; --debug shows them")
    return "\n".join(lines)


def note(text: str) -> None:
    """Write a line for people on stderr."""
    print(printable(text), file=sys.stderr, flush=True)


PLAIN_SECONDS = 30.0  # between two lines of a long job in a log


class ProgressLine:
    """The progress of one job at a time on stderr: a live bar on a terminal, a plain line now and then in a log.

    Args:
        is_live: whether stderr is a terminal. now: monotonic seconds.
    """

    def __init__(self, *, is_live: bool, now: Callable[[], float] = time.monotonic) -> None:
        self._is_live = is_live
        self._now = now
        self._name = ""
        self._bar: Any = None
        self._task: Any = None
        self._began = self._told = 0.0
        self._first = 0

    def show(self, name: str, done: int, total: int | None, detail: str = "", *, is_bytes: bool = False) -> None:
        """Show how far the job is.

        Args:
            total: how much there is to do; None: not known yet.
            detail: words beside the figures.
            is_bytes: whether done and total are bytes, of which a rate is shown.
        """
        if name != self._name:
            self.end()
            self._name, self._began, self._first = name, self._now(), done
            self._told = self._began
            if self._is_live:
                self._start(total, is_bytes)
        if self._is_live:
            self._bar.update(self._task, completed=done, total=total, detail=detail)
        else:
            self._tell(name, done, total, detail, is_bytes)

    def _start(self, total: int | None, is_bytes: bool) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            ProgressColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False), BarColumn(24)]
        columns += [DownloadColumn(binary_units=True), TransferSpeedColumn()] if is_bytes else []
        columns += [TextColumn("{task.fields[detail]}", markup=False), TimeRemainingColumn()]
        self._bar = Progress(*columns, console=Console(stderr=True, force_terminal=True), transient=True)
        self._task = self._bar.add_task(self._name, total=total, detail="")
        self._bar.start()

    def _tell(self, name: str, done: int, total: int | None, detail: str, is_bytes: bool) -> None:
        now = self._now()
        if total is not None and done >= total:
            note(f"{name}: done in {human_seconds(now - self._began)}")
            self._name = ""
        elif now - self._told >= PLAIN_SECONDS:
            self._told = now
            rate = (done - self._first) / (now - self._began)
            figures = [f"{human_bytes(done)} of {human_bytes(total or 0)}, {human_bytes(rate)}/s"] if is_bytes else []
            figures += [detail] if detail else [] if is_bytes else [f"{done} of {total}"]
            figures += [f"about {human_seconds((total - done) / rate)} left"] if total and rate > 0 else []
            note(f"{name}: {', '.join(figures)}")

    def say(self, text: str) -> None:
        """Show a sentence; a bar stays below it."""
        if self._bar is None:
            note(text)
        else:
            self._bar.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def end(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._name = None, ""
