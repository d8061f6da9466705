"""Say lines on stdout and stderr in a way that decides nothing: who reads too slowly, or no more, loses lines.

A thread of its own writes what waits in a bounded queue, so that a full pipe holds up nobody; what finds no room there, or
no room on a disk, is dropped and counted, and the next line that can be written says how many were. What is said is
left to `console.py` and `logs.py`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Literal, TextIO

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
        self._lost = 0
        self._why = ""
        self._is_closed = False  # since the process began
        self._is_cut = False  # a part of a text was written
        self._written = 0  # texts, the lost ones too

    @property
    def lost(self) -> int:
        """How many texts were dropped since the last one that was written."""
        return self._lost

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

    def begin(self) -> None:
        """Write in a thread of its own from now on."""
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
        self._waiting.put(None)
        until = time.monotonic() + (seconds or 0.0)
        before = self._written
        while thread.is_alive() and (seconds is None or time.monotonic() < until):
            thread.join(0.05)
            if self._written != before:
                before, until = self._written, time.monotonic() + (seconds or 0.0)
        if thread.is_alive():  # it is left behind in its write, with a queue that nobody adds to
            self._waiting = SimpleQueue()

    def replace_if_closed(self) -> None:
        """Let libraries print to nowhere where this process was started without the stream."""
        if getattr(sys, self._name) is None:
            self._is_closed = True
            nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # as long as the process
            setattr(sys, self._name, nowhere)

    @contextlib.contextmanager
    def _on_its_own(self) -> Iterator[None]:
        """Write what waits, however long it takes, and let the block write."""
        was_beside = self._thread is not None
        self.end(None)
        try:
            yield
        finally:
            if was_beside:
                self.begin()

    def _run(self) -> None:
        waiting = self._waiting
        while (text := waiting.get()) is not None:
            self._put(text)

    def _put(self, text: str) -> None:
        try:
            before = f"({self._lost} lines were lost here: {self._why})\n" if self._lost and self._is_for_people else ""
            self._write(("\n" if self._is_cut else "") + before + text)
            self._lost, self._is_cut = 0, False
        except (OSError, ValueError) as error:  # ValueError: the stream is closed, or cannot encode it
            self._lose(getattr(error, "strerror", None) or str(error))
        self._written += 1

    @property
    def _is_for_people(self) -> bool:
        return self._name == "stderr"

    def _lose(self, why: str) -> None:
        self._lost += 1
        self._why = why

    def _write(self, text: str) -> None:
        stream: TextIO = getattr(sys, self._name)
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


class Written:
    """What libraries that draw on a terminal take for a file: it writes to an outlet."""

    encoding = "utf-8"

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet

    def write(self, text: str) -> int:
        """Write the text, or drop it."""
        self._outlet.say(text)
        return len(text)

    def flush(self) -> None:
        """Do nothing: an outlet keeps nothing back."""

    def isatty(self) -> bool:
        """Tell whether the text goes to a terminal: only then is something drawn."""
        return True


@contextlib.contextmanager
def beside() -> Iterator[None]:
    """Let both outlets write in threads of their own within the block, and leave nothing behind that could fail later."""
    _hold_standard_descriptors()
    for outlet in (OUT, ERR):
        outlet.replace_if_closed()
        outlet.begin()
    try:
        yield
    finally:
        for outlet in (OUT, ERR):
            outlet.end()
        if OUT.lost:
            ERR.say(f"{OUT.lost} lines of stdout were lost\n")
        for number, stream in ((1, sys.stdout), (2, sys.stderr)):
            try:
                if stream is not None:
                    stream.flush()  # of what libraries printed
            except (OSError, ValueError):
                _send_to_nowhere(number)


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
