"""A child on pipes: results, progress and errors cross; it never outlives its parent."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedsoda_edge.errors import DiskFull, WorkerFailed
from fedsoda_edge.ports.child import Child, Values

CHILD = """
import os, time
from fedsoda_edge.errors import DiskFull
from fedsoda_edge.ports.child import serve
def full(values, report): raise DiskFull("no space for 3 bytes")
def wrong(values, report): raise ZeroDivisionError("x / 0")
def double(values, report):
    print("noise on stdout does not break the frames", flush=True)
    report({"step": 1}); return {"twice": 2 * values["number"]}
def nan(values, report): return {"loss": float("nan")}
def die(values, report): os.write(2, b"last words\\n"); os._exit(7)
def pid(values, report): return {"pid": os.getpid()}
def work(values, report): time.sleep(60); return {}
serve({"full": full, "wrong": wrong, "double": double, "die": die, "pid": pid, "work": work, "nan": nan})
"""

PARENT = """
import asyncio, sys
from fedsoda_edge.ports.child import Child
async def main():
    child = Child("toy_child")
    print((await child.call("pid", {}))["pid"], flush=True)
    await child.call("work", {})
asyncio.run(main())
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "toy_child.py").write_text(CHILD)
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])])}


def test_results_progress_and_errors_cross(environment: dict[str, str]) -> None:
    async def talk() -> None:
        child, said = Child("toy_child", environment), list[Values]()
        assert await child.call("double", {"number": 21}, said.append) == {"twice": 42}
        assert said == [{"step": 1}]
        with pytest.raises(DiskFull, match="no space for 3 bytes"):
            await child.call("full", {})
        with pytest.raises(WorkerFailed, match="ZeroDivisionError: x / 0") as failure:
            await child.call("wrong", {})
        with pytest.raises(WorkerFailed, match="Out of range float values"):  # NaN is no JSON; the child lives on
            await child.call("nan", {})
        assert "Traceback" in failure.value.details
        assert child.peak_rss_bytes > 1 << 20
        await child.close()
        assert child.pid is None

    asyncio.run(talk())


def test_a_dead_child_leaves_its_last_words_and_the_next_call_starts_another(environment: dict[str, str]) -> None:
    async def talk() -> None:
        child = Child("toy_child", environment)
        with pytest.raises(WorkerFailed, match="status 7 during 'die'") as failure:
            await child.call("die", {})
        assert "last words" in failure.value.details
        assert (await child.call("double", {"number": 1})) == {"twice": 2}
        await child.close()

    asyncio.run(talk())


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is POSIX")
def test_kill_9_of_the_parent_leaves_no_child_even_in_the_middle_of_work(environment: dict[str, str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert os.getpgid(child) != os.getpgid(parent.pid)
        parent.send_signal(signal.SIGKILL)
    until = time.monotonic() + 10
    while time.monotonic() < until and _is_running(child):
        time.sleep(0.05)
    assert not _is_running(child)


def _is_running(pid: int) -> bool:
    """A zombie that nobody has collected yet has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
