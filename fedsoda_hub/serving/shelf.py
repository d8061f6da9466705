"""Decide which bytes of the run an edge may ask for now, and where they lie: manifests, bundle files, views in force.

Sending them is `listener.py`'s and `connection.py`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

import msgspec

from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.coded import coded_bytes, of_factor
from fedsoda_edge.protocol.manifest import ADAPTER_LORA, EMULATOR_LORA, BundleManifest, TensorSpec
from fedsoda_hub.federation import records as rec
from fedsoda_hub.federation.state import LedgerState
from fedsoda_hub.run.directory import RunDirectory

DRAWS = 2  # of layers, whose bundles edges may fetch: those in force and those before them


class Shelf:
    """The bundles and views of one run. stocked: set when the run is prepared."""

    def __init__(self, directory: RunDirectory, state: LedgerState) -> None:
        self.stocked = asyncio.Event()
        self.max_update_bytes = 1
        self._bundle = directory.bundle
        self._blobs = directory.blobs
        self._state = state
        self._manifests: list[BundleManifest] = []  # in force, by size class
        self._draws: list[dict[str, Path]] = []  # files by digest, of the bundles in force and of those before them
        self._verified: set[str] = set()  # of the views in force
        self._verifying = asyncio.Lock()

    def follow(self, records: Iterable[rec.AnyRecord]) -> None:
        """Offer the files of the bundles that the records name; an edge may still fetch those that were in force before.

        Args:
            records: those that the state has just folded in.
        """
        draws = [named for record in records if (named := _manifests_of(record))]
        if not draws:
            return
        self._draws = [*self._draws, *map(self._files_of, draws[-DRAWS:])][-DRAWS:]
        self._manifests = [self._manifest(one.manifest) for one in self._state.sub_llms]
        # Names and offsets of the safetensors header: at most 256 bytes a tensor.
        self.max_update_bytes = 4096 + max(
            sum(256 + max(coded_bytes(spec.shape, codec) for codec in ("bf16", "int8")) for spec in one.lora.adapter)
            for one in self._manifests
        )
        self.stocked.set()

    def _files_of(self, manifests: tuple[ms.Digest, ...]) -> dict[str, Path]:
        """Find the files of the bundles with these manifests."""
        files: dict[str, Path] = {}
        for digest in manifests:
            files[digest] = self._blobs.path(digest)
            for file in self._manifest(digest).files:
                is_lora = file.name in (ADAPTER_LORA, EMULATOR_LORA)
                files[file.sha256] = self._blobs.path(file.sha256) if is_lora else self._bundle / file.name
        return files

    @property
    def lent_blobs(self) -> set[str]:
        """The digests of the blobs that bundles hold which may still be fetched."""
        return {
            digest for files in self._draws for digest, path in files.items() if path.parent == self._blobs.directory
        }

    def _manifest(self, digest: ms.Digest) -> BundleManifest:
        return msgspec.json.decode(self._blobs.get(digest), type=BundleManifest)

    def layout(self, size_class: int, factor: ms.Factor) -> tuple[TensorSpec, ...]:
        """Return the layout of an update of this size class in a round that trains this factor."""
        return of_factor(self._manifests[size_class].lora.adapter, factor)

    def ref(self, digest: ms.Digest) -> ms.BlobRef:
        """Name a blob of the run with its size."""
        return ms.BlobRef(digest=digest, bytes=self._blobs.path(digest).stat().st_size)

    def bundle_file(self, digest: str) -> Path | None:
        """Find a file of a bundle; None: no bundle that may be fetched has it."""
        return next((files[digest] for files in reversed(self._draws) if digest in files), None)

    @property
    def files(self) -> dict[str, Path]:
        """The path of every file of the bundles that may be fetched, by digest."""
        return {digest: path for files in self._draws for digest, path in files.items()}

    async def run_blob(self, digest: str) -> Path | None:
        """Find a view in force or the coded step to it; None: the blob is neither.

        Raises:
            BlobCorrupt: the blob is not what it was.
        """
        views = self._state.views
        if digest not in views:
            return None
        async with self._verifying:  # once for each, however many edges ask
            if digest not in self._verified:
                await asyncio.to_thread(self._blobs.verify, digest)
                self._verified = (self._verified & views) | {digest}
        return self._blobs.path(digest)


def _manifests_of(record: rec.AnyRecord) -> tuple[ms.Digest, ...]:
    if isinstance(record, rec.RunPrepared | rec.Repruned):
        return record.manifest, *(one.manifest for one in record.smaller)
    return ()
