"""Speak to terminals and scripts, in the same way from both commands: JSON envelope, sentences, exit statuses.

What a command does, and which events it shows, is left to the two `cli` rooms.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import IO, Any, cast

import typer

from fedsoda_edge.errors import USAGE_HELP, FedSODAError, UsageProblem, WayOut
from fedsoda_edge.ports.defects import machine_words, sentence_of, trace_of
from fedsoda_edge.ports.ends import of_this_machine
from fedsoda_edge.ports.log_lines import LINES, Level, LogChoices, printable
from fedsoda_edge.ports.logs import logs_shown
from fedsoda_edge.ports.outlet import ERR, OUT, HarmlessStream, beside
from fedsoda_edge.ports.system import on_stop
from fedsoda_edge.units import finite, human_bytes, human_seconds

EXIT_HELP = (
    "Exit status: 0 done; 1 failed, do not retry; 2 wrong usage, settings or data; 3 temporary (network, hub away, "
    "disk full), retry is sensible; 4 this device cannot hold the model; 5 refused by the hub; 6 one side is too old; "
    "130 Ctrl+C. "
    "SIGTERM and SIGHUP save state and exit 0."
)


class Terminated(BaseException):
    """The request of a signal to save state and exit 0. name: that of the signal."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@contextlib.contextmanager
def reporting(
    as_json: bool, jsonl: bool, debug: bool, *, is_private: bool = False, logs: LogChoices | None = None
) -> Iterator[None]:
    """Show an error as one sentence, and exit with the status of its class.

    Args:
        as_json, jsonl: whether stdout gets one JSON object, or one event a line.
        debug: whether to show logs and tracebacks on stderr.
        is_private: whether the command reads private text, which the words of a defect may quote: they are left out.
        logs: how its lines are written; None: for people on stderr.
    """
    with contextlib.ExitStack() as lines:

        def keep() -> None:
            if logs is not None:
                lines.enter_context(LINES.kept(logs))

        yield from _reported(as_json, jsonl, debug, is_private, keep)


def _reported(as_json: bool, jsonl: bool, debug: bool, is_private: bool, keep: Callable[[], None]) -> Iterator[None]:
    """Do what `reporting` does; keep: lets lines be written as the command asks."""

    on_stop(_terminate)
    ASKED.is_answered = False
    try:
        if as_json and jsonl:
            raise UsageProblem("--json prints one object and --jsonl one event a line; give only one of them")
        keep()
        with logs_shown(is_debug=debug), PULSE.beating():
            yield
    except typer.Exit:
        raise
    except (Exception, Terminated, KeyboardInterrupt) as error:
        raise typer.Exit(_told(error, as_json, jsonl, debug, is_private=is_private)) from None


def _terminate(number: int, _: Any) -> None:
    raise Terminated(signal.Signals(number).name)


def _told(
    error: BaseException,
    as_json: bool,
    jsonl: bool,
    debug: bool,
    *,
    is_private: bool = False,
) -> int:
    """Say how the command ended, in words and for programs; return its exit status."""
    if isinstance(error, Terminated):
        note("stopped; the same command continues where this one ended")
        finish({"status": "ok", "stopped": error.name}, as_json, jsonl)
        return 0
    if isinstance(error, KeyboardInterrupt):
        note("stopped; the same command continues where this one ended")
        finish(_failure("Interrupted", "Ctrl+C", 130, "interrupted", WayOut("retry", "{command}")), as_json, jsonl)
        return 130
    is_quoting = is_private and not isinstance(error, FedSODAError) and not machine_words(error)
    said, kind = sentence_of(error) if is_quoting else str(error), type(error).__name__
    status, code, way_out = 1, "defect", WayOut("defect", "{command} --debug")
    if isinstance(error, FedSODAError):
        status, code, way_out = error.exit_status, error.code, error.way_out()
        note(f"error: {error}")
    elif isinstance(error, OSError | MemoryError) and not is_quoting:
        refused = of_this_machine(error)
        status, code, way_out = refused.exit_status, refused.code, refused.way_out
        said = str(error) or "memory ran out"
        note(f"error: {said}; {refused.remedy}, then try again")
    else:
        words = said if is_quoting else f"{kind}: {said}"
        note(f"error: {words}; this is a defect of fedsoda: please report it, with what --debug shows")
    if debug:
        note(
            getattr(error, "details", "")
            or (trace_of(error) if is_quoting else "".join(traceback.format_exception(error)))
        )
    finish(_failure(kind, said, status, code, way_out), as_json, jsonl)
    return status


def _failure(kind: str, message: str, status: int, code: str, way_out: WayOut) -> dict[str, object]:
    """Make the object of an error; its keys are part of the promise to programs."""
    return {
        "status": "error",
        "error": kind,
        "message": message,
        "exit_status": status,
        "code": code,
        "recovery": way_out.recovery,
        "helps": way_out.helps.format(command=ASKED.command),
    }


class CommandLine:
    """The command that this process was asked for.

    command: its words up to the options: "fedsoda-edge cache list". is_answered: whether programs have the last they get.
    """

    def __init__(self) -> None:
        self.command = "fedsoda-edge"
        self.is_answered = False


ASKED = CommandLine()


def run(app: typer.Typer) -> None:
    """Run the command and exit with its status. Wrong usage is shown as one sentence too, with --json as an object."""
    with beside():
        status = _status_of(app)
    sys.exit(status)


def _status_of(app: typer.Typer) -> int:
    """Run the command. Whatever ends it, also before it began or while it ended, --jsonl has a last line."""
    as_json, jsonl = is_asked("--json"), is_asked("--jsonl")
    ASKED.is_answered = False
    try:
        on_stop(_terminate)
        status = app(standalone_mode=False)
    except OSError:  # of a help text that nobody reads: commands turn theirs into sentences
        status = 0
    except BaseException as error:
        if hasattr(error, "format_message"):  # typer brings its own click, whose classes have no public name
            status = _of_usage(error, as_json, jsonl)
        else:
            is_interrupt = type(error).__name__ == "Abort"
            ended = KeyboardInterrupt() if is_interrupt else error
            status = _told(ended, as_json, jsonl, is_asked("--debug"), is_private=True)
    return status if isinstance(status, int) else 0


def _of_usage(error: Any, as_json: bool, jsonl: bool) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        note(f"error: {error.format_message().rstrip('.')}{_where(error)}; --help shows how to use it")
    finish(_failure("Usage", error.format_message(), 2, "usage", WayOut("fix-input", USAGE_HELP)), as_json, jsonl)
    return 2


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
    """Print the object of --json, or the last event of --jsonl, once. That it cannot be written does not change what was done."""
    if ASKED.is_answered:
        return
    ASKED.is_answered = True
    if as_json:
        try:
            OUT.give(json.dumps(finite({"schema": 1, **values}), allow_nan=False) + "\n")
        except (OSError, ValueError) as error:
            note(f"the JSON object could not be written to stdout: {getattr(error, 'strerror', None) or error}")
    elif jsonl:
        line_out(json.dumps(finite({"schema": 1, "event": "end", "terminal": True, **values}), allow_nan=False))


def line_out(text: str) -> None:
    """Write a line for programs on stdout."""
    OUT.say(text + "\n")


def hand_over(secret: str, as_json: Mapping[str, object] | None) -> None:
    """Print what exists nowhere else, alone on stdout or in the object of --json.

    Args:
        as_json: the object's fields; None: only the secret is printed.

    Raises:
        UsageProblem: it could not be written, so nobody has it.
    """
    text = secret if as_json is None else json.dumps({"schema": 1, **as_json}, allow_nan=False)
    try:
        OUT.give(text + "\n")
        ASKED.is_answered = as_json is not None
    except (OSError, ValueError) as error:
        raise UsageProblem(
            f"stdout takes nothing ({getattr(error, 'strerror', None) or error}), so nothing was made; name a file with --out"
        ) from error


def note(text: str) -> None:
    """Write a line for people on stderr."""
    LINES.say(text)


def show(drawing: Any) -> None:
    """Draw a table of rich for people on stderr."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.capture() as drawn:
        console.print(drawing)
    ERR.say(drawn.get())


FIRST_SECONDS = 4.0  # of a job after which a log has a line of it
PLAIN_SECONDS = 25.0  # between two lines of a long job in a log
_BEAT_SECONDS = 0.5


@dataclass(frozen=True)
class _Job:
    """A piece of work. began, at: when it began, and when it was as far as `done`; first: how far it was then."""

    name: str
    began: float
    first: int = 0
    at: float = 0.0
    done: int = 0
    total: int | None = None
    detail: str = ""
    is_bytes: bool = False

    def line(self, now: float) -> str:
        """Say how far the job is, and how long it has worked where it has no figures."""
        is_known = self.total is not None or bool(self.detail)
        figures = []
        rate = (self.done - self.first) / (self.at - self.began) if self.at > self.began else 0.0
        if self.is_bytes:
            figures += [f"{human_bytes(self.done)} of {human_bytes(self.total or 0)}, {human_bytes(rate)}/s"]
        if self.detail:
            figures += [self.detail]
        elif is_known and not self.is_bytes:
            figures += [f"{self.done} of {self.total}"]
        if self.total and rate > 0:
            figures += [f"about {human_seconds((self.total - self.done) / rate)} left"]
        else:
            figures += [f"{human_seconds(now - self.began)} so far"]
        return f"{self.name}: {', '.join(figures)}"


class Pulse:
    """The lines of long work in a log: what is done within 5 s of its begin, and how far it is twice a minute.

    A thread looks for what is due, so that work which reports nothing for minutes is not silent either.

    Args:
        now: monotonic seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self._lock = threading.Lock()
        self._command: _Job | None = None  # what is done where no job is known
        self._job: _Job | None = None
        self._due_at = 0.0
        self._is_drawn = self._is_awaited = False

    def work(self, name: str) -> None:
        """Say what the command does from now on, beside its jobs; "": nothing that takes this device's time."""
        with self._lock:
            self._command = _Job(name, self.now()) if name else None
            self._due_at = self.now() + FIRST_SECONDS

    def job(self, job: _Job | None, *, is_drawn: bool = False, is_awaited: bool = False) -> None:
        """Take how far the job is; None: it is over.

        Args:
            is_drawn: whether a bar on a terminal shows it, so that no line is needed.
            is_awaited: whether others do it: a line is due only where something has changed.
        """
        with self._lock:
            is_new = (self._job and self._job.name) != (job and job.name)
            self._job, self._is_drawn, self._is_awaited = job, is_drawn, is_awaited
            if is_new:
                self._due_at = self.now() + (PLAIN_SECONDS if is_awaited else FIRST_SECONDS)
        if job is not None:
            self._say_due()

    def beat(self) -> None:
        """Say what is due. Called every half second."""
        if not self._is_awaited:
            self._say_due()

    def _say_due(self) -> None:
        with self._lock:
            job, now = self._job or self._command, self.now()
            if job is None or (self._is_drawn and self._job) or now < self._due_at:
                return
            self._due_at = now + PLAIN_SECONDS
        note(job.line(now))

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Look for what is due, in a thread, within the block."""
        is_over = threading.Event()

        def beats() -> None:
            while not is_over.wait(_BEAT_SECONDS):
                self.beat()

        threading.Thread(target=beats, daemon=True, name="says what takes long").start()
        try:
            yield
        finally:
            is_over.set()
            self.work("")
            self.job(None)


PULSE = Pulse()


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Let a log say that this is done, where it takes long, within the block."""
    PULSE.work(what)
    try:
        yield
    finally:
        PULSE.work("")


class ProgressLine:
    """The progress of one job at a time on stderr: a live bar on a terminal, a plain line now and then in a log.

    Args:
        is_live: whether stderr is a terminal.
        pulse: what says the lines of a log.
    """

    def __init__(self, *, is_live: bool, pulse: Pulse = PULSE) -> None:
        self._is_live = is_live
        self._pulse = pulse
        self._job: _Job | None = None
        self._bar: Any = None
        self._task: Any = None

    def show(
        self,
        name: str,
        done: int,
        total: int | None,
        detail: str = "",
        *,
        is_bytes: bool = False,
        is_awaited: bool = False,
    ) -> None:
        """Show how far the job is.

        Args:
            total: how much there is to do; None: not known yet.
            detail: words beside the figures.
            is_bytes: whether done and total are bytes, of which a rate is shown.
            is_awaited: whether others do it, and this process only hears how far it is.
        """
        now = self._pulse.now()
        if self._job is None or name != self._job.name:
            self.end()
            self._job = _Job(name, now, done)
            if self._is_live:
                self._start(name, total, is_bytes)
        self._job = replace(self._job, at=now, done=done, total=total, detail=detail, is_bytes=is_bytes)
        if self._is_live:
            self._bar.update(self._task, completed=done, total=total, detail=detail)
            self._pulse.job(self._job, is_drawn=True)
        elif total is not None and done >= total:
            note(f"{name}: done in {human_seconds(now - self._job.began)}")
            self.end()
        else:
            self._pulse.job(self._job, is_awaited=is_awaited)

    def _start(self, name: str, total: int | None, is_bytes: bool) -> None:
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
        console = Console(file=cast("IO[str]", HarmlessStream(ERR, sys.stderr)), force_terminal=True)
        self._bar = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
        self._task = self._bar.add_task(name, total=total, detail="")
        self._bar.start()

    def say(self, text: str, level: Level | None = None, event: str = "") -> None:
        """Show a sentence; a bar stays below it."""
        if self._bar is None:
            LINES.say(text, level, event)
        else:
            LINES.drawn(text, level, event)
            self._bar.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def end(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._job = None
        self._pulse.job(None)


def is_terminal() -> bool:
    """Tell whether people see stderr on a terminal, in the form for people."""
    return sys.stderr is not None and sys.stderr.isatty() and LINES.is_for_people
