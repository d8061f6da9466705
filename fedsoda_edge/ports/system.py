"""Do what differs between Linux, macOS and Windows: locks, signals, process groups, memory readings.

Linux is tested. The branches for `win32` and `darwin` follow the documentation of those systems and were not run; WSL2
takes those of Linux. All other files are the same everywhere.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, Literal, TypedDict

from fedsoda_edge.errors import UsageProblem

if TYPE_CHECKING:
    import asyncio

STOP_SIGNALS: tuple[signal.Signals, ...] = (signal.SIGTERM,)
if sys.platform == "win32":  # a group ends there with Ctrl+Break, which a terminal that closes also says
    STOP_SIGNALS += (signal.SIGBREAK,)
else:  # a terminal or an ssh connection that ends says it
    STOP_SIGNALS += (signal.SIGHUP,)
_LOCKED_BYTE = 1 << 30  # Windows' locks keep others from reading too: the pid before it stays readable


class Lock:
    """An exclusive lock on a file, which names its holder. It ends with the process, however that ends.

    Raises:
        Held: on construction, when another process has the lock.
        UsageProblem: on construction, when the file system has no locks.
        OSError: on construction, when no file can be made there.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
        try:
            _take(file, path)
        except BaseException:
            file.close()
            raise
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self._file = file

    def release(self) -> None:
        """Let another process take the lock."""
        self._file.close()


class Held(Exception):
    """The refusal of a lock that another process has. pid: that process's number, as it wrote it."""

    def __init__(self, pid: str) -> None:
        super().__init__(pid)
        self.pid = pid


def is_locked(path: Path) -> bool:
    """Tell whether a process has the lock on this file, also where the file may only be read.

    Raises:
        UsageProblem: the file system has no locks.
        OSError: the file cannot be opened.
    """
    try:
        file = path.open("a+" if os.access(path, os.W_OK) else "r")
    except FileNotFoundError:
        return False
    with file:
        try:
            _take(file, path)
        except Held:
            return True
    return False


def _take(file: IO[str], path: Path) -> None:
    try:
        _lock(file)
    except OSError as error:
        if error.errno in _HELD_BY_ANOTHER:
            file.seek(0)
            raise Held(file.read().strip() or "unknown") from None
        raise UsageProblem(
            f"{path} cannot be locked ({error.strerror}): its file system has no locks, as a network file system may; "
            "move this directory to a local disk"
        ) from error


# What Linux, BSD and Windows answer where another process has the lock; ENOLCK and others say that there are no locks.
_HELD_BY_ANOTHER = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)


def _lock(file: IO[str]) -> None:
    if sys.platform == "win32":
        import msvcrt

        file.seek(_LOCKED_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(0, os.SEEK_END)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class ProcessGroup(TypedDict, total=False):
    """Arguments of subprocess that put a child into a group of its own: one on Windows, the other elsewhere."""

    creationflags: int
    start_new_session: bool


def group_of_its_own() -> ProcessGroup:
    """Return the arguments of subprocess for a child that the terminal's Ctrl+C does not reach."""
    if sys.platform == "win32":
        group = ProcessGroup(creationflags=subprocess.CREATE_NEW_PROCESS_GROUP)
    else:
        group = ProcessGroup(start_new_session=True)
    return group


def kill_group(pid: int) -> None:
    """Kill a process that was made with `group_of_its_own`, and all in its group, where it still is."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if sys.platform == "win32":
            os.kill(pid, signal.SIGTERM)
        else:
            os.killpg(pid, signal.SIGKILL)


def stop_signal() -> signal.Signals:
    """Return the signal that asks a process made with `group_of_its_own` to save its state and end."""
    return STOP_SIGNALS[-1] if sys.platform == "win32" else signal.SIGTERM


def on_stop(handler: Callable[[int, FrameType | None], Any]) -> None:
    """Call `handler` in the main thread when somebody asks this process to end."""
    for number in _heeded(STOP_SIGNALS):
        signal.signal(number, handler)


def _heeded(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Leave out the signals that whoever started this process had it ignore, as nohup does with SIGHUP."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def on_signal_in(loop: asyncio.AbstractEventLoop, handler: Callable[[str], None]) -> None:
    """Call `handler` with the signal's name on Ctrl+C and on the signals of `on_stop`.

    Args:
        loop: runs in the main thread; the handler is called in it.
    """
    for number in (signal.SIGINT, *_heeded(STOP_SIGNALS)):
        name = number.name
        if sys.platform == "win32":  # its loops have no add_signal_handler
            signal.signal(number, lambda *_, name=name: loop.call_soon_threadsafe(handler, name))
        else:
            loop.add_signal_handler(number, handler, name)


def was_killed(status: int) -> bool:
    """Tell whether an exit status is that of kill -9, as the out-of-memory killer sends it. Windows has no such status."""
    return status == -9


def lower_priority() -> None:
    """Give the owner's programs priority over this process, unless FEDSODA_NICE=0 (tests and measurements)."""
    if os.environ.get("FEDSODA_NICE") == "0":
        return
    if sys.platform == "win32":
        import psutil

        psutil.Process().nice(psutil.BELOW_NORMAL_PRIORITY_CLASS)
    else:
        os.nice(10)


def place_of(device_id: str, directory: Path) -> str:
    """Return a digest of this machine, its boot and a directory: another one for a copy, also for one on this machine.

    Args:
        device_id: goes into the digest, so that the parts, of which there are few, cannot be found by trying.
    """
    parts = [device_id, platform.node(), str(uuid.getnode())]
    for path in ("/etc/machine-id", "/proc/sys/kernel/random/boot_id"):
        try:
            parts.append(Path(path).read_text(encoding="ascii").strip())
        except (OSError, ValueError):  # not Linux
            parts.append("")
    try:
        found = directory.stat()
        parts.append(f"{found.st_dev}:{found.st_ino}")
    except OSError:
        parts.append(str(directory))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def descriptors_left() -> int | None:
    """Return how many files and sockets this process may still open; None: the system sets no limit."""
    left = None
    if sys.platform != "win32":
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY:
            left = max(0, soft - len(os.listdir("/proc/self/fd" if sys.platform == "linux" else "/dev/fd")))
    return left


def peak_rss_bytes() -> int:
    """Read the most memory that this process has held, in bytes."""
    if sys.platform == "linux":  # not ru_maxrss: there a child inherits it
        status = Path("/proc/self/status").read_text(encoding="ascii")
        peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    elif sys.platform == "darwin":
        import resource

        peak = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes there, KiB on Linux
    else:
        import psutil

        peak = int(psutil.Process().memory_info().peak_wset)
    return peak


def sync_directory(directory: Path) -> None:
    """Make a rename in `directory` durable. Windows cannot open directories and needs no such call."""
    if sys.platform != "win32":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def reached_by(directory: Path) -> Iterator[str]:
    """Give a directory a short name within the block, for calls that take no long ones. Only Linux has such names."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{handle}" if sys.platform == "linux" else str(directory)
    finally:
        os.close(handle)


def return_memory_at_once() -> None:
    """Let malloc map every large block and give it back when it is freed, instead of keeping holes for later.

    What a process holds is then what it uses; page faults cost some time. Only glibc has such a setting.
    """
    if sys.platform == "linux":
        import ctypes

        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            m_trim_threshold, m_mmap_threshold = -1, -3
            libc.mallopt(m_mmap_threshold, 1 << 20)
            libc.mallopt(m_trim_threshold, 32 << 20)


def linux_machine() -> str:
    """Return the name of this machine's processor family where Linux runs a Python of 64 bits; "" elsewhere."""
    return platform.machine() if sys.platform == "linux" and sys.maxsize > 1 << 32 else ""


def is_strangers_connection(port_there: int, port_here: int) -> bool:
    """Tell whether another user's process that is not root's holds the other end of a connection on this machine.

    Linux tells whose each socket is; where it does not, nobody is a stranger.

    Args:
        port_there, port_here: the ports of the other end and of this one.
    """
    if sys.platform == "linux":
        ends = f":{port_there:04X}", f":{port_here:04X}"
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            with contextlib.suppress(OSError):
                for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
                    fields = line.split()
                    if fields[1].endswith(ends[0]) and fields[2].endswith(ends[1]):
                        return int(fields[7]) not in (0, os.getuid())
    return False


def keep_memory_off_disk() -> None:
    """Let nothing that this process holds get into a core file, should it crash. Swap is left to the system."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if sys.platform == "linux":  # programs that collect core files do not heed the limit
        with contextlib.suppress(OSError):
            Path("/proc/self/coredump_filter").write_text("0", encoding="ascii")


def directories_of_libraries() -> set[Path]:
    """List the directories of the libraries that this process has loaded; none where the system does not tell."""
    found = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            path = line.split(maxsplit=5)[5:]
            if path and path[0].startswith("/") and ".so" in path[0]:
                found.add(Path(path[0]).parent)
    return found


def memory_limit_hint() -> str:
    """Return a sentence on memory that this system keeps from its programs; "" where it keeps none."""
    if "microsoft" in platform.release().lower():
        return "WSL2 sees part of the machine's memory; [wsl2] memory= in %UserProfile%\\.wslconfig gives it more"
    return ""


def service_system() -> Literal["systemd", "launchd", "schtasks", ""]:
    """Return what starts services on this system; "": nothing that is known, as in a container."""
    if sys.platform == "win32":
        return "schtasks"
    elif sys.platform == "darwin":
        return "launchd"
    else:
        return "systemd" if Path("/run/systemd/system").is_dir() else ""


def user_number() -> int:
    """Return the number of this user; -1 where users have none."""
    if sys.platform == "win32":
        return -1
    else:
        return os.getuid()


def numbers_of_user(name: str) -> tuple[int, list[int]] | None:
    """Return the number of a user and those of its groups, its own first; None: there is no such user."""
    if sys.platform == "win32":
        return None
    else:
        import pwd

        try:
            found = pwd.getpwnam(name)
        except KeyError:
            return None
        others = [number for number in os.getgrouplist(name, found.pw_gid) if number != found.pw_gid]
        return found.pw_uid, [found.pw_gid, *others]
