"""Send our loggers to stderr where a developer asks for it: `--debug`, or FEDSODA_LOG=debug.

Each room has one logger, named after its package: `logging.getLogger("fedsoda_edge.join")`. Users of the SDK set them
up as any other logger. How a line of a conversation is written is left to `protocol/trace.py`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.ports.log_lines import LINES

PACKAGES = ("fedsoda_edge", "fedsoda_hub")


class _Stderr(logging.Handler):
    """A handler that writes plain lines to what stderr is at that moment."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s.%(msecs)03d %(name)s %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record."""
        if LINES.is_for_people:
            LINES.say(self.format(record), "debug")
        else:  # which notes the time itself
            LINES.say(f"{record.name} {record.getMessage()}", "debug")


@contextlib.contextmanager
def logs_shown(*, is_debug: bool) -> Iterator[None]:
    """Show what our loggers say, from the level debug on; loggers of libraries stay as they are.

    Args:
        is_debug: whether the command line asks for it; FEDSODA_LOG=debug asks too.

    Raises:
        UsageProblem: FEDSODA_LOG has another value.
    """
    wanted = os.environ.get("FEDSODA_LOG", "")
    if wanted and wanted.lower() != "debug":
        raise UsageProblem(f"FEDSODA_LOG is {wanted!r}, and only debug is known; set it to debug, or unset it")
    if not (is_debug or wanted):
        yield
        return
    handler, loggers = _Stderr(), [logging.getLogger(name) for name in PACKAGES]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
        logger.propagate = False  # a handler of the root would show each line a second time
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
