"""Say with which exit status a process ends on an error, and what to do about what the machine refused.

The statuses are docs/operations.md (o2-exit); those of our own errors stand on their classes.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from fedsoda_edge.errors import TEMPORARY, DiskFull, FedSODAError, OutOfMemory, WayOut

# Words of allocators, in errors that torch raises without a class of their own.
_NO_MEMORY = ("you tried to allocate", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
_MACHINE = WayOut("fix-machine", "")
_DISK = WayOut("fix-machine", "df -h")


@dataclass(frozen=True)
class RefusedByMachine:
    """A refusal of the system: the exit status of a process that ends on it, its code, and what ends it, also in words."""

    exit_status: int
    code: str
    remedy: str
    way_out: WayOut


def of_this_machine(error: OSError | MemoryError) -> RefusedByMachine:
    """Return what a refusal of the system means."""
    if isinstance(error, MemoryError) or error.errno == errno.ENOMEM:
        return RefusedByMachine(OutOfMemory.exit_status, OutOfMemory.code, "end other programs", _MACHINE)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RefusedByMachine(DiskFull.exit_status, DiskFull.code, "free some space there", _DISK)
    if isinstance(error, ConnectionError | TimeoutError):
        return RefusedByMachine(TEMPORARY, "network", "check the network", WayOut("retry", "fedsoda-edge doctor"))
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return RefusedByMachine(TEMPORARY, "too-many-files", "allow more open files with `ulimit -n`", _MACHINE)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "let this user read and write there, or name another place"
        return RefusedByMachine(2, "no-permission", remedy, _MACHINE)
    return RefusedByMachine(2, "machine", "correct this on this machine", _MACHINE)


def status_of(error: BaseException) -> int:
    """Return the exit status of a process that ends on this error."""
    from asyncio import CancelledError  # not before there is something to end: --help is quick

    match error:
        case FedSODAError():
            return error.exit_status
        case OSError() | MemoryError():
            return of_this_machine(error).exit_status
        case KeyboardInterrupt() | CancelledError():
            return 130
        case _:
            return 1


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is a lack of memory: Python's, torch's or a driver's, on any device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
