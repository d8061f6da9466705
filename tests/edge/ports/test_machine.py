"""The limits of control groups are read from trees as machines have them, recorded here file by file."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from fedsoda_edge.ports.machine import Room, room

MIB = 1 << 20
V2 = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1 = (
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "36 31 0:33 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
)
HYBRID = V1 + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"


@pytest.fixture(autouse=True)
def _host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with 16 GiB free and 16 CPUs."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=16384 * MIB))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))


def tree(root: Path, mounts: str, cgroup: str, **files: str) -> Path:
    """Record a machine; files are named by their path below /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mountinfo").write_text("23 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + mounts)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_control_groups_it_is_the_machines(tmp_path: Path) -> None:
    assert room(tmp_path) == Room(16384 * MIB, "", 16, "")


def test_a_container_of_version_2_has_what_its_limit_leaves_and_page_cache_counts_as_free(tmp_path: Path) -> None:
    files = {
        "memory.max": f"{600 * MIB}\n",
        "memory.current": f"{100 * MIB}\n",
        "memory.stat": f"anon {40 * MIB}\ninactive_file {60 * MIB}\n",
        "memory.high": "max\n",
        "cpu.max": "150000 100000\n",
    }
    found = room(tree(tmp_path, V2, "0::/\n", **files))
    assert found == Room(560 * MIB, "/sys/fs/cgroup/memory.max", 1, "/sys/fs/cgroup/cpu.max")


def test_max_is_no_limit(tmp_path: Path) -> None:
    files = {"memory.max": "max\n", "memory.high": "max\n", "memory.current": "5\n", "cpu.max": "max 100000\n"}
    assert room(tree(tmp_path, V2, "0::/\n", **files)) == Room(16384 * MIB, "", 16, "")


def test_the_tightest_of_all_groups_above_counts_with_the_usage_of_its_own_level(tmp_path: Path) -> None:
    files = {
        "user.slice/memory.max": f"{1000 * MIB}\n",
        "user.slice/memory.current": f"{900 * MIB}\n",
        "user.slice/run.scope/memory.max": f"{500 * MIB}\n",
        "user.slice/run.scope/memory.current": f"{100 * MIB}\n",
        "user.slice/run.scope/deep/memory.max": "max\n",
        "user.slice/cpu.max": "400000 100000\n",
        "user.slice/run.scope/cpu.max": "max 100000\n",
    }
    found = room(tree(tmp_path, V2, "0::/user.slice/run.scope/deep\n", **files))
    assert (found.ram_bytes, found.ram_from) == (100 * MIB, "/sys/fs/cgroup/user.slice/memory.max")
    assert (found.cpus, found.cpus_from) == (4, "/sys/fs/cgroup/user.slice/cpu.max")


def test_memory_high_is_a_limit_too(tmp_path: Path) -> None:
    files = {"a/memory.max": f"{900 * MIB}", "a/memory.high": f"{300 * MIB}", "a/memory.current": f"{100 * MIB}"}
    found = room(tree(tmp_path, V2, "0::/a\n", **files))
    assert (found.ram_bytes, found.ram_from) == (200 * MIB, "/sys/fs/cgroup/a/memory.high")


@pytest.mark.parametrize("mounts", [V1, HYBRID], ids=["v1", "hybrid"])
def test_version_1_reads_each_controllers_own_tree(tmp_path: Path, mounts: str) -> None:
    cgroup = "4:memory:/pod/box\n3:cpuset:/pod\n2:cpu,cpuacct:/pod/box\n0::/init.scope\n"
    files = {
        "memory/pod/box/memory.limit_in_bytes": f"{700 * MIB}\n",
        "memory/pod/box/memory.usage_in_bytes": f"{300 * MIB}\n",
        "memory/pod/box/memory.stat": f"inactive_file 0\ntotal_inactive_file {100 * MIB}\n",
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "cpu,cpuacct/pod/box/cpu.cfs_quota_us": "250000\n",
        "cpu,cpuacct/pod/box/cpu.cfs_period_us": "100000\n",
        "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "cpuset/pod/cpuset.cpus": "0-3,8\n",
    }
    found = room(tree(tmp_path, mounts, cgroup, **files))
    assert (found.ram_bytes, found.ram_from) == (500 * MIB, "/sys/fs/cgroup/memory/pod/box/memory.limit_in_bytes")
    assert (found.cpus, found.cpus_from) == (2, "/sys/fs/cgroup/cpu,cpuacct/pod/box/cpu.cfs_quota_us")


def test_a_container_with_the_hosts_paths_and_its_part_of_the_tree_mounted(tmp_path: Path) -> None:
    mounts = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    files = {"memory/memory.limit_in_bytes": f"{64 * MIB}\n", "memory/memory.usage_in_bytes": "0\n"}
    assert room(tree(tmp_path / "own", mounts, "4:memory:/docker/abc\n", **files)).ram_bytes == 64 * MIB
    assert room(tree(tmp_path / "other", mounts, "4:memory:/elsewhere\n", **files)).ram_bytes == 64 * MIB
    # A process outside its namespace's root sees /.. paths.
    assert (
        room(tree(tmp_path / "outside", V2, "0::/../up\n", **{"memory.max": "1000", "memory.current": "0"})).ram_bytes
        == 1000
    )


def test_a_quota_below_one_cpu_is_one_thread_and_a_cpuset_counts_its_ranges(tmp_path: Path) -> None:
    half = tree(tmp_path / "half", V2, "0::/\n", **{"cpu.max": "50000 100000"})
    assert room(half).cpus == 1
    few = tree(tmp_path / "few", V2, "0::/\n", **{"cpuset.cpus.effective": "2-4,7\n"})
    assert (room(few).cpus, room(few).cpus_from) == (4, "/sys/fs/cgroup/cpuset.cpus.effective")


def test_a_group_that_holds_more_than_its_limit_has_nothing_free(tmp_path: Path) -> None:
    files = {"memory.max": "100", "memory.current": "500"}
    assert room(tree(tmp_path, V2, "0::/\n", **files)).ram_bytes == 0


def test_this_machines_own_limits_are_read() -> None:
    found = room()
    assert 1 <= found.cpus <= 16
    assert 0 < found.ram_bytes <= 16384 * MIB
