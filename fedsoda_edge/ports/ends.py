"""Say with which exit status a process ends on an error, and what to do about what the machine refused.

The statuses are docs/operations.md (o2-exit); those of our own errors stand on their classes.
"""

from __future__ import annotations

import asyncio
import errno

from fedsoda_edge.errors import DiskFull, FedSODAError, OutOfMemory

# Words of allocators, in errors that torch raises without a class of their own.
_NO_MEMORY = ("you tried to allocate", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def of_this_machine(error: OSError | MemoryError) -> tuple[int, str]:
    """Return the exit status of what the system refused, and what to do about it."""
    if isinstance(error, MemoryError):
        return OutOfMemory.exit_status, "end other programs"
    if error.errno == errno.ENOMEM:
        return OutOfMemory.exit_status, "end other programs"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull.exit_status, "free some space there"
    if isinstance(error, ConnectionError | TimeoutError):
        return 3, "check the network"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return 3, "allow more open files with `ulimit -n`"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return 2, "let this user read and write there, or name another place"
    return 2, "correct this on this machine"


def status_of(error: BaseException) -> int:
    """Return the exit status of a process that ends on this error."""
    match error:
        case FedSODAError():
            return error.exit_status
        case OSError() | MemoryError():
            return of_this_machine(error)[0]
        case KeyboardInterrupt() | asyncio.CancelledError():
            return 130
        case _:
            return 1


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is a lack of memory: Python's, torch's or a driver's, on any device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
