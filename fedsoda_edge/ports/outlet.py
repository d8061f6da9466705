"""Say lines on stdout and stderr in a way that decides nothing: who reads too slowly, or no more, loses lines.

A thread of its own writes what waits in a bounded queue, so that a full pipe holds up nobody; what finds no room there, or
no room on a disk, is dropped and counted, and the next line that can be written says how many were. What is said is
left to `console.py` and `logs.py`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, Literal, TextIO

from fedsoda_edge.units import counted

MOST_WAITING = 10_000  # texts, of lines mostly
END_SECONDS = 3.0  # without progress, after which a command that is over leaves what still waits
_AGAIN_SECONDS = 0.05  # between two tries to write where another program made the descriptor non-blocking


class Outlet:
    """One of the two standard streams.

    Until `beside` begins, texts are written at once, to what `sys` has under this name at that moment.
    """

    def __init__(self, name: Literal["stdout", "stderr"]) -> None:
        self._name = name
        self._waiting: SimpleQueue[str | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stream: TextIO | None = None  # while the thread writes
        self._lost = self._unsaid = 0
        self._why = ""
        self._wording: Callable[[str], str] | None = None
        self._is_closed = False  # since the process began
        self._is_cut = False  # a part of a text was written
        self._written = 0  # texts, the lost ones too

    @property
    def lost(self) -> int:
        """The number of texts that were dropped."""
        return self._lost

    @property
    def is_closed(self) -> bool:
        """Whether the process was started without the stream."""
        return self._is_closed

    def word_losses(self, wording: Callable[[str], str] | None) -> None:
        """Write the line that says how many were lost in this form; None: as it stands. stdout has no such line."""
        self._wording = wording

    def forget_stream(self) -> None:
        """Write to what `sys` has again."""
        self._stream, self._is_closed = None, False
        self._lost = self._unsaid = 0

    def say(self, text: str) -> None:
        """Write a text, or drop it and count it. Never raises, never waits."""
        if self._thread is None:
            self._put(text)
        elif self._waiting.qsize() >= MOST_WAITING:
            self._lose("nobody reads them")
        else:
            self._waiting.put(text)

    def give(self, text: str) -> None:
        """Write a text that is a command's result, after all that waits, however long its reader takes.

        Raises:
            OSError: it could not be written.
        """
        if self._is_closed:
            raise OSError(errno.EBADF, "it is closed")
        with self._on_its_own():
            self._write(text)

    def begin(self, stream: TextIO | None) -> None:
        """Write to this stream from now on, in a thread of its own. None: the process was started without it."""
        self._stream, self._is_closed = stream, stream is None
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"says on {self._name}")
        self._thread.start()

    def end(self, seconds: float | None = END_SECONDS) -> None:
        """Write what waits, then write at once again.

        Args:
            seconds: how long to wait for a reader that takes nothing; None: as long as it is there.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        waiting = self._waiting
        waiting.put(None)
        until = time.monotonic() + (seconds or 0.0)
        before = self._written
        while thread.is_alive() and (seconds is None or time.monotonic() < until):
            thread.join(0.05)
            if self._written != before:
                before, until = self._written, time.monotonic() + (seconds or 0.0)
        if thread.is_alive():  # it is left behind in its write, with a queue that nobody adds to
            self._waiting = SimpleQueue()
            for _ in range(waiting.qsize()):
                self._lose("nobody reads them")

    @contextlib.contextmanager
    def _on_its_own(self) -> Iterator[None]:
        """Write what waits, however long it takes, and let the block write."""
        was_beside = self._thread is not None
        self.end(None)
        try:
            yield
        finally:
            if was_beside:
                self.begin(self._stream)

    def _run(self) -> None:
        waiting = self._waiting
        while (text := waiting.get()) is not None:
            self._put(text)

    def _put(self, text: str) -> None:
        try:
            lost = self._unsaid
            before = self._losses(lost) if lost and self._name == "stderr" else ""
            self._write(("\n" if self._is_cut else "") + before + text)
            self._unsaid, self._is_cut = self._unsaid - lost, False
        except (OSError, ValueError) as error:  # ValueError: the stream is closed, or cannot encode it
            self._lose(getattr(error, "strerror", None) or str(error))
        self._written += 1

    def _losses(self, lost: int) -> str:
        said = f"({lost} lines were lost here: {self._why})"
        return f"{said}\n" if self._wording is None else self._wording(said)

    def _lose(self, why: str) -> None:
        self._lost += 1
        self._unsaid += 1
        self._why = why

    def _write(self, text: str) -> None:
        stream: TextIO | None = self._stream or getattr(sys, self._name)
        if stream is None or self._is_closed:
            raise OSError(errno.EBADF, "it is closed")
        descriptor = _descriptor(stream, self._name)
        if descriptor is None:
            stream.write(text)
            stream.flush()
        else:  # past the stream's buffer, which would keep what failed, and fail again when the process ends
            self._write_all(descriptor, text.encode(stream.encoding or "utf-8", "backslashreplace"))

    def _write_all(self, descriptor: int, data: bytes) -> None:
        view, until = memoryview(data), time.monotonic() + END_SECONDS
        try:
            while view:
                try:
                    view = view[os.write(descriptor, view) :]
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise
                    time.sleep(_AGAIN_SECONDS)
        except OSError:
            self._is_cut = self._is_cut or len(view) < len(data)
            raise


def _descriptor(stream: TextIO, name: str) -> int | None:
    """Find the descriptor of a stream that is the process's own; None for one that a program put in its place."""
    if stream is not getattr(sys, f"__{name}__"):
        return None
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None


OUT, ERR = Outlet("stdout"), Outlet("stderr")


class HarmlessStream(io.TextIOBase):
    """A stream for libraries that print or draw: it writes to an outlet, and so never fails.

    Args:
        stream: the stream that the outlet writes to; None: whatever has its name then.
    """

    def __init__(self, outlet: Outlet, stream: TextIO | None = None) -> None:
        self._outlet = outlet
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        """The way to write characters that the encoding lacks."""
        return "backslashreplace"

    @property
    def buffer(self) -> Any:
        """The stream of bytes below."""
        return getattr(self._stream, "buffer")  # noqa: B009  # a stream of text alone has none

    def write(self, text: str) -> int:
        """Write the text, or drop it."""
        if not isinstance(text, str):
            raise TypeError(f"text is written here, not {type(text).__name__}")
        self._outlet.say(text)
        return len(text)

    def fileno(self) -> int:
        """Return the descriptor of the stream."""
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Tell whether the text goes to a terminal."""
        return self._stream is not None and self._stream.isatty()


@contextlib.contextmanager
def beside() -> Iterator[None]:
    """Let both outlets write in threads of their own within the block, and leave nothing behind that could fail later.

    What libraries print goes through them too.
    """
    _hold_standard_descriptors()
    streams = sys.stdout, sys.stderr
    OUT.begin(sys.stdout)
    ERR.begin(sys.stderr)
    sys.stdout, sys.stderr = HarmlessStream(OUT, sys.stdout), HarmlessStream(ERR, sys.stderr)
    try:
        yield
    finally:
        OUT.end()
        if OUT.lost and not OUT.is_closed:
            ERR.say(f"{counted(OUT.lost, 'line')} of stdout were lost\n")
        ERR.end()
        sys.stdout, sys.stderr = streams
        OUT.forget_stream()
        ERR.forget_stream()


def _hold_standard_descriptors() -> None:
    """Open what is closed of the three standard descriptors, so that no file or socket gets one of these numbers.

    A library that prints, or a child, would write into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            _send_to_nowhere(number)


def _send_to_nowhere(number: int) -> None:
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere != number:
            os.dup2(nowhere, number, inheritable=True)
            os.close(nowhere)
