"""What differs between systems: what can be checked on this one. `scripts/check` types the branches of the others."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.ports.system import (
    Held,
    Lock,
    group_of_its_own,
    is_locked,
    memory_limit_hint,
    peak_rss_bytes,
    stop_signal,
    was_killed,
)

HOLD = "import sys; from pathlib import Path; from fedsoda_edge.ports.system import Lock\n"
HOLD += "lock = Lock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"


def test_a_lock_names_its_holder_and_goes_with_it_however_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Held) as held:
            Lock(path)
        assert held.value.pid == str(holder.pid)
        assert path.read_text() == str(holder.pid)  # who was refused changed nothing
        holder.kill()
        assert was_killed(holder.wait())
    lock = Lock(path)
    assert path.read_text() == str(os.getpid())
    lock.release()
    Lock(path).release()


def test_a_child_in_a_group_of_its_own_does_not_get_this_terminals_ctrl_c() -> None:
    wait = [sys.executable, "-c", "import sys; print('there', flush=True); sys.stdin.read()"]
    with subprocess.Popen(wait, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **group_of_its_own()) as child:
        assert os.getpgid(child.pid) == child.pid != os.getpgid(0)
        child.send_signal(stop_signal())
        assert child.wait(timeout=10) == -signal.SIGTERM
    assert not was_killed(-signal.SIGTERM)


def test_the_peak_is_this_processs_own_and_does_not_fall() -> None:
    held = bytearray(64 << 20)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    with_it = peak_rss_bytes()
    del held
    assert peak_rss_bytes() > with_it - (1 << 20)  # the kernel counts pages in batches
    told = subprocess.run(
        [sys.executable, "-c", "from fedsoda_edge.ports.system import peak_rss_bytes; print(peak_rss_bytes())"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(told.stdout) < with_it  # ru_maxrss would tell at least the parent's


def test_wsl_is_told_where_its_memory_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.release", lambda: "6.6.87.2-microsoft-standard-WSL2")
    assert ".wslconfig" in memory_limit_hint()
    monkeypatch.setattr("platform.release", lambda: "6.1.0-13-amd64")
    assert memory_limit_hint() == ""


def test_a_process_that_lowers_its_priority_lets_others_go_before_it_unless_it_is_told_not_to() -> None:
    code = "import os; from fedsoda_edge.ports.system import lower_priority; before = os.nice(0); lower_priority()\n"
    code += "print(os.nice(0) - before)"

    def lowered(**environment: str) -> int:
        kept = {name: value for name, value in os.environ.items() if name != "FEDSODA_NICE"} | environment
        return int(subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, check=True).stdout)

    assert lowered() == min(10, 19 - os.nice(0))
    assert lowered(FEDSODA_NICE="0") == 0


@pytest.mark.skipif(sys.platform == "win32", reason="locks with msvcrt")
def test_a_file_system_without_locks_is_not_taken_for_a_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    path = tmp_path / "home" / "lock"
    held = Lock(path)
    assert is_locked(path)
    held.release()
    assert not is_locked(path)
    assert not is_locked(tmp_path / "nobody" / "lock")

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    for look in (Lock, is_locked):
        with pytest.raises(UsageProblem, match=r"cannot be locked \(No locks available\).*local disk"):
            look(path)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGHUP")
@pytest.mark.parametrize(("before", "status"), [("SIG_DFL", 0), ("SIG_IGN", 7)])
def test_a_hang_up_is_a_request_to_end_unless_whoever_started_it_had_it_ignored(before: str, status: int) -> None:
    code = f"import os, signal, sys\nfrom fedsoda_edge.ports.system import on_stop\nsignal.signal(signal.SIGHUP, signal.{before})\n"
    code += "on_stop(lambda *_: os._exit(0))\nos.kill(os.getpid(), signal.SIGHUP)\nsys.exit(7)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == status
