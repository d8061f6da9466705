"""Run the commands of one directory as child processes that write their events to logs. No code of ours is imported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

ONE_THREAD = {"FEDSODA_THREADS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
NO_CHANGES: Mapping[str, str] = MappingProxyType({})
PATIENCE_SECONDS = 300.0

# A device with less disk than this one: sizes of disks come from `shutil` alone, in the agent and in its worker.
_SMALL_DISK = """import os, shutil
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 40, 0, int(os.environ["SMALL_DISK_BYTES"]))
"""


def small_disk(directory: Path, free_bytes: int, python_path: str | None = None) -> dict[str, str]:
    """Make the environment of a process that sees so many bytes free, by a `sitecustomize` in `directory`.

    Args:
        python_path: where else it looks for packages; None: as this process does.
    """
    directory.mkdir(exist_ok=True)
    (directory / "sitecustomize.py").write_text(_SMALL_DISK, encoding="utf-8")
    others = os.environ.get("PYTHONPATH") if python_path is None else python_path
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(directory), others])),
        "SMALL_DISK_BYTES": str(free_bytes),
    }


class Commands:
    """Processes of one directory; `log` names the file that takes what one of them says. All end with the block.

    Args:
        environment: of all of them, beside this process's own.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str] = NO_CHANGES) -> None:
        self.directory = directory
        self._environment = {**os.environ, **ONE_THREAD, **environment}
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def ask(self, module: str, *arguments: str | Path, environment: Mapping[str, str] = NO_CHANGES) -> dict[str, Any]:
        """Run a command with `--json` to its end and return its report, which says "ok"."""
        command = [sys.executable, "-m", module, *map(str, arguments), "--json"]
        ended = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            env={**self._environment, **environment},
            cwd=self.directory,
        )
        assert ended.returncode == 0, ended.stderr
        found: dict[str, Any] = json.loads(ended.stdout)
        assert found["status"] == "ok"
        return found

    def start(
        self, log: str, module: str, *arguments: str | Path, environment: Mapping[str, str] = NO_CHANGES
    ) -> subprocess.Popen[str]:
        """Start a command with `--jsonl` that appends to the log."""
        command = [sys.executable, "-m", module, *map(str, arguments), "--jsonl"]
        with self._path(log).open("a", encoding="utf-8") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                text=True,
                env={**self._environment, **environment},
                cwd=self.directory,
            )
        self._processes.append(process)
        return process

    def forget(self, process: subprocess.Popen[str]) -> None:
        """Let this process, which has ended, have ended in any way."""
        self._processes.remove(process)

    def _path(self, log: str) -> Path:
        return self.directory / f"{log}.log"

    def events(self, log: str) -> list[dict[str, Any]]:
        """Return the events that were said so far; other lines of the log are for people."""
        lines = self._path(log).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def wait_for(self, log: str, **wanted: Any) -> dict[str, Any]:
        """Return the first event of the log with these values, as soon as it is there."""
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            for event in self.events(log):
                if wanted.items() <= event.items():
                    return event
            ended_badly = [process.args for process in self._processes if process.poll() not in (None, 0)]
            assert not ended_badly, f"{ended_badly} failed: {self._path(log).read_text(encoding='utf-8')[-3000:]}"
            assert time.monotonic() < until, (
                f"{wanted} never came: {self._path(log).read_text(encoding='utf-8')[-3000:]}"
            )
            time.sleep(0.02)

    def finish(self, *processes: subprocess.Popen[str]) -> None:
        """Wait until they have ended well."""
        for process in processes:
            assert process.wait(timeout=PATIENCE_SECONDS) == 0, f"{process.args!r} ended with {process.returncode}"

    def stop(self, *processes: subprocess.Popen[str]) -> None:
        """Ask them to save their state and end."""
        for process in processes:
            process.send_signal(signal.SIGTERM)
        self.finish(*processes)
