"""Take one check out of the product in a child of `bench_trust_artifacts`, so that its counts can be seen to fail."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


def plant(name: str) -> None:
    """Take out the check of that name."""
    {"names": _names, "panics": _panics}[name]()


def _names() -> None:
    from fedsoda_edge.ports.disk import BlobStore

    BlobStore.path = lambda self, digest: self.directory / digest  # type: ignore[method-assign]


def _panics() -> None:
    from fedsoda_edge.data import samples

    @contextlib.contextmanager
    def nothing() -> Iterator[None]:
        yield

    samples.panics_caught = nothing  # type: ignore[attr-defined]
