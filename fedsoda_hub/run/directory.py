"""Name every path of a run's directory. Who writes what is each room's own matter."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path

from fedsoda_edge.errors import DiskFull, UsageProblem
from fedsoda_edge.ports.disk import BlobStore
from fedsoda_edge.ports.system import Held, Lock


@dataclass(frozen=True)
class RunDirectory:
    """The directory of a run: `NAME.run` beside its RUN.toml."""

    path: Path

    @property
    def bundle(self) -> Path:
        """The directory with the manifest of each sub-LLM and all shards, once the run is prepared."""
        return self.path / "bundle"

    @property
    def manifest(self) -> Path:
        """The file of the largest sub-LLM's manifest, as preparation left it."""
        return self.bundle / "manifest.json"

    @property
    def blobs(self) -> BlobStore:
        """The store of views, coded steps, updates and manifests, by digest."""
        return BlobStore(self.path / "blobs")

    @property
    def uploads(self) -> Path:
        """The directory of what arrives of updates, until they are whole; only while a hub serves."""
        return self.path / "uploads"

    @property
    def preparation(self) -> Path:
        """The directory of what the stages of preparation leave for each other."""
        return self.path / "prepare"

    @property
    def texts(self) -> Path:
        """The directory of what the full LLM wrote for preparation, each file named by all that it depends on."""
        return self.path / "texts"

    @property
    def model_revision(self) -> Path:
        """The file with the revision of the full LLM that the run began with."""
        return self.path / "model_revision.json"

    @property
    def ledger(self) -> Path:
        """The file of the ledger, tokens and traffic."""
        return self.path / "ledger.sqlite"

    @property
    def admin_token(self) -> Path:
        """The file with the secret of whoever may ask the hub for its status; mode 0600."""
        return self.path / "admin.token"

    @property
    def signing_key(self) -> Path:
        """The file with the key by which devices know this hub (`keys.py`); mode 0600."""
        return self.path / "hub.key"

    @property
    def tls_key(self) -> Path:
        """The file with the key of the hub's own TLS, which devices pin; mode 0600."""
        return self.path / "tls.key"

    @property
    def tls_certificate(self) -> Path:
        """The file with the certificate that the hub made for that key."""
        return self.path / "tls.pem"

    @property
    def tls_pin(self) -> Path:
        """The file with the pin of the key that the hub shows, its own or its owner's."""
        return self.path / "tls.pin"

    @property
    def webhook_secret(self) -> Path:
        """The file with the secret that signs what [notify] webhook is posted, unless the owner has one; mode 0600."""
        return self.path / "webhook.secret"

    @property
    def address(self) -> Path:
        """The file with the URL of the hub that serves the run; only while it serves."""
        return self.path / "address"

    @property
    def process(self) -> Path:
        """The file with what the process that serves or prepares the run does, or how the last one ended."""
        return self.path / "hub.json"

    @property
    def report(self) -> Path:
        """The directory of `fedsoda-hub report`, unless --to names another."""
        return self.path / "report"

    def lock(self) -> Lock:
        """Lock the run for this process: one live hub per run.

        Raises:
            UsageProblem: another process has locked it, or it cannot be locked.
            DiskFull: the disk has no space left.
        """
        try:
            return Lock(self.path / "lock")
        except Held as held:
            raise UsageProblem(f"{self.path} is in use by another hub (pid {held.pid}); stop that one first") from None
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(f"{self.path} cannot be locked: the disk is full; free some space there") from error
            raise UsageProblem(
                f"{self.path} cannot be written to ({error.strerror}); run this as the user whom it belongs to, or move "
                "the RUN.toml to a directory that you may write to"
            ) from error
