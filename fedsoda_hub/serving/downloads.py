"""Make what the owner downloads, by the command that makes it: this process holds sockets, so torch and plots are another's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedsoda_edge.errors import UsageProblem
from fedsoda_hub.settings.run import RunSettings

Downloadable = Literal["export", "report"]
LONGEST_SECONDS = 3600.0


@dataclass(frozen=True)
class MadeFile:
    """A file that was made in a directory of its own, to be deleted when it was sent."""

    file: Path
    directory: Path
    name: str
    media_type: str

    def forget(self) -> None:
        """Delete it."""
        shutil.rmtree(self.directory, ignore_errors=True)


class Downloads:
    """The downloads of a run, one at a time. program: the words that start `fedsoda-hub`."""

    def __init__(self, settings: RunSettings, program: Sequence[str] = (sys.executable, "-m", "fedsoda_hub")) -> None:
        self._settings = settings
        self._program = program
        self._is_making = asyncio.Lock()

    async def make(self, what: Downloadable) -> MadeFile:
        """Make the report as one HTML file, or the adapter as a zip.

        Raises:
            UsageProblem: another download is being made, or the command says why there is none.
        """
        if self._is_making.locked():
            raise UsageProblem("another download is being made; try again when it has come")
        async with self._is_making:
            directory = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="fedsoda-"))
            try:
                await self._run(what, directory / what)
                name = self._settings.name
                if what == "report":
                    return MadeFile(directory / what / "report.html", directory, f"{name}-report.html", "text/html")
                packed = await asyncio.to_thread(shutil.make_archive, str(directory / name), "zip", directory / what)
                return MadeFile(Path(packed), directory, f"{name}-adapter.zip", "application/zip")
            except BaseException:
                shutil.rmtree(directory, ignore_errors=True)
                raise

    async def _run(self, what: Downloadable, to: Path) -> None:
        child = await asyncio.create_subprocess_exec(
            *self._program,
            *(what, self._settings.path, "--to", str(to), "--json"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            out, _ = await asyncio.wait_for(child.communicate(), LONGEST_SECONDS)
        finally:
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
                await child.wait()
        if child.returncode:
            raise UsageProblem(_why(out) or f"`fedsoda-hub {what}` ended with status {child.returncode}; try it there")


def _why(out: bytes) -> str:
    """Return the sentence of a command's error; "": it said none."""
    try:
        found = json.loads(out)
    except ValueError:
        return ""
    said = found.get("message") if isinstance(found, dict) else None
    return said if isinstance(said, str) else ""
