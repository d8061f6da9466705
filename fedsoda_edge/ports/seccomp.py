"""Refuse system calls to this process for good: all that reach a network or another process's memory. Linux alone.

A filter is a program in classic BPF, seccomp(2): it loads words of (number, architecture, ip, arguments) and returns what
becomes of the call. It holds for all threads and children, and nothing takes it off. What a worker needs beside is left to
`confine.py`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

# BPF: load a word at an offset; jump if equal, or if at least, over (true, false) instructions; return.
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets; the argument's lower half, where bytes are little-endian
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_X32 = 0x40000000  # the bit in numbers of x86-64's second table, with pointers of 32 bits
_AF_UNIX = 1
_SET_MODE_FILTER, _ALL_THREADS = 1, 1
_PR_SET_NO_NEW_PRIVS = 38


@dataclass(frozen=True)
class Machine:
    """The calls of one architecture. audit: its number in a filter. numbers: of the calls, by name."""

    audit: int
    numbers: Mapping[str, int]


_NEW = {"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "pidfd_getfd": 438}  # of all machines
MACHINES: Mapping[str, Machine] = MappingProxyType(
    {
        "x86_64": Machine(
            0xC000003E,
            {
                "socket": 41,
                "connect": 42,
                "accept": 43,
                "bind": 49,
                "listen": 50,
                "socketpair": 53,
                "ptrace": 101,
                "accept4": 288,
                "process_vm_readv": 310,
                "process_vm_writev": 311,
                "seccomp": 317,
                "bpf": 321,
                **_NEW,
            },
        ),
        "aarch64": Machine(
            0xC00000B7,
            {
                "ptrace": 117,
                "socket": 198,
                "socketpair": 199,
                "bind": 200,
                "listen": 201,
                "accept": 202,
                "connect": 203,
                "accept4": 242,
                "process_vm_readv": 270,
                "process_vm_writev": 271,
                "seccomp": 277,
                "bpf": 280,
                **_NEW,
            },
        ),
    }
)
_FAMILIES = ("socket", "socketpair")  # their first argument is the kind of network
_MEETING = ("connect", "bind", "listen", "accept", "accept4")
# io_uring opens and connects sockets without a call that a filter sees. Libraries do without where it does not exist.
_AROUND = ("io_uring_setup", "io_uring_enter", "io_uring_register")
_OF_OTHERS = ("ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "bpf")


def program(machine: Machine, *, has_unix: bool) -> bytes:
    """Assemble the filter: 8 bytes an instruction.

    Args:
        has_unix: whether sockets to other processes of this machine are left, which drivers of GPUs ask for. Pairs of
            sockets, whose two ends this process holds, are always left.
    """
    code = [
        _one(_LOAD, _ARCHITECTURE),
        _one(_JUMP_EQUAL, machine.audit, 1, 0),
        _refused(errno.ENOSYS),  # a call by the table of another architecture
        _one(_LOAD, _NUMBER),
        _one(_JUMP_AT_LEAST, _X32, 0, 1),
        _refused(errno.ENOSYS),
    ]
    refusals = dict.fromkeys(_AROUND, errno.ENOSYS) | dict.fromkeys(_OF_OTHERS, errno.EPERM)
    if not has_unix:
        refusals |= dict.fromkeys(_MEETING, errno.EACCES)
    for name, number in refusals.items():
        code += [_one(_JUMP_EQUAL, machine.numbers[name], 0, 1), _refused(number)]
    for name in _FAMILIES:
        if name == "socket" and not has_unix:
            code += [_one(_JUMP_EQUAL, machine.numbers[name], 0, 1), _refused(errno.EAFNOSUPPORT)]
            continue
        code += [
            _one(_JUMP_EQUAL, machine.numbers[name], 0, 4),
            _one(_LOAD, _FIRST_ARGUMENT),
            _one(_JUMP_EQUAL, _AF_UNIX, 0, 1),
            _one(_RETURN, _ALLOW),
            _refused(errno.EAFNOSUPPORT),
        ]
    return b"".join([*code, _one(_RETURN, _ALLOW)])


def _one(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _refused(number: int) -> bytes:
    return _one(_RETURN, _ERRNO | number)


class _Program(ctypes.Structure):
    """The struct sock_fprog of linux/filter.h."""

    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def install(machine: Machine, filter_: bytes) -> None:
    """Put all threads of this process under a filter.

    Raises:
        OSError: the kernel, or a filter above this one, does not allow it.
    """
    forbid_new_rights()
    given = _Program(len(filter_) // 8, filter_)
    number = ctypes.c_long(machine.numbers["seccomp"])
    found = libc().syscall(number, _SET_MODE_FILTER, ctypes.c_ulong(_ALL_THREADS), ctypes.byref(given))
    if found < 0:
        raise failure()
    if found > 0:  # the number of a thread under another filter
        raise OSError(errno.EBUSY, f"thread {found} has a filter of its own")


def forbid_new_rights() -> None:
    """Let no program that this process starts have more rights than it, which the kernel asks for before a filter.

    Raises:
        OSError: the kernel does not know this.
    """
    if libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise failure()


def libc() -> ctypes.CDLL:
    """Return the C library, which keeps errno for `failure`."""
    return ctypes.CDLL(None, use_errno=True)


def failure() -> OSError:
    """Make the error of the C call that failed last."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
