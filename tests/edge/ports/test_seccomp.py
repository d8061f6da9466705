"""The filter's bytes, read by an interpreter of classic BPF that is written here: what becomes of every call."""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path

import pytest

from fedsoda_edge.ports.seccomp import MACHINES, program

X86, ARM = 0xC000003E, 0xC00000B7  # AUDIT_ARCH_X86_64, AUDIT_ARCH_AARCH64 of linux/audit.h
ALLOWED = 0x7FFF0000
INET, INET6, UNIX, NETLINK, PACKET, ALG, VSOCK = 2, 10, 1, 16, 17, 38, 40


def refused(number: int) -> int:
    return 0x00050000 | number


def run(code: bytes, number: int, machine: int, *arguments: int) -> int:
    """Run a filter on one call as seccomp(2) says: the data is (int nr, u32 arch, u64 ip, u64 args[6])."""
    data = struct.pack("<iIQ6Q", number, machine, 0x1000, *arguments, *[0] * (6 - len(arguments)))
    instructions = [struct.unpack_from("<HBBI", code, at) for at in range(0, len(code), 8)]
    accumulator, at = 0, 0
    while True:
        what, if_true, if_false, value = instructions[at]
        at += 1
        match what:
            case 0x20:  # BPF_LD | BPF_W | BPF_ABS
                assert value % 4 == 0
                (accumulator,) = struct.unpack_from("<I", data, value)
            case 0x15:  # BPF_JMP | BPF_JEQ | BPF_K
                at += if_true if accumulator == value else if_false
            case 0x35:  # BPF_JMP | BPF_JGE | BPF_K
                at += if_true if accumulator >= value else if_false
            case 0x06:  # BPF_RET | BPF_K
                return int(value)
            case _:
                raise AssertionError(f"instruction {what:#x} is none that the kernel takes here")


def test_the_first_instructions_are_those_of_the_kernels_documentation() -> None:
    """Written out by hand from linux/bpf_common.h: load the architecture, compare it, and refuse another one."""
    code = program(MACHINES["x86_64"], has_unix=False)
    assert code[:32].hex(" ", 8) == "2000000004000000 150001003e0000c0 0600000026000500 2000000000000000"
    assert code[-8:].hex() == "060000000000ff7f"


@pytest.mark.parametrize("has_unix", [False, True])
@pytest.mark.parametrize(
    ("name", "audit", "numbers"),
    [
        ("x86_64", X86, {"socket": 41, "connect": 42, "socketpair": 53, "bind": 49, "sendto": 44, "openat": 257}),
        ("aarch64", ARM, {"socket": 198, "connect": 203, "socketpair": 199, "bind": 200, "sendto": 206, "openat": 56}),
    ],
)
def test_no_family_but_the_machines_own_gets_a_socket(
    name: str, audit: int, numbers: dict[str, int], has_unix: bool
) -> None:
    code = program(MACHINES[name], has_unix=has_unix)
    for family in (INET, INET6, NETLINK, PACKET, ALG, VSOCK, 0, 9, 255, INET | 1 << 8):
        assert run(code, numbers["socket"], audit, family, 1) == refused(errno.EAFNOSUPPORT), family
        assert run(code, numbers["socketpair"], audit, family, 1) == refused(errno.EAFNOSUPPORT), family
    assert run(code, numbers["socket"], audit, UNIX, 1) == (ALLOWED if has_unix else refused(errno.EAFNOSUPPORT))
    assert run(code, numbers["socketpair"], audit, UNIX, 1) == ALLOWED
    # The kernel reads a family as an int: what stands in the upper half of the register changes nothing.
    assert run(code, numbers["socket"], audit, (1 << 32) | INET, 1) == refused(errno.EAFNOSUPPORT)
    for call in ("connect", "bind"):
        assert run(code, numbers[call], audit, 3) == (ALLOWED if has_unix else refused(errno.EACCES))
    assert run(code, numbers["openat"], audit) == run(code, numbers["sendto"], audit) == ALLOWED


@pytest.mark.parametrize("name", MACHINES)
def test_nothing_goes_round_the_filter_or_into_other_processes(name: str) -> None:
    machine = MACHINES[name]
    code = program(machine, has_unix=True)
    for call in ("io_uring_setup", "io_uring_enter", "io_uring_register"):
        assert run(code, machine.numbers[call], machine.audit) == refused(errno.ENOSYS)
    for call in ("ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "bpf"):
        assert run(code, machine.numbers[call], machine.audit) == refused(errno.EPERM)
    for number in (0, 1, 9, 41, 42, 198, 203, 359, 400):  # of another architecture, i386 and the table of x32
        assert run(code, number, 0x40000003) == refused(errno.ENOSYS)
        assert run(code, number | 0x40000000, machine.audit) == refused(errno.ENOSYS)
    assert run(code, -1, machine.audit) == refused(errno.ENOSYS)


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("has_unix", [False, True])
def test_all_other_calls_are_allowed(name: str, has_unix: bool) -> None:
    machine = MACHINES[name]
    code = program(machine, has_unix=has_unix)
    ours = set(machine.numbers.values())
    others = [number for number in range(470) if number not in ours]
    assert {run(code, number, machine.audit, INET) for number in others} == {ALLOWED}
    assert run(code, machine.numbers["seccomp"], machine.audit) == ALLOWED  # a second filter can only take more away


@pytest.mark.parametrize(
    ("name", "header", "prefix"),
    [
        ("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "__NR_"),
        ("aarch64", "/usr/include/asm-generic/unistd.h", "__NR_"),
    ],
)
def test_the_numbers_are_those_of_the_kernels_headers(name: str, header: str, prefix: str) -> None:
    if not Path(header).exists():
        pytest.skip(f"{header} is not installed")
    defined = dict(re.findall(rf"#define {prefix}(\w+)\s+(\d+)", Path(header).read_text()))
    assert {call: str(number) for call, number in MACHINES[name].numbers.items()} == {
        call: defined[call] for call in MACHINES[name].numbers
    }
