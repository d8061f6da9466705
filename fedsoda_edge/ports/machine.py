"""Read how much memory and how many CPUs this process may use: the machine's, or less where a control group says so.

In a container, and below systemd, the machine's own numbers are those of the host; who takes as much is killed, or runs
in turns with itself. What fits into it is left to `device/fit.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedsoda_edge.errors import UsageProblem

_UNLIMITED = 1 << 60  # version 1 writes its largest number of pages where there is no limit


@dataclass(frozen=True)
class Room:
    """The memory and CPUs that a process may use. ram_bytes: free now. ram_from, cpus_from: the file of the limit; "": the machine itself."""

    ram_bytes: int
    ram_from: str
    cpus: int
    cpus_from: str


def room(root: Path = Path("/")) -> Room:
    """Read the smaller of what the machine has and what each control group above this process allows.

    Args:
        root: where proc and sys are, for recorded trees.
    """
    ram, ram_from = psutil.virtual_memory().available, ""
    cpus, cpus_from = float(_machine_cpus()), ""
    for directory in _groups(root):
        for number, file in _free_bytes(directory):
            if number < ram:
                ram, ram_from = number, str(Path("/") / file.relative_to(root))
        for count, file in _cpus(directory):
            if count < cpus:
                cpus, cpus_from = count, str(Path("/") / file.relative_to(root))
    # Rounded down: one thread more than the quota would have all of them stopped for a part of each period.
    return Room(max(0, ram), ram_from, max(1, int(cpus)), cpus_from)


def threads(own: int) -> int:
    """Count the threads to compute with: FEDSODA_THREADS, or what a library takes by itself within `room`.

    Args:
        own: the library's own choice, made without the quota.

    Raises:
        UsageProblem: FEDSODA_THREADS is not a number of threads.
    """
    given = os.environ.get("FEDSODA_THREADS")
    if not given:
        return min(own, room().cpus)
    if not given.isascii() or not given.isdigit():
        raise UsageProblem(f"FEDSODA_THREADS is {given!r}; set it to a number of threads, or unset it")
    return int(given) or min(own, room().cpus)


def _machine_cpus() -> int:
    """Count the CPUs that this process may run on, as taskset and cpusets leave them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _groups(root: Path) -> Iterator[Path]:
    """Yield the directory of each control group that this process is in, and of each one above it.

    Where a container sees a part of the tree only, its path is one of the host's: what is mounted is its part then.
    """
    mounts = _mounts(root)
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, names, path = (*line.split(":", 2), "", "")[:3]
        for controllers, top, point in mounts:
            if set(names.split(",")) <= controllers if names else not controllers:
                below = path.removeprefix(top.rstrip("/")).strip("/") if _is_below(path, top) else ""
                directory = root / point.strip("/")
                groups = [directory]
                for name in below.split("/") if below and ".." not in below else ():
                    groups.append(groups[-1] / name)
                yield from reversed(groups)


def _is_below(path: str, top: str) -> bool:
    return path == top or path.startswith(top.rstrip("/") + "/")


def _mounts(root: Path) -> list[tuple[set[str], str, str]]:
    """List the mounted trees: their controllers (none: version 2), the group that is their top, the directory."""
    found = []
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        controllers = set(kind[2].split(",")) if kind[0] == "cgroup" else set()
        found.append((controllers, fields[3], fields[4]))
    return found


def _free_bytes(group: Path) -> Iterator[tuple[int, Path]]:
    """Yield what each limit of a group leaves: the limit, less what is held that the kernel cannot take back at once."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.high", "memory.current", "inactive_file"),  # above it the kernel slows the group down
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        most, held = _number(group / limit), _number(group / used)
        if most is None or most >= _UNLIMITED:
            continue
        given_back = next(
            (
                int(line.split()[1])
                for line in _text(group / "memory.stat").splitlines()
                if line.startswith(f"{cache} ")
            ),
            0,
        )
        yield most - max(0, (held or 0) - given_back), group / limit


def _cpus(group: Path) -> Iterator[tuple[float, Path]]:
    quota, _, period = _text(group / "cpu.max").strip().partition(" ")
    if quota.isdigit() and period.isdigit() and int(period):
        yield int(quota) / int(period), group / "cpu.max"
    most, of = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    if most is not None and most > 0 and of:
        yield most / of, group / "cpu.cfs_quota_us"
    for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
        if count := _count(_text(group / name)):
            yield count, group / name
            return


def _count(ranges: str) -> int:
    """Count the CPUs of a list such as 0-3,8."""
    total = 0
    for part in ranges.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (last or first).isdigit():
            total += int(last or first) - int(first) + 1
    return total


def _number(path: Path) -> int | None:
    """Read a whole number; None: there is none, or it says "max"."""
    text = _text(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
