"""Say what went wrong, with both values, and what to do next.

    FedSODAError                     status 1  failed, do not retry
    ├── LocalError                   you, your settings, data or device
    │   ├── UsageProblem             2  wrong option or setting
    │   ├── DataProblem              2  the data cannot be used
    │   ├── HomeInUse                2  another join runs in this FEDSODA_HOME
    │   ├── DeviceTooSmall           4  this device cannot hold the model
    │   ├── OutOfMemory              4  memory ran out in the middle of work
    │   ├── DiskFull                 3  no space; retry once there is
    │   └── WorkerFailed             1  the child process that owns torch ended
    └── RemoteError                  the other side
        ├── HubUnreachable           3  which step failed: DNS, TCP, TLS, HTTP, auth
        ├── RefusedByHub             5  token, version, revoked
        ├── HubNotTrusted            5  not the hub that this device knows, or not what that hub signed
        ├── ProtocolMismatch         5  the two sides speak different versions
        ├── ProtocolViolation        1  the other side broke the rules of the conversation
        └── BlobCorrupt              1  a file does not have its digest

Fields live on the exception and the sentence is built from them, so that errors cross a pipe as data. A sentence names
settings as the SDK does; how a command shows it, and with which status it exits, is left to `ports/console.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

Field = str | int | bool  # of an error, as it crosses a pipe
TEMPORARY = 3  # the one exit status after which trying again is sensible


@dataclass
class FedSODAError(Exception):
    """The root of all errors: each has an exit status, docs/operations.md (o2-exit), and one sentence."""

    exit_status: ClassVar[int] = 1

    def fields(self) -> dict[str, Field]:
        """Return the fields as JSON values, for a pipe or `--json`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __reduce__(self) -> Any:
        return type(self), tuple(self.fields().values())


@dataclass
class LocalError(FedSODAError):
    """A mistake of the caller, or something that this machine cannot do."""

    message: str

    def __str__(self) -> str:
        return self.message


@dataclass
class UsageProblem(LocalError):
    """A wrong option or setting."""

    exit_status: ClassVar[int] = 2


@dataclass
class DataProblem(LocalError):
    """Data that cannot be used.

    missing: the template's name for a column that the rows lack; "" where the problem is another one.
    remedy: what the caller can do about that column; "": what a caller of the SDK can do.
    """

    exit_status: ClassVar[int] = 2

    missing: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        if not self.missing:
            return self.message
        in_python = f"rename one, or name its column: columns={{{self.missing!r}: 'COLUMN'}}"
        return f"{self.message}; {self.remedy or in_python}"


@dataclass
class HomeInUse(LocalError):
    """A FEDSODA_HOME in which another join runs."""

    exit_status: ClassVar[int] = 2


@dataclass
class DeviceTooSmall(LocalError):
    """A device without room for the model."""

    exit_status: ClassVar[int] = 4


@dataclass
class OutOfMemory(LocalError):
    """A machine whose memory, or that of its GPU, ran out in the middle of work. details: the traceback."""

    exit_status: ClassVar[int] = 4

    details: str = ""


@dataclass
class DiskFull(LocalError):
    """A disk without space. Trying again is sensible once there is some."""

    exit_status: ClassVar[int] = TEMPORARY


@dataclass
class WorkerFailed(LocalError):
    """The end of the child process that owns torch, or a defect in it.

    details: its traceback, or the last lines that it wrote. was_killed: whether it was killed from outside, by kill -9
    or because memory ran out.
    """

    details: str = ""
    was_killed: bool = False


@dataclass
class RemoteError(FedSODAError):
    """A mistake of the other side, or no way to reach it."""

    message: str

    def __str__(self) -> str:
        return self.message


@dataclass
class HubUnreachable(RemoteError):
    """A hub that cannot be reached. step: the first that failed of DNS, TCP, TLS, HTTP and auth."""

    exit_status: ClassVar[int] = TEMPORARY

    step: str = ""


@dataclass
class RefusedByHub(RemoteError):
    """A refusal that trying again does not change: the token, the version, a revoked device."""

    exit_status: ClassVar[int] = 5


@dataclass
class HubNotTrusted(RemoteError):
    """Something that the hub which this device knows did not sign, or signed for another run, version or time."""

    exit_status: ClassVar[int] = 5


@dataclass
class ProtocolMismatch(FedSODAError):
    """Two sides that speak different versions of the protocol."""

    exit_status: ClassVar[int] = 5

    edge: int
    hub: int

    def __str__(self) -> str:
        return f"this edge speaks protocol {self.edge}, the hub needs {self.hub}; " + (
            "upgrade this device: pip install -U fedsoda" if self.edge < self.hub else "upgrade the hub"
        )


@dataclass
class ProtocolViolation(RemoteError):
    """A message of the other side that breaks the rules of the conversation."""


@dataclass
class BlobCorrupt(RemoteError):
    """A file that does not have its digest, or is not what its name says."""


class Panicked(Exception):
    """The end of a call of a library in Rust that met what it does not expect, as an error that can be caught."""


@contextlib.contextmanager
def panics_caught() -> Iterator[None]:
    """Raise Panicked where a library in Rust panics, which Python knows as a BaseException only.

    The panic's own words are left out: they may quote the text that the library worked on.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise Panicked("a library met what it does not expect") from None


def by_name(name: str) -> type[FedSODAError] | None:
    """Find the error class of that name, None where there is none: errors cross pipes as {name, fields}, never as pickles."""
    found = globals().get(name)
    return found if isinstance(found, type) and issubclass(found, FedSODAError) else None


def lasting_statuses() -> list[int]:
    """List the exit statuses of errors that trying again does not change, as supervisors must know them."""
    kinds = [kind for kind in globals().values() if isinstance(kind, type) and issubclass(kind, FedSODAError)]
    return sorted({kind.exit_status for kind in kinds} - {TEMPORARY})
