"""What a case of `bench_inputs` is, and how it runs the real commands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One thing that a user brings.

    part: the letter of its part in the README of the cases. kind, name: as there. wrong: does it in an empty directory,
    through the real commands, and returns what was wrong in a sentence; "" where all was right.
    """

    part: str
    kind: str
    name: str
    wrong: Callable[[Path], str]


@dataclass(frozen=True)
class Ended:
    """A command that has ended: its exit status and what it wrote."""

    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Everything that it wrote."""
        return self.out + self.err

    def lacks(self, status: int, *words: str) -> str:
        """Return what is wrong where the status is another one, a word is missing, or a defect is claimed."""
        if "Traceback" in self.text or "defect of fedsoda" in self.text:
            return f"a defect is claimed: {self.text[-300:]}"
        if self.status != status:
            return f"exit status {self.status} instead of {status}: {self.text[-300:]}"
        missing = [word for word in words if word not in " ".join(self.text.split())]
        return f"{missing} missing in: {self.text[-300:]}" if missing else ""


def command(
    module: str, *arguments: str, home: Path, environment: Mapping[str, str] | None = None, seconds: float = 60
) -> Ended:
    """Run `python -m MODULE ARGUMENTS` with an empty FEDSODA_HOME below `home`, and wait for its end.

    Raises:
        subprocess.TimeoutExpired: it did not end.
    """
    given = {**os.environ, "FEDSODA_HOME": str(home / "fedsoda-home"), "COLUMNS": "200", **(environment or {})}
    ended = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        env=given,
        timeout=seconds,
        check=False,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)
