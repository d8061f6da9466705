"""A process that gave up network and paths: what it tries then fails, in all its threads and children, and what it needs works.

What is tried runs in a small process of its own, since nothing gives back what was given up.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from fedsoda_edge.ports import confine as confine_file
from fedsoda_edge.ports import landlock, seccomp
from fedsoda_edge.ports.confine import Reach, confine
from tests.conftest import ROOT

SCRIPT = """
import json, os, socket, subprocess, sys, threading
from fedsoda_edge.ports.confine import confine

port, given, elsewhere = int(sys.argv[1]), sys.argv[2], sys.argv[3]
waiting, tried = threading.Event(), {}

def earlier():  # a thread that was here before
    waiting.wait()
    attempt("tcp in an earlier thread", lambda: socket.create_connection(("127.0.0.1", port), 2))

def attempt(name, do):
    try:
        do()
        tried[name] = "done"
    except OSError as error:
        tried[name] = type(error).__name__

def udp():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.sendto(b"text", ("127.0.0.1", port))

def pair():
    one, other = socket.socketpair()
    one.sendall(b"x")
    assert other.recv(1) == b"x"

thread = threading.Thread(target=earlier)
thread.start()
found = confine()
waiting.set()
thread.join()
attempt("tcp", lambda: socket.create_connection(("127.0.0.1", port), 2))
attempt("tcp6", lambda: socket.create_connection(("::1", port), 2))
attempt("udp", udp)
attempt("dns", lambda: socket.getaddrinfo("hub.example.org", 80))
attempt("unix", lambda: socket.socket(socket.AF_UNIX))
attempt("netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))
attempt("pair", pair)
attempt("read elsewhere", lambda: open(elsewhere).read())
attempt("read by the root of proc", lambda: open("/proc/self/root" + elsewhere).read())
attempt("write beside", lambda: open(elsewhere + ".new", "w"))
attempt("write what is given", lambda: open(given + "/data.jsonl", "a"))
attempt("list above", lambda: os.listdir(os.path.dirname(elsewhere)))
attempt("link", lambda: os.link(given + "/data.jsonl", elsewhere + ".link"))
attempt("memory of the parent", lambda: open(f"/proc/{os.getppid()}/mem", "rb"))
attempt("signal the parent", lambda: os.kill(os.getppid(), 0))
attempt("read", lambda: open(given + "/data.jsonl").read())
attempt("read by a link in the directory", lambda: open(given + "/linked.arrow").read())
attempt("write", lambda: open(given + "/own/made", "w").write("x"))
attempt("rename", lambda: os.replace(given + "/own/made", given + "/own/renamed"))
attempt("delete", lambda: os.unlink(given + "/own/renamed"))
attempt("import", lambda: __import__("sqlite3"))
attempt("random", lambda: open("/dev/urandom", "rb").read(1))
attempt("run", lambda: subprocess.run([sys.executable, "-c", ""], check=True, timeout=60))
child = subprocess.run(
    [sys.executable, "-c", f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"], capture_output=True
)
tried["tcp in a child"] = "done" if child.returncode == 0 else "OSError"
print(json.dumps([found.network, found.files, found.missing, tried]))
"""


@pytest.fixture
def listener() -> Iterator[int]:
    """A port on which somebody would answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def outcome(tmp_path: Path, port: int, **environment: str) -> tuple[str, str, list[str], dict[str, str]]:
    """What a confined process could do: its network and files as it says, what it lacks, and each attempt's result."""
    given, own, elsewhere = tmp_path / "given", tmp_path / "given" / "own", tmp_path / "elsewhere"
    own.mkdir(parents=True)
    elsewhere.mkdir()
    (given / "data.jsonl").write_text("{}")
    (elsewhere / "secret").write_text("secret")
    (tmp_path / "far.arrow").write_text("rows")
    (given / "linked.arrow").symlink_to(tmp_path / "far.arrow")
    reach = Reach(reads=(str(given),), writes=(str(own),), may_use_gpu=False)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(port), str(given), str(elsewhere / "secret")],
        env={**os.environ, "PYTHONPATH": str(ROOT), **reach.as_variables(), **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    network, files, missing, tried = json.loads(run.stdout)
    return network, files, missing, tried


def has_landlock() -> bool:
    try:
        return landlock.version() > 0
    except OSError:
        return False


ALWAYS = {"pair", "read", "read by a link in the directory", "write", "rename", "delete", "import", "random", "run"}
NETWORK = {"tcp", "tcp6", "udp", "dns", "unix", "netlink", "tcp in a child", "tcp in an earlier thread"}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has seccomp and Landlock")
def test_a_confined_process_reaches_nobody_and_nothing_but_its_own(tmp_path: Path, listener: int) -> None:
    network, files, missing, tried = outcome(tmp_path, listener)
    assert network == "seccomp"
    assert bool(files) != bool(missing)
    done = {name for name, result in tried.items() if result == "done"}
    assert done & NETWORK == set()
    assert done >= ALWAYS
    if not has_landlock():
        pytest.skip("this kernel has no Landlock: paths are not tried")
    assert files == f"Landlock {landlock.version()}"
    assert done == ALWAYS


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has seccomp and Landlock")
def test_the_same_attempts_succeed_in_a_process_that_is_not_confined(tmp_path: Path, listener: int) -> None:
    """So the failures above are the confinement's."""
    network, files, missing, tried = outcome(tmp_path, listener, FEDSODA_CONFINE="0")
    assert (network, files) == ("", "")
    assert missing == ["FEDSODA_CONFINE=0 leaves its network and its paths as they are"]
    assert {name for name, result in tried.items() if result != "done"} <= {"tcp6", "dns"}  # by this machine's network


# -- where it cannot be had -----------------------------------------------------------------------------------


def refusing(number: int) -> Any:
    return mock.Mock(side_effect=OSError(number, os.strerror(number)))


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSYS, "does not exist in this kernel"),  # gVisor, kernels before 5.13
        (errno.EOPNOTSUPP, "is switched off in this kernel (lsm=)"),
        (errno.EPERM, "is refused by the container that this runs in"),  # Docker's filter before 23
        (errno.E2BIG, "fails here (Argument list too long)"),  # 16 rule sets above this one
    ],
)
def test_what_cannot_be_had_is_left_out_and_named(number: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confine_file, "linux_machine", lambda: "x86_64")
    monkeypatch.setattr(confine_file, "keep_memory_off_disk", lambda: None)
    monkeypatch.setattr(landlock, "version", refusing(number))
    monkeypatch.setattr(seccomp, "install", refusing(number))
    found = confine()
    assert (found.network, found.files) == ("", "")
    assert found.missing == (
        f"it may read all files of this user: Landlock {reason}",
        f"it has the network of this user: the seccomp filter {reason}",
    )


@pytest.mark.parametrize(("machine", "says"), [("", "only Linux has"), ("ppc64le", "is not written for ppc64le")])
def test_other_systems_and_machines_are_named(machine: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confine_file, "linux_machine", lambda: machine)
    monkeypatch.setattr(confine_file, "keep_memory_off_disk", lambda: None)
    monkeypatch.setattr(landlock, "version", refusing(errno.ENOSYS))
    assert says in confine().missing[-1]


@pytest.mark.skipif(not has_landlock(), reason="this kernel has no Landlock")
def test_where_files_are_lost_under_the_rules_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on 9p without a cache, where a file is another one each time: a thread of its own tries it before."""
    data, before = tmp_path / "data.jsonl", threading.active_count()
    data.write_text("{}")
    rights = list(confine_file._rights(Reach(reads=(str(data),)), has_gpu=False))
    without = [(path, right) for path, right in rights if path != data]
    monkeypatch.setattr(confine_file, "_rights", lambda *_: iter(without))
    with pytest.raises(OSError, match="could not be used under it"):
        confine_file._leave_only(Reach(reads=(str(data),)), has_gpu=False)
    assert data.read_text() == "{}"  # this process is as it was
    assert (Path(__file__).stat().st_size, threading.active_count()) > (0, before - 1)


def test_the_directory_of_the_command_is_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m` puts it into sys.path, and private data lies there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert tmp_path not in confine_file._of_python()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # unless its user says so
    assert tmp_path in confine_file._of_python()


def test_with_a_gpu_its_devices_and_the_names_of_threads_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuInit fails where it cannot write /proc/self/task/TID/comm, or open one of its devices."""
    monkeypatch.setattr(confine_file, "_gpu_devices", lambda: [Path("/dev/nvidia0"), Path("/dev/nvidia-uvm")])
    rights = dict(confine_file._rights(Reach(), has_gpu=True))
    for device in ("/dev/nvidia0", "/dev/nvidia-uvm"):
        assert rights[Path(device)] & landlock.IOCTL_DEV
        assert rights[Path(device)] & landlock.WRITE_FILE
    assert rights[Path("/proc")] & landlock.WRITE_FILE
    assert not dict(confine_file._rights(Reach(), has_gpu=False))[Path("/proc")] & landlock.WRITE_FILE


HOSTILE = """
import os, socket
from fedsoda_edge.errors import DataProblem
try:
    socket.create_connection(("127.0.0.1", int(os.environ["TRY_PORT"])), 2)
    raise DataProblem("connected")
except OSError as error:
    raise DataProblem(f"refused with {error.errno}") from error
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has seccomp")
@pytest.mark.parametrize(("switch", "says"), [("1", f"refused with {errno.EAFNOSUPPORT}"), ("0", "connected")])
def test_the_command_that_checks_data_has_no_network(tmp_path: Path, listener: int, switch: str, says: str) -> None:
    """A library that reads the rows turns on its user."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "pyarrow.py").write_text(HOSTILE)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 private text")
    ended = subprocess.run(
        [sys.executable, "-m", "fedsoda_edge", "data", "check", "rows.parquet", "--json"],
        env={
            **os.environ,
            "PYTHONPATH": f"{tmp_path / 'lib'}{os.pathsep}{ROOT}",
            "TRY_PORT": str(listener),
            "FEDSODA_CONFINE": switch,
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert json.loads(ended.stdout)["message"] == says
