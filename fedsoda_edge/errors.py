"""Say what went wrong, with both values, and what to do next.

    FedSODAError                     status 1  failed, do not retry
    ├── LocalError                   you, your settings, data or device
    │   ├── UsageProblem             2  wrong option or setting
    │   │   └── AlreadyThere         2  what was to be made has been made; nothing was changed
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
        ├── ProtocolMismatch         6  no version of the protocol that both sides speak
        ├── ProtocolViolation        1  the other side broke the rules of the conversation
        └── BlobCorrupt              1  a file does not have its digest

Fields live on the exception and the sentence is built from them, so that errors cross a pipe as data. A sentence names
settings as the SDK does; how a command shows it, and with which status it exits, is left to `ports/console.py`.

Beside its sentence an error has what programs go by: a code, who can end it (`Recovery`), and the command that helps.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

Field = str | int | bool  # of an error, as it crosses a pipe
TEMPORARY = 3  # the one exit status after which trying again is sensible

# What ends an error: to try again later; to correct what was given; to change this machine, whose owner can; to ask the
# owner of the hub; nothing of these, since it is a defect of this software or of the other side's.
Recovery = Literal["retry", "fix-input", "fix-machine", "ask-owner", "defect"]
USAGE_HELP = "{command} --help"


@dataclass(frozen=True)
class WayOut:
    """The way to end an error.

    helps: the command that shows more or brings a cure; {command} stands for the one that failed; "": none does.
    """

    recovery: Recovery
    helps: str


@dataclass
class FedSODAError(Exception):
    """The root of all errors: each has an exit status and a code, docs/operations.md (o2-exit), and one sentence."""

    exit_status: ClassVar[int] = 1
    code: ClassVar[str] = "failed"

    def way_out(self) -> WayOut:
        """Return what ends the error."""
        return WayOut("defect", "{command} --debug")

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
    code: ClassVar[str] = "usage"

    def way_out(self) -> WayOut:
        return WayOut("fix-input", USAGE_HELP)


@dataclass
class AlreadyThere(UsageProblem):
    """A thing that was to be made and is there already; nothing was changed."""

    code: ClassVar[str] = "already-there"


@dataclass
class DataProblem(LocalError):
    """Data that cannot be used.

    missing: the template's name for a column that the rows lack; "" where the problem is another one.
    remedy: what the caller can do about that column; "": what a caller of the SDK can do.
    """

    exit_status: ClassVar[int] = 2
    code: ClassVar[str] = "data"

    missing: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        if not self.missing:
            return self.message
        in_python = f"rename one, or name its column: columns={{{self.missing!r}: 'COLUMN'}}"
        return f"{self.message}; {self.remedy or in_python}"

    def way_out(self) -> WayOut:
        return WayOut("fix-input", "fedsoda-edge data check")


@dataclass
class HomeInUse(LocalError):
    """A FEDSODA_HOME in which another join runs."""

    exit_status: ClassVar[int] = 2
    code: ClassVar[str] = "home-in-use"

    def way_out(self) -> WayOut:
        return WayOut("fix-machine", "fedsoda-edge status")


@dataclass
class DeviceTooSmall(LocalError):
    """A device without room for the model."""

    exit_status: ClassVar[int] = 4
    code: ClassVar[str] = "device-too-small"

    def way_out(self) -> WayOut:
        return WayOut("fix-machine", "fedsoda-edge plan")


@dataclass
class OutOfMemory(LocalError):
    """A machine whose memory, or that of its GPU, ran out in the middle of work. details: the traceback."""

    exit_status: ClassVar[int] = 4
    code: ClassVar[str] = "out-of-memory"

    details: str = ""

    def way_out(self) -> WayOut:
        return WayOut("fix-machine", "fedsoda-edge doctor")


@dataclass
class DiskFull(LocalError):
    """A disk without space. Trying again is sensible once there is some."""

    exit_status: ClassVar[int] = TEMPORARY
    code: ClassVar[str] = "disk-full"

    def way_out(self) -> WayOut:
        return WayOut("fix-machine", "df -h")


@dataclass
class WorkerFailed(LocalError):
    """The end of the child process that owns torch, or a defect in it.

    details: its traceback, or the last lines that it wrote. was_killed: whether it was killed from outside, by kill -9
    or because memory ran out.
    """

    code: ClassVar[str] = "worker-failed"

    details: str = ""
    was_killed: bool = False

    def way_out(self) -> WayOut:
        return WayOut("fix-machine" if self.was_killed else "defect", "fedsoda-edge doctor")


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
    code: ClassVar[str] = "hub-unreachable"

    step: str = ""

    def way_out(self) -> WayOut:
        return WayOut("retry", "fedsoda-edge doctor")


@dataclass
class RefusedByHub(RemoteError):
    """A refusal that trying again does not change: the token, the version, a revoked device."""

    exit_status: ClassVar[int] = 5
    code: ClassVar[str] = "refused"

    def way_out(self) -> WayOut:
        return WayOut("ask-owner", "fedsoda-edge doctor")


@dataclass
class HubNotTrusted(RemoteError):
    """Something that the hub which this device knows did not sign, or signed for another run, version or time."""

    exit_status: ClassVar[int] = 5
    code: ClassVar[str] = "hub-not-trusted"

    def way_out(self) -> WayOut:
        return WayOut("ask-owner", "fedsoda-edge doctor")


@dataclass
class ProtocolMismatch(FedSODAError):
    """Two sides without a version of the protocol that both speak: `protocol/versions.py`.

    edge, hub: the two versions, one of each, that lie nearest. remedy: the command that brings this device a newer release.
    """

    exit_status: ClassVar[int] = 6
    code: ClassVar[str] = "protocol-mismatch"

    edge: int
    hub: int
    remedy: str = ""

    def __str__(self) -> str:
        if self.edge < self.hub:
            return (
                f"this fedsoda is too old for the hub: it speaks protocol {self.edge} at most, the hub {self.hub} at least; "
                f"bring this device a newer release: {self.remedy or 'upgrade fedsoda'}"
            )
        return (
            f"the hub is too old for this fedsoda: it speaks protocol {self.hub} at most, this device {self.edge} at least; "
            "ask the hub's owner to upgrade it, or join with an older release"
        )

    def way_out(self) -> WayOut:
        return WayOut("fix-machine", self.remedy) if self.edge < self.hub else WayOut("ask-owner", "")


@dataclass
class ProtocolViolation(RemoteError):
    """A message of the other side that breaks the rules of the conversation."""

    code: ClassVar[str] = "protocol-violation"

    def way_out(self) -> WayOut:
        return WayOut("defect", "fedsoda-edge doctor")


@dataclass
class BlobCorrupt(RemoteError):
    """A file that does not have its digest, or is not what its name says."""

    code: ClassVar[str] = "blob-corrupt"

    def way_out(self) -> WayOut:
        return WayOut("ask-owner", "fedsoda-edge doctor")


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
