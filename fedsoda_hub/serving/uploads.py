"""Updates between their last chunk and the machine's answer: check, store, and forget what was not accepted."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter

from fedsoda_edge.errors import ProtocolViolation
from fedsoda_edge.ports.disk import BlobStore
from fedsoda_edge.protocol.coded import check
from fedsoda_edge.protocol.manifest import TensorSpec
from fedsoda_edge.protocol.messages import Digest
from fedsoda_edge.protocol.session import Upload
from fedsoda_hub.federation.state import RunState


class Uploads:
    """What arrived and is not judged yet."""

    def __init__(self, blobs: BlobStore, codec: str) -> None:
        self._blobs = blobs
        self._codec = codec
        self._arriving: Counter[Digest] = Counter()  # uploads whose blob is written, until they are judged
        self._unkept: set[Digest] = set()  # blobs that an upload brought, until it is known that they stay

    @property
    def num_unjudged(self) -> int:
        """Uploads that were stored and not judged yet."""
        return self._arriving.total()

    async def take(self, upload: Upload, layout: tuple[TensorSpec, ...]) -> str | None:
        """Check an upload's structure and store its bytes durably; return what is wrong with it, None: nothing.

        Raises:
            DiskFull: it is not stored.
        """
        start = upload.start
        try:
            if start.codec != self._codec:
                raise ProtocolViolation(f"the update is coded as {start.codec:.40}, the run as {self._codec}")
            await asyncio.to_thread(check, upload.data, layout, self._codec)
        except ProtocolViolation as error:
            return str(error)
        if not self._blobs.has(start.digest):
            self._unkept.add(start.digest)
        self._arriving[start.digest] += 1
        try:
            await asyncio.to_thread(self._blobs.put, upload.data)
        except BaseException:
            self._arriving[start.digest] -= 1
            raise
        return None

    def judged(self, digest: Digest) -> None:
        """Note that an upload with these bytes was accepted or refused."""
        self._arriving[digest] -= 1

    def forget_refused(self, state: RunState) -> None:
        """Delete blobs that came with updates none of which was accepted. One that was there before is never touched.

        Only while no job runs: its result may have the same bytes, and until it is written down nobody knows.
        """
        kept = {update.digest for update in (*state.accepted.values(), *state.receipts.values())}
        kept |= {state.master, *state.views} | ({state.moments} if state.moments is not None else set())
        for digest in [digest for digest in self._unkept if not self._arriving[digest]]:
            self._unkept.discard(digest)
            del self._arriving[digest]
            if digest not in kept:
                with contextlib.suppress(OSError):  # it only takes space
                    self._blobs.path(digest).unlink()
