"""Write the lines that people and collectors of logs read: on stderr, for the journal, and to a file that is rotated.

One line a fact. What is said is left to the displays of both commands; a line that cannot be written decides nothing
(`outlet.py`).
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TextIO, TypeAlias, cast

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.ports.outlet import ERR, Outlet
from fedsoda_edge.units import parse_bytes

Level: TypeAlias = Literal["debug", "info", "notice", "warning", "error"]
Form: TypeAlias = "Callable[[str, Level, str], str]"

_PRIORITIES: dict[Level, int] = {"debug": 7, "info": 6, "notice": 5, "warning": 4, "error": 3}  # of sd-daemon(3)
_SPOKEN: dict[str, Level] = {"error: ": "error", "note: ": "notice"}  # how sentences for people begin

# What others write (an edge's reason, a model's answer) must not steer this terminal, nor turn the direction of writing.
_CONTROL = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
_CONTROL |= dict.fromkeys((0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)), "\ufffd")


def printable(text: str) -> str:
    """Replace control characters, which a terminal would obey, and those of the direction of writing; lines and tabs stay."""
    return text.translate(_CONTROL)


@dataclass(frozen=True)
class LogChoices:
    """The options of a command that say where its lines go, and how.

    format: "auto": for people on a terminal, else with time and level; "text", "json": so everywhere. size: bytes of the
    file, as people write them, before it is rotated. keep: how many older files stay beside it.
    """

    format: str = "auto"
    file: Path | None = None
    size: str = "10MB"
    keep: int = 5


# --- how a line is written -----------------------------------------------------------------------------


def _for_people(text: str, level: Level, event: str) -> str:
    return printable(text) + "\n"


def _timed(text: str, level: Level, event: str) -> str:
    """Write "2026-11-30T00:20:49.123Z info: text", each line of it."""
    start = f"{_now()} {level}: "
    return "".join(f"{start}{line}\n" for line in printable(text).split("\n"))


def _journaled(text: str, level: Level, event: str) -> str:
    """Write a line as the journal takes it, which notes the time itself."""
    return "".join(f"<{_PRIORITIES[level]}>{line}\n" for line in printable(text).split("\n"))


def _as_json(text: str, level: Level, event: str) -> str:
    """Write one object a fact."""
    values = {"time": _now(), "level": level, "message": printable(text)} | ({"event": event} if event else {})
    return json.dumps(values) + "\n"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def is_journal() -> bool:
    """Tell whether stderr is the journal, as systemd says it with JOURNAL_STREAM."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(2)
    except OSError:
        return False
    return (device, inode) == (str(found.st_dev), str(found.st_ino))


# --- where it goes -------------------------------------------------------------------------------------


class LogLines:
    """The lines of this command. Before `kept`, and after it, they are for people on stderr."""

    def __init__(self) -> None:
        self._form: Form = _for_people
        self._is_asked = False  # for a format on stderr, also where events go to stdout
        self._file: Outlet | None = None
        self._file_form: Form = _timed

    @property
    def is_for_people(self) -> bool:
        """Whether stderr has the form for a terminal, on which progress may be drawn."""
        return self._form is _for_people

    def say(self, text: str, level: Level | None = None, event: str = "") -> None:
        """Write a fact on stderr, and to the file.

        Args:
            level: None: as the sentence begins.
            event: the tag of the event that it is about; "": it is about none.
        """
        self._write(text, level, event, is_on_stderr=True)

    def drawn(self, text: str, level: Level | None = None, event: str = "") -> None:
        """Write a fact that a terminal shows already to the file alone."""
        self._write(text, level, event, is_on_stderr=False)

    def beside_events(self, text: str, level: Level | None = None, event: str = "") -> None:
        """Write a fact whose event is on stdout: to the file, and on stderr where a format was asked for."""
        self._write(text, level, event, is_on_stderr=self._is_asked)

    def _write(self, text: str, level: Level | None, event: str, *, is_on_stderr: bool) -> None:
        start = next((one for one in _SPOKEN if text.startswith(one)), "")
        level = level or _SPOKEN.get(start, "info")
        bare = text.removeprefix(start)
        if is_on_stderr:
            ERR.say(self._form(text if self._form is _for_people else bare, level, event))
        if self._file is not None:
            self._file.say(self._file_form(bare, level, event))

    @contextlib.contextmanager
    def kept(self, choices: LogChoices) -> Iterator[None]:
        """Write lines as these options say within the block.

        Raises:
            UsageProblem: an option has a value that is not known, or the file cannot be written.
        """
        if choices.format not in ("auto", "text", "json"):
            raise UsageProblem(f"--log-format {choices.format!r} is not known; choose auto, text or json")
        file = None
        if choices.file is not None:
            file = RotatedFile(choices.file, parse_bytes(choices.size, "--log-size"), choices.keep)
        is_terminal = sys.stderr is not None and sys.stderr.isatty()
        if choices.format == "json":
            self._form = _as_json
        elif choices.format == "text" or not is_terminal:
            self._form = _timed
        if choices.format != "json" and self._form is _timed and is_journal():
            self._form = _journaled
        self._is_asked = choices.format != "auto"
        self._file_form = _as_json if choices.format == "json" else _timed
        ERR.word_losses(lambda text: self._form(text, "warning", ""))
        if file is not None:
            self._file = Outlet("stderr")
            self._file.word_losses(lambda text: self._file_form(text, "warning", ""))
            self._file.begin(cast(TextIO, file))
        try:
            yield
        finally:
            if self._file is not None and file is not None:
                self._file.end()
                file.close()
            self._form, self._is_asked, self._file = _for_people, False, None
            ERR.word_losses(None)


class RotatedFile(io.TextIOBase):
    """A file of lines that only its owner reads. At a size it becomes NAME.1, and NAME.1 becomes NAME.2.

    Raises:
        UsageProblem: on construction, when it cannot be written.
    """

    def __init__(self, path: Path, max_bytes: int, keep: int) -> None:
        self._path, self._max_bytes, self._keep = path.expanduser().absolute(), max_bytes, keep
        try:
            self._open()
        except OSError as error:
            raise UsageProblem(
                f"the log file {path} cannot be written: {error.strerror}; name another with --log-file, in a directory that "
                "is there"
            ) from error

    def _open(self) -> None:
        # Not blocking: a pipe that nobody reads is refused at the start.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
        self._descriptor = os.open(self._path, flags, 0o600)
        found = os.fstat(self._descriptor)
        self._size = found.st_size if stat.S_ISREG(found.st_mode) else None  # None: what cannot be rotated

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            os.close(self._descriptor)
        super().close()

    def write(self, text: str) -> int:
        """Write a text whole.

        Raises:
            OSError: the disk is full, or the file is gone.
        """
        data = text.encode("utf-8", "backslashreplace")
        if self._size is not None and self._size and self._size + len(data) > self._max_bytes:
            self._rotate()
        written = os.write(self._descriptor, data)
        if self._size is not None:
            self._size += written
        if written < len(data):
            raise OSError(errno.ENOSPC, "a part of a line was written")
        return len(text)

    def _rotate(self) -> None:
        """Begin a new file. Where that fails, lines go to the old one, which grows."""
        with contextlib.suppress(OSError):
            for number in range(self._keep - 1, 0, -1):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(self._older(number), self._older(number + 1))
            if self._keep:
                os.replace(self._path, self._older(1))
            else:
                self._path.unlink()
            before = self._descriptor
            self._open()
            os.close(before)

    def _older(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")


LINES = LogLines()
