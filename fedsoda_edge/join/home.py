"""Keep this device's state in one directory, which one join uses at a time.

The files of a run are left to `run_state.py`, files of bundles to `ports/store.py`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
from platformdirs import user_data_path

from fedsoda_edge.errors import DiskFull, HomeInUse, ProtocolViolation, UsageProblem, WayOut
from fedsoda_edge.ports import installer
from fedsoda_edge.ports.disk import write_durably
from fedsoda_edge.ports.system import Held, Lock, is_locked

KEY_BYTES = 32  # AES-256
# What is in `version`: how the files lie. A release that lays them out in a way which this one cannot read adds one, and
# brings older homes forward when it locks them. The first release wrote no `version`; its files lie as in 1.
HOME_VERSION = 1
CACHE_DTYPES = ("bf16", "int8")  # the forms in which border states are kept


def default_home() -> Path:
    """Return FEDSODA_HOME, or the platform's user directory where it is not set.

    Raises:
        UsageProblem: this user has no home directory, as in a container that knows the user's number only.
    """
    wanted = os.environ.get("FEDSODA_HOME")
    try:
        home = Path(wanted).expanduser() if wanted else user_data_path("fedsoda", appauthor=False)
    except (RuntimeError, KeyError) as error:
        raise UsageProblem(f"this user has no home directory ({error}); {_NO_HOME}") from error
    if not wanted and home.parts[:1] == ("~",):
        raise UsageProblem(f"this user has no home directory; {_NO_HOME}")
    return home


_NO_HOME = "set FEDSODA_HOME to a directory that stays, in a container one on a volume"


class JoinedRun(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a joined run that `data check` needs: name, template, lengths, tokenizer files.

    max_length: ids of a sample at most. tokenizer: the path of each file by its name in a bundle. eos: as the model's
    config has it, which may list every id that ends a generation; None: it has none. vocab_size: ids that the model has an
    embedding for; None: a join of an older version did not note it.
    """

    run: str
    prompt: str
    completion: str
    max_length: int
    tokenizer: dict[str, str]
    eos: int | list[int] | None
    vocab_size: int | None = None


class HomeOfNewerRelease(UsageProblem):
    """A FEDSODA_HOME that a newer release has used, whose files this one may not understand."""

    def way_out(self) -> WayOut:
        return WayOut("fix-machine", installer.found().update)


class Home:
    """A FEDSODA_HOME: device id, files of bundles by digest, one directory for each run.

    Args:
        directory: None: FEDSODA_HOME, or the platform's user directory.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = (directory or default_home()).absolute()
        self._lock: Lock | None = None

    @property
    def store(self) -> Path:
        """The directory of the files of bundles, by digest (`ports/store.py`)."""
        return self.directory / "store"

    @property
    def runs(self) -> Path:
        """The directory of all runs, one directory each (`run_state.py`)."""
        return self.directory / "runs"

    @property
    def temporary(self) -> Path:
        """The directory of what the worker's libraries write meanwhile; a join begins with an empty one."""
        return self.directory / "tmp"

    @property
    def device_key(self) -> Path:
        """The file of the key by which hubs know this device (`identity.py`); mode 0600."""
        return self.directory / "device.key"

    @property
    def hubs(self) -> Path:
        """The directory of where hubs were reached last, by their key (`identity.py`)."""
        return self.directory / "hubs"

    @property
    def config(self) -> Path:
        """The file of options that need not be given each time (`cli/config_file.py`)."""
        return self.directory / "config.toml"

    @property
    def status(self) -> Path:
        """The file of what the join does now (`status.py`)."""
        return self.directory / "status.json"

    @property
    def control(self) -> Path:
        """The directory of requests to the running join (`control.py`)."""
        return self.directory / "control"

    @property
    def receipts(self) -> Path:
        """The file of all that ever left this device, and of what hubs answered (`receipts.py`)."""
        return self.directory / "receipts.jsonl"

    def known_hub(self, run_id: str) -> Path:
        """Return the file of what this device knows of a run's hub (`trust.py`); it may not be there yet.

        Raises:
            ProtocolViolation: the hub chose a run_id that would lead out of here.
        """
        return self._of_run(run_id) / "hub.json"

    def run(self, run_id: str) -> Path:
        """Make and return the directory of one run (`run_state.py`).

        Raises:
            ProtocolViolation: the hub chose a run_id that would lead out of here.
        """
        path = self._of_run(run_id)
        with self.usable():
            path.mkdir(parents=True, exist_ok=True)
        return path

    def _of_run(self, run_id: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", run_id):
            raise ProtocolViolation(
                f"the hub names its run {run_id[:80]!r}, which is not a safe name for a directory; join only hubs you trust"
            )
        return self.runs / run_id

    def remember_run(self, run_id: str, joined: JoinedRun) -> None:
        """Keep what `data check` needs of a run that is joined.

        Raises:
            ProtocolViolation: the hub chose a run_id that would lead out of here.
            DiskFull: nothing half-written stays.
        """
        write_durably(self.run(run_id) / "joined.json", msgspec.json.encode(joined))

    def last_joined(self) -> JoinedRun | None:
        """Return what was kept of the run joined last; None where there is none, or its tokenizer was deleted."""
        found = sorted((self.directory / "runs").glob("*/joined.json"), key=lambda path: path.stat().st_mtime)
        if not found:
            return None
        try:
            joined = msgspec.json.decode(found[-1].read_bytes(), type=JoinedRun)
        except (msgspec.DecodeError, UnicodeDecodeError):  # cut by a full disk, or of another release
            return None
        return joined if all(Path(path).exists() for path in joined.tokenizer.values()) else None

    @contextlib.contextmanager
    def usable(self) -> Iterator[None]:
        """Turn errors of the disk into sentences that name the directory and what to do."""
        try:
            yield
        except OSError as error:
            wrong = f"FEDSODA_HOME {self.directory} cannot be used: {error.strerror}; "
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(wrong + "free space there, then try again") from error
            raise UsageProblem(wrong + "set FEDSODA_HOME to a directory you may write to") from error

    def border(self, run_id: str) -> Path:
        """Return the directory of the run's border states, encrypted (`border_cache.py`)."""
        return self.run(run_id) / "border"

    def cache_key(self, *, keep: bool) -> bytes:
        """Return the key of the border states, 32 bytes.

        Args:
            keep: whether to keep the key, mode 0600, for later joins; otherwise it is new for each join, so that nobody
                reads the border states of a join that ended.

        Raises:
            UsageProblem: the key's file is damaged, or the directory cannot be used.
        """
        path = self.directory / "cache.key"
        with self.usable():
            if not keep:
                path.unlink(missing_ok=True)
                return secrets.token_bytes(KEY_BYTES)
            if not path.exists():
                write_durably(path, secrets.token_bytes(KEY_BYTES), 0o600)
            key = path.read_bytes()
        if len(key) != KEY_BYTES:
            raise UsageProblem(
                f"{path} has {len(key)} bytes, a key has {KEY_BYTES}; delete the file, so that a new key is made"
            )
        return key

    def forget_borders(self) -> int:
        """Delete the border states of every run; return the bytes freed."""
        freed = 0
        for directory in self.runs.glob("*/border"):
            freed += sum(path.stat().st_size for path in directory.iterdir())
            shutil.rmtree(directory, ignore_errors=True)
        return freed

    def make_directories(self) -> None:
        """Make the directories that a worker may use, which must be here before it starts; what is temporary goes.

        Raises:
            UsageProblem: the directory cannot be used.
        """
        with self.usable():
            shutil.rmtree(self.temporary, ignore_errors=True)
            for directory in (self.store, self.runs, self.temporary):
                directory.mkdir(parents=True, exist_ok=True)

    def device_id(self) -> str:
        """Return the id of this device, to which a token is bound; it is made once.

        Raises:
            UsageProblem: its file is damaged, or the directory cannot be used.
        """
        path = self.directory / "device_id"
        self._check_version()
        with self.usable():
            if not path.exists():
                write_durably(path, secrets.token_hex(16).encode())
            found = path.read_text(encoding="ascii", errors="replace").strip()
        if not re.fullmatch("[!-~]{1,64}", found):
            raise UsageProblem(
                f"{path} is damaged: it does not name this device; delete it, and ask the hub's owner for "
                "`fedsoda-hub token rebind`, since the token belongs to the device that it named"
            )
        return found

    def lock(self) -> None:
        """Keep other joins out of this home; the lock ends with the process, however that ends.

        Raises:
            HomeInUse: another process has the lock.
            HomeOfNewerRelease: all is left as it is.
        """
        version = self._check_version()
        with self.usable():
            try:
                self._lock = Lock(self.directory / "lock")
            except Held as held:
                raise HomeInUse(
                    f"{self.directory} is used by another join (pid {held.pid}); stop that join, or set FEDSODA_HOME "
                    "to another directory and join with another token, since a token belongs to one home"
                ) from None

        if version < HOME_VERSION:
            with self.usable():
                write_durably(self.directory / "version", f"{HOME_VERSION}\n".encode())

    def _check_version(self) -> int:
        """Return the version of the home, 0 where it has none.

        Raises:
            HomeOfNewerRelease: this release does not know it.
        """
        path = self.directory / "version"
        with self.usable():
            try:
                found = path.read_text(encoding="ascii", errors="replace").strip()
            except FileNotFoundError:
                return 0
        if not re.fullmatch("[0-9]{1,9}", found):
            raise UsageProblem(f"{path} holds {found[:40]!r} and no number; delete it if this release made the home")
        if int(found) > HOME_VERSION:
            raise HomeOfNewerRelease(
                f"FEDSODA_HOME {self.directory} was used by a newer fedsoda: its version is {found}, and this release knows "
                f"those up to {HOME_VERSION}; bring this device a newer release: {installer.found().update}"
            )
        return int(found)

    def is_in_use(self) -> bool:
        """Tell whether a join runs here. Takes the lock for a moment: only the lock shows whether a join is alive."""
        with self.usable():
            return is_locked(self.directory / "lock")

    def unlock(self) -> None:
        """Let other joins use this home; without a lock nothing happens."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
