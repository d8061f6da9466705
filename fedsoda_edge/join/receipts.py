"""Keep the file of all that ever left this device and of what hubs answered: one JSON line each, added at its end, mode 0600.

What is sent is noted before it leaves, so that it is listed even if no answer ever came. A line that a crash cut is left out
when the file is read. Who notes what is left to `witness.py`, whether a hub's receipt is one to `trust.py`.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Literal

import msgspec

from fedsoda_edge.errors import DiskFull, UsageProblem
from fedsoda_edge.join.trust import receipt_problem
from fedsoda_edge.ports.disk import write_durably
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.ranges import Count
from fedsoda_edge.protocol.signatures import KEY_BYTES, fingerprint, from_text

MAX_BYTES = 4 << 20  # from which on small messages are counted instead of kept; updates and answers always stay
KEPT_LINES = 2000  # of the latest, which stay whatever they are
MAX_WAITING = 1000  # lines in memory while the disk is full
_BINARY: int = getattr(os, "O_BINARY", 0)  # Windows would write another line end


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="line"):
    """The root of all lines. at: seconds since 1970 by this device's clock."""

    at: float


class HubNamed(Line, frozen=True, tag="named"):
    """A hub's answer to the Hello before it. key: the hub's public key, base64url; "": it signs nothing."""

    hub: str
    run: str
    run_name: str
    edge: str
    key: str = ""


class MessageSent(Line, frozen=True, tag="sent"):
    """A message that left, and the bytes of the update that follows it. hub: the address that it went to.

    run, run_name, edge, key: as the hub had said; "" in the first Hello, before it had.
    """

    hub: str
    message: ms.EdgeMessage
    bytes: int
    run: str = ""
    run_name: str = ""
    edge: str = ""
    key: str = ""


class FilesAsked(Line, frozen=True, tag="asked"):
    """The first request of a join for files of the bundle at this address: a hub's or a mirror's."""

    hub: str
    run: str = ""
    run_name: str = ""
    key: str = ""


class AnswerCame(Line, frozen=True, tag="answered"):
    """A hub's answer to the update sent before it."""

    run: str
    message: ms.Receipt | ms.Refusal


class LinesCounted(Line, frozen=True, tag="counted"):
    """The number of lines of each kind that this one stands for, the last of which was written at `at`."""

    lines: dict[str, int]


AnyLine = HubNamed | MessageSent | FilesAsked | AnswerCame | LinesCounted
_LINE = msgspec.json.Decoder(AnyLine)
What = Literal[
    "hello",
    "ready",
    "blob_request",
    "update",
    "decline",
    "progress",
    "paused",
    "resumed",
    "leave",
    "download",
    "counted",
]
AnswerKind = Literal["none", "verified", "unsigned", "forged", "refused"]


class ReceiptLog:
    """The file of one FEDSODA_HOME. Processes that add lines at the same time do not mix them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[bytes] = []  # what the disk did not take yet
        self._num_lost = 0

    def add(self, line: AnyLine) -> None:
        """Add a line; where the disk is full it is kept in memory and added with the next one."""
        self._waiting.append(msgspec.json.encode(line) + b"\n")
        if len(self._waiting) > MAX_WAITING:
            self._num_lost += 1
            del self._waiting[0]
        try:
            self._write(line.at, durably=isinstance(line, AnswerCame))
        except OSError as error:
            _refuse_unless_full(error, self.path)

    def add_or_raise(self, line: AnyLine) -> None:
        """Add a line that must be on disk before what it tells of leaves.

        Raises:
            DiskFull: it is not on disk.
        """
        self._waiting.append(msgspec.json.encode(line) + b"\n")
        try:
            self._write(line.at, durably=True)
        except OSError as error:
            self._waiting.pop()
            _refuse_unless_full(error, self.path)
            raise DiskFull(
                f"the disk is full, and nothing leaves that is not noted in {self.path} first; free space there; the update "
                "stays here until then"
            ) from error

    def _write(self, at: float, *, durably: bool) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lost = LinesCounted(at=at, lines={"lost on a full disk": self._num_lost})
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | _BINARY, 0o600)
        try:
            size = os.fstat(handle).st_size
            is_cut = False  # by a crash: then the next line begins on its own
            if size:
                os.lseek(handle, size - 1, os.SEEK_SET)  # what is written goes to the end all the same
                is_cut = os.read(handle, 1) != b"\n"
            data = (b"\n" if is_cut else b"") + (msgspec.json.encode(lost) + b"\n" if self._num_lost else b"")
            data += b"".join(self._waiting)
            written = os.write(handle, data)
            if written < len(data):
                os.ftruncate(handle, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if durably:
                os.fsync(handle)
        finally:
            os.close(handle)
        self._waiting.clear()
        self._num_lost = 0

    def lines(self) -> tuple[list[AnyLine], int]:
        """Return all lines, the oldest first, and how many cannot be read: cut by a crash, or of a later release."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return [], 0
        except OSError as error:
            raise UsageProblem(
                f"{self.path} cannot be read ({error.strerror}); run this as the user who joined"
            ) from error
        found, unread = list[AnyLine](), 0
        for line in data.split(b"\n"):
            try:
                found += [_LINE.decode(line)] if line else []
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                unread += 1
        return found, unread

    def shorten(self) -> None:
        """Count small old messages instead of keeping them, where the file has grown large. Call it under the home's lock."""
        try:
            if self.path.stat().st_size <= MAX_BYTES:
                return
        except FileNotFoundError:
            return
        lines, unread = self.lines()
        old, late = lines[:-KEPT_LINES], lines[-KEPT_LINES:]
        kept = [line for line in old if isinstance(line, AnswerCame) or _is_update(line)]
        gone: Counter[str] = Counter({"unread": unread} if unread else {})
        at = late[0].at if late else 0.0
        for line in old:
            if isinstance(line, LinesCounted):
                gone.update(line.lines)
            elif not isinstance(line, AnswerCame) and not _is_update(line):
                gone[_what(line)] += 1
        counted: list[AnyLine] = [LinesCounted(at=at, lines=dict(gone))] if gone else []
        text = b"".join(msgspec.json.encode(line) + b"\n" for line in (*kept, *counted, *late))
        try:
            write_durably(self.path, text, 0o600)
        except DiskFull:  # the file stays as it is
            return


def _refuse_unless_full(error: OSError, path: Path) -> None:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise UsageProblem(
            f"{path} cannot be written to ({error.strerror}), and nothing leaves that is not noted there; make it writable "
            "for the user who joins"
        ) from error


def _is_update(line: AnyLine) -> bool:
    return isinstance(line, MessageSent) and isinstance(line.message, ms.UpdateStart)


def _what(line: AnyLine) -> str:
    match line:
        case MessageSent(message=ms.UpdateStart()):
            return "update"
        case MessageSent(message=message):
            return str(message.__struct_config__.tag)
        case FilesAsked():
            return "download"
        case _:
            return str(line.__struct_config__.tag)


# --- what people are shown -------------------------------------------------------------------------------------------


class Departure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something that left this device, and what was answered.

    at: in UTC. hub: the address that it went to. hub_key: the fingerprint of the hub's key; None: not known then. said: the
    message as it left, JSON. digest, bytes: of the coded delta. answer: "verified": the hub's key signed the receipt;
    "unsigned": an older hub's receipt; "forged": a receipt whose signature does not hold; "none": sent, no receipt; None: no
    answer is due. receipt, signature: what the hub signed, and how.
    """

    at: str
    what: What
    hub: str
    hub_key: str | None
    run: str | None
    run_id: str | None
    round: Count | None
    num_examples: int | None
    loss: float | None
    bytes: Count
    digest: str | None
    said: str
    answer: AnswerKind | None
    reason: str | None
    receipt: str | None
    signature: str | None


def departures(lines: Iterable[AnyLine], run: str | None = None) -> list[Departure]:
    """Return all that left, the oldest first, each with its answer.

    Args:
        run: name or id of a run; None: all runs.
    """
    return [one for one in _departures(list(lines)) if run is None or run in (one.run, one.run_id)]


def _departures(lines: list[AnyLine]) -> Iterator[Departure]:
    for place, line in enumerate(lines):
        match line:
            case MessageSent():
                yield _sent(line, lines, place + 1)
            case FilesAsked():
                yield _departure(line.at, "download", line.hub, line.key, line.run, line.run_name)
            case LinesCounted(lines=gone):
                said = msgspec.json.encode(gone).decode()
                yield _departure(line.at, "counted", "", "", "", "", said=said)


def _sent(line: MessageSent, lines: list[AnyLine], later: int) -> Departure:
    message, run, name, key = line.message, line.run, line.run_name, line.key
    if isinstance(message, ms.Hello):  # the hub said who it is in its answer
        for next_line in islice(lines, later, None):
            if isinstance(next_line, MessageSent) and isinstance(next_line.message, ms.Hello):
                break
            if isinstance(next_line, HubNamed) and next_line.hub == line.hub:
                run, name, key = next_line.run, next_line.run_name, next_line.key
                break
    said = msgspec.json.encode(message).decode()
    if not isinstance(message, ms.UpdateStart):
        what: What = msgspec.convert(_what(line), What)
        round_number = getattr(message, "round", None)
        return _departure(line.at, what, line.hub, key, run, name, said=said, bytes=line.bytes, round=round_number)
    answer, reason, receipt = _answer(line, message, islice(lines, later, None))
    return Departure(
        at=_time(line.at),
        what="update",
        hub=line.hub,
        hub_key=_fingerprint(key),
        run=name or None,
        run_id=run or None,
        round=message.round,
        num_examples=message.num_examples,
        loss=message.loss,
        bytes=line.bytes,
        digest=message.digest,
        said=said,
        answer=answer,
        reason=reason or None,
        receipt=None if receipt is None else receipt.text,
        signature=None if receipt is None else receipt.signature,
    )


def _answer(
    line: MessageSent, message: ms.UpdateStart, later: Iterable[AnyLine]
) -> tuple[AnswerKind, str, ms.Signed | None]:
    """Find the answer to an update: the first one of its run and round before it was sent again."""
    for next_line in later:
        if isinstance(next_line, MessageSent) and next_line.run == line.run and _is_update(next_line):
            break
        if (
            not isinstance(next_line, AnswerCame)
            or next_line.run != line.run
            or next_line.message.round != message.round
        ):
            continue
        answer = next_line.message
        if isinstance(answer, ms.Refusal):
            return "refused", answer.reason, None
        if not line.key:
            return "unsigned", "", answer.signed
        why = receipt_problem(answer, message, ms.EdgeId(line.edge), line.run, from_text(line.key, KEY_BYTES))
        return ("forged", why, answer.signed) if why else ("verified", "", answer.signed)
    return "none", "", None


def _departure(
    at: float,
    what: What,
    hub: str,
    key: str,
    run: str,
    name: str,
    *,
    said: str = "",
    bytes: int = 0,
    round: int | None = None,
) -> Departure:
    return Departure(
        at=_time(at),
        what=what,
        hub=hub,
        hub_key=_fingerprint(key),
        run=name or None,
        run_id=run or None,
        round=round,
        num_examples=None,
        loss=None,
        bytes=bytes,
        digest=None,
        said=said,
        answer=None,
        reason=None,
        receipt=None,
        signature=None,
    )


def _fingerprint(key: str) -> str | None:
    return fingerprint(from_text(key, KEY_BYTES)) if key else None


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
