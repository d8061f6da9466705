"""A child on pipes: results, progress and errors cross; it never outlives its parent."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedsoda_edge.errors import DiskFull, OutOfMemory, WorkerFailed
from fedsoda_edge.ports.child import END_SECONDS, Child

CHILD = """
import math, os, time
import msgspec
from fedsoda_edge.errors import DiskFull
from fedsoda_edge.ports.child import serve
from fedsoda_edge.protocol.calls import Call, NoProgress
class Step(msgspec.Struct, frozen=True):
    step: int
class Number(msgspec.Struct, frozen=True):
    number: float
class Double(Call[Number, Step], frozen=True, tag="double"):
    number: int
class Do(Call[Number, NoProgress], frozen=True, tag="do"):
    what: str
class PanicException(BaseException): pass  # as libraries in Rust raise it
def answer(call, report):
    match call:
        case Double(number=number):
            print("noise on stdout does not break the frames", flush=True)
            report(Step(1))
            return Number(2 * number)
        case Do(what="full"): raise DiskFull("no space for 3 bytes")
        case Do(what="wrong"): raise ZeroDivisionError("x / 0")
        case Do(what="panic"): raise PanicException("inside `a private text`")
        case Do(what="nan"): return Number(math.nan)
        case Do(what="die"):
            os.write(2, b"last words\\n")
            os._exit(7)
        case Do(what="no memory"): raise MemoryError
        case Do(what="no vram"): raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB\\nand more")
        case Do(what="no room"): raise OSError(28, "No space left on device", "/store/x")
        case Do(what=said) if said.startswith("die of "):
            os.write(2, f"  File x\\n{said[7:]}\\n\\n".encode())
            os._exit(1)
        case Do(what="pid"): return Number(os.getpid())
        case Do(what="nap"):
            time.sleep(0.2)
            return Number(0)
        case Do(what="work"):
            time.sleep(60)
            return Number(0)
if __name__ == "__main__":
    serve(Double | Do, answer)
"""

PRIVATE_CHILD = """
import os
import msgspec
from fedsoda_edge.ports.child import serve
from fedsoda_edge.protocol.calls import Call, NoProgress
class Number(msgspec.Struct, frozen=True):
    number: float
class Read(Call[Number, NoProgress], frozen=True, tag="read"):
    what: str
class Do(Call[Number, NoProgress], frozen=True, tag="do"):
    what: str
class Panic(BaseException):
    pass
def answer(call, report):
    match call:
        case Read():
            print("secret on stdout", flush=True)
            os.write(2, b"secret of a library\\n")
            return Number(1)
        case Do(what="before"): raise ValueError("before")
        case Do(what="raise"): raise ValueError("sec" + "ret")
        case Do(what="panic"): raise Panic("sec" + "ret")
        case Do(what="full"): raise OSError(28, "secret")
        case Do(what="die"):
            os.write(2, b"secret last words\\n")
            os._exit(7)
if __name__ == "__main__":
    serve(Read | Do, answer, private=(Read,))
"""

PARENT = """
import asyncio
from fedsoda_edge.ports.child import Child
from toy_child import Do
async def main():
    child = Child("toy_child")
    print(int((await child.call(Do(what="pid"))).number), flush=True)
    await child.call(Do(what="work"))
asyncio.run(main())
"""


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    (tmp_path / "toy_child.py").write_text(CHILD)
    (tmp_path / "private_child.py").write_text(PRIVATE_CHILD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_child", raising=False)
    monkeypatch.delitem(sys.modules, "private_child", raising=False)
    monkeypatch.setenv("FEDSODA_TOKEN", "secret")
    monkeypatch.setenv("FEDSODA_LINK", "secret")
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])])}


def test_results_progress_and_errors_cross(environment: dict[str, str]) -> None:
    toy = importlib.import_module("toy_child")

    async def talk() -> None:
        child, said = Child("toy_child", environment), list[Any]()
        assert await child.call(toy.Double(number=21), said.append) == toy.Number(42)
        assert said == [toy.Step(1)]
        with pytest.raises(DiskFull, match="no space for 3 bytes"):
            await child.call(toy.Do(what="full"))
        with pytest.raises(WorkerFailed, match="ZeroDivisionError: x / 0") as failure:
            await child.call(toy.Do(what="wrong"))
        assert "Traceback" in failure.value.details
        with pytest.raises(WorkerFailed, match="answered Do with something other than a Number"):  # JSON has no NaN
            await child.call(toy.Do(what="nan"))
        with pytest.raises(DiskFull, match="No space left on device: '/store/x'"):
            await child.call(toy.Do(what="no room"))
        for what, words in (("no memory", "MemoryError"), ("no vram", "CUDA out of memory. Tried to allocate 9 GiB")):
            with pytest.raises(OutOfMemory) as short:
                await child.call(toy.Do(what=what))
            assert str(short.value) == f"memory ran out during Do ({words}); end other programs"
            assert "Traceback" in short.value.details
        assert await child.call(toy.Double(number=1)) == toy.Number(2)  # it lives on
        assert child.peak_rss_bytes > 1 << 20
        await child.close()
        assert child.pid is None

    asyncio.run(talk())


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("FileNotFoundError: [Errno 2] No usable temporary directory found in ['/tmp']", "set TMPDIR"),
        ("KeyError: 'getpwuid(): uid not found: 7'", "set HOME and USER"),
        ("RuntimeError: Could not determine home directory.", "set HOME"),
        ("ModuleNotFoundError: No module named 'torch'", "install fedsoda again"),
        ("ValueError: " + 400 * "x", "xxx"),
    ],
)
def test_the_last_line_of_a_dead_child_is_in_the_sentence_with_what_to_set(
    environment: dict[str, str], said: str, remedy: str
) -> None:
    toy = importlib.import_module("toy_child")

    async def talk() -> None:
        child = Child("toy_child", environment)
        with pytest.raises(WorkerFailed) as failure:
            await child.call(toy.Do(what=f"die of {said}"))
        assert f"status 1 during Do: {said[:300]}" in str(failure.value)
        assert remedy in str(failure.value)
        assert len(str(failure.value)) < 500
        await child.close()

    asyncio.run(talk())


def test_a_dead_child_leaves_its_last_words_and_the_next_call_starts_another(environment: dict[str, str]) -> None:
    toy = importlib.import_module("toy_child")

    async def talk() -> None:
        child = Child("toy_child", environment)
        with pytest.raises(WorkerFailed, match="status 7 during Do") as failure:
            await child.call(toy.Do(what="die"))
        assert "last words" in failure.value.details
        assert await child.call(toy.Double(number=1)) == toy.Number(2)
        await child.close()

    asyncio.run(talk())


def test_after_a_call_that_was_cancelled_the_next_one_has_its_own_answer(environment: dict[str, str]) -> None:
    toy = importlib.import_module("toy_child")

    async def talk() -> None:
        child = Child("toy_child", environment)
        before = (await child.call(toy.Do(what="pid"))).number
        working = asyncio.create_task(child.call(toy.Do(what="nap")))
        await asyncio.sleep(0)  # the call is written
        working.cancel()
        await asyncio.wait({working})
        assert child.pid is None
        async with asyncio.timeout(END_SECONDS):
            assert await child.call(toy.Double(number=21)) == toy.Number(42)
            assert (await child.call(toy.Do(what="pid"))).number not in (before, 0)
        await child.close()
        assert not psutil.pid_exists(int(before))

    asyncio.run(talk())


def test_after_progress_that_could_not_be_told_the_next_call_has_its_own_answer(environment: dict[str, str]) -> None:
    toy = importlib.import_module("toy_child")

    def fails(_: object) -> None:
        raise ValueError("the display broke")

    async def talk() -> None:
        child = Child("toy_child", environment)
        with pytest.raises(ValueError, match="the display broke"):
            await child.call(toy.Double(number=1), fails)
        assert await child.call(toy.Double(number=21)) == toy.Number(42)
        await child.close()

    asyncio.run(talk())


def test_a_child_that_only_imports_is_ended_at_once(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "slow_child.py").write_text("import time; time.sleep(60)")

    async def talk() -> None:
        child = Child("slow_child", environment)
        await child.start()
        async with asyncio.timeout(END_SECONDS / 2):
            await child.close()
        assert child.pid is None

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


def test_after_a_call_that_reads_private_text_nothing_but_answers_leaves_the_child(environment: dict[str, str]) -> None:
    toy = importlib.import_module("private_child")

    async def talk() -> None:
        child = Child("private_child", environment)
        with pytest.raises(WorkerFailed, match="ValueError: before") as failure:
            await child.call(toy.Do(what="before"))
        assert "ValueError: before" in failure.value.details
        assert await child.call(toy.Read(what="print")) == toy.Number(1)
        for how in ("raise", "panic"):
            with pytest.raises(WorkerFailed) as failure:
                await child.call(toy.Do(what=how))
            assert "secret" not in f"{failure.value} {failure.value.details}"
            assert "private_child.py" in failure.value.details
        with pytest.raises(DiskFull) as full:
            await child.call(toy.Do(what="full"))
        assert "secret" not in str(full.value)
        with pytest.raises(WorkerFailed, match=r"status 7 during Do$") as failure:
            await child.call(toy.Do(what="die"))
        assert failure.value.details == ""
        await child.close()

    asyncio.run(talk())
    assert not {"FEDSODA_TOKEN", "FEDSODA_LINK"} & Child("private_child")._environment.keys()


def test_a_panic_of_a_library_is_an_answer_and_its_words_stay_with_the_child(environment: dict[str, str]) -> None:
    toy = importlib.import_module("toy_child")

    async def talk() -> None:
        child = Child("toy_child", environment)
        with pytest.raises(WorkerFailed) as failure:
            await child.call(toy.Do(what="panic"))
        assert "private" not in str(failure.value) + failure.value.details
        assert await child.call(toy.Double(number=1)) == toy.Number(2)  # the same process goes on
        await child.close()

    asyncio.run(talk())
