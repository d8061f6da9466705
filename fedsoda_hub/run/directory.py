"""What lies where in a run's directory. Every path of a run comes from here; who writes what is each room's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.ports.disk import BlobStore
from fedsoda_edge.ports.system import Held, Lock


@dataclass(frozen=True)
class RunDirectory:
    """`NAME.run` beside its RUN.toml."""

    path: Path

    @property
    def bundle(self) -> Path:
        """The manifest of each sub-LLM and all shards, once the run is prepared."""
        return self.path / "bundle"

    @property
    def manifest(self) -> Path:
        """The largest sub-LLM's manifest, as preparation left it."""
        return self.bundle / "manifest.json"

    @property
    def blobs(self) -> BlobStore:
        """Views, coded steps, updates and manifests, by digest."""
        return BlobStore(self.path / "blobs")

    @property
    def preparation(self) -> Path:
        """What the stages of preparation leave for each other."""
        return self.path / "prepare"

    @property
    def model_revision(self) -> Path:
        """The revision of the full LLM that the run began with."""
        return self.path / "model_revision.json"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.sqlite"

    @property
    def admin_token(self) -> Path:
        """The secret of whoever may ask the hub for its status; mode 0600."""
        return self.path / "admin.token"

    @property
    def address(self) -> Path:
        """The URL of the hub that serves the run, while it does."""
        return self.path / "address"

    @property
    def report(self) -> Path:
        return self.path / "report"

    def lock(self) -> Lock:
        """Take the run for this process: one live hub per run.

        Raises:
            UsageProblem: another process has it.
        """
        try:
            return Lock(self.path / "lock")
        except Held as held:
            raise UsageProblem(f"{self.path} is in use by a running hub (pid {held.pid}); stop that first") from None
