"""Say what went wrong, with both values, and what to do next.

    FedSODAError                     status 1  failed, do not retry
    ├── LocalError                   you, your settings, data or device
    │   ├── UsageProblem             2  wrong option or setting
    │   ├── DataProblem              2  the data cannot be used
    │   ├── HomeInUse                2  another join runs in this FEDSODA_HOME
    │   ├── DeviceTooSmall           4  this device cannot hold the model
    │   ├── DiskFull                 3  no space; retry once there is
    │   └── WorkerFailed             1  the child process that owns torch ended
    └── RemoteError                  the other side
        ├── HubUnreachable           3  which step failed: DNS, TCP, TLS, HTTP, auth
        ├── RefusedByHub             5  token, version, revoked
        ├── ProtocolMismatch         5  the two sides speak different versions
        ├── ProtocolViolation        1  the other side broke the rules of the conversation
        └── BlobCorrupt              1  a file does not have its digest

Fields live on the exception and the sentence is built from them, so that errors cross a pipe as data.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

Field = str | int | bool  # of an error, as it crosses a pipe


@dataclass
class FedSODAError(Exception):
    """The root: every error has an exit status, docs/operations.md (o2-exit), and one sentence."""

    exit_status: ClassVar[int] = 1

    def fields(self) -> dict[str, Field]:
        """Return the fields as JSON values, for a pipe or `--json`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __reduce__(self) -> Any:
        return type(self), tuple(self.fields().values())


@dataclass
class LocalError(FedSODAError):
    """You did something wrong, or this machine cannot do it."""

    message: str

    def __str__(self) -> str:
        return self.message


@dataclass
class UsageProblem(LocalError):
    exit_status: ClassVar[int] = 2


@dataclass
class DataProblem(LocalError):
    """missing: the template's name for a column that the rows do not have, where that is the problem.

    remedy: what the caller can do about that column; without one, what stands in the caller's Python.
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
    exit_status: ClassVar[int] = 2


@dataclass
class DeviceTooSmall(LocalError):
    exit_status: ClassVar[int] = 4


@dataclass
class DiskFull(LocalError):
    exit_status: ClassVar[int] = 3


@dataclass
class WorkerFailed(LocalError):
    """The worker ended or raised something that is not ours; `details` is its traceback or last words.

    was_killed: from outside, as by kill -9 or where memory ran out.
    """

    details: str = ""
    was_killed: bool = False


@dataclass
class RemoteError(FedSODAError):
    """The other side did something wrong, or cannot be reached."""

    message: str

    def __str__(self) -> str:
        return self.message


@dataclass
class HubUnreachable(RemoteError):
    """`step` is one of DNS, TCP, TLS, HTTP, auth: the first that failed."""

    exit_status: ClassVar[int] = 3

    step: str = ""


@dataclass
class RefusedByHub(RemoteError):
    exit_status: ClassVar[int] = 5


@dataclass
class ProtocolMismatch(FedSODAError):
    exit_status: ClassVar[int] = 5

    edge: int
    hub: int

    def __str__(self) -> str:
        return f"this edge speaks protocol {self.edge}, the hub needs {self.hub}; " + (
            "upgrade this device: pip install -U fedsoda" if self.edge < self.hub else "upgrade the hub"
        )


@dataclass
class ProtocolViolation(RemoteError):
    pass


@dataclass
class BlobCorrupt(RemoteError):
    pass


def by_name(name: str) -> type[FedSODAError] | None:
    """Find the class of this module with that name: errors cross pipes as {name, fields}, never as pickles."""
    found = globals().get(name)
    return found if isinstance(found, type) and issubclass(found, FedSODAError) else None
