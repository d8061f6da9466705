"""Check and store updates between their last chunk and the machine's answer, and delete those that were not accepted.

Which update is accepted is `federation/collecting.py`'s.
"""

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
from fedsoda_hub.federation.state import LedgerState


class Uploads:
    """The updates that arrived and are not judged yet."""

    def __init__(self, blobs: BlobStore, codec: str) -> None:
        self._blobs = blobs
        self._codec = codec
        self._arriving: Counter[Digest] = Counter()  # uploads by blob, from its writing until they are judged
        self._unkept: set[Digest] = set()  # blobs that an upload brought, until it is known that they are needed

    @property
    def num_unjudged(self) -> int:
        """The number of uploads that are stored and not judged yet."""
        return self._arriving.total()

    async def take(self, upload: Upload, layout: tuple[TensorSpec, ...]) -> str | None:
        """Check an upload's structure and store its bytes durably.

        Returns:
            what is wrong with its structure, and then it is not stored; None: nothing.

        Raises:
            DiskFull: the disk has no space left; it is not stored.
        """
        start = upload.start
        try:
            if start.codec != self._codec:
                raise ProtocolViolation(
                    f"the update is coded as {start.codec}, but this run codes as {self._codec}; join again"
                )
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
        """Note that an upload of this blob was accepted or refused."""
        self._arriving[digest] -= 1

    def forget_refused(self, state: LedgerState) -> None:
        """Delete the blobs of updates that were refused. A blob that existed before is never deleted.

        Call it only while no job runs: a result may have the same bytes, which is not known until it is recorded.
        """
        kept = {update.digest for update in (*state.accepted.values(), *state.receipts.values())}
        kept |= {state.master, *state.views} | ({state.moments} if state.moments is not None else set())
        for digest in [digest for digest in self._unkept if not self._arriving[digest]]:
            self._unkept.discard(digest)
            del self._arriving[digest]
            if digest not in kept:
                with contextlib.suppress(OSError):  # a blob that stays only takes space
                    self._blobs.path(digest).unlink()
