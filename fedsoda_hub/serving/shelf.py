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


class Shelf:
    """The bundles and views of one run. stocked: set when the run is prepared."""

    def __init__(self, directory: RunDirectory, state: LedgerState) -> None:
        self.stocked = asyncio.Event()
        self.max_update_bytes = 1
        self._bundle = directory.bundle
        self._blobs = directory.blobs
        self._state = state
        self._manifests: list[BundleManifest] = []  # in force, by size class
        self._files: dict[ms.Digest, Path] = {}

    def follow(self, records: Iterable[rec.AnyRecord]) -> None:
        """Offer the files of all bundles that the records name; an edge may still fetch one that was in force before.

        Args:
            records: those that the state has just folded in.
        """
        named = [digest for record in records for digest in _manifests_of(record)]
        if not named:
            return
        for digest in named:
            self._files[digest] = self._blobs.path(digest)
            for file in self._manifest(digest).files:
                is_lora = file.name in (ADAPTER_LORA, EMULATOR_LORA)
                self._files[ms.Digest(file.sha256)] = (
                    self._blobs.path(file.sha256) if is_lora else self._bundle / file.name
                )
        self._manifests = [self._manifest(one.manifest) for one in self._state.sub_llms]
        # Names and offsets of the safetensors header: at most 256 bytes a tensor.
        self.max_update_bytes = 4096 + max(
            sum(256 + max(coded_bytes(spec.shape, codec) for codec in ("bf16", "int8")) for spec in one.lora.adapter)
            for one in self._manifests
        )
        self.stocked.set()

    def _manifest(self, digest: ms.Digest) -> BundleManifest:
        return msgspec.json.decode(self._blobs.get(digest), type=BundleManifest)

    def layout(self, size_class: int, factor: ms.Factor) -> tuple[TensorSpec, ...]:
        """Return the layout of an update of this size class in a round that trains this factor."""
        return of_factor(self._manifests[size_class].lora.adapter, factor)

    def ref(self, digest: ms.Digest) -> ms.BlobRef:
        """Name a blob of the run with its size."""
        return ms.BlobRef(digest=digest, bytes=self._blobs.path(digest).stat().st_size)

    def bundle_file(self, digest: str) -> Path | None:
        """Find a file of a bundle; None: no bundle of this run has it."""
        return self._files.get(ms.Digest(digest))

    @property
    def files(self) -> dict[ms.Digest, Path]:
        """The path of every file of the bundles, by digest."""
        return dict(self._files)

    def run_blob(self, digest: str) -> bytes | None:
        """Read a view in force or the coded step to it; None: the blob is neither."""
        return self._blobs.get(digest) if digest in self._state.views else None


def _manifests_of(record: rec.AnyRecord) -> tuple[ms.Digest, ...]:
    if isinstance(record, rec.RunPrepared | rec.Repruned):
        return record.manifest, *(one.manifest for one in record.smaller)
    return ()
