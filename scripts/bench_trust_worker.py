"""Count what a confined worker can still reach: every system call by its filter, and real attempts in a process of its own.

The filter is run by an interpreter of classic BPF that is written here. The attempts are those of a library that turns on
its user: connect, look up, read, write, signal. `bench_trust.py` runs it with the other parts.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

from fedsoda_edge.ports import landlock, seccomp
from fedsoda_edge.ports.confine import Reach

PLANTED = "BENCH_TRUST_PLANTED"  # a statement that the confined process runs before it confines itself
ALLOWED = 0x7FFF0000
NUM_CALLS = 512
AF_UNIX, AF_INET, FAMILIES = 1, 2, (0, 1, 2, 10, 16, 17, 38, 40)
# What must be refused, by the numbers of the kernel's own tables: (x86-64, arm64).
MEETING = {"connect": (42, 203), "accept": (43, 202), "bind": (49, 200), "listen": (50, 201), "accept4": (288, 242)}
REFUSED = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "pidfd_getfd": (438, 438),
}
SOCKET, SOCKETPAIR = (41, 198), (53, 199)
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

ATTEMPTS = """
import json, os, socket, subprocess, sys, threading
exec(os.environ.get("BENCH_TRUST_PLANTED", ""))
from fedsoda_edge.ports.confine import confine

port, given, elsewhere = int(sys.argv[1]), sys.argv[2], sys.argv[3]
begun, tried = threading.Event(), {}

def attempt(name, do):
    try:
        do()
        tried[name] = True
    except (OSError, subprocess.SubprocessError):
        tried[name] = False

def udp():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.sendto(b"text", ("127.0.0.1", port))

def earlier():
    begun.wait()
    attempt("tcp in an earlier thread", lambda: socket.create_connection(("127.0.0.1", port), 2))

thread = threading.Thread(target=earlier)
thread.start()
found = confine()
begun.set()
thread.join()
attempt("tcp", lambda: socket.create_connection(("127.0.0.1", port), 2))
attempt("tcp6", lambda: socket.socket(socket.AF_INET6))
attempt("udp", udp)
attempt("dns", lambda: socket.getaddrinfo("localhost.", 80, family=socket.AF_INET, type=socket.SOCK_STREAM) and socket.socket())
attempt("unix", lambda: socket.socket(socket.AF_UNIX))
attempt("netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))
attempt("by a program", lambda: subprocess.run([sys.executable, "-S", "-c",
    f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"], check=True, capture_output=True, timeout=60))
attempt("read elsewhere", lambda: open(elsewhere).read())
attempt("read through proc", lambda: open("/proc/self/root" + elsewhere).read())
attempt("list elsewhere", lambda: os.listdir(os.path.dirname(elsewhere)))
attempt("write elsewhere", lambda: open(elsewhere + ".new", "w"))
attempt("change the data", lambda: open(given + "/data", "ab"))
attempt("delete the data", lambda: os.unlink(given + "/data"))
attempt("delete elsewhere", lambda: os.unlink(elsewhere))
attempt("link elsewhere", lambda: os.link(given + "/data", elsewhere + ".link"))
attempt("write to /tmp", lambda: open(f"/tmp/.bench-trust-{os.getpid()}", "x"))
attempt("read /etc/shadow", lambda: open("/etc/shadow").read())
attempt("memory of the parent", lambda: open(f"/proc/{os.getppid()}/mem", "rb"))
attempt("signal the parent", lambda: os.kill(os.getppid(), 0))
attempt("own: read", lambda: open(given + "/data").read())
attempt("own: read by a link", lambda: open(given + "/linked").read())
attempt("own: write", lambda: open(given + "/own/made", "w").write("x"))
attempt("own: rename", lambda: os.replace(given + "/own/made", given + "/own/renamed"))
attempt("own: pair of sockets", lambda: socket.socketpair())
attempt("own: import", lambda: __import__("sqlite3"))
print(json.dumps([found.network, found.files, tried]))
"""
OF_THE_NETWORK = {"tcp", "tcp6", "udp", "dns", "unix", "netlink", "by a program", "tcp in an earlier thread"}


def measure(quick: bool) -> dict[str, object]:
    """Count calls and attempts, and those that end as they must.

    Args:
        quick: whether to make the attempts once; otherwise with paths of several kinds.
    """
    wrong: list[str] = []
    num_calls = sum(_calls_of(name, has_unix, wrong) for name in MACHINES for has_unix in (False, True))
    num_attempts, network, files = 0, "", ""
    for kind in ("plain",) if quick else ("plain", "behind a link", "with spaces", "in the directory of the command"):
        network, files, tried = _attempted(kind)
        num_attempts += len(tried)
        for name, is_done in sorted(tried.items()):
            must = name.startswith("own:")
            is_judged = must or (bool(network) if name in OF_THE_NETWORK else bool(files))
            if is_judged and is_done != must:
                wrong.append(f"{name} {'succeeds' if is_done else 'fails'} in a confined process ({kind})")
        for means, lack, there in (("seccomp", network, _machine_is_known()), ("Landlock", files, _has_landlock())):
            num_attempts += 1
            if there and not lack:
                wrong.append(f"{means} is here and not in force")
    tried_in_all = num_calls + num_attempts
    return {
        "tried": tried_in_all,
        "right": tried_in_all - len(wrong),
        "wrong": wrong[:20],
        "calls": num_calls,
        "attempts": num_attempts,
        "network": network,
        "files": files,
    }


def _calls_of(name: str, has_unix: bool, wrong: list[str]) -> int:
    """Run the filter of one machine on all its calls; return how many there were."""
    code, audit, column = (
        seccomp.program(seccomp.MACHINES[name], has_unix=has_unix),
        MACHINES[name],
        list(MACHINES).index(name),
    )
    refused = {numbers[column] for numbers in REFUSED.values()}
    refused |= set() if has_unix else {numbers[column] for numbers in MEETING.values()}
    count = 0
    for number in range(NUM_CALLS):
        for family in FAMILIES if number in (SOCKET[column], SOCKETPAIR[column]) else (AF_INET,):
            count += 1
            is_left = run(code, number, audit, family) == ALLOWED
            if number == SOCKET[column]:
                must = family == AF_UNIX and has_unix
            elif number == SOCKETPAIR[column]:
                must = family == AF_UNIX
            else:
                must = number not in refused
            if is_left != must:
                wrong.append(f"call {number} of {name} with {family} is {'allowed' if is_left else 'refused'}")
        for other, of in ((number, 0x40000003), (number | 0x40000000, audit)):  # i386, and the second table of x86-64
            count += 1
            if run(code, other, of, AF_UNIX) != 0x00050000 | errno.ENOSYS:
                wrong.append(f"call {other:#x} of another table is let through on {name}")
    return count


def run(code: bytes, number: int, machine: int, argument: int) -> int:
    """Run a filter on one call, as seccomp(2) says, and return what it returns."""
    data = struct.pack("<iIQ6Q", number, machine, 0, argument, 0, 0, 0, 0, 0)
    accumulator = at = 0
    while True:
        what, if_true, if_false, value = struct.unpack_from("<HBBI", code, 8 * at)
        at += 1
        if what == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif what in (0x15, 0x35):
            is_true = accumulator == value if what == 0x15 else accumulator >= value
            at += if_true if is_true else if_false
        else:
            return int(value)


def _attempted(kind: str) -> tuple[str, str, dict[str, bool]]:
    """Make all attempts in a confined process: by which means it says it is confined, and whether each was done."""
    with tempfile.TemporaryDirectory() as made, socket.create_server(("127.0.0.1", 0)) as server:
        top = Path(made).resolve()
        given = top / ("my data" if kind == "with spaces" else "given")
        (given / "own").mkdir(parents=True)
        (top / "elsewhere").mkdir()
        (top / "elsewhere" / "secret").write_text("secret")
        (given / "data").write_text("rows")
        (top / "far").write_text("rows")
        (given / "linked").symlink_to(top / "far")
        named = given
        if kind == "behind a link":
            named = top / "link"
            named.symlink_to(given)
        reach = Reach(reads=(str(named),), writes=(str(named / "own"),), may_use_gpu=False)
        command = [sys.executable, "-c", ATTEMPTS, str(server.getsockname()[1]), str(named)]
        ended = subprocess.run(
            [*command, str(top / "elsewhere" / "secret")],
            cwd=top / "elsewhere" if kind == "in the directory of the command" else top,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **reach.as_variables()},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if ended.returncode:
            raise RuntimeError(f"the confined process failed: {ended.stderr[-2000:]}")
        for path in Path("/tmp").glob(".bench-trust-*"):
            path.unlink()
        network, files, tried = json.loads(ended.stdout)
        return network, files, tried


def _has_landlock() -> bool:
    try:
        return landlock.version() > 0
    except OSError:
        return False


def _machine_is_known() -> bool:
    return sys.platform == "linux" and os.uname().machine in seccomp.MACHINES


@contextlib.contextmanager
def _planted(statement: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, {PLANTED: statement}):
        yield


@contextlib.contextmanager
def _without_io_uring() -> Iterator[None]:
    with mock.patch.object(seccomp, "_AROUND", ()):
        yield


DEFECTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "the filter is not installed": lambda: _planted(
        "import fedsoda_edge.ports.seccomp as s; s.install = lambda *a: None"
    ),
    "the filter holds for one thread": lambda: _planted("import fedsoda_edge.ports.seccomp as s; s._ALL_THREADS = 0"),
    "the rules on paths are not taken": lambda: _planted(
        "import fedsoda_edge.ports.landlock as l; l.restrict = lambda rights: None"
    ),
    "the data may be written": lambda: _planted("import fedsoda_edge.ports.landlock as l; l.READ = l.WRITE"),
    "io_uring is left": _without_io_uring,
}
