"""Leave a process only the paths that it is given, and no signals to others: Landlock, landlock(7). Linux 5.13 and newer.

The rules hold for the thread that takes them and for all that it starts later, and nothing takes them off. They stand on
the files themselves, not on names: a file that another one replaces is another file. Which paths a worker needs is left to
`confine.py`.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable
from pathlib import Path

from fedsoda_edge.ports.seccomp import failure, forbid_new_rights, libc

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on all machines
_VERSION_FLAG, _PATH_BENEATH = 1, 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, MAKE_SYM = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 12
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
READ = READ_FILE | READ_DIR
RUN = READ | EXECUTE
WRITE = READ | WRITE_FILE | TRUNCATE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SYM | REFER
DEVICE = READ | WRITE_FILE | TRUNCATE | IOCTL_DEV
_OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
_BITS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # rights on paths that each version knows; later ones know no others here
_TCP, _TCP_SINCE = 0b11, 4  # bind and connect
_OUTSIDE, _OUTSIDE_SINCE = 0b11, 6  # sockets without a path, signals


def version() -> int:
    """Return the version of the kernel's Landlock.

    Raises:
        OSError: it has none, it is switched off, or a filter above this process refuses it.
    """
    found = int(libc().syscall(ctypes.c_long(_CREATE_RULESET), None, ctypes.c_size_t(0), _VERSION_FLAG))
    if found < 0:
        raise failure()
    return found


def restrict(rights: Iterable[tuple[Path, int]]) -> None:
    """Leave this thread, and all that it starts, these rights on these paths and what is below them, and no others.

    Args:
        rights: a path and its rights; paths that do not exist are passed over.

    Raises:
        OSError: as in `version`.
    """
    known = version()
    handled = (1 << _BITS[min(known, max(_BITS))]) - 1
    asked = struct.pack("=QQQ", handled, _TCP if known >= _TCP_SINCE else 0, _OUTSIDE if known >= _OUTSIDE_SINCE else 0)
    # An older kernel takes a longer struct whose further bytes are 0.
    rules = int(libc().syscall(ctypes.c_long(_CREATE_RULESET), asked, ctypes.c_size_t(len(asked)), 0))
    if rules < 0:
        raise failure()
    try:
        for path, allowed in rights:
            _add(rules, path, allowed & handled)
        forbid_new_rights()
        if libc().syscall(ctypes.c_long(_RESTRICT_SELF), rules, 0):
            raise failure()
    finally:
        os.close(rules)


_ONLY_A_PLACE: int = getattr(os, "O_PATH", 0) | getattr(os, "O_CLOEXEC", 0)  # Linux alone has them


def _add(rules: int, path: Path, allowed: int) -> None:
    try:
        opened = os.open(path, _ONLY_A_PLACE)
    except OSError:  # not here, or not for this user: then there is nothing to allow
        return
    try:
        if not stat.S_ISDIR(os.fstat(opened).st_mode):
            allowed &= _OF_FILES
        rule = struct.pack("=Qi", allowed, opened)
        if allowed and libc().syscall(ctypes.c_long(_ADD_RULE), rules, _PATH_BENEATH, rule, 0):
            raise failure()
    finally:
        os.close(opened)
