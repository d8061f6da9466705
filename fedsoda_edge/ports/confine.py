"""Let a process that reads private text give up what it has no need of: the network, and all paths but its own.

It must happen before the process starts a thread, so before it imports torch. What the system does not allow is left out
and named; training continues. How calls are refused is left to `seccomp.py`, how paths are to `landlock.py`.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec

from fedsoda_edge.ports import landlock, seccomp
from fedsoda_edge.ports.system import directories_of_libraries, keep_memory_off_disk, linux_machine
from fedsoda_edge.protocol.commands import Confinement

VARIABLE = "FEDSODA_WORKER_REACH"  # carries a Reach to the process that it is for
SWITCH = "FEDSODA_CONFINE"  # "0" leaves all as it is

# Where libraries and programs lie. Only single files of /etc: it has secrets of the machine, and may have ours.
_PROGRAMS = "/usr /lib /lib32 /lib64 /bin /sbin /opt /nix/store /gnu/store /snap /run/opengl-driver /run/current-system"
_SETTINGS = (
    "ld.so.cache ld.so.conf ld.so.conf.d ld.so.preload localtime timezone passwd group nsswitch.conf host.conf os-release "
    "alternatives machine-id mime.types ssl/openssl.cnf pki/tls/openssl.cnf crypto-policies nvidia OpenCL cuda"
)
_FACTS = "/proc /sys"
_PLAIN_DEVICES = "null zero full random urandom"
_SHARED = "/dev/shm"  # where OpenMP and drivers of GPUs note which process has what
_GPU_DEVICES = ("nvidia*", "dri", "kfd", "dxg", "nvhost*", "nvmap", "nvgpu", "accel")
# What the worker imports: an editable installation lies where sys.path does not say.
_PACKAGES = (
    "fedsoda_edge torch transformers tokenizers safetensors bitsandbytes numpy msgspec psutil pyarrow cryptography"
)


class Reach(msgspec.Struct, frozen=True, kw_only=True):
    """The paths that a process needs beside those of its programs. may_use_gpu: whether it is to train on one."""

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    may_use_gpu: bool = True

    def as_variables(self) -> dict[str, str]:
        """Return the environment that carries it."""
        return {VARIABLE: msgspec.json.encode(self).decode()}


def confine() -> Confinement:
    """Give up network and paths as the environment says, and return what is in force."""
    keep_memory_off_disk()
    if os.environ.get(SWITCH) == "0":
        return Confinement(missing=(f"{SWITCH}=0 leaves its network and its paths as they are",))
    name = linux_machine()
    if not name:
        return Confinement(missing=("this system has no means for it that a program may use: only Linux has",))
    reach = msgspec.json.decode(os.environ.get(VARIABLE, "{}"), type=Reach)
    has_gpu = reach.may_use_gpu and _wakes_gpu()
    missing = []
    network = files = ""
    try:
        _leave_only(reach, has_gpu)
        files = f"Landlock {landlock.version()}"
    except OSError as error:
        missing.append(f"it may read all files of this user: Landlock {_why(error)}")
    machine = seccomp.MACHINES.get(name)
    if machine is None:
        missing.append(f"it has the network of this user: the seccomp filter is not written for {name}")
    else:
        try:
            seccomp.install(machine, seccomp.program(machine, has_unix=has_gpu))
            network = "seccomp"
        except OSError as error:
            missing.append(f"it has the network of this user: the seccomp filter {_why(error)}")
    return Confinement(network=network, files=files, missing=tuple(missing))


def give_up_network() -> None:
    """Give up the network in a command that reads private text and asks nobody; where that cannot be had, nothing changes."""
    machine = seccomp.MACHINES.get(linux_machine())
    if machine is not None and os.environ.get(SWITCH) != "0":
        with contextlib.suppress(OSError):
            seccomp.install(machine, seccomp.program(machine, has_unix=False))


def _why(error: OSError) -> str:
    match error.errno:
        case errno.ENOSYS | errno.EINVAL:
            return "does not exist in this kernel"
        case errno.EOPNOTSUPP:
            return "is switched off in this kernel (lsm=)"
        case errno.EPERM:
            return "is refused by the container that this runs in"
    return f"fails here ({error.strerror or error})"


# --- paths -----------------------------------------------------------------------------------------------------------


def _leave_only(reach: Reach, has_gpu: bool) -> None:
    """Leave the paths of this reach, once a thread has tried that they can be used then.

    Raises:
        OSError: there is no Landlock, or the paths could not be used under it, as on file systems whose files are other
            ones each time they are opened.
    """
    landlock.version()
    for directory in reach.writes:
        with contextlib.suppress(OSError):
            os.makedirs(directory, exist_ok=True)
    rights = list(_rights(reach, has_gpu))
    wanted = [path for path in _tried(reach) if _is_usable(*path)]
    failures: list[OSError] = []

    def try_it() -> None:
        try:
            landlock.restrict(rights)  # of this thread alone
            lost = next((path for path, is_written in wanted if not _is_usable(path, is_written)), None)
            if lost is not None:
                raise OSError(errno.EACCES, f"{lost} could not be used under it")
        except OSError as error:
            failures.append(error)

    trial = threading.Thread(target=try_it)
    trial.start()
    trial.join()
    if failures:
        raise failures[0]
    landlock.restrict(rights)


def _tried(reach: Reach) -> Iterator[tuple[Path, bool]]:
    yield Path(os.__file__), False
    yield Path(__file__), False
    for path in reach.reads:
        yield Path(path), False
    for path in reach.writes:
        yield Path(path), True


_NO_WAIT: int = getattr(os, "O_NONBLOCK", 0)  # a pipe without a writer would hold the open up; Windows has none


def _is_usable(path: Path, is_written: bool) -> bool:
    """Tell whether a file can be opened, a directory listed, and a file made in it where that is wanted."""
    try:
        if not path.is_dir():
            os.close(os.open(path, os.O_RDONLY | _NO_WAIT))
            return True
        os.listdir(path)
        if is_written:
            made = path / f".trial.{os.getpid()}"
            os.close(os.open(made, os.O_WRONLY | os.O_CREAT, 0o600))
            made.unlink()
    except OSError:
        return False
    return True


def _rights(reach: Reach, has_gpu: bool) -> Iterator[tuple[Path, int]]:
    """Yield all paths that the worker has a use for, with its rights."""
    for place in {*map(Path, _PROGRAMS.split()), *_of_python(), *_named_by_variables(), *directories_of_libraries()}:
        yield place, landlock.RUN
    for name in _SETTINGS.split():
        yield Path("/etc", name), landlock.READ
    for name in _FACTS.split():
        yield Path(name), landlock.READ
    for name in _PLAIN_DEVICES.split():
        yield Path("/dev", name), landlock.DEVICE
    yield Path(_SHARED), landlock.WRITE
    for path in reach.reads:
        yield from ((one, landlock.READ) for one in _with_links(Path(path)))
    for path in reach.writes:
        yield from ((one, landlock.WRITE) for one in _with_links(Path(path)))
    if has_gpu:
        for device in _gpu_devices():
            yield device, landlock.DEVICE
        # cuInit writes the names of its threads below /proc, which only the whole of /proc stands for.
        yield Path("/proc"), landlock.READ | landlock.WRITE_FILE
        compiled = Path(os.environ.get("CUDA_CACHE_PATH") or Path.home() / ".nv/ComputeCache")
        with contextlib.suppress(OSError):  # CUDA does without a cache, at the cost of minutes
            compiled.mkdir(parents=True, exist_ok=True)
        yield compiled, landlock.WRITE


def _of_python() -> set[Path]:
    """List where Python and the packages lie, without the directory in which the command runs."""
    found = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.exec_prefix), Path(sys.executable).resolve().parent}
    here = Path.cwd()
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    found |= {Path(entry) for entry in sys.path if entry and (Path(entry) != here or entry in named)}
    for name in _PACKAGES.split():
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(name)
            found |= {Path(place) for place in (spec and spec.submodule_search_locations) or ()}
    return {path for path in found if path not in (Path.home(), Path("/"))}


def _named_by_variables() -> set[Path]:
    """List where this user's environment has libraries and programs beside the system's."""
    lists = [os.environ.get(name, "") for name in ("LD_LIBRARY_PATH", "PATH")]
    single = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH", "ROCM_PATH", "HIP_PATH", "CONDA_PREFIX")]
    preloaded = os.environ.get("LD_PRELOAD", "").replace(":", " ").split()
    entries = [entry for each in lists for entry in each.split(":")] + single + preloaded
    return {Path(entry) for entry in entries if entry.startswith("/")} - {Path.home(), Path("/")}


def _with_links(path: Path) -> Iterator[Path]:
    """Yield a path and the links that lie in it: what they lead to needs a rule of its own."""
    yield path
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        yield from (path / entry.name for entry in entries if entry.is_symlink())


# --- GPUs ------------------------------------------------------------------------------------------------------------


def _gpu_devices() -> list[Path]:
    return [path for pattern in _GPU_DEVICES for path in Path("/dev").glob(pattern)]


def _wakes_gpu() -> bool:
    """Tell whether there is a GPU, and have the driver make its devices, for which a confined process lacks the right."""
    if Path("/proc", "driver", "nvidia").exists() and not Path("/dev/nvidia-uvm").exists():
        tool = shutil.which("nvidia-modprobe")
        if tool is not None:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                subprocess.run([tool, "-c", "0", "-u"], capture_output=True, timeout=10, check=False)
    return bool(_gpu_devices())
